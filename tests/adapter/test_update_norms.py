"""Norms of updates from the factors alone, against those of the updates themselves."""

from __future__ import annotations

import pytest
import torch

from lora_dist.adapter import attach_adapter, layer_update, lora_layers, update_norms
from lora_dist.blocks import BlockMask, Pattern, grid
from lora_dist.models.architecture import prunable_linears
from tests.tiny import tiny_model


@pytest.mark.parametrize("masked", [True, False])
def test_norms_are_those_of_the_updates(masked):
    model = tiny_model("llama", vocab_size=64)
    generator = torch.Generator().manual_seed(3)
    masks = {}
    for linear in prunable_linears(model):
        shape = (linear.weight_OI.shape[0], linear.weight_OI.shape[1])
        masks[linear.name] = BlockMask(torch.rand(grid(shape, 24), generator=generator) > 0.5, shape, 24)  # edge tiles are cut
    peft = attach_adapter(model, Pattern(masks) if masked else None, r=4, lora_alpha=12, target_modules=["all-linear"])
    for parameter in peft.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, generator=generator)
    trained = {name: p.detach().cpu() for name, p in peft.named_parameters() if p.requires_grad}
    norms = update_norms(peft, trained)
    assert norms.keys() == {name for name, _ in lora_layers(peft)} and norms
    for name, layer in lora_layers(peft):
        assert norms[name] == pytest.approx(float(layer_update(layer).norm()), rel=1e-5)
    assert update_norms(peft, {}) == {}
