"""The lines of workflow W1, word for word and in its order, to the terminal and to log files. Rank 0 only.

Takes plain numbers; the loop decides when to call what. Neither a full disk nor a terminal that is gone ends the run.
"""

from __future__ import annotations

import contextlib
import errno
import io
import math
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TextIO

from tqdm import tqdm

from lora_dist.monitor.line_file import LineFile

RULE = "=" * 40
BAR_WIDTH = 33


def clock(seconds: float) -> str:
    """0:01:40, hours without limit."""
    total = int(seconds)
    return f"{total // 3600}:{total % 3600 // 60:02d}:{total % 60:02d}"


def short_rate(rate: float) -> str:
    """A learning rate as people write it: 1e-04, 9.5e-05."""
    mantissa, exponent = f"{rate:.3e}".split("e")
    return f"{mantissa.rstrip('0').rstrip('.')}e{exponent}"


def perplexity_text(value: float) -> str:
    return f"{value:.2f}" if value < 1e7 else f"{value:.3e}"


class ProgressBar:
    """A tqdm bar on stderr whose last state also goes to the log, where a moving bar would be noise."""

    def __init__(self, console: Console, total: int, label: str):
        self._console = console
        self._bar = tqdm(total=total, desc=label, disable=not console.enabled, file=sys.stderr, dynamic_ncols=True, leave=True)

    def update(self) -> None:
        with contextlib.suppress(OSError):  # stderr may be a file on a full disk: a picture less
            self._bar.update()

    def show(self, done: int, text: str) -> None:
        """At so many, with `text` behind the bar."""
        self._bar.bar_format = (
            f"{{desc}}: {{percentage:3.0f}}%|{{bar}}| {text} [{{n_fmt}}/{{total_fmt}}, {{elapsed}}<{{remaining}}]"
        )
        with contextlib.suppress(OSError):
            self._bar.update(done - self._bar.n)

    def clear(self) -> None:
        """Off the screen, until it moves again."""
        with contextlib.suppress(OSError):
            self._bar.clear()

    def close(self) -> None:
        if self._console.enabled:
            line = str(self._bar)
            with contextlib.suppress(OSError):
                self._bar.close()
            self._console.log_only(line)


class Console:
    """Prints on rank 0, and appends the same lines to log files once there are some. `line` may be called from several threads."""

    waits_for_best = False
    """training goes on only when a new best adapter is on disk and told of"""

    def __init__(self, enabled: bool = True, stream: TextIO | None = None):
        self.enabled = enabled
        self._stream = stream or sys.stdout
        self._logs: list[LineFile] = []
        self._pending: list[str] = []
        self._last_line = ""
        self._stream_failing = False

    def open_log(self, *files: Path) -> None:
        """Append to these files from now on, what was printed before included."""
        if self.enabled:
            self._logs = [LineFile(file) for file in files]
            for line in self._pending:
                self.log_only(line)
            self._pending = []

    def close(self) -> None:
        """Try once more to write what could not be written, and tell how much is missing."""
        for log in self._logs:
            log.close()
        self._logs = []
        if self._stream_failing:
            self._give_up_stream()  # or the interpreter would end with code 120 on flushing it

    def log_only(self, line: str) -> None:
        for log in self._logs:
            log.write(line)
        if not self._logs:
            self._pending.append(line)

    def line(self, text: str = "") -> None:
        """Print and log one line; two blank lines never follow each other."""
        if self.enabled and not (text == "" and self._last_line == ""):
            self._last_line = text
            self._print(text)
            self.log_only(text)

    def _print(self, text: str) -> None:
        try:
            print(text, file=self._stream, flush=True)
            self._stream_failing = False
        except OSError as error:  # a file on a full disk, or nobody reads any more
            if not self._stream_failing:
                self.log_only(f"the console's output cannot be written ({error.strerror}): the run goes on")
            self._stream_failing = True
            if error.errno == errno.EPIPE:
                self._give_up_stream()

    def _give_up_stream(self) -> None:
        """Print nowhere from now on."""
        with contextlib.suppress(OSError, io.UnsupportedOperation):
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self._stream.fileno())
            os.close(nowhere)

    def bar(self, total: int, label: str) -> ProgressBar:
        return ProgressBar(self, total, label)

    # Before training

    def model_loaded(self) -> None:
        self.line("✅ Model loaded successfully")
        self.line("Applying LoRA configuration...")

    def adapter_applied(self, trainable: int, total: int, what: str = "LoRA") -> None:
        share = 100 * trainable / total
        self.line(f"trainable params: {trainable:,} || all params: {total:,} || trainable%: {share:.3f}%")
        self.line(f"✅ {what} applied: only {share:.3f}% parameters are trainable")

    def pattern(self, kind: str, block: int, sparsity: float, layers: int, digest: str) -> None:
        tiles = f"{block}x{block} tiles"
        unit = {"block": tiles, "element": "single elements", "mixed": f"{tiles}, in some linears single elements"}[kind]
        self.line(f"✅ Sparsity pattern: {unit}, {sparsity:.2%} of {layers} linears pruned, digest {digest[:12]}")

    def placement(
        self,
        strategy: str,
        processes: int,
        *,
        base_elements: int,
        base_elements_total: int,
        base_bytes: int,
        trainable_elements: int,
    ) -> None:
        """What one process holds under a sharding strategy."""
        share = base_elements / max(1, base_elements_total)
        self.line(
            f"✅ Strategy {strategy} on {processes} process{'es' if processes > 1 else ''}: each holds {share:.1%} of the base "
            f"({base_bytes / 2**30:.3f} GiB) and the optimizer of {trainable_elements:,} parameters"
        )

    def loading_data(self, name: str, config: str | None) -> None:
        self.line(f"Loading dataset '{name}'{f' ({config})' if config else ''}...")

    def data_loaded(self, name: str, *, train: int, evaluation: int, from_cache: bool, wanted_train: int | None) -> None:
        if from_cache:
            self.line(f"Found cached dataset {name}")
        if wanted_train is not None and train < wanted_train:
            self.line(f"ℹ️  {wanted_train:,} training samples asked for, the data has {train:,}: using all")
        self.line("✅ Dataset loaded")
        self.line(f"  - Train samples: {train:,} sequences")
        self.line(f"  - Eval samples: {evaluation:,} sequences")

    def examples(self, kind: str, *, by_columns: bool, template: str | None, answers_only: bool) -> None:
        named = f", template {template}" if template is not None else ""
        learnt = "loss on the answers" if answers_only else "loss on prompts and answers"
        self.line(f"  - Format: {kind}{' (by the columns)' if by_columns else ''}{named}, {learnt}")

    def records(
        self, split: str | None, *, records: int, bad: int, first_bad: str, truncated: int, max_length: int,
        lost_share: float | None,
    ) -> None:  # fmt: skip
        """What became of the records of a split, where there is anything to say.

        Args:
            split: None where there is only one.
            lost_share: of the answers of truncated examples; None: they have no answers.
        """
        where = f" ({split})" if split is not None else ""
        if bad:
            self.line(f"  - Bad records{where}: {bad:,} of {records:,} left out ({first_bad})")
        if truncated:
            lost = "" if lost_share is None else f" (answers lost {lost_share:.0%} of their tokens)"
            self.line(f"  - Truncated{where}: {truncated:,} of {records - bad:,} examples at {max_length} tokens{lost}")

    def packed(self, *, examples: int, rows: int, capacity: int, fill: float) -> None:
        self.line(f"  - Packed: {examples:,} examples in {rows:,} rows of {capacity:,} tokens, {fill:.1%} filled")

    def padding(self, share: float, *, grouped: bool) -> None:
        self.line(f"  - Padding: about {share:.1%} of the tokens computed{', grouped by length' if grouped else ''}")

    def resumed(self, path: Path, step: int, processes: int) -> None:
        self.line(f"✅ Resuming from {path} at step {step} ({processes} process{'es' if processes > 1 else ''})")

    def training_starts(
        self, *, examples: int, epochs: float, micro_batch: int, total_batch: int, accumulation: int, steps: int, trainable: int
    ) -> None:
        self.line()
        self.line("***** Running training *****")
        self.line(f"  Num examples = {examples}")
        self.line(f"  Num Epochs = {epochs:.4g}")
        self.line(f"  Instantaneous batch size per device = {micro_batch}")
        self.line(f"  Total train batch size (w. parallel, distributed & accumulation) = {total_batch}")
        self.line(f"  Gradient Accumulation steps = {accumulation}")
        self.line(f"  Total optimization steps = {steps}")
        self.line(f"  Number of trainable parameters = {trainable:,}")
        self.line()

    # While training

    def step_done(self, *, epoch: int, done: int, steps_per_epoch: int, loss: float, accuracy: float | None) -> None:
        """After every step: means of its epoch (counted from 0) so far. Shown by `EpochConsole`."""

    def epoch_done(self, *, train_loss: float, train_accuracy: float | None) -> None:
        """Of a classifier, where an epoch or the run ends: its means. Shown by `EpochConsole`."""

    def expected_time(self, seconds: float) -> None:
        self.line(f"Expected training time: ~{clock(seconds)}")

    def step(self, *, step: int, total: int, loss: float, rate: float, epoch: float, elapsed_s: float) -> None:
        share = step / total
        filled = max(1, round(share * BAR_WIDTH))
        bar = ("=" * (filled - 1) + ">").ljust(BAR_WIDTH)
        self.line(f"{{'loss': {loss:.4f}, 'learning_rate': {short_rate(rate)}, 'epoch': {round(epoch, 4):g}}}")
        self.line(
            f"Step {step}/{total}   [{bar}] {share:.1%}  | Loss: {loss:.4f} | LR: {short_rate(rate)} | Time: {clock(elapsed_s)}"
        )

    def evaluation_starts(self, samples: int, batch_size: int, *, final: bool = False) -> None:
        self.line()
        self.line("***** Running Final Evaluation *****" if final else "***** Running Evaluation *****")
        self.line(f"  Num examples = {samples}")
        self.line(f"  Batch size = {batch_size}")

    def evaluated(
        self, *, step: int, loss: float, figures: Mapping[str, float], runtime_s: float, samples: int, steps: int, epoch: float,
        better: bool, before: float | None, best: str,
    ) -> None:  # fmt: skip
        """`better`: best so far; `before`: what it is compared with, None for the first: the loss, or the metric `best`, negative."""
        self.line(
            f"{{'eval_loss': {loss:.4f}, 'eval_runtime': {runtime_s:.2f}, 'eval_samples_per_second': {samples / runtime_s:.2f}, "
            f"'eval_steps_per_second': {steps / runtime_s:.2f}, 'epoch': {round(epoch, 4):g}}}"
        )
        self.line(f"Eval at step {step}:")
        self.line(f"  - Eval Loss: {loss:.4f}")
        for name, value in figures.items():
            self.line(f"  - Perplexity: {perplexity_text(value)}" if name == "perplexity" else f"  - Eval {name}: {value:.4f}")
        was = "" if before is None else _compared(before, best, figures)
        if before is None:
            self.line("  - Best so far: Yes ✅ (first evaluation)")
        elif better:
            self.line(f"  - Best so far: Yes ✅ (improved from {was})")
        else:
            self.line(f"  - Best so far: No (best {was})")
        self.line()

    def saving(self, folder: Path) -> None:
        self.line(f"Saving model checkpoint to {folder}")

    def saved_files(self, config: Path, weights: Path) -> None:
        self.line(f"Configuration saved in {config}")
        self.line(f"Model weights saved in {weights}")

    def checkpoint_saved(self, step: int) -> None:
        self.line(f"✅ Checkpoint saved at step {step}")
        self.line()

    def note(self, text: str) -> None:
        self.line(f"ℹ️  {text}")

    def warning(self, text: str) -> None:
        self.line(f"⚠️  {text}")

    # At the end

    def training_done(self, seconds: float) -> None:
        self.line(f"Training completed in {clock(seconds)}")

    def final_results(
        self, *, loss: float, figures: Mapping[str, float], runtime_s: float, samples: int, steps: int, epoch: float,
        first: float | None,
    ) -> None:  # fmt: skip
        """`first`: perplexity at step 0."""
        self.line("***** Final eval results *****")
        self.line(f"  eval_loss = {loss:.4f}")
        self.line(f"  eval_runtime = {runtime_s:.2f}")
        self.line(f"  eval_samples_per_second = {samples / runtime_s:.2f}")
        self.line(f"  eval_steps_per_second = {steps / runtime_s:.2f}")
        for name, value in figures.items():
            self.line(f"  {name} = {perplexity_text(value) if name == 'perplexity' else format(value, '.4f')}")
        self.line(f"  epoch = {round(epoch, 4)}")
        self.line()
        perplexity = figures.get("perplexity")
        if perplexity is None:
            return
        self.line(f"✅ Final Perplexity: {perplexity_text(perplexity)}")
        if first is not None:
            change = 100 * (1 - perplexity / first)
            verb, word = ("Improved", "reduction") if change >= 0 else ("Worsened", "rise")
            self.line(f"   ({verb} from {perplexity_text(first)} → {perplexity_text(perplexity)}, {word}: {abs(change):.2f}%)")
        self.line()

    def tokenizer_saved(self, file: Path) -> None:
        self.line(f"Tokenizer saved in {file}")
        self.line()

    def summary(
        self, *, steps: int, seconds: float, train_loss: float | None, eval_loss: float | None, perplexity: float | None,
        best_checkpoint: str | None,
    ) -> None:  # fmt: skip
        self.line("***** Training summary *****")
        self.line(f"  Total steps: {steps}")
        self.line(f"  Total time: {clock(seconds)}")
        self.line(f"  Final train loss: {train_loss:.4f}" if train_loss is not None else "  Final train loss: none (no step)")
        if eval_loss is not None:
            self.line(f"  Final eval loss: {eval_loss:.4f}")
        if perplexity is not None:
            self.line(f"  Final perplexity: {perplexity_text(perplexity)}")
        if best_checkpoint:
            self.line(f"  Best checkpoint: {best_checkpoint}")
        self.line()

    def complete(self, output_dir: Path, next_steps: Sequence[str], what: str = "LoRA") -> None:
        """`what`: is trained, LoRA or sparse full."""
        self.line(RULE)
        self.line(f"{what} Fine-tuning Complete!")
        self.line(RULE)
        self.line(f"{what} weights saved to: {output_dir}")
        self.line()
        self.line("Next steps:")
        for text in next_steps:
            self.line(text)
        self.line(RULE)


def _compared(before: float, best: str, figures: Mapping[str, float]) -> str:
    """What an evaluation is compared with."""
    if "perplexity" in figures:
        return perplexity_text(math.exp(min(before, 700)))
    return f"{best} {before if best == 'eval_loss' else -before:.4f}"
