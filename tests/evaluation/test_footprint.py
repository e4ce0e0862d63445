"""Weights, zeros and peak memory."""

from __future__ import annotations

import sys

import pytest
import torch
from torch import nn

from lora_dist.adapter import attach_adapter
from lora_dist.evaluation.footprint import PeakMemory, count_zeros, densely_adapted, held_bytes, weight_bytes
from lora_dist.models.architecture import prunable_linears
from tests.tiny import tiny_model


def test_bytes_of_weights_and_of_those_that_are_not_zero():
    weight = nn.Parameter(torch.tensor([[1.0, 0.0], [0.0, 2.0]]))
    half = nn.Parameter(torch.tensor([0.0, 1.0, 1.0], dtype=torch.bfloat16))
    found = weight_bytes([weight, half])
    assert (found.parameters, found.total, found.nonzero) == (7, 4 * 4 + 3 * 2, 2 * 4 + 2 * 2)


def test_zeros_and_tiles_of_the_weights_as_they_are_used():
    model = tiny_model()
    linears = prunable_linears(model)
    elements = sum(linear.weight_OI.numel() for linear in linears)
    assert count_zeros(linears, 16).zero_weights == 0
    first = linears[0].weight_OI
    first[:16, :16] = 0
    first[20, 20] = 0
    found = count_zeros(linears, 16)
    assert (found.weights, found.zero_weights, found.zero_tiles) == (elements, 257, 1)
    assert found.tiles == sum(-(-o // 16) * -(-i // 16) for o, i in (linear.weight_OI.shape for linear in linears))
    assert found.share == pytest.approx(257 / elements) and found.tile_share == pytest.approx(1 / found.tiles)
    # A dense update on that linear leaves nothing zero there.
    adapted = attach_adapter(
        model, None, r=2, lora_alpha=4, lora_dropout=0.0, target_modules=["q_proj"], use_rslora=False, form="auto"
    )
    dense = densely_adapted(adapted, linears)
    assert dense == {linear.name for linear in linears if linear.name.endswith("q_proj")}
    assert linears[0].name in dense and count_zeros(linears, 16, dense).zero_weights == 0


@pytest.mark.skipif(sys.platform != "linux", reason="sampled from /proc")
def test_the_peak_is_seen_even_when_it_is_over():
    before = held_bytes()
    with PeakMemory(torch.device("cpu"), before) as peak:
        held = torch.ones(96 << 18)  # 96 MiB
        for _ in range(20):
            held.mul_(1.0)
        del held
    assert peak.peak_bytes is not None and 90 << 20 < peak.peak_bytes < 200 << 20
    with PeakMemory(torch.device("cpu"), held_bytes()) as peak:
        pass
    assert peak.peak_bytes is not None and peak.peak_bytes < 20 << 20
