"""What is trained whole beside an adapter, against plain torch; found by name, saved, loaded, merged."""

from __future__ import annotations

import copy

import pytest
import torch

from lora_dist.adapter import (
    adapter_tensors,
    attach_adapter,
    count_parameters,
    load_adapter,
    lora_layers,
    merge_adapter,
    save_adapter,
    whole_layers,
)
from lora_dist.blocks import Pattern
from lora_dist.log import UserError
from tests.adapter.test_sparse import RATES, Masked, loss_of, make_pattern, tokens
from tests.tiny import tiny_model

SPARSE = {"adapter_type": "sparse_full"}


def attached(kind: str, dtype=torch.float64, **changes):
    base = tiny_model(kind, dtype=torch.float32).to(dtype)
    pattern = make_pattern(base)
    reference = copy.deepcopy(base)
    model = attach_adapter(base, pattern, r=4, lora_alpha=8, **changes)
    if dtype == torch.float64:
        model.double()
    return model, reference, pattern


@pytest.mark.parametrize(
    "kind,modules,bias",
    [
        ("llama", ["all-norm", "embed_tokens", "lm_head"], "none"),
        ("gpt2", ["ln_1", "wte"], "all"),  # head tied to the embedding, biases everywhere
        ("opt", [], "lora_only"),
    ],
)
def test_beside_the_kept_weights_equals_plain_torch(kind, modules, bias):
    model, base, pattern = attached(kind, **SPARSE, whole_modules=modules, bias=bias)
    reference = Masked(base, pattern)
    found = {f"{name}.{key}" for name, layer in whole_layers(model) for key in layer.deltas()}
    trained = [p for name, p in reference.model.named_parameters() if name in found]
    assert len(trained) == len(found) and {"llama": 7, "gpt2": 16, "opt": 12}[kind] == len(found)
    for p in trained:
        p.requires_grad_(True)
    reference.weights += trained
    reference.optimizer.add_param_group({"params": trained})
    mine = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(mine, lr=0.0, weight_decay=0.0, betas=(0.9, 0.95), eps=1e-8)
    for rate, ids in zip(RATES, tokens(), strict=True):
        optimizer.zero_grad()
        loss = loss_of(model, ids)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(mine, 0.5)
        optimizer.param_groups[0]["lr"] = rate
        optimizer.step()
        for group in reference.optimizer.param_groups:
            group["lr"] = rate
        expected, _ = reference.step(ids, rate)
        assert float(loss.detach()) == pytest.approx(expected, rel=1e-10)
    kept = sum(int(mask.sum()) for mask in reference.masks)
    assert count_parameters(model)[0] == kept + sum(p.numel() for p in trained)
    expected_state = reference.model.state_dict()
    merged = merge_adapter(model).state_dict()
    assert merged.keys() == expected_state.keys()
    assert all(torch.allclose(merged[k], expected_state[k], rtol=1e-9, atol=1e-12) for k in merged)


@pytest.mark.parametrize("kind", ["lora", "dora", "adalora", "sparse_full"])
def test_saved_loaded_and_merged_with_every_masked_type(kind, tmp_path):
    adalora = {"adalora": {"target_r": 2, "init_r": 4}} if kind == "adalora" else {}
    model, base, pattern = attached(
        "qwen2", torch.float32, adapter_type=kind, whole_modules=["norm", "embed_tokens"], bias="all", **adalora
    )
    assert type(model.peft_config["default"]).__name__ in ("BlockLoraConfig", "BlockAdaLoraConfig", "SparseFullConfig")
    torch.manual_seed(0)
    for p in model.parameters():
        if p.requires_grad:
            p.data += 0.02 * torch.randn_like(p)
    model.eval()
    ids = tokens()[0]
    out = model(input_ids=ids).logits
    assert not torch.allclose(out, base(input_ids=ids).logits, atol=1e-2)
    with model.disable_adapter():
        assert torch.equal(model(input_ids=ids).logits, base(input_ids=ids).logits)
    save_adapter(model, tmp_path, adapter_tensors(model), pattern=pattern)
    again = load_adapter(base, tmp_path, base_fingerprint=None, pattern=pattern)
    again.eval()
    assert torch.equal(again(input_ids=ids).logits, out)
    assert not any(p.requires_grad for name, p in again.named_parameters() if "lora_whole" in name)
    merged = merge_adapter(again)
    torch.testing.assert_close(merged(input_ids=ids).logits, out, rtol=1e-4, atol=1e-5)
    assert all(not merged.get_submodule(name).weight[~mask.expand()].any() for name, mask in pattern.items())


def test_16_bits_lose_no_small_update_of_a_norm():
    model, base, _ = attached("llama", torch.bfloat16, **SPARSE, whole_modules=["all-norm"])
    norm = dict(whole_layers(model))["model.norm"]
    for _ in range(1000):
        norm.lora_whole_weight["default"].data += 1e-4
    assert norm.value("weight").dtype == torch.bfloat16
    assert torch.equal(norm.value("weight"), (base.model.norm.weight.float() + 0.1).bfloat16())


@pytest.mark.parametrize(
    "modules,bias,words",
    [
        (["embed"], "none", "adapter.modules_to_save: embed match no module of this model"),
        (["mlp"], "none", "gate_proj carries the adapter already"),
        ([], "all", "adapter.bias: found all, but there are no such biases in this model"),
    ],
)
def test_what_cannot_be_trained_whole_is_named(modules, bias, words):
    with pytest.raises(UserError, match=words):
        attached("llama", whole_modules=modules, bias=bias)


def test_what_is_pruned_is_not_trained_whole_and_a_plain_adapter_trains_nothing_beside():
    with pytest.raises(UserError, match=r"down_proj is pruned, and what is trained whole keeps no zeros"):
        attached("llama", target_modules=["q_proj"], whole_modules=["down_proj"])
    with pytest.raises(UserError, match="found with an adapter that respects no pattern"):
        attach_adapter(tiny_model("llama"), None, r=4, lora_alpha=8, whole_modules=["norm"])
    model, _, _ = attached("llama")
    assert not list(whole_layers(model)) and len(list(lora_layers(model))) == 14
    assert isinstance(model.peft_config["default"].pattern, Pattern)
