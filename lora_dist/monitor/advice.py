"""Texts that tell a user what to do about a run, in terms of that run's own options. Plain values in, text out."""

from __future__ import annotations


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


BANDS = ((7.0, "ideal"), (10.0, "good"), (50.0, "fair"), (float("inf"), "poor"))
"""upper ends for Llama-2-7B on WikiText-2 (W1)"""


def perplexity_band(perplexity: float, bands: tuple[tuple[float, str], ...] = BANDS) -> str:
    """The name of the first band whose upper end is not below the perplexity."""
    return next((name for upper, name in bands if perplexity <= upper), bands[-1][1])
