"""The global cursor: which samples a step trains on, as a function of (seed, cursor) and nothing else.

    epoch, offset = divmod(cursor, num_samples)
    step          = positions [offset, offset + global_batch) of the epoch's order, fewer at the end of an epoch
    sample        = epoch_order(num_samples, seed, epoch)[position]

The cursor counts the samples that are behind, over all epochs and ranks. With `drop_last` it also counts the tail that an epoch
leaves out: after the last whole step it jumps to the next multiple of `num_samples`. So it means the same position whatever the
batch, and a run may go on from it on another number of processes or with another global batch. Nothing is carried but the cursor,
and starting anywhere costs one permutation. Called by `loader.py`; the engine asks `steps_per_epoch`.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np
import torch

from lora_dist.log import UserError


def stable_seed(*parts: int | str) -> int:
    """A 63-bit hash of the parts, the same on every machine and in every version."""
    digest = hashlib.blake2b("/".join(map(str, parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def stable_permutation(num: int, *key: int | str) -> torch.Tensor:
    """A random permutation (num,), int64, that depends on the key only.

    Sorts splitmix64(key + i), written out here because library generators may change between versions, and a run that is
    resumed under a newer torch must see the same order. splitmix64 is a bijection, so no two sort keys are equal.
    """
    z = np.arange(1, num + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15) + np.uint64(stable_seed(*key))
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return torch.from_numpy(np.argsort(z ^ (z >> np.uint64(31)), kind="stable").astype(np.int64))


def epoch_order(num_samples: int, seed: int, epoch: int) -> torch.Tensor:
    """The order in which an epoch visits its samples: a permutation (num_samples,), int64, derived from (seed, epoch) only."""
    return stable_permutation(num_samples, "epoch", seed, epoch)


_GROUPED_STEPS = 50  # steps in a mega-batch, as in transformers


def grouped_order(lengths_N: np.ndarray, global_batch: int, seed: int, epoch: int) -> np.ndarray:
    """An epoch's order (N,), int64, in which a step has samples of similar lengths.

    transformers' way (`group_by_length`): the epoch's order is cut into mega-batches of 50 steps (fewer in small data, so that there are 4),
    each sorted by length. The whole steps are then shuffled, and the one with the longest sample comes first, so that too little memory
    shows at once; the incomplete step stays the last. Derived from lengths, global batch, seed and epoch only.
    """
    count = len(lengths_N)
    order = epoch_order(count, seed, epoch).numpy()
    mega = max(1, min(_GROUPED_STEPS, count // (global_batch * 4))) * global_batch
    parts = [order[start : start + mega] for start in range(0, count, mega)]
    sorted_ = np.concatenate([part[np.argsort(-lengths_N[part], kind="stable")] for part in parts])
    whole = count // global_batch
    steps = stable_permutation(whole, "groups", seed, epoch).numpy()
    if whole:
        longest = lengths_N[sorted_[: whole * global_batch]].argmax() // global_batch
        steps = np.concatenate([[longest], steps[steps != longest]])
    return np.concatenate(
        [sorted_[: whole * global_batch].reshape(whole, global_batch)[steps].reshape(-1), sorted_[whole * global_batch :]]
    )


def steps_per_epoch(num_samples: int, global_batch: int, drop_last: bool = False) -> int:
    """Optimizer steps from the start of an epoch to its end; `global_batch` is the samples of a step over all ranks.

    Raises:
        UserError: if `drop_last` leaves no step at all.
    """
    if drop_last:
        _require_whole_step(num_samples, global_batch)
        return num_samples // global_batch
    return -(-num_samples // global_batch)


@dataclass(frozen=True)
class StepSlice:
    """One rank's part of one optimizer step. Positions are in the epoch's order; None is a filler row."""

    epoch: int
    start: int
    """position in the epoch's order where the step begins; its samples are the `samples_global` from there on"""
    positions: tuple[tuple[int | None, ...], ...]
    """micro-batches of micro_batch rows each; the same shape on every rank"""
    first_positions: tuple[int, ...]
    """where each micro-batch starts, filled or not: unique over micro-batches and ranks of an epoch; dropout derives from it"""
    samples_global: int
    """real samples of the step over all ranks"""
    cursor_after: int
    """the cursor once this step is done"""


def step_at(
    cursor: int, *, num_samples: int, global_batch: int, micro_batch: int, rank: int, world: int, drop_last: bool = False
) -> StepSlice:
    """The step that starts at a cursor. A step never spans two epochs.

    The samples of the step depend on (cursor, global batch); micro_batch and world only say who takes which. Rows are dealt
    round-robin over ranks, so a step that makes no whole rounds (any, where the global batch does not, or the short one at the end
    of an epoch) is spread evenly; on every rank it has ceil(samples / (micro_batch * world)) micro-batches, completed with filler
    rows, so that collectives stay in step.

    Raises:
        UserError: if `drop_last` leaves no step at all.
    """
    assert cursor >= 0 and 0 <= rank < world
    epoch, offset = divmod(cursor, num_samples)
    if drop_last:
        _require_whole_step(num_samples, global_batch)
        if num_samples - offset < global_batch:  # only where a larger global batch took over in the middle of an epoch
            epoch, offset = epoch + 1, 0
    end = min(offset + global_batch, num_samples)
    round_rows = micro_batch * world
    starts = tuple(start + rank for start in range(offset, end, round_rows))
    positions = tuple(tuple(p if p < end else None for p in range(start, start + round_rows, world)) for start in starts)
    cursor_after = epoch * num_samples + end
    if drop_last and num_samples - end < global_batch:
        cursor_after = (epoch + 1) * num_samples
    return StepSlice(epoch, offset, positions, starts, end - offset, cursor_after)


def _require_whole_step(num_samples: int, global_batch: int) -> None:
    if num_samples < global_batch:
        raise UserError(
            f"train.dataloader_drop_last: found {num_samples} samples, expected {global_batch} or more (one whole step): "
            "set it to false, or lower train.per_device_train_batch_size, train.gradient_accumulation_steps or train.global_batch_size"
        )
