"""Batches from windows or examples: the steps of training from any cursor on, and evaluation.

Rows are gathered from a memory map, so loading in the process itself is usually fast enough; with workers the batches are made
ahead of the step. Either way the batches are the same, and the cursor travels with its batch, so loading ahead never moves it.
Called by `engine/`.

Rows of unlike lengths are dealt to the micro-batches of their step by length: neighbours are padded to the longer one only, and since
the loss counts by label tokens of the whole step, nothing else changes.

Letters for shapes: `A` micro-batches, `B` rows, `L` tokens of a micro-batch's longest row.
"""

from __future__ import annotations

import atexit
import signal
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any, TypeVar

import numpy as np
import torch

from lora_dist.data.rows import FILLER, RowBatch, Rows
from lora_dist.data.sampler import StepSlice, epoch_order, grouped_order, stable_seed, step_at, steps_per_epoch
from lora_dist.process import end_with_parent

_EXPECTED_STEPS = 200  # what padding is estimated on

Meta = TypeVar("Meta")


@dataclass(frozen=True)
class MicroBatch:
    """What one forward pass sees. Filler rows have ids 0 and labels -100. Labels are not shifted."""

    input_ids_BL: torch.Tensor
    labels_BL: torch.Tensor
    dropout_seed: int
    """63 bits, derived from (seed, epoch, first position): to seed the generator with before the forward pass"""
    windows: tuple[int, ...] = ()
    """numbers of the training windows, examples or packed rows, row by row; filler rows have -1"""
    position_ids_BL: torch.Tensor | None = None
    """rows of several examples: positions that start anew with each"""
    attention_mask_BL: torch.Tensor | None = None
    targets_B: torch.Tensor | None = None
    weights_B: torch.Tensor | None = None
    """these three of classified rows, as in `RowBatch`"""
    counts: float = 0
    """what these rows count in the step's loss"""
    token_types_BL: torch.Tensor | None = None
    """of pairs, as in `RowBatch`"""


@dataclass(frozen=True)
class StepBatch:
    """One rank's part of one optimizer step."""

    micro_batches: list[MicroBatch]
    epoch: int
    cursor_after: int
    """to be stored once the step is done"""
    samples_global: int
    """real samples of the step over all ranks"""
    label_tokens: float
    """this rank's labels other than -100 after the causal shift (labels[:, 1:]), summed over its micro-batches; of classified rows,
    their weights"""
    tokens: int
    """this rank's tokens of samples, in all micro-batches"""
    computed_tokens: int
    """this rank's tokens with padding and filler rows"""


class StepLoader:
    """Endless steps of training for one rank.

    Args:
        rows: what is trained on, the same on every rank.
        global_batch: samples an optimizer step takes over all ranks.
        micro_batch: rows a forward pass.
        rank, world: who this process is; of the batches of all ranks, each sample of an epoch is in exactly one.
        seed: decides order and dropout.
        drop_last: leave out the incomplete step at the end of an epoch.
        num_workers: processes that load ahead; 0 loads in this process.
        group_by_length: samples of a step have similar lengths; the order then also depends on the global batch.
        pin_memory: put batches into page-locked memory; without a GPU it has no effect.

    Raises:
        UserError: if `drop_last` leaves no step at all.
    """

    def __init__(
        self,
        rows: Rows,
        *,
        global_batch: int,
        micro_batch: int,
        rank: int,
        world: int,
        seed: int,
        drop_last: bool = False,
        group_by_length: bool = False,
        num_workers: int = 0,
        pin_memory: bool = False,
    ):
        self.global_batch, self.micro_batch = global_batch, micro_batch
        self.accumulation = -(-global_batch // (micro_batch * world))  # micro-batches of a whole step
        self.steps_per_epoch = steps_per_epoch(len(rows), self.global_batch, drop_last)
        self._rows, self._lengths_N = rows, rows.lengths
        self._seed = seed
        self._group_by_length = group_by_length
        self._num_workers = num_workers
        self._pin = pin_memory and torch.cuda.is_available()
        self._split: dict[str, Any] = {
            "num_samples": len(rows),
            "global_batch": global_batch,
            "micro_batch": micro_batch,
            "rank": rank,
            "world": world,
            "drop_last": drop_last,
        }

    def __iter__(self) -> Iterator[StepBatch]:
        return self.steps_from(0)

    def steps_from(self, cursor: int) -> Iterator[StepBatch]:
        """Steps from a cursor on, through all further epochs; the caller stops. Costs one permutation, however far it is."""
        for (step, rows_AB), micro_batches in _load(self._rows, self._plan(cursor), self._num_workers):
            yield self._batch(step, rows_AB, micro_batches)

    def expected_padding(self) -> float:
        """Share of padding in what this rank computes, over the first steps of the first epoch (200 at most)."""
        tokens, computed = 0, 0
        for _, rows_AB in islice(self._plan(0), min(self.steps_per_epoch, _EXPECTED_STEPS)):
            if self._lengths_N is None:
                lengths_AB = (rows_AB != FILLER).astype(np.int64)
            else:
                lengths_AB = np.where(rows_AB == FILLER, 0, self._lengths_N[np.maximum(rows_AB, 0)])
            tokens += int(lengths_AB.sum())
            computed += int(lengths_AB.max(axis=1).sum()) * lengths_AB.shape[1]
        return 1 - tokens / max(computed, 1)

    def _order(self, epoch: int) -> np.ndarray:
        if self._group_by_length and self._lengths_N is not None:
            return grouped_order(self._lengths_N, self.global_batch, self._seed, epoch)
        return epoch_order(self._split["num_samples"], self._seed, epoch).numpy()

    def _plan(self, cursor: int) -> Iterator[tuple[StepSlice, np.ndarray]]:
        """Steps with the numbers of the rows (A, B) they read, in order."""
        epoch, order = -1, np.empty(0, np.int64)
        while True:
            step = step_at(cursor, **self._split)
            if step.epoch != epoch:
                epoch, order = step.epoch, self._order(step.epoch)
            chosen = order[step.start : step.start + step.samples_global]
            if self._lengths_N is not None:
                chosen = chosen[np.argsort(-self._lengths_N[chosen], kind="stable")]
            yield step, np.array([[FILLER if p is None else chosen[p - step.start] for p in row] for row in step.positions])
            cursor = step.cursor_after

    def _batch(self, step: StepSlice, rows_AB: np.ndarray, read: list[RowBatch]) -> StepBatch:
        micro_batches: list[MicroBatch] = []
        label_tokens: float = 0
        for rows, first, rows_B in zip(read, step.first_positions, rows_AB.tolist(), strict=True):
            counts = rows.counts
            label_tokens += counts
            ids_BL, labels_BL, positions_BL, mask_BL, targets_B, weights_B = map(
                self._pinned,
                (rows.input_ids_BL, rows.labels_BL, rows.position_ids_BL, rows.attention_mask_BL, rows.targets_B, rows.weights_B),
            )
            assert ids_BL is not None and labels_BL is not None
            dropout_seed = stable_seed("dropout", self._seed, step.epoch, first)
            micro_batches.append(
                MicroBatch(
                    ids_BL,
                    labels_BL,
                    dropout_seed,
                    tuple(rows_B),
                    positions_BL,
                    mask_BL,
                    targets_B,
                    weights_B,
                    counts,
                    self._pinned(rows.token_types_BL),
                )
            )
        return StepBatch(
            micro_batches,
            step.epoch,
            step.cursor_after,
            step.samples_global,
            label_tokens,
            tokens=sum(rows.tokens for rows in read),
            computed_tokens=sum(rows.input_ids_BL.numel() for rows in read),
        )

    def _pinned(self, tensor: torch.Tensor | None) -> torch.Tensor | None:
        return tensor.pin_memory() if self._pin and tensor is not None else tensor


def eval_batches(
    rows: Rows, *, batch_size: int, rank: int, world: int, num_workers: int = 0
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Input ids and labels (B, L) of this rank's share, in order; each row is in exactly one rank's batches.

    Every rank yields the same number of batches, ceil(rows / (batch_size * world)), all of `batch_size` rows; what is missing
    at the end are filler rows (ids 0, labels -100). No packed rows: these would need their positions as well.
    """
    for batch in eval_row_batches(rows, batch_size=batch_size, rank=rank, world=world, num_workers=num_workers):
        assert batch.position_ids_BL is None
        yield batch.input_ids_BL, batch.labels_BL


def eval_row_batches(rows: Rows, *, batch_size: int, rank: int, world: int, num_workers: int = 0) -> Iterator[RowBatch]:
    """As `eval_batches`, with all that a row has. Batch k of a rank begins at row (k * world + rank) * batch_size."""
    assert 0 <= rank < world
    for _, (batch,) in _load(rows, _eval_plan(len(rows), batch_size, rank, world), num_workers):
        yield batch


def _eval_plan(count: int, batch_size: int, rank: int, world: int) -> Iterator[tuple[None, np.ndarray]]:
    for start in range(rank * batch_size, count + rank * batch_size, batch_size * world):
        rows_B = np.arange(start, start + batch_size)
        rows_B[rows_B >= count] = FILLER
        yield None, rows_B[None]


# --- reading, here or in workers ------------------------------------------------------------------------------------------


class _Reader(torch.utils.data.Dataset[Any]):
    """Answers (meta, numbers of rows (A, B)) with these and their batches: what a worker runs."""

    def __init__(self, rows: Rows):
        self._rows = rows

    def __getitem__(self, item: tuple[Meta, np.ndarray]) -> tuple[tuple[Meta, np.ndarray], list[RowBatch]]:
        return item, [self._rows.batch(rows_B) for rows_B in item[1]]


def _load(
    rows: Rows, plan: Iterable[tuple[Meta, np.ndarray]], num_workers: int
) -> Iterator[tuple[tuple[Meta, np.ndarray], list[RowBatch]]]:
    reader = _Reader(rows)
    if num_workers == 0:
        yield from map(reader.__getitem__, plan)
        return
    loader = torch.utils.data.DataLoader(
        reader,
        sampler=plan,  # one item a batch, asked for in this process and in this order
        batch_size=None,
        num_workers=num_workers,
        collate_fn=_as_it_is,
        worker_init_fn=_follow_the_main_process,
        generator=torch.Generator(),  # else starting workers would draw from the global generator
    )
    # Workers ignore SIGTERM, which is how multiprocessing ends them at exit, and would then wait for them for ever. Dropping the
    # only reference to the iterator asks them to stop instead; this hook runs first, being registered last.
    holder = [iter(loader)]
    atexit.register(holder.clear)
    try:
        while holder:
            try:
                item = next(holder[0])
            except StopIteration:
                return
            yield item
    finally:
        holder.clear()
        atexit.unregister(holder.clear)


def _as_it_is(item: Any) -> Any:
    return item


def _follow_the_main_process(_worker: int) -> None:
    """A preemption signal reaches the whole process group; only the main process may decide when to stop. One that is killed takes its
    workers along: they would keep the run folder's lock, which they inherit, until torch's watchdog ends them, 5 s later."""
    end_with_parent()
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)
    torch.set_num_threads(1)
