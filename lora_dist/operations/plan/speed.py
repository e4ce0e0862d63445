"""How long a step takes: its floating-point operations at a rate, its traffic at a bandwidth. Rates are given, or measured here.

A frozen weight costs 2 operations a token forward and 2 backward (no gradient of its own), and 2 more where its layer is computed
again: 4N, or 6N with checkpointing. Called by `choice.py`.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from lora_dist.operations.plan.memory import Layout
from lora_dist.operations.plan.rehearse import Shapes
from lora_dist.operations.plan.traffic import Traffic

SLOWER = {"fp32": 16.0, "nf4": 1.3, "int8": 1.6}
"""time of the same products over that in bf16, where only a bf16 rate is given: a GPU without TF32, and the cost of making the weights anew"""
_HOST_BANDWIDTH = 25e9
_TIMED = 3


@dataclass(frozen=True)
class Rates:
    """What the hardware does, a rank."""

    flops: float
    """operations a second that products in bf16 (or fp16) reach"""
    bandwidth: float
    """bytes a second between ranks"""
    flops_fp32: float | None = None
    """None: `SLOWER` says"""

    def of(self, precision: str) -> float:
        if precision == "fp32" and self.flops_fp32 is not None:
            return self.flops_fp32
        return self.flops / SLOWER.get(precision, 1.0)


def flops_a_token(shapes: Shapes, length: int, *, checkpointing: float) -> float:
    """Operations of forward and backward pass a token; attention counted with its mask, half of the T x T.

    Args:
        checkpointing: share of the layers that is computed again.
    """
    attention = 2.0 * length * shapes.head_width * shapes.layers
    adapter = float(sum(p.elements for p in shapes.trainable))
    layers = 2.0 * (shapes.layer_products + adapter) + attention
    head = 2.0 * shapes.head_products
    again = layers * checkpointing
    # Backward: gradients of inputs cost what the forward pass does, attention's twice that, the adapter's own once more.
    return layers + head + again + layers + attention + head + 2.0 * adapter


def step_time_s(
    shapes: Shapes,
    layout: Layout,
    precision: str,
    sent: Traffic,
    rates: Rates,
    *,
    tokens: int,
    length: int,
    checkpointing: float,
) -> float:
    """Of one optimizer step.

    Args:
        tokens: that a rank computes in it.
    """
    computing = tokens * flops_a_token(shapes, length, checkpointing=checkpointing) / rates.of(precision)
    sending = sent.network / rates.bandwidth + sent.host / _HOST_BANDWIDTH
    # What is gathered ahead is hidden behind the layer before it; the adapter's gradients are summed at the end.
    hidden = layout.cuda and layout.strategy in ("fsdp2", "zero3")
    return max(computing, sending) if hidden else computing + sending


def measure_rates(one_layer: Callable[[str, torch.device], tuple[Any, Shapes]], length: int, bandwidth: float) -> Rates:
    """What this machine reaches on one layer of the model and its head, forward and backward, with its adapter.

    Args:
        one_layer: the wrapped model and its shapes, by precision, on a device.
        length: tokens of a row.
        bandwidth: handed on.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    found = {}
    for precision in ("fp32", "bf16"):
        model, shapes = one_layer(precision, device)
        ids_BL = torch.ones((1, length), dtype=torch.long, device=device)
        times = []
        for _ in range(_TIMED + 1):
            _wait(device)
            start = time.perf_counter()
            model(input_ids=ids_BL, use_cache=False).logits.float().sum().backward()
            _wait(device)
            times.append(time.perf_counter() - start)
        found[precision] = length * flops_a_token(shapes, length, checkpointing=False) / min(times[1:])
    return Rates(found["bf16"], bandwidth, found["fp32"])


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
