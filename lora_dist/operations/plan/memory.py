"""Memory of a rank, part by part: what a strategy holds from a model's shapes, and what a rehearsed step adds at its peak.

Plain numbers in and out. Called by `choice.py`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Protocol

from lora_dist.operations.plan.rehearse import Parameter, Shapes
from lora_dist.operations.plan.trace import Peak, Phase

GIB = 2**30
STRATEGIES = ("ddp", "zero1", "zero2", "zero3", "fsdp2")
SHARDED = {"fsdp2": "units", "zero3": "leaves"}
"""strategies that cut the base, and what they gather at a time"""
_SMALLEST_8BIT = 4096
"""elements from which bitsandbytes keeps a parameter's state in 8 bits"""
_QUANTISED_BLOCK = 256
_PERSISTENT_ROWS = 10
"""`stage3_param_persistence_threshold` over the hidden size: zero3 leaves smaller parameters whole"""


@dataclass(frozen=True)
class Layout:
    """How a run is spread."""

    strategy: str
    processes: int
    offload_optimizer: bool = False
    offload_param: bool = False
    optim: str = "adamw_torch"
    adalora: bool = False
    cuda: bool = True
    shards: int | None = None
    """processes that share a copy of the base (hybrid_shard: those of one machine); None: all"""

    @property
    def name(self) -> str:
        offloaded = "+".join(what for what, on in (("optimizer", self.offload_optimizer), ("param", self.offload_param)) if on)
        return f"{self.strategy} offload {offloaded}" if offloaded else self.strategy


@dataclass(frozen=True)
class Memory:
    """Bytes of a rank at its peak, on the device unless said otherwise."""

    base: int = 0
    teacher: int = 0
    """of train.distill_from: its weights, and what it says of a micro-batch"""
    adapter: int = 0
    gradients: int = 0
    optimizer: int = 0
    activations: int = 0
    logits: int = 0
    buffers: int = 0
    """the model's own, buckets of collectives, and parameters that are whole for the moment"""
    overhead: int = 0
    """of the framework: context and libraries"""
    host: int = 0
    """in the machine's memory instead, by offloading; not in the total"""

    @property
    def total(self) -> int:
        return sum(getattr(self, f.name) for f in fields(self) if f.name != "host")


class Rehearsed(Protocol):
    """What `rehearse.Rehearsal` gives."""

    def shapes(self, precision: str) -> Shapes: ...

    def peaks(
        self, precision: str, *, checkpointing: float, rows: int, train: bool = True, gather: str = "none", exact: bool = False
    ) -> dict[Phase, Peak]: ...


def held(shapes: Shapes, layout: Layout) -> Memory:
    """What stays for the whole of training."""
    n = layout.shards or layout.processes
    trainable = sum(p.bytes for p in shapes.trainable)
    elements = sum(p.elements for p in shapes.trainable)
    base = sum(_own_bytes(p, shapes, layout, n) for p in shapes.base)
    adapter = sum(_own_bytes(p, shapes, layout, n) for p in shapes.trainable)
    own_elements = -(-elements // n)
    states = 8 * own_elements
    if layout.strategy == "ddp":
        states = sum(_state_bytes(p, layout.optim) for p in shapes.trainable)
        if layout.adalora:
            states += 3 * 4 * elements  # importance, its mean and its uncertainty
    if layout.strategy.startswith("zero"):
        states += 4 * own_elements  # its own copy of what it updates
    gradients = {
        "ddp": trainable,
        "fsdp2": trainable // n,
        "zero1": trainable,
        "zero2": 4 * own_elements,
        "zero3": 4 * own_elements,
    }
    buffers, host = shapes.buffer_bytes + _buckets(shapes, layout), 0
    if layout.cuda and layout.offload_optimizer:
        host, states = host + states, 0
    if layout.cuda and layout.offload_param:
        host, base = host + base, 0
    return Memory(base=base, adapter=adapter, gradients=gradients[layout.strategy], optimizer=states, buffers=buffers, host=host)


def _own_bytes(parameter: Parameter, shapes: Shapes, layout: Layout, n: int) -> int:
    """A parameter's bytes on a rank."""
    if layout.strategy == "fsdp2":
        rows = parameter.shape[0] if parameter.shape else 1
        return math.ceil(-(-rows // n) * parameter.bytes / max(1, rows))
    if layout.strategy == "zero3":
        whole = parameter.bytes if parameter.elements < _PERSISTENT_ROWS * shapes.hidden else 0
        return -(-parameter.bytes // n) + whole
    return parameter.bytes


def _state_bytes(parameter: Parameter, optim: str) -> int:
    """Of AdamW's two moments."""
    if optim.startswith("paged"):
        return 0  # moves out of a full GPU
    if optim.endswith("8bit") and parameter.elements >= _SMALLEST_8BIT:
        return 2 * (parameter.elements + 4 * -(-parameter.elements // _QUANTISED_BLOCK))
    return 8 * parameter.elements


def _buckets(shapes: Shapes, layout: Layout) -> int:
    """Buffers that DeepSpeed reduces gradients in."""
    if layout.strategy not in ("zero2", "zero3", "zero1"):
        return 0
    return 4 * min(shapes.hidden**2, sum(p.elements for p in shapes.trainable))


def at_peak(
    rehearsed: Rehearsed,
    layout: Layout,
    precision: str,
    *,
    checkpointing: float,
    rows: int,
    eval_rows: int = 0,
    overhead: int = 0,
    exact: bool = False,
) -> Memory:
    """Everything, at the moment when it is most: of a micro-batch of `rows`, or of an evaluation's batch.

    Args:
        eval_rows: 0: nothing is evaluated.
        overhead: bytes of the framework.
        exact: as `Rehearsal.peaks` has it.
    """
    still = held(rehearsed.shapes(precision), layout)
    gather = SHARDED.get(layout.strategy, "none")
    peaks = list(rehearsed.peaks(precision, checkpointing=checkpointing, rows=rows, gather=gather, exact=exact).values())
    if eval_rows:
        peaks += rehearsed.peaks(precision, checkpointing=False, rows=eval_rows, train=False, gather=gather, exact=exact).values()
    peak = max(peaks, key=lambda each: each.total)
    return Memory(
        base=still.base,
        adapter=still.adapter,
        gradients=still.gradients,
        optimizer=still.optimizer,
        activations=peak.total - peak.logits - peak.gathered,
        logits=peak.logits,
        buffers=still.buffers + peak.gathered,
        overhead=overhead,
        host=still.host,
    )
