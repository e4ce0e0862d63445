"""Texts that tell a user what to do about a run, in terms of that run's own options. Plain values in, text out."""

from __future__ import annotations

from collections.abc import Sequence


def out_of_memory(
    *,
    block_size: int,
    gradient_checkpointing: bool,
    micro_batch: int,
    accumulation: int,
    rank: int,
    where: str,
    peak_gib: float | None,
) -> str:
    """What to change after running out of memory, largest saving first; printed instead of a bare traceback."""
    lines = [f"❌ Out of memory {where}" + (f" (peak {peak_gib:.1f} GiB)" if peak_gib else "") + ". What helps, in this order:"]
    if not gradient_checkpointing:
        lines.append("  - gradient checkpointing:  --train.gradient_checkpointing true      (now off)")
    if micro_batch > 1:
        half = micro_batch // 2
        lines.append(
            f"  - micro-batch {micro_batch} -> {half}:  --train.per_device_train_batch_size {half} "
            f"--train.gradient_accumulation_steps {accumulation * 2}   (same global batch)"
        )
    if block_size > 128:
        lines.append(f"  - context {block_size} -> {block_size // 2}:  --data.block_size {block_size // 2}")
    if rank > 4:
        lines.append(f"  - rank {rank} -> {max(4, rank // 2)}:  --adapter.r {max(4, rank // 2)}")
    lines.append(
        "  - base in half precision:  --train.bf16 true; a smaller evaluation batch:  --train.per_device_eval_batch_size 1"
    )
    return "\n".join(lines)


def perplexity_band(perplexity: float, upper_ends: Sequence[float]) -> str:
    """ideal, good, fair or poor: the first band whose upper end is not below the perplexity."""
    names = ("ideal", "good", "fair")
    return next((name for name, upper in zip(names, upper_ends, strict=True) if perplexity <= upper), "poor")
