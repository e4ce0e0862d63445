"""How many samples an optimizer step takes, and how this number of processes shares them: decided once, at the start of a run.

    rounds      = ceil(global / (micro-batch * processes))      micro-batches that each process sums into a step
    micro-batch = ceil(global / (rounds * processes))           never above the configured one, and smaller where that leaves fewer fillers

The global batch is what a run must keep when it goes on with other processes than before: steps, schedule and data order count in it.
Pure; called by `engine/setup.py`.
"""

from __future__ import annotations

from dataclasses import dataclass

from lora_dist.log import UserError
from lora_dist.state import TrainState


@dataclass(frozen=True)
class BatchPlan:
    """The numbers in force. `notes` are for the console: what differs from the configuration or from the checkpoint."""

    global_batch: int
    """samples (windows, examples, packed rows) an optimizer step takes, over all processes"""
    micro_batch: int
    """rows that a process holds at once"""
    accumulation: int
    """micro-batches that a process sums into a step"""
    follows: bool
    """whether micro-batch and accumulation follow from the global batch, instead of the other way round"""
    notes: tuple[str, ...] = ()


def plan_batch(*, micro_batch: int, accumulation: int, world: int, wanted: int | None, before: TrainState | None) -> BatchPlan:
    """Decide.

    `wanted` rules where it is set. Else the checkpoint's global batch is kept as long as micro-batch and accumulation are configured
    as they were, whatever the number of processes; if the user has changed them, theirs make the global batch.

    Args:
        micro_batch: `train.per_device_train_batch_size`.
        accumulation: `train.gradient_accumulation_steps`.
        world: processes.
        wanted: `train.global_batch_size`.
        before: state of the checkpoint that the run goes on from.

    Raises:
        UserError: fewer samples in a step than processes.
    """
    product = micro_batch * accumulation * world
    then = before.global_batch if before is not None and before.global_batch > 0 else None
    kept = before is not None and (before.micro_batch, before.accumulation) == (micro_batch, accumulation)
    notes = []
    if wanted is not None:
        total = wanted
    elif then is not None and kept:
        total = then
    else:
        total = product
    if then not in (None, total):
        reason = (
            f"train.global_batch_size is {wanted}"
            if wanted is not None
            else "micro-batch or accumulation is another (train.global_batch_size would keep it)"
        )
        notes.append(f"a step of the checkpoint had {then} samples, a step has {total} from now on: {reason}")
    if total < world:
        raise UserError(
            f"train.global_batch_size: found {total} samples a step for {world} processes, expected one a process or more: "
            f"start {total} processes at most, or set train.global_batch_size to {world} or more"
        )
    if total == product:
        return BatchPlan(total, micro_batch, accumulation, wanted is not None, tuple(notes))
    rounds = -(-total // (micro_batch * world))
    rows = -(-total // (rounds * world))
    notes += _adapted(total, world, (accumulation, rounds), (micro_batch, rows))
    return BatchPlan(total, rows, rounds, True, tuple(notes))


def _adapted(total: int, world: int, accumulation: tuple[int, int], micro_batch: tuple[int, int]) -> list[str]:
    """What is in force instead of what is configured, and what it costs; pairs are (configured, in force)."""
    changed = [
        f"train.{key} {before} -> {now}"
        for key, (before, now) in (("gradient_accumulation_steps", accumulation), ("per_device_train_batch_size", micro_batch))
        if before != now
    ]
    lines = [f"{', '.join(changed)} on {_processes(world)}, so that a step has {total} samples"] if changed else []
    computed = accumulation[1] * micro_batch[1] * world
    if computed > total:
        lines.append(
            f"{(computed - total) / computed:.0%} of the rows that a step computes are fillers: {total} samples make no whole rounds of "
            f"{micro_batch[1]} rows on {_processes(world)}"
        )
    return lines


def _processes(world: int) -> str:
    return f"{world} process{'es' if world > 1 else ''}"
