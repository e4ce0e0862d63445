"""Mean training loss and accuracy of an epoch, kept in `TrainState`, so that a resumed run tells those of whole epochs too.

Called by `engine/loop.py` after every step, and where an epoch or the run ends. Only classifiers are told of by epochs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from lora_dist.data.loader import StepBatch
from lora_dist.engine.setup import Parts
from lora_dist.engine.step import StepResult

Record = Callable[[str, Mapping[str, float]], None]


class Tally:
    """The sums of one run's current epoch; they stay until the next one's first step.

    Args:
        record: takes an event and its values, on every process.
    """

    def __init__(self, parts: Parts, record: Record):
        self._parts, self._record = parts, record

    def add(self, batch: StepBatch, result: StepResult, total: float) -> None:
        """One step that was taken.

        Args:
            total: what its loss was divided by.
        """
        p, state = self._parts, self._parts.state
        if state.tally_epoch != batch.epoch:
            state.tally_epoch, state.tally_steps, state.tally_loss, state.tally_counts = batch.epoch, 0, 0.0, 0.0
            state.tally_correct, state.tally_rows = 0, 0
        state.tally_steps += 1
        state.tally_loss += result.loss * total
        state.tally_counts += total
        if result.correct is not None:
            state.correct_window, state.rows_window = (
                state.correct_window + result.correct,
                state.rows_window + batch.samples_global,
            )
            state.tally_correct, state.tally_rows = state.tally_correct + result.correct, state.tally_rows + batch.samples_global
        p.console.step_done(
            epoch=batch.epoch,
            done=state.tally_steps,
            steps_per_epoch=p.loader.steps_per_epoch,
            loss=state.tally_loss / state.tally_counts,
            accuracy=self._accuracy(),
        )

    def window_accuracy(self) -> dict[str, float]:
        """Of the rows since the last call, under its name; empty where there is no such thing."""
        state = self._parts.state
        found = {"accuracy": state.correct_window / state.rows_window} if state.rows_window else {}
        state.correct_window = state.rows_window = 0
        return found

    def epoch_ends(self) -> bool:
        """Whether the last step was an epoch's; of such a one, and of the run's last, a classifier's means are told and recorded."""
        p, state = self._parts, self._parts.state
        ends = state.cursor % len(p.train_rows) == 0
        if p.task.classifies and state.tally_counts and (ends or state.step == p.total_steps):
            loss, accuracy = state.tally_loss / state.tally_counts, self._accuracy()
            p.console.epoch_done(train_loss=loss, train_accuracy=accuracy)
            means = {"train_loss": loss} if accuracy is None else {"train_loss": loss, "train_accuracy": accuracy}
            self._record("epoch", {**means, "epoch": state.cursor / len(p.train_rows)})
        return ends

    def _accuracy(self) -> float | None:
        state = self._parts.state
        return state.tally_correct / state.tally_rows if state.tally_rows else None
