"""The console of workflow W3: a classifier's run told by epochs, while it goes on. Rank 0 only.

Used by `scripts/train_lora_basic.py` in place of `Console`, whose remaining lines it keeps; what it leaves out stands in the log.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

from lora_dist.monitor.console import Console, ProgressBar, clock

_SHORT = {"accuracy": "acc"}


class EpochConsole(Console):
    """A bar and two lines an epoch in place of lines by steps."""

    waits_for_best = True

    def __init__(self, enabled: bool = True, stream: TextIO | None = None):
        super().__init__(enabled, stream)
        self._epochs = 1
        self._epoch = -1
        self._bar: ProgressBar | None = None
        self._better: tuple[int, str] | None = (
            None  # step of the best adapter that is not told to be saved yet, and why it is best
        )

    def adapter_applied(self, trainable: int, total: int, what: str = "LoRA") -> None:
        self.line("📊 Parameter Statistics:")
        for name, value in (("Total", total), ("Trainable", trainable), ("Frozen", total - trainable)):
            self.line(f"  {name + ' parameters:':<22}{value:>17,}")
        self.line(f"  {'Trainable percentage:':<22}{100 * trainable / total:>16.2f}%")

    def training_starts(self, *, epochs: float, **facts: Any) -> None:
        self._epochs = max(1, math.ceil(epochs))
        super().training_starts(epochs=epochs, **facts)

    def step_done(self, *, epoch: int, done: int, steps_per_epoch: int, loss: float, accuracy: float | None) -> None:
        if epoch != self._epoch:
            self._close_bar()
            self._epoch = epoch
            self.line(f"📝 Epoch {epoch + 1}/{self._epochs}")
        if self._bar is None:
            self._bar = self.bar(steps_per_epoch, "Training")
        self._bar.show(done, f"loss: {loss:.4f}" + ("" if accuracy is None else f", acc: {accuracy:.4f}"))

    def epoch_done(self, *, train_loss: float, train_accuracy: float | None) -> None:
        self._close_bar()
        self.line(f"  Train Loss: {train_loss:.4f}" + ("" if train_accuracy is None else f" | Train Acc: {train_accuracy:.4f}"))

    def evaluation_starts(self, samples: int, batch_size: int, *, final: bool = False) -> None:
        self._close_bar()

    def evaluated(
        self, *, step: int, loss: float, figures: Mapping[str, float], better: bool, best: str, **_rest: Any,
    ) -> None:  # fmt: skip
        if step == 0:
            self.line("Before training:")
        self.line(
            f"  Eval Loss:  {loss:.4f}" + "".join(f" | Eval {_title(name)}:  {value:.4f}" for name, value in figures.items())
        )
        if better and step > 0:
            self._better = (step, _reason(best, loss, figures))

    def checkpoint_saved(self, step: int) -> None:
        self.log_only(f"Checkpoint saved at step {step}")
        if self._better is not None and self._better[0] == step:
            self.line(f"  💾 Best model saved! ({self._better[1]})")
            self._better = None

    def step(self, *, step: int, total: int, loss: float, rate: float, epoch: float, elapsed_s: float) -> None:
        self.log_only(f"step {step}/{total}: loss {loss:.4f}, learning rate {rate:.3e}, epoch {epoch:.3f}, {clock(elapsed_s)}")

    def saving(self, folder: Path) -> None:
        self.log_only(f"Saving model checkpoint to {folder}")

    def saved_files(self, config: Path, weights: Path) -> None:
        self.log_only(f"Model weights saved in {weights}")

    def tokenizer_saved(self, file: Path) -> None:
        self.log_only(f"Tokenizer saved in {file}")

    def expected_time(self, seconds: float) -> None:
        self.log_only(f"Expected training time: ~{clock(seconds)}")

    def final_results(
        self, *, loss: float, figures: Mapping[str, float], samples: int, **_rest: Any,
    ) -> None:  # fmt: skip
        found = "".join(f", {name} {value:.4f}" for name, value in figures.items())
        self.line(f"✅ The adapter in the run's folder, on {samples:,} examples: loss {loss:.4f}{found}")

    def complete(self, output_dir: Path, next_steps: Sequence[str], what: str = "LoRA") -> None:
        self.line(f"LoRA weights saved to: {output_dir}")
        for text in next_steps:
            self.line(text)

    def _print(self, text: str) -> None:
        if self._bar is not None:
            self._bar.clear()  # or the line would stand behind it
        super()._print(text)

    def _close_bar(self) -> None:
        bar, self._bar = self._bar, None
        if bar is not None:
            bar.close()


def _title(name: str) -> str:
    return _SHORT.get(name, name).capitalize() if name in (*_SHORT, "f1", "pearson") else name


def _reason(best: str, loss: float, figures: Mapping[str, float]) -> str:
    """What chose the best adapter, and its value."""
    return f"eval_{_SHORT.get(best, best)}: {figures[best]:.4f}" if best in figures else f"eval_loss: {loss:.4f}"
