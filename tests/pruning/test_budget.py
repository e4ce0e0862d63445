"""Budgets across matrices: damages against whole forwards of the model, and the sharing out of tiles."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor

from lora_dist.pruning import PruneSettings, Sensitivity, budgets, capture, prune_layers, sensitivities, tile_scores
from lora_dist.pruning import budget as budgeting
from tests.tiny import tiny_model, tiny_windows

BLOCK = 8
WINDOWS = tiny_windows(count=6)


def _last_hidden(model: torch.nn.Module) -> Tensor:
    seen: list[Tensor] = []
    hook = model.model.layers[-1].register_forward_hook(
        lambda _m, _args, out: seen.append(out if isinstance(out, Tensor) else out[0])
    )
    with torch.no_grad():
        model(WINDOWS)
    hook.remove()
    return seen[0].double()


def test_damages_are_those_of_whole_forwards_and_nothing_is_changed() -> None:
    model = tiny_model()
    before = copy.deepcopy(model.state_dict())
    layers = model.model.layers
    captured = capture(model, layers, WINDOWS)
    found = sensitivities(layers, "model.layers", captured, sparsity=0.25, block=BLOCK)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert len(found) == 14
    plain = _last_hidden(model)
    for name in ("model.layers.0.self_attn.k_proj", "model.layers.0.mlp.down_proj", "model.layers.1.self_attn.o_proj"):
        inputs: list[Tensor] = []
        linear = model.get_submodule(name)
        hook = linear.register_forward_hook(lambda _m, args, _out, inputs=inputs: inputs.append(args[0].flatten(0, -2)))
        _last_hidden(model)
        hook.remove()
        energies_PQ = tile_scores(linear.weight, BLOCK, inputs[0].norm(dim=0), squared=True)
        torch.testing.assert_close(found[name].energies_N, energies_PQ.flatten(), rtol=1e-4, atol=1e-6)
        weight = linear.weight.clone()
        for tile in energies_PQ.flatten().argsort()[: energies_PQ.numel() // 4].tolist():
            p, q = divmod(tile, energies_PQ.shape[1])
            linear.weight.data[p * BLOCK : (p + 1) * BLOCK, q * BLOCK : (q + 1) * BLOCK] = 0
        off = (_last_hidden(model) - plain).square().sum(-1) / plain.square().sum(-1)
        linear.weight.data.copy_(weight)
        assert found[name].damage == pytest.approx(float(off.mean()), rel=1e-3)


def test_the_cheapest_tiles_of_all_matrices_go(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(budgeting, "LEAST_KEPT", 0.3)
    found = {
        "a": Sensitivity(torch.tensor([4.0, 1.0, 3.0, 2.0]), damage=3.0, lost=3.0),  # costs 1 each of energy
        "b": Sensitivity(torch.tensor([10.0, 20.0, 30.0, 40.0]), damage=3.0, lost=300.0),  # 0.1, 0.2, 0.3, 0.4
    }
    assert budgets(found, 0.125) == {"a": 0, "b": 1}
    # at 50% each keeps at least 0.15 of its tiles, which is one
    assert budgets(found, 0.5) == {"a": 1, "b": 3}
    assert budgets(found, 0.0) == {"a": 0, "b": 0}
    assert sum(budgets(found, 0.7).values()) == 5


def test_matrices_that_do_not_matter_lose_most_and_the_whole_keeps_its_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(budgeting, "LEAST_KEPT", 0.3)
    model = tiny_model()
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight.mul_(1e-3)  # so gate and up hardly matter
    layers = model.model.layers
    settings = PruneSettings(0.5, BLOCK, select="global")
    masks = prune_layers(layers, "model.layers", settings, capture(model, layers, WINDOWS)).masks
    shares = {name: 1 - mask.kept_elements() / (mask.shape[0] * mask.shape[1]) for name, mask in masks.items()}
    assert shares["model.layers.0.mlp.gate_proj"] == shares["model.layers.0.mlp.up_proj"] == 0.85
    assert shares["model.layers.0.mlp.gate_proj"] > shares["model.layers.1.mlp.gate_proj"]
    tiles = sum(mask.kept_PQ.numel() for mask in masks.values())
    assert sum(int((~mask.kept_PQ).sum()) for mask in masks.values()) == tiles // 2
    assert min(shares.values()) < 0.45
