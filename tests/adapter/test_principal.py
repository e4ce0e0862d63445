"""PiSSA on an unchanged base: against PEFT's own PiSSA, saved as an ordinary LoRA, frozen factors that stay to the bit."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model

from lora_dist.adapter import (
    adapter_tensors,
    attach_adapter,
    layer_update,
    load_adapter,
    lora_layers,
    merge_adapter,
    read_frozen_rank,
    save_adapter,
)
from lora_dist.blocks import Guard
from tests.adapter.test_peft import gpt2, llama, logits, prune, train_a_little

OPTIONS = {"r": 4, "lora_alpha": 8, "init_lora_weights": "pissa"}


def test_unmasked_it_trains_as_pefts_pissa_and_plain_peft_loads_what_is_saved(tmp_path):
    base = llama()
    weights = {name: p.clone() for name, p in base.named_parameters()}
    mine = attach_adapter(copy.deepcopy(base), None, **OPTIONS)
    theirs = get_peft_model(copy.deepcopy(base), LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM", **OPTIONS))
    assert torch.allclose(logits(mine), logits(base), atol=1e-5)
    for (_, a), (_, b) in zip(lora_layers(mine), lora_layers(theirs), strict=True):
        trained = a.lora_B["default"].weight[:, :4] @ a.lora_A["default"].weight[:4]
        torch.testing.assert_close(trained, b.lora_B["default"].weight @ b.lora_A["default"].weight, rtol=1e-3, atol=1e-4)
    mine.train(), theirs.train()
    assert train_a_little(mine, 5) == pytest.approx(train_a_little(theirs, 5), rel=1e-3)
    for name, p in mine.get_base_model().named_parameters():
        if "lora_" not in name:
            assert torch.equal(p, weights[name.replace(".base_layer", "")])
    save_adapter(mine, tmp_path, adapter_tensors(mine))
    assert read_frozen_rank(tmp_path / "adapter_model.safetensors") == 4
    again = PeftModel.from_pretrained(copy.deepcopy(base), str(tmp_path))
    assert again.peft_config["default"].r == 8 and again.peft_config["default"].peft_type == "LORA"
    torch.testing.assert_close(logits(again), logits(mine), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("make", [llama, gpt2])
@pytest.mark.parametrize(("start", "rslora"), [("pissa", False), ("pissa_niter_8", True)])
def test_masked_it_keeps_zeros_and_its_frozen_factors(make, start, rslora, tmp_path):
    base = make()
    pattern = prune(base)
    torch.manual_seed(3)
    model = attach_adapter(copy.deepcopy(base), pattern, **{**OPTIONS, "init_lora_weights": start}, use_rslora=rslora)
    assert torch.allclose(logits(model), logits(base), atol=2e-5)
    name, layer = next(lora_layers(model))
    weight = base.get_submodule(name).weight
    weight_OI = weight.T if make is gpt2 else weight
    scale = 8 / (2 if rslora else 4)
    assert layer.scaling["default"] == pytest.approx(scale)
    best = (scale * layer.lora_B["default"].weight[:, :4] @ layer.lora_A["default"].weight[:4]).detach()
    weight_OI = weight_OI.detach()
    error = torch.linalg.svdvals(weight_OI)[4:].norm()
    assert float((weight_OI - best).norm()) == pytest.approx(float(error), rel=1e-3 if start == "pissa" else 0.05)
    before = {n: t.clone() for n, t in adapter_tensors(model).items()}
    model.train()
    train_a_little(model, 5)
    for n, tensor in adapter_tensors(model).items():
        now, then = (tensor, before[n]) if "lora_A" in n else (tensor.T, before[n].T)
        assert torch.equal(now[4:], then[4:]) and not torch.equal(now[:4], then[:4])
    update = layer_update(layer)
    assert update.any() and not update[~pattern[name].expand()].any()
    save_adapter(model, tmp_path, adapter_tensors(model))
    again = load_adapter(copy.deepcopy(base), tmp_path, base_fingerprint=None, pattern=pattern)
    assert torch.equal(logits(again), logits(model))
    expected = logits(model)
    merged = merge_adapter(model)
    torch.testing.assert_close(logits(merged), expected, rtol=1e-4, atol=2e-5)
    transposed = set(pattern) if make is gpt2 else set()
    Guard(dict(merged.named_parameters()), pattern, transposed=transposed).check_pattern("after merging")


def test_ranks_beyond_a_narrow_weight_start_as_in_any_lora():
    base = llama()
    model = attach_adapter(base, None, **{**OPTIONS, "r": 80}, target_modules=["q_proj"])
    layer = next(lora_layers(model))[1]
    A, B = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    assert A.shape[0] == 160 and A[64:80].any() and not B[:, 64:80].any() and not B[:, 144:].any()
    assert layer_update(layer).abs().max() < 1e-5
