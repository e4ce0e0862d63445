"""Wanda's calibration of encoders: what each linear sees, layer by layer, is what it sees in the whole model."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForMaskedLM

from lora_dist.blocks import find_linears
from lora_dist.log import UserError
from lora_dist.models.architecture import decoder_layers
from lora_dist.pruning import capture
from tests.classes import SIZES


def _encoder(kind: str) -> Any:
    torch.manual_seed(0)
    model = AutoModelForMaskedLM.from_config(AutoConfig.for_model(kind, vocab_size=40, **SIZES)).eval()
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.3)
    return model


@pytest.mark.parametrize("kind", ["bert", "roberta", "distilbert", "electra", "modernbert"])
def test_input_norms_of_an_encoders_linears_are_those_of_the_whole_model(kind):
    model = _encoder(kind)
    windows_NL = torch.randint(5, 40, (6, 24))
    prefix, layers = decoder_layers(model)
    seen: dict[str, torch.Tensor] = {}
    handles = []
    for i, layer in enumerate(layers):
        for linear in find_linears(layer, f"{prefix}.{i}"):

            def note(_module, args, name=linear.name):
                seen[name] = args[0].detach().flatten(0, -2).norm(dim=0)

            handles.append(linear.module.register_forward_pre_hook(note))
    with torch.no_grad():
        model(input_ids=windows_NL)
    for handle in handles:
        handle.remove()
    calibration = capture(model, layers, windows_NL)
    for i, layer in enumerate(layers):
        norms = calibration.norms(i, layer, find_linears(layer, f"{prefix}.{i}"))
        for name, norm_I in norms.items():
            torch.testing.assert_close(norm_I, seen.pop(name), rtol=1e-4, atol=1e-5)
        calibration.advance(i, layer)
    assert not seen


def test_an_encoder_whose_layers_return_more_is_refused():
    model = _encoder("deberta-v2")
    with pytest.raises(UserError, match="score: found wanda, but DebertaV2ForMaskedLM cannot be calibrated layer by layer"):
        capture(model, decoder_layers(model)[1], torch.randint(5, 40, (2, 8)))
