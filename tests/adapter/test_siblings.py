"""Layers with one input, computed at once: the numbers are those of each alone, and whoever is no sibling is told apart."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from lora_dist.adapter import attach_adapter
from lora_dist.adapter import siblings as siblings_module
from lora_dist.adapter.layer import BlockLoraLinear
from lora_dist.adapter.linear import Adapted, adapted_linears
from lora_dist.blocks import BlockMask, grid
from tests.adapter.test_peft import llama, prune

FORMS = ["plain", "merged", "beside", "mixed", "dropped"]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("tokens", [9, 200])
def test_several_layers_at_once_equal_each_alone(form, tokens):
    """Outputs and all gradients; of unlike widths and ranks, with and without a bias."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    x = draw(2, tokens, 48).requires_grad_()
    dropped = torch.nn.functional.dropout(x, 0.3) if form == "dropped" else None
    layers, gradients = [], []
    for i, (O, rank, scale) in enumerate([(64, 4, 0.7), (70, 3, 1.3), (16, 4, 2.0)]):
        mask = BlockMask(torch.rand(grid((O, 48), 16), generator=generator) > 0.5, (O, 48), 16)
        kept_PQ = None if form in ("plain", "dropped") or (form == "mixed" and i == 1) else mask.kept_PQ
        factors = draw(rank, 48).requires_grad_(), draw(O, rank).requires_grad_()
        merged = kept_PQ is not None and (form == "merged" or (form == "mixed" and i == 2))
        how = "merged" if merged else "beside"
        layers.append(Adapted(draw(O, 48), draw(O) if i == 1 else None, *factors, kept_PQ, 16, scale, how))
        gradients.append(draw(2, tokens, O))
    leaves = [x, *(factor for layer in layers for factor in (layer.A_RI, layer.B_OR))]
    together = adapted_linears(x, layers, dropped)
    alone = [adapted_linears(x, [layer], dropped)[0] for layer in layers]
    for one, other in zip(together, alone, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)
    found = [torch.autograd.grad(outputs, leaves, gradients, retain_graph=True) for outputs in (together, alone)]
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


def train_a_step(model):
    ids = torch.randint(0, 96, (4, 17), generator=torch.Generator().manual_seed(2))
    model(input_ids=ids, labels=ids).loss.backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("checkpointing", [True, False])
def test_a_models_siblings_are_computed_at_once(masked, checkpointing, monkeypatch):
    base = llama()
    model = attach_adapter(base, prune(base) if masked else None, r=4, lora_alpha=8)
    for module in model.modules():
        if isinstance(module, BlockLoraLinear):
            nn.init.normal_(module.lora_B["default"].weight, std=0.1)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    model.train()
    apart = copy.deepcopy(model)
    for module in apart.modules():
        if isinstance(module, BlockLoraLinear):
            module.siblings = None
    taken = []
    monkeypatch.setattr(
        siblings_module, "adapted_linears", lambda x, layers: taken.append(len(layers)) or adapted_linears(x, layers)
    )
    expected = train_a_step(apart)
    assert not taken
    found = train_a_step(model)
    assert taken == [3, 2] * 2 * (1 + checkpointing)
    assert found.keys() == expected.keys()
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-4, atol=1e-6)
    for module in model.modules():  # nothing waits to be taken, so nothing is held
        if isinstance(module, BlockLoraLinear) and module.siblings is not None:
            assert module.siblings._x is None and not module.siblings._waiting


def test_layers_with_inputs_of_their_own_are_computed_alone(monkeypatch):
    model = attach_adapter(llama(), None, r=4, lora_alpha=8)
    attention = model.base_model.model.model.layers[0].self_attn
    q, k, v = attention.q_proj, attention.k_proj, attention.v_proj
    nn.init.normal_(k.lora_B["default"].weight, std=0.1)
    x, other = torch.randn(2, 5, 64), torch.randn(2, 5, 64)

    def alone(layer, x):
        return layer.base_layer(x) + layer.update("default", x)

    q(x)
    torch.testing.assert_close(k(other), alone(k, other))  # the tensor decides, not the order
    taken = []
    monkeypatch.setattr(
        siblings_module, "adapted_linears", lambda x, layers: taken.append(len(layers)) or adapted_linears(x, layers)
    )
    for layer in (q, k, v):
        torch.testing.assert_close(layer(x), alone(layer, x))
    assert not taken  # ... and they are not tried again


def test_a_layer_called_twice_is_no_sibling():
    model = attach_adapter(llama(), None, r=4, lora_alpha=8)
    mlp = model.base_model.model.model.layers[0].mlp
    x = torch.randn(2, 5, 64)
    torch.testing.assert_close(mlp.gate_proj(x), mlp.gate_proj(x))
    torch.testing.assert_close(mlp.up_proj(x), mlp.up_proj.base_layer(x))


def test_dropout_is_each_layers_own():
    model = attach_adapter(llama(), None, r=4, lora_alpha=8, lora_dropout=0.5)
    mlp = model.base_model.model.model.layers[0].mlp
    x = torch.randn(2, 5, 64)
    model.train()
    mlp.gate_proj(x)
    assert not mlp.gate_proj.siblings._waiting
    model.eval()
    mlp.gate_proj(x)
    assert len(mlp.gate_proj.siblings._waiting) == 1
