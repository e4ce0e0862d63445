"""Decoder layers and their linears, found without names."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lora_dist.log import UserError
from lora_dist.models.architecture import decoder_layers, prunable_linears
from tests.tiny import KINDS, tiny_model

LLAMA_LIKE = [
    "self_attn.q_proj",
    "self_attn.k_proj",
    "self_attn.v_proj",
    "self_attn.o_proj",
    "mlp.gate_proj",
    "mlp.up_proj",
    "mlp.down_proj",
]
EXPECTED = {
    "gpt2": ("transformer.h", ["attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"]),
    "opt": (
        "model.decoder.layers",
        ["self_attn.k_proj", "self_attn.v_proj", "self_attn.q_proj", "self_attn.out_proj", "fc1", "fc2"],
    ),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("layers", [1, 3])
def test_linears_of_the_decoder_layers_and_no_others(kind: str, layers: int) -> None:
    model = tiny_model(kind, layers=layers)
    prefix, names = EXPECTED.get(kind, ("model.layers", LLAMA_LIKE))
    found_prefix, found_layers = decoder_layers(model)
    assert found_prefix == prefix
    assert found_layers is model.get_submodule(prefix)
    linears = prunable_linears(model)
    assert sorted(linear.name for linear in linears) == sorted(f"{prefix}.{i}.{name}" for i in range(layers) for name in names)
    assert all(model.get_submodule(linear.name) is linear.module for linear in linears)
    assert {linear.transposed for linear in linears} == {kind == "gpt2"}


def test_lists_inside_a_layer_are_not_layers() -> None:
    """Experts: a list as long as the model has layers, in each layer."""
    model = tiny_model("llama", layers=2)
    for layer in model.model.layers:
        layer.mlp.experts = nn.ModuleList([nn.Linear(32, 32) for _ in range(2)])
    assert decoder_layers(model)[0] == "model.layers"
    assert "model.layers.1.mlp.experts.0" in {linear.name for linear in prunable_linears(model)}


def test_what_is_not_recognised_names_its_class() -> None:
    class Pair(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder = nn.ModuleList([nn.Linear(2, 2)])
            self.decoder = nn.ModuleList([nn.Linear(2, 2)])

    with pytest.raises(UserError, match="model class Pair: expected one list of repeated decoder layers, found encoder, decoder"):
        decoder_layers(Pair())
    with pytest.raises(UserError, match="model class Linear: .* found none"):
        decoder_layers(nn.Linear(2, 2))
    model = tiny_model("llama", layers=3)
    model.config.num_hidden_layers = 4
    with pytest.raises(UserError, match="LlamaForCausalLM: expected one list of repeated decoder layers of length 4, found none"):
        prunable_linears(model)


def test_writing_through_the_view_writes_the_model() -> None:
    model = tiny_model("gpt2")
    linear = prunable_linears(model)[0]
    linear.weight_OI[3, :] = 7.0
    assert torch.equal(model.transformer.h[0].attn.c_attn.weight[:, 3], torch.full((32,), 7.0))
