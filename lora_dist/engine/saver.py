"""Saving while training goes on: a snapshot in memory, a thread on rank 0 that writes it, and what to do when that fails.

Training waits for the copy only. A save waits for the one before it. What became of a save is told to all processes before the next
step; a failed one leaves the last good checkpoint in force, and `train.max_failed_saves` in a row stop the run. A best adapter whose
save failed stays in memory and is written again beside the next one. Called by `engine/loop.py`; every public method but `news`,
`went_back` and `close` is a collective.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from lora_dist.adapter import adapter_tensors, save_adapter
from lora_dist.engine.checkpoint import ADAPTER, list_checkpoints, retain, save_checkpoint
from lora_dist.engine.setup import Parts
from lora_dist.log import UserError, logger
from lora_dist.state import TrainState

RETRY_AFTER_S = 2.0
"""pause before a save that has to succeed is tried again"""

Record = Callable[[str, Mapping[str, float]], None]


@dataclass(frozen=True)
class Snapshot:
    """What a checkpoint is written from, on CPU; on rank 0 only."""

    state: TrainState
    adapter: dict[str, Tensor]
    """by the names in the adapter file"""
    optimizer: dict[str, Tensor]
    norms: dict[str, float]
    """2-norms of the live adapter, by the names in the file, not taken from `adapter`"""
    stall_time_s: float
    """that training waited for the copy"""


@dataclass(frozen=True)
class Outcome:
    """What became of one save."""

    step: int
    path: Path
    problem: str | None
    save_time_s: float
    stall_time_s: float


class Saver:
    """The checkpoints of one run.

    Args:
        record: takes an event and its values, on every process.
    """

    def __init__(self, parts: Parts, record: Record):
        self._parts, self._record = parts, record
        self._max_failed = parts.config.train.max_failed_saves
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="save")  # starts no thread before it is used
        self._running: Future[list[Outcome]] | None = None
        self._owed: Snapshot | None = None  # the best adapter, where its save failed; only the thread touches it while it runs
        self._best: Snapshot | None = None  # to be written again where the run folder is removed under the run; as above
        self._failed_in_a_row = 0
        self.saved_step: int = parts.world.on_main(self._step_on_disk)
        """step of the newest state that is on disk, on every process; -1: none"""
        self._owes_best = False
        self.longest_save_s = 0.0
        self.saves = 0
        """that this attempt has published"""

    def _step_on_disk(self) -> int:
        step = self._parts.state.step
        return step if any(n == step for n, _ in list_checkpoints(self._parts.output_dir)) else -1

    def start(self) -> None:
        """Copy what is to be saved and have it written. Waits for the save before."""
        p = self._parts
        self.wait()
        start = time.perf_counter()
        trained, optimizer = p.strategy.trainable_tensors(), p.strategy.optimizer_tensors()
        if p.allocation is not None:
            optimizer |= p.allocation.tensors()
        norms = self.live_norms()
        if not p.world.is_main:
            return
        snapshot = Snapshot(
            copy.deepcopy(p.state), adapter_tensors(p.model, trained), optimizer, norms, time.perf_counter() - start
        )
        p.console.saving(p.output_dir / f"checkpoint-{p.state.step}")
        self._running = self._thread.submit(self._write, snapshot)

    def live_norms(self) -> dict[str, float]:
        """2-norms of the live adapter, by the names in its file."""
        p = self._parts
        norms = {name: torch.tensor(norm, dtype=torch.float64) for name, norm in p.strategy.trainable_norms().items()}
        return {name: float(norm) for name, norm in adapter_tensors(p.model, norms).items()}

    def ensure_folder(self) -> bool:
        """On rank 0, no collective: make the run folder anew if it was removed or moved under the run; whether it was.

        Raises:
            UserError: it cannot be made, or another run has taken its place.
        """
        assert self._parts.folder is not None
        happened = self._parts.folder.ensure()
        if happened is not None:
            self._parts.console.warning(happened)
        return happened is not None

    @property
    def news(self) -> bool:
        """Whether a save has ended that `absorb` has not told of; on rank 0. No collective."""
        return self._running is not None and self._running.done()

    def wait(self) -> None:
        """Until no save is running, and tell what became of it."""
        if self._parts.world.any(self._running is not None):
            self.absorb()

    def absorb(self) -> None:
        """Waits for the save that is running and tells all processes of it.

        Raises:
            UserError: on every process, for one failure too many in a row.
        """
        p = self._parts
        outcomes: list[Outcome] = p.world.broadcast(self._running.result() if self._running is not None else [])
        self._running = None
        failed = [outcome for outcome in outcomes if outcome.problem is not None]
        self._failed_in_a_row = self._failed_in_a_row + 1 if failed else 0
        for outcome in outcomes:
            if outcome.step == p.state.best_step:
                self._owes_best = outcome.problem is not None
            if outcome.problem is None:
                self._tell_success(outcome)
            else:
                self._tell_failure(outcome)
        if failed and self._failed_in_a_row >= self._max_failed:
            raise UserError(
                f"train.max_failed_saves: {self._failed_in_a_row} checkpoints in a row could not be written, the last because: "
                f"{failed[-1].problem}"
            )

    def surely(self) -> None:
        """Have this step and the best one on disk; tried again until `train.max_failed_saves` in a row have failed.

        Raises:
            UserError: on every process.
        """
        step = self._parts.state.step
        self.wait()
        self._look_again()
        while self.saved_step != step or self._owes_best:
            self.start()
            self.wait()
            if self.saved_step != step or self._owes_best:
                time.sleep(RETRY_AFTER_S)

    def went_back(self) -> None:
        """The run has gone back to a checkpoint, which is what stands on disk now. No save is running. No collective."""
        self.saved_step, self._owes_best, self._owed = self._parts.state.step, False, None

    def _look_again(self) -> None:
        """What was saved may have been removed since: the last step's and the best adapter are to be written again."""
        p, best = self._parts, self._parts.state.best_step

        def missing() -> tuple[bool, bool]:
            self.ensure_folder()
            there = {step for step, _ in list_checkpoints(p.output_dir)}
            best_missing = best not in there and self._best is not None and best == self._best.state.step
            if best_missing and self._owed is None:
                self._owed = self._best
            return self.saved_step not in there, best_missing and best != p.state.step

        step_missing, best_missing = p.world.on_main(missing)
        self.saved_step = -1 if step_missing else self.saved_step
        self._owes_best = self._owes_best or best_missing

    def close(self) -> None:
        """Let a save that is running end, whatever ended the run; its outcome is told to nobody any more but the log."""
        self._thread.shutdown(wait=True)
        if self._running is not None and self._running.exception() is None:
            for outcome in self._running.result():
                self._parts.console.log_only(f"checkpoint-{outcome.step}: {outcome.problem or 'saved'}")

    def _tell_success(self, outcome: Outcome) -> None:
        console = self._parts.console
        self.saved_step, self.saves = outcome.step, self.saves + 1
        self.longest_save_s = max(self.longest_save_s, outcome.save_time_s + outcome.stall_time_s)
        adapter = outcome.path / ADAPTER
        console.saved_files(adapter / "adapter_config.json", adapter / "adapter_model.safetensors")
        console.checkpoint_saved(outcome.step)
        values = {"saved_step": outcome.step, "save_time_s": outcome.save_time_s, "stall_time_s": outcome.stall_time_s}
        self._record("save", values)

    def _tell_failure(self, outcome: Outcome) -> None:
        text = (
            f"checkpoint-{outcome.step} was not saved ({self._failed_in_a_row} of at most {self._max_failed} in a row): "
            f"{outcome.problem}"
        )
        self._parts.console.warning(text)
        if not self._parts.world.is_main:
            logger.info("rank %d: %s", self._parts.world.rank, text)
        self._record("save_failed", {"failed_step": outcome.step, "failed_in_a_row": self._failed_in_a_row})

    # In the thread, on rank 0

    def _write(self, snapshot: Snapshot) -> list[Outcome]:
        owed, self._owed = self._owed, None
        if self._folder_made_anew() and owed is None:
            owed = self._best
        if snapshot.state.step == snapshot.state.best_step:
            self._best = snapshot
        still_best = owed is not None and owed.state.step == snapshot.state.best_step != snapshot.state.step
        outcomes = []
        for each in [owed, snapshot] if still_best and owed is not None else [snapshot]:
            outcome = self._write_one(each, best_step=snapshot.state.best_step)
            outcomes.append(outcome)
            if outcome.problem is not None and each.state.step == snapshot.state.best_step:
                self._owed = each
        return outcomes

    def _folder_made_anew(self) -> bool:
        """Whether the run folder had been removed. What cannot be mended fails the save that follows."""
        try:
            return self.ensure_folder()
        except UserError:
            return False

    def _write_one(self, snapshot: Snapshot, *, best_step: int) -> Outcome:
        p, step = self._parts, snapshot.state.step
        start, problem = time.perf_counter(), None
        try:
            self.ensure_folder()
            save_checkpoint(
                p.output_dir,
                write_adapter=lambda folder: save_adapter(
                    p.model, folder, snapshot.adapter, pattern=p.pattern, base_fingerprint=p.identity.base_fingerprint
                ),
                optimizer=snapshot.optimizer,
                state=snapshot.state,
                identity=p.identity,
                versions=p.versions,
                norms=snapshot.norms,
                run_id=p.run_id,
            )
            retain(p.output_dir, p.config.train.save_total_limit, best_step)
        except (UserError, OSError) as error:  # told by `absorb`; anything else is a bug and ends the run there
            problem = str(error)
        path = p.output_dir / f"checkpoint-{step}"
        return Outcome(step, path, problem, time.perf_counter() - start, snapshot.stall_time_s)
