"""The evaluations of a run: what they find goes to console, metrics and `TrainState`. Called by `engine/loop.py`."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping
from typing import Any

from lora_dist.data.loader import eval_row_batches
from lora_dist.engine.setup import Parts
from lora_dist.engine.step import Mark
from lora_dist.engine.task import criterion, figures_of
from lora_dist.evaluation.perplexity import EvalResult
from lora_dist.log import UserError

Record = Callable[[str, Mapping[str, float]], None]


class Evaluations:
    """Loss and perplexity on the evaluation rows, which the run has to have.

    Args:
        record: takes an event and its values, on every process.
        on_batch: called after every batch on every process; what it raises breaks the evaluation off, without a trace in the state.
        mark: told of every batch before it: phase, step, number.
    """

    def __init__(self, parts: Parts, record: Record, on_batch: Callable[[], None], mark: Mark):
        self._parts, self._record, self._on_batch, self._mark = parts, record, on_batch, mark
        self.times_s: list[float] = []

    def run(self) -> bool:
        """Collective: evaluate now; whether it is the best so far. The first one (of the pruned model) is best, but nothing to save."""
        p, state = self._parts, self._parts.state
        result = self._measure(final=False)
        if state.step == 0 and not math.isfinite(result.loss):
            raise UserError(f"evaluation at step 0: found a loss of {result.loss} before any training: the base itself is broken")
        before = state.best_metric
        found = criterion(result, p.task.best)
        better = before is None or found < before - p.config.train.early_stopping_threshold
        if state.step == 0:
            state.first_eval_loss = result.loss
        if better:
            state.best_metric, state.best_step, state.evals_without_improvement = found, state.step, 0
        else:
            state.evals_without_improvement += 1
        p.console.evaluated(
            step=state.step,
            **self._figures(result),
            better=better,
            before=before,
            best=p.task.best,
        )
        self._write("eval", result)
        return better and state.step > 0

    def run_final(self) -> EvalResult:
        """Collective: evaluate what the run ends with."""
        p, state = self._parts, self._parts.state
        result = self._measure(final=True)
        first = None if state.first_eval_loss is None else math.exp(min(state.first_eval_loss, 700))
        p.console.final_results(**self._figures(result), first=first if p.task.best == "eval_loss" else None)
        self._write("final", result)
        return result

    def _measure(self, *, final: bool) -> EvalResult:
        p, batch_size = self._parts, self._parts.config.train.per_device_eval_batch_size
        assert p.eval_rows is not None
        p.console.evaluation_starts(len(p.eval_rows), batch_size, final=final)
        bar = p.console.bar(math.ceil(len(p.eval_rows) / (batch_size * p.world.size)), "Evaluating")
        batches = eval_row_batches(p.eval_rows, batch_size=batch_size, rank=p.world.rank, world=p.world.size)

        done = itertools.count(1)
        self._mark("evaluation", p.state.step, 0)
        p.stepper.clock.now = "evaluation"

        def on_batch() -> None:
            bar.update()
            self._on_batch()
            self._mark("evaluation", p.state.step, next(done))

        try:
            result = p.task.evaluate(p.strategy.module, batches, world=p.world, samples=len(p.eval_rows), on_batch=on_batch)
        finally:
            bar.close()
        p.stepper.clock.now = ""
        self.times_s.append(result.runtime_s)
        return result

    def _epoch(self) -> float:
        return self._parts.state.cursor / len(self._parts.train_rows)

    def _figures(self, result: EvalResult) -> dict[str, Any]:
        """What the console shows of an evaluation."""
        return {
            "loss": result.loss,
            "figures": figures_of(result),
            "runtime_s": result.runtime_s,
            "samples": result.samples,
            "steps": result.steps,
            "epoch": self._epoch(),
        }

    def _write(self, event: str, result: EvalResult) -> None:
        self._record(
            event,
            {
                "eval_loss": result.loss,
                **figures_of(result),
                "eval_runtime_s": result.runtime_s,
                "eval_tokens": result.tokens,
                "epoch": self._epoch(),
            },
        )
