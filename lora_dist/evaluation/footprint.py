"""What a model weighs: bytes of its weights, zeros among them, and peak memory while it works.

Peak memory is that of the GPU's allocator, or on CPU the anonymous resident memory (RssAnon, and what of it is swapped out) above what
the process held before the model was loaded; libraries and files that are only mapped do not count. It is sampled every few
milliseconds from /proc, which is Linux's. Called by `engine/report.py`.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lora_dist.blocks import BlockMask, NamedLinear

_INTERVAL_S = 0.005
_STATUS = Path("/proc/self/status")


def held_bytes() -> int | None:
    """Anonymous memory of this process now; None where there is no /proc."""
    try:
        status = _STATUS.read_text()
    except OSError:
        return None
    return sum(1024 * int(value) for value in re.findall(r"^(?:RssAnon|VmSwap):\s+(\d+) kB", status, re.MULTILINE))


class PeakMemory:
    """Peak memory inside a `with` block.

    Args:
        before: on CPU, what the process held before the model was loaded.
    """

    def __init__(self, device: torch.device, before: int | None):
        self._device, self._before = device, before
        self.peak_bytes: int | None = None

    def __enter__(self) -> PeakMemory:
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)
            return self
        self._done = threading.Event()
        self._highest = held_bytes()
        self._sampler = threading.Thread(target=self._sample, daemon=True)
        self._sampler.start()
        return self

    def _sample(self) -> None:
        while not self._done.wait(_INTERVAL_S):
            self._note()

    def _note(self) -> None:
        now = held_bytes()
        if now is not None:
            self._highest = max(self._highest or 0, now)

    def __exit__(self, *problem: object) -> None:
        if self._device.type == "cuda":
            self.peak_bytes = torch.cuda.max_memory_allocated(self._device)
            return
        self._done.set()
        self._sampler.join()
        self._note()
        if self._highest is not None and self._before is not None:
            self.peak_bytes = max(0, self._highest - self._before)


def peak_kind(device: torch.device) -> str:
    """What `PeakMemory` measures on this device."""
    if device.type == "cuda":
        return "CUDA allocator, highest of the processes"
    return "anonymous resident memory above that before loading, highest of the processes"


@dataclass(frozen=True)
class WeightBytes:
    """Of the parameters a process holds; a parameter that is used twice counts once."""

    parameters: int
    total: int
    nonzero: int
    """bytes of the elements that are not exactly zero"""


def weight_bytes(parameters: Iterable[Tensor]) -> WeightBytes:
    """Waits for the device."""
    count = total = nonzero = 0
    for parameter in parameters:
        local: Any = parameter.to_local() if hasattr(parameter, "to_local") else parameter  # a shard counts as what it is
        count += local.numel()
        total += local.numel() * local.element_size()
        nonzero += int(torch.count_nonzero(local)) * local.element_size()
    return WeightBytes(count, total, nonzero)


@dataclass(frozen=True)
class Zeros:
    """Exactly zero weights of the linears that may be pruned."""

    weights: int
    zero_weights: int
    tiles: int
    zero_tiles: int
    block: int

    @property
    def share(self) -> float:
        return self.zero_weights / max(1, self.weights)

    @property
    def tile_share(self) -> float:
        return self.zero_tiles / max(1, self.tiles)


def count_zeros(linears: Iterable[NamedLinear], block: int, dense: frozenset[str] = frozenset()) -> Zeros:
    """Zeros of the weights as they are used.

    Args:
        block: tile side.
        dense: linears whose weight is the sum of a base and a dense update: nothing of it counts as zero.
    """
    weights = zeros = tiles = zero_tiles = 0
    for linear in linears:
        weight_OI = linear.weight_OI
        mask = BlockMask.detect(weight_OI, block)
        weights += weight_OI.numel()
        tiles += mask.kept_PQ.numel()
        if linear.name not in dense:
            zeros += weight_OI.numel() - int(torch.count_nonzero(weight_OI))
            zero_tiles += int((~mask.kept_PQ).sum())
    return Zeros(weights, zeros, tiles, zero_tiles, block)


def densely_adapted(model: nn.Module, linears: Iterable[NamedLinear]) -> frozenset[str]:
    """Names of the linears that an adapter without a pattern adds a dense update to."""
    adapted = {name.replace(".base_layer", "") for name, module in model.named_modules() if hasattr(module, "lora_A")}
    return frozenset(linear.name for linear in linears if any(name.endswith(linear.name) for name in adapted))
