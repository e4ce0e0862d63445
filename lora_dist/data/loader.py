"""Batches from windows: the steps of training from any cursor on, and evaluation.

Rows are gathered from a memory map, so loading in the process itself is usually fast enough; with workers the batches are made
ahead of the step. Either way the batches are the same, and the cursor travels with its batch, so loading ahead never moves it.
Called by `engine/`.

Letters for shapes: `A` micro-batches, `B` rows, `L` tokens a window.
"""

from __future__ import annotations

import atexit
import signal
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch

from lora_dist.data.sampler import StepSlice, epoch_order, stable_seed, step_at, steps_per_epoch
from lora_dist.data.windows import Windows
from lora_dist.process import end_with_parent

IGNORE_LABEL = -100
_FILLER = -1  # a row that stands for no sample: ids 0, labels IGNORE_LABEL

Meta = TypeVar("Meta")


@dataclass(frozen=True)
class MicroBatch:
    """What one forward pass sees. Filler rows have ids 0 and labels -100. Labels are not shifted."""

    input_ids_BL: torch.Tensor
    labels_BL: torch.Tensor
    dropout_seed: int
    """63 bits, derived from (seed, epoch, first position): to seed the generator with before the forward pass"""
    windows: tuple[int, ...] = ()
    """numbers of the training windows, row by row; filler rows have -1"""


@dataclass(frozen=True)
class StepBatch:
    """One rank's part of one optimizer step."""

    micro_batches: list[MicroBatch]
    epoch: int
    cursor_after: int
    """to be stored once the step is done"""
    samples_global: int
    """real samples of the step over all ranks"""
    label_tokens: int
    """this rank's labels other than -100 after the causal shift (labels[:, 1:]), summed over its micro-batches"""


class StepLoader:
    """Endless steps of training for one rank.

    Args:
        windows: the training windows, the same on every rank.
        global_batch: samples an optimizer step takes over all ranks.
        micro_batch: rows a forward pass.
        rank, world: who this process is; of the batches of all ranks, each sample of an epoch is in exactly one.
        seed: decides order and dropout.
        drop_last: leave out the incomplete step at the end of an epoch.
        num_workers: processes that load ahead; 0 loads in this process.
        pin_memory: put batches into page-locked memory; without a GPU it has no effect.

    Raises:
        UserError: if `drop_last` leaves no step at all.
    """

    def __init__(
        self,
        windows: Windows,
        *,
        global_batch: int,
        micro_batch: int,
        rank: int,
        world: int,
        seed: int,
        drop_last: bool = False,
        num_workers: int = 0,
        pin_memory: bool = False,
    ):
        self.global_batch, self.micro_batch = global_batch, micro_batch
        self.accumulation = -(-global_batch // (micro_batch * world))  # micro-batches of a whole step
        self.steps_per_epoch = steps_per_epoch(len(windows), self.global_batch, drop_last)
        self._windows = windows
        self._seed = seed
        self._num_workers = num_workers
        self._pin = pin_memory and torch.cuda.is_available()
        self._split: dict[str, Any] = {
            "num_samples": len(windows),
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
        for (step, rows_AB), ids_ABL in _load(self._windows, self._plan(cursor), self._num_workers):
            yield self._batch(step, rows_AB, ids_ABL)

    def _plan(self, cursor: int) -> Iterator[tuple[tuple[StepSlice, np.ndarray], np.ndarray]]:
        """Steps with the windows (A, B) they read, and these again for the reader, in order."""
        epoch, order = -1, np.empty(0, np.int64)
        while True:
            step = step_at(cursor, **self._split)
            if step.epoch != epoch:
                epoch, order = step.epoch, epoch_order(len(self._windows), self._seed, step.epoch).numpy()
            rows_AB = np.array([[_FILLER if p is None else order[p] for p in row] for row in step.positions])
            yield (step, rows_AB), rows_AB
            cursor = step.cursor_after

    def _batch(self, step: StepSlice, rows_AB: np.ndarray, ids_ABL: torch.Tensor) -> StepBatch:
        filler_AB1 = torch.tensor([[p is None for p in row] for row in step.positions])[..., None]
        labels_ABL = ids_ABL.masked_fill(filler_AB1, IGNORE_LABEL)
        label_tokens = int((labels_ABL[..., 1:] != IGNORE_LABEL).sum())
        if self._pin:
            ids_ABL, labels_ABL = ids_ABL.pin_memory(), labels_ABL.pin_memory()
        micro_batches = [
            MicroBatch(ids_BL, labels_BL, stable_seed("dropout", self._seed, step.epoch, first), tuple(rows_B))
            for ids_BL, labels_BL, first, rows_B in zip(ids_ABL, labels_ABL, step.first_positions, rows_AB.tolist(), strict=True)
        ]
        return StepBatch(micro_batches, step.epoch, step.cursor_after, step.samples_global, label_tokens)


def eval_batches(
    windows: Windows, *, batch_size: int, rank: int, world: int, num_workers: int = 0
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Input ids and labels (B, L) of this rank's share, in order; each window is in exactly one rank's batches.

    Every rank yields the same number of batches, ceil(windows / (batch_size * world)), all of `batch_size` rows; what is missing
    at the end are filler rows (ids 0, labels -100).
    """
    assert 0 <= rank < world
    plan = _eval_plan(len(windows), batch_size, rank, world)
    for rows_B, ids_BL in _load(windows, plan, num_workers):
        yield ids_BL, ids_BL.masked_fill(torch.from_numpy(rows_B == _FILLER)[:, None], IGNORE_LABEL)


def _eval_plan(count: int, batch_size: int, rank: int, world: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    for start in range(rank * batch_size, count + rank * batch_size, batch_size * world):
        rows_B = np.arange(start, start + batch_size)
        rows_B[rows_B >= count] = _FILLER
        yield rows_B, rows_B


# --- reading, here or in workers ------------------------------------------------------------------------------------------


class _Reader(torch.utils.data.Dataset[Any]):
    """Answers (meta, rows) with (meta, token ids of these rows): what a worker runs."""

    def __init__(self, windows: Windows):
        self._windows = windows

    def __getitem__(self, item: tuple[Meta, np.ndarray]) -> tuple[Meta, torch.Tensor]:
        meta, rows = item
        ids = self._windows.gather(np.maximum(rows, 0))
        ids[torch.from_numpy(rows == _FILLER)] = 0
        return meta, ids


def _load(windows: Windows, plan: Iterable[tuple[Meta, np.ndarray]], num_workers: int) -> Iterator[tuple[Meta, torch.Tensor]]:
    reader = _Reader(windows)
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
