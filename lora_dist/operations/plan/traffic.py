"""What a rank sends in one optimizer step, by collective. Plain numbers; called by `choice.py`."""

from __future__ import annotations

from dataclasses import dataclass

from lora_dist.operations.plan.memory import Layout
from lora_dist.operations.plan.rehearse import Shapes


@dataclass(frozen=True)
class Traffic:
    """Bytes that leave a rank in one optimizer step, by ring algorithms."""

    all_reduce: int = 0
    all_gather: int = 0
    reduce_scatter: int = 0
    host: int = 0
    """to and from the machine's memory, of what is offloaded"""

    @property
    def network(self) -> int:
        return self.all_reduce + self.all_gather + self.reduce_scatter


def traffic(shapes: Shapes, layout: Layout, *, accumulation: int, checkpointing: float) -> Traffic:
    """Of a step of `accumulation` micro-batches."""
    n = layout.processes
    share = (n - 1) / n
    trainable = sum(p.bytes for p in shapes.trainable)
    moved = 2 * 4 * sum(p.elements for p in shapes.trainable) // n if layout.offload_optimizer else 0
    if layout.strategy == "ddp":
        return Traffic(all_reduce=int(2 * share * trainable))
    if layout.strategy == "zero1":
        return Traffic(all_reduce=int(2 * share * trainable), all_gather=int(share * trainable), host=moved)
    if layout.strategy == "zero2":
        return Traffic(reduce_scatter=int(share * trainable * accumulation), all_gather=int(share * trainable), host=moved)
    in_units = sum(p.bytes for p in shapes.parameters if p.unit >= 0)
    outside = sum(p.bytes for p in shapes.parameters if p.unit < 0)
    if layout.strategy == "fsdp2":
        shards = layout.shards or n
        inside = (shards - 1) / shards
        return Traffic(
            # units before their forward and their backward pass; what is in none of them once
            all_gather=int(inside * (2 * in_units + outside) * accumulation),
            reduce_scatter=int(inside * trainable),
            all_reduce=int(2 * (1 - shards / n) * trainable / shards) if shards < n else 0,
        )
    passes = 2 + checkpointing  # each layer is let go of after every pass, the recomputed one too
    host = moved + (int(sum(p.bytes for p in shapes.base) / n * passes * accumulation) if layout.offload_param else 0)
    return Traffic(
        all_gather=int(share * (in_units + outside) * passes * accumulation),
        reduce_scatter=int(share * trainable * accumulation),
        host=host,
    )
