"""DoRA, AdaLoRA and IA3 beside LoRA: equal to PEFT's own, to dense references where they are masked, and zeros kept after merging."""

from __future__ import annotations

import copy
import json
import subprocess
import sys

import pytest
import torch
from peft import AdaLoraConfig, IA3Config, LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

from lora_dist.adapter import (
    Allocation,
    adapter_tensors,
    attach_adapter,
    bias_update,
    layer_update,
    load_adapter,
    lora_layers,
    merge_adapter,
    read_adapter_config,
    save_adapter,
)
from lora_dist.blocks import BlockMask, Guard, Pattern
from lora_dist.log import UserError
from tests.adapter.test_peft import gpt2, llama, logits, prune, train_a_little

ADALORA = {"init_r": 6, "target_r": 3, "tinit": 1, "tfinal": 2, "deltaT": 1}


def options(kind: str) -> dict:
    rank = {"r": 4, "lora_alpha": 8}
    return {"adapter_type": kind, **rank, **({"adalora": ADALORA} if kind == "adalora" else {})}


def pefts_own(base, kind: str, transposed: bool):
    common = {"target_modules": "all-linear", "task_type": "CAUSAL_LM", "fan_in_fan_out": transposed}
    if kind == "ia3":
        return get_peft_model(base, IA3Config(**common, feedforward_modules=["mlp.c_proj"] if transposed else ["down_proj"]))
    if kind == "adalora":
        return get_peft_model(base, AdaLoraConfig(**common, **ADALORA, lora_alpha=8, total_step=10))
    return get_peft_model(base, LoraConfig(**common, r=4, lora_alpha=8, use_dora=kind == "dora"))


def train_with_hooks(model, allocation: Allocation | None, steps: int = 8) -> list[float]:
    """A loop as the engine's: the penalty on the loss, the allocation behind the optimizer's step."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    ids = torch.randint(0, 96, (4, 17), generator=torch.Generator().manual_seed(2))
    losses = []
    for step in range(1, steps + 1):
        optimizer.zero_grad()
        out = model.base_model.model(input_ids=ids, labels=ids).loss
        (out if allocation is None else out + allocation.penalty()).backward()
        optimizer.step()
        if allocation is not None:
            allocation.after_update(step, True)
        losses.append(out.item())
    return losses


@pytest.mark.parametrize("make", [llama, gpt2])
@pytest.mark.parametrize("kind", ["dora", "ia3"])
def test_with_every_tile_kept_it_equals_pefts_own(make, kind):
    base = make()
    full = Pattern({n: BlockMask.full(m.shape, 16) for n, m in prune(copy.deepcopy(base)).items()})
    feedforward = {"feedforward_modules": ["mlp.c_proj"]} if make is gpt2 and kind == "ia3" else {}
    torch.manual_seed(5)
    mine = attach_adapter(copy.deepcopy(base), full, **options(kind), **feedforward)
    torch.manual_seed(5)
    theirs = pefts_own(copy.deepcopy(base), kind, make is gpt2)
    assert mine.get_nb_trainable_parameters() == theirs.get_nb_trainable_parameters()
    assert torch.allclose(logits(mine), logits(base), atol=1e-5)
    mine.train(), theirs.train()
    assert train_a_little(mine, 5) == pytest.approx(train_a_little(theirs, 5), rel=1e-5)
    torch.testing.assert_close(logits(mine), logits(theirs), rtol=1e-4, atol=1e-5)
    assert adapter_tensors(mine).keys() == adapter_tensors(theirs).keys()


def test_masked_dora_equals_a_dense_reference_with_its_gradients():
    base = llama()
    pattern = prune(base)
    name = "model.layers.0.self_attn.q_proj"
    base.get_submodule(name).weight.data[:16] = 0  # rows without any weight
    kept = pattern[name].kept_PQ.clone()
    kept[0] = False
    pattern = Pattern({**pattern, name: BlockMask(kept, pattern[name].shape, 16)})
    model = attach_adapter(base, pattern, **options("dora"))
    layer = base.get_submodule(name)
    with torch.no_grad():
        layer.lora_B["default"].weight.normal_()
        layer.lora_magnitude_vector["default"].weight.mul_(1.3)
    x = torch.randn(5, 64, requires_grad=True)
    A, B, m = (
        p.detach().clone().requires_grad_()
        for p in (layer.lora_A["default"].weight, layer.lora_B["default"].weight, layer.lora_magnitude_vector["default"].weight)
    )
    V = layer.base_layer.weight + layer.scaling["default"] * pattern[name].expand() * (B @ A)
    norm = V.detach().norm(dim=1)
    W = (m / torch.where(norm > 0, norm, 1.0))[:, None] * V
    x_reference = x.detach().clone().requires_grad_()
    expected, found = x_reference @ W.T, layer(x)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    weight = torch.randn_like(found)
    (found * weight).sum().backward()
    (expected * weight).sum().backward()
    for mine, theirs in (
        (layer.lora_A["default"].weight, A), (layer.lora_B["default"].weight, B), (layer.lora_magnitude_vector["default"].weight, m),
        (x, x_reference),
    ):  # fmt: skip
        torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-4, atol=1e-4)
    assert not layer_update(layer)[~pattern[name].expand()].any()
    model.merge_adapter(safe_merge=True)
    Guard(dict(model.get_base_model().named_parameters()), pattern).check_pattern("after merging")


def test_masked_adalora_equals_a_dense_reference_with_its_gradients():
    base = llama()
    pattern = prune(base)
    attach_adapter(base, pattern, **options("adalora"), form="factorised")
    name = "model.layers.1.mlp.down_proj"
    layer = base.get_submodule(name)
    with torch.no_grad():
        layer.lora_E["default"].normal_()
    A, E, B = (p["default"].detach().clone().requires_grad_() for p in (layer.lora_A, layer.lora_E, layer.lora_B))
    delta = pattern[name].expand() * (B @ (A * E)) * 8 / (6 + 1e-5)
    x = torch.randn(5, 104)
    expected, found = x @ (layer.base_layer.weight + delta).T, layer(x)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    found.square().sum().backward()
    expected.square().sum().backward()
    for mine, theirs in ((layer.lora_A, A), (layer.lora_E, E), (layer.lora_B, B)):
        torch.testing.assert_close(mine["default"].grad, theirs.grad, rtol=1e-3, atol=1e-4)


def test_adalora_trains_as_peft_does():
    """Losses, ranks and weights of PEFT's own loop: its model's loss with the penalty, its update_and_allocate behind each step."""
    base = llama()
    torch.manual_seed(5)
    theirs = pefts_own(copy.deepcopy(base), "adalora", False)
    optimizer = torch.optim.AdamW([p for p in theirs.parameters() if p.requires_grad], lr=1e-2)
    ids = torch.randint(0, 96, (4, 17), generator=torch.Generator().manual_seed(2))
    theirs.train()
    for step in range(1, 11):
        optimizer.zero_grad()
        theirs(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        theirs.base_model.update_and_allocate(step)
    full = Pattern({n: BlockMask.full(m.shape, 16) for n, m in prune(copy.deepcopy(base)).items()})
    for pattern in (None, full):
        torch.manual_seed(5)
        mine = attach_adapter(copy.deepcopy(base), pattern, **options("adalora")).train()
        allocation = Allocation(mine, 10)
        train_with_hooks(mine, allocation, 10)
        assert sum(allocation.ranks.values()) == 3 * 14 and len(set(allocation.ranks.values())) > 1
        torch.testing.assert_close(logits(mine), logits(theirs), rtol=1e-4, atol=1e-4)


def test_adalora_killed_and_resumed_is_bit_identical():
    base = llama()
    pattern = prune(base)

    def fresh():
        torch.manual_seed(5)
        model = attach_adapter(copy.deepcopy(base), pattern, **options("adalora")).train()
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        return model, optimizer, Allocation(model, 10)

    def go(parts, steps):
        model, optimizer, allocation = parts
        ids = torch.randint(0, 96, (4, 17), generator=torch.Generator().manual_seed(2))
        for step in steps:
            optimizer.zero_grad()
            (model.base_model.model(input_ids=ids, labels=ids).loss + allocation.penalty()).backward()
            optimizer.step()
            allocation.after_update(step, True)

    whole = fresh()
    go(whole, range(1, 11))
    for stop in (5, 9):  # while the ranks are reduced, and behind it
        first, second = fresh(), fresh()
        go(first, range(1, stop + 1))
        second[0].load_state_dict(first[0].state_dict())
        second[1].load_state_dict(first[1].state_dict())
        second[2].load(first[2].tensors())
        go(second, range(stop + 1, 11))
        a, b = adapter_tensors(whole[0]), adapter_tensors(second[0])
        assert all(torch.equal(a[k], b[k]) for k in a)
        assert second[2].ranks == whole[2].ranks


@pytest.mark.parametrize("make", [llama, gpt2])
@pytest.mark.parametrize("kind", ["lora", "dora", "adalora", "ia3"])
def test_merged_weights_keep_every_zero_and_the_logits(make, kind, tmp_path):
    base = make()
    pattern = prune(base)
    feedforward = {"feedforward_modules": ["mlp.c_proj"]} if make is gpt2 and kind == "ia3" else {}
    model = attach_adapter(copy.deepcopy(base), pattern, **options(kind), **feedforward, base_fingerprint="a" * 64)
    train_with_hooks(model, Allocation(model, 8) if kind == "adalora" else None)
    before = logits(model)
    save_adapter(model, tmp_path, adapter_tensors(model))
    again = load_adapter(copy.deepcopy(base), tmp_path, base_fingerprint="a" * 64, pattern=pattern)
    assert torch.equal(logits(again), before)
    changes = {name: layer_update(layer) for name, layer in lora_layers(model)}
    biases = {name: update for name, layer in lora_layers(model) if (update := bias_update(layer)) is not None}
    merged = merge_adapter(model)
    torch.testing.assert_close(logits(merged), before, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(before, logits(base), atol=1e-3)
    transposed = set(pattern) if make is gpt2 else set()
    Guard(dict(merged.named_parameters()), pattern, transposed=transposed).check_pattern("after merging")
    for name, change in changes.items():  # what `merge --strategy fsdp2` adds shard by shard
        weight, now = base.get_submodule(name).weight.data, merged.get_submodule(name).weight.data
        torch.testing.assert_close(weight + (change.T if transposed else change), now, rtol=1e-4, atol=1e-6)
        if name in biases:
            torch.testing.assert_close(base.get_submodule(name).bias + biases[name], merged.get_submodule(name).bias)


PLAIN_PEFT = """
import sys, torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import LlamaForCausalLM
model = PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(sys.argv[1]), sys.argv[2]).eval()
with torch.no_grad():
    before = model(input_ids=load_file(sys.argv[3])["ids"]).logits
    merged = model.merge_and_unload(safe_merge=True)(input_ids=load_file(sys.argv[3])["ids"]).logits
save_file({"adapter": before, "merged": merged}, sys.argv[4])
assert "lora_dist" not in sys.modules
"""


def test_plain_peft_loads_every_unmasked_type_with_equal_logits(tmp_path):
    base = llama()
    base.save_pretrained(tmp_path / "base")
    ids = torch.randint(0, 96, (2, 15), generator=torch.Generator().manual_seed(3))
    save_file({"ids": ids}, tmp_path / "ids")
    code = ""
    for kind in ("lora", "dora", "adalora", "ia3"):
        model = attach_adapter(copy.deepcopy(base), None, **options(kind))
        train_with_hooks(model, Allocation(model, 8) if kind == "adalora" else None)
        save_adapter(model, tmp_path / kind, adapter_tensors(model))
        save_file({"logits": logits(model)}, tmp_path / f"{kind}.mine")
        paths = [str(tmp_path / name) for name in ("base", kind, "ids", f"{kind}.out")]
        code += f"sys.argv[1:] = {paths!r}\n" + PLAIN_PEFT.split("import sys, torch")[1]
    subprocess.run([sys.executable, "-c", "import sys, torch\n" + code], check=True, cwd=tmp_path)
    for kind, peft_type in (("lora", "LORA"), ("dora", "LORA"), ("adalora", "ADALORA"), ("ia3", "IA3")):
        assert json.loads((tmp_path / kind / "adapter_config.json").read_text())["peft_type"] == peft_type
        mine, theirs = load_file(tmp_path / f"{kind}.mine")["logits"], load_file(tmp_path / f"{kind}.out")
        torch.testing.assert_close(theirs["adapter"], mine, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(theirs["merged"], mine, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind,peft_type", [("dora", "BLOCK_LORA"), ("adalora", "BLOCK_ADALORA")])
def test_masked_types_load_through_peft_once_lora_dist_is_imported(kind, peft_type, tmp_path):
    base = llama()
    pattern = prune(base)
    model = attach_adapter(copy.deepcopy(base), pattern, **options(kind))
    train_a_little(model)
    save_adapter(model, tmp_path, adapter_tensors(model))
    assert read_adapter_config(tmp_path).peft_type == peft_type
    assert torch.equal(logits(PeftModel.from_pretrained(base, str(tmp_path))), logits(model))


def test_unmasked_dora_on_rows_of_zeros_is_refused():
    base = llama()
    base.model.layers[0].mlp.up_proj.weight.data[3] = 0
    with pytest.raises(UserError, match=r"row 3 of model.layers.0.mlp.up_proj is all zeros"):
        attach_adapter(base, None, **options("dora"))


def test_ranks_need_steps_to_be_reduced_in():
    model = attach_adapter(llama(), None, **options("adalora"))
    with pytest.raises(UserError, match=r"adapter.tinit, adapter.tfinal: found 1 and 2 in a run of 3 steps"):
        Allocation(model, 3)
