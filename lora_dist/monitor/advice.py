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
    memory_gib: float | None = None,
    request: str = "",
    half: bool = False,
    quantised: bool = False,
    sharded_base: bool = False,
    adamw_8bit: bool = False,
    eval_batch: int = 8,
    checkpointing_layers: str = "all",
    fits: str | None = None,
) -> str:
    """What to change after running out of memory, largest saving first for the place where it ended; printed instead of a traceback.

    Args:
        where: while loading, in the forward pass of step 3, ...; the words forward, backward, optimizer, evaluation and loading choose
            what is advised first.
        peak_gib, memory_gib: what this process has used at most, and all that there is.
        request: the allocator's own words.
        half, quantised, sharded_base: how the base is held.
        checkpointing_layers: how many of the first layers are computed again, where checkpointing is on.
        fits: what would fit by `lora-dist plan`, one line; None where it was not asked.
    """
    used = ""
    if peak_gib:
        used = f" (peak {peak_gib:.1f}{f' of {memory_gib:.1f}' if memory_gib else ''} GiB)"
    lines = [f"❌ Out of memory {where}{used}. What helps, in this order:"]
    base = []
    if not half and not quantised:
        base.append("base in half precision:  --train.bf16 true")
    if not quantised:
        base.append("base in 4 bits (QLoRA):  --model.load_in_4bit true")
    if not sharded_base:
        base.append("base cut over processes:  --strategy fsdp2, on two or more of them")
    steps = []
    if not gradient_checkpointing:
        steps.append("gradient checkpointing:  --train.gradient_checkpointing true      (now off)")
    elif checkpointing_layers != "all":
        steps.append(f"every layer computed again:  --train.gradient_checkpointing_layers all      (now {checkpointing_layers})")
    if micro_batch > 1:
        half_batch = micro_batch // 2
        steps.append(
            f"micro-batch {micro_batch} -> {half_batch}:  --train.per_device_train_batch_size {half_batch} "
            f"--train.gradient_accumulation_steps {accumulation * 2}   (same global batch)"
        )
    if block_size > 64:
        steps.append(f"context {block_size} -> {block_size // 2}:  --data.block_size {block_size // 2}")
    adapter = [f"rank {rank} -> {max(4, rank // 2)}:  --adapter.r {max(4, rank // 2)}"] if rank > 4 else []
    optimizer = [] if adamw_8bit else ["optimizer state in 8 bits:  --train.optim adamw_8bit"]
    evaluation = [f"evaluation batch {eval_batch} -> 1:  --train.per_device_eval_batch_size 1"] if eval_batch > 1 else []
    if "optimizer" in where:
        remedies = [*adapter, *optimizer, *base, *steps]
    elif "evaluation" in where:
        remedies = [*evaluation, *base]
    elif "loading" in where:
        remedies = [*base, *adapter]
    else:
        remedies = [*steps, *adapter, *base, *evaluation]
    lines += [f"  - {each}" for each in remedies]
    if fits is not None:
        lines.append(f"  By the plan this fits:  {fits}")
    if request:
        lines.append(f"  ({request})")
    return "\n".join(lines)


def perplexity_band(perplexity: float, upper_ends: Sequence[float]) -> str:
    """ideal, good, fair or poor: the first band whose upper end is not below the perplexity."""
    names = ("ideal", "good", "fair")
    return next((name for name, upper in zip(names, upper_ends, strict=True) if perplexity <= upper), "poor")
