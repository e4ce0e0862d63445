"""Learning rate as a pure function of the step, so that nothing has to be carried in a checkpoint."""

from __future__ import annotations

import math


def warmup_steps(total_steps: int, steps: int, ratio: float) -> int:
    """Steps of warm-up: `steps` if above 0, else the ratio of all steps, rounded up (as transformers counts)."""
    return steps if steps > 0 else math.ceil(total_steps * ratio)


def learning_rate(step: int, total_steps: int, *, peak: float, warmup: int, kind: str) -> float:
    """Rate of the optimizer step number `step` (0 = the first), as transformers' schedules of the same names.

    Args:
        peak: rate at the end of the warm-up.
        warmup: steps of linear warm-up from 0.
        kind: linear (to 0), cosine (half a wave to 0) or constant.
    """
    if step < warmup:
        return peak * step / max(1, warmup)
    if kind == "constant":
        return peak
    progress = min(1.0, (step - warmup) / max(1, total_steps - warmup))
    if kind == "linear":
        return peak * (1.0 - progress)
    if kind == "cosine":
        return peak * 0.5 * (1.0 + math.cos(math.pi * progress))
    raise ValueError(f"lr_scheduler_type: found {kind}, expected linear, cosine or constant")
