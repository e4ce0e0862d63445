"""What becomes of a step whose numbers are wrong: stop, leave its batch out, or go back to the newest checkpoint and on behind it.

Every process sees the same `Problem` (`engine/step.py`) and so decides alike; counters and the losses that a spike is measured against
are in `TrainState`, so a resumed run decides alike too. Each time a post-mortem is written into the run folder. Called by
`engine/loop.py`; every public method but `loss_limit` and `took` is a collective.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import statistics
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from lora_dist.adapter import read_adapter_tensors, split_allocation
from lora_dist.data.loader import StepBatch
from lora_dist.engine.checkpoint import Checkpoint, find_checkpoint, load_checkpoint
from lora_dist.engine.saver import Saver
from lora_dist.engine.setup import Parts
from lora_dist.engine.step import NonFiniteError, Problem, StepResult
from lora_dist.state import POST_MORTEM

SPIKE_WINDOW, SPIKE_HISTORY = 32, 16
"""steps that the median is of, at most and at least"""
_RECENT = 20
_TEXT_ROWS, _TEXT_CHARACTERS = 8, 200

Record = Callable[[str, Mapping[str, float]], None]
Decision = Literal["stop", "skip", "rollback"]


class Health:
    """The policy of one run.

    Args:
        record: takes an event and its values, on every process.
    """

    def __init__(self, parts: Parts, saver: Saver, record: Record):
        self._parts, self._saver, self._record = parts, saver, record
        self._args = parts.config.health

    def loss_limit(self) -> float:
        """The highest loss that is no spike."""
        history = self._parts.state.recent_losses
        if self._args.spike_nats is None or len(history) < SPIKE_HISTORY:
            return math.inf
        return statistics.median(history) + self._args.spike_nats

    def took(self, result: StepResult) -> None:
        """Remember a step that moved the optimizer."""
        state = self._parts.state
        state.recent_losses = [*state.recent_losses, result.loss][-SPIKE_WINDOW:]
        state.recent_grad_norms = [*state.recent_grad_norms, result.grad_norm][-SPIKE_WINDOW:]

    def handle(self, problem: Problem, batch: StepBatch, rate: float) -> Decision:
        """Act on a step that was not taken, and count it in the state: a batch left out is a step, after a rollback the step is that of
        the checkpoint.

        Args:
            batch: this process's part of the step.
            rate: its learning rate.

        Returns:
            skip or rollback.

        Raises:
            NonFiniteError: on every process, where the run has to stop; the state is that of the step before.
        """
        decision, checkpoint, why = self._decide(problem)
        file = self._write_post_mortem(problem, batch, rate, decision, checkpoint, why)
        found = problem.describe()
        if decision == "stop":
            raise NonFiniteError(f"{found}; {why}; see {file}")
        state, console = self._parts.state, self._parts.console
        if decision == "rollback" and checkpoint is not None:
            before = state.step
            self._go_back(checkpoint, batch.cursor_after)
            counted = f"{state.rollbacks} of at most {self._args.max_rollbacks}"
            console.warning(f"{found}: back to {checkpoint.path.name} and on behind this batch ({counted}); see {file}")
            self._record("rollback", {"rollbacks": state.rollbacks, "from_step": before, "cursor": state.cursor})
        else:
            state.step, state.cursor, state.skipped_batches = state.step + 1, batch.cursor_after, state.skipped_batches + 1
            counted = f"{state.skipped_batches} of at most {self._args.max_skips}"
            console.warning(f"{found}: batch left out ({counted}); see {file}")
            self._record("skip", {"skipped_batches": state.skipped_batches, "cursor": state.cursor})
        return decision

    def _decide(self, problem: Problem) -> tuple[Decision, Checkpoint | None, str]:
        """What to do; to where, if back; why, if that ends the run."""
        args, state = self._args, self._parts.state
        if problem.kind == "overflow":
            return "stop", None, "use train.bf16"
        wanted: Decision = "rollback" if problem.kind == "spike" else args.non_finite
        if wanted == "skip" and state.skipped_batches >= args.max_skips:
            return (
                "stop",
                None,
                f"{state.skipped_batches} batches are left out already (health.max_skips): lower train.learning_rate",
            )
        if wanted == "rollback":
            if state.rollbacks >= args.max_rollbacks:
                return (
                    "stop",
                    None,
                    f"rolled back {state.rollbacks} times already (health.max_rollbacks): lower train.learning_rate",
                )
            checkpoint = self._newest_checkpoint()
            if checkpoint is None:
                return "stop", None, "no checkpoint to go back to yet: lower train.learning_rate or train.save_steps"
            return "rollback", checkpoint, ""
        fp16 = ", use train.bf16" if self._parts.strategy.loss_scale is not None else ""
        return (
            wanted,
            None,
            f"lower train.learning_rate{fp16}, or have such batches left out (health.non_finite skip or rollback)",
        )

    # Going back

    def _newest_checkpoint(self) -> Checkpoint | None:
        p = self._parts
        self._saver.wait()

        def find() -> Path | None:
            return find_checkpoint(
                p.output_dir, lambda path, why: p.console.note(f"skipping {path.name}: {why}"), run_id=p.run_id
            )

        path = p.world.on_main(find)
        return load_checkpoint(path) if path is not None else None

    def _go_back(self, checkpoint: Checkpoint, cursor: int) -> None:
        """Adapter, optimizer and state of a checkpoint; the data goes on at `cursor`."""
        p, state = self._parts, self._parts.state
        p.strategy.load_trainable(read_adapter_tensors(p.model, checkpoint.adapter, p.strategy.shapes))
        optimizer, ranks = split_allocation(checkpoint.optimizer)
        p.strategy.load_optimizer_tensors(optimizer)
        if p.allocation is not None:
            p.allocation.load(ranks)
        kept = {
            "cursor": cursor,
            "rollbacks": state.rollbacks + 1,
            "skipped_batches": state.skipped_batches,
            "train_time_s": state.train_time_s,
            "tracker_run_id": state.tracker_run_id,
        }
        for name in (field.name for field in dataclasses.fields(state)):
            setattr(state, name, kept.get(name, getattr(checkpoint.state, name)))
        if p.strategy.loss_scale is not None and state.loss_scale is not None:
            p.strategy.loss_scale.scale, p.strategy.loss_scale.good_steps = state.loss_scale, state.loss_scale_good_steps
        self._saver.went_back()
        p.world.on_main(lambda: p.metrics.drop_after(state.step))  # the abandoned steps, so that none stands there twice

    # The post-mortem

    def _write_post_mortem(
        self, problem: Problem, batch: StepBatch, rate: float, decision: Decision, checkpoint: Checkpoint | None, why: str
    ) -> str:
        """Written by rank 0; its name in the run folder, or why there is none."""
        p, state = self._parts, self._parts.state
        texts = [text for rank in p.world.gather(self._offending_text(problem, batch)) for text in rank]
        recent = list(zip(state.recent_losses, state.recent_grad_norms, strict=True))[-_RECENT:]
        content = {
            "step": problem.step,
            "kind": problem.kind,
            "value": problem.value,
            "found": problem.describe(),
            "policy": self._args.non_finite if problem.kind != "spike" else "rollback",
            "done": decision if checkpoint is None else f"rollback to {checkpoint.path.name}",
            "why_stopped": why if decision == "stop" else None,
            "skipped_batches_before": state.skipped_batches,
            "rollbacks_before": state.rollbacks,
            "ranks": problem.ranks,
            "parameters": problem.parameters,
            "epoch": batch.epoch,
            "cursor": state.cursor,
            "cursor_after": batch.cursor_after,
            "micro_batches": [
                {"rank": rank, "micro_batch": i, **dataclasses.asdict(seen)}
                for rank, each in enumerate(problem.seen)
                for i, seen in enumerate(each)
            ],
            "text": texts,
            "learning_rate": rate,
            "loss_scale": p.strategy.loss_scale.scale if p.strategy.loss_scale is not None else None,
            "recent_steps": [{"loss": loss, "grad_norm": norm} for loss, norm in recent],
            "adapter_norms": p.strategy.trainable_norms(),
            "strategy": p.strategy.name,
            "processes": p.world.size,
            "attempt": p.attempt_number,
            "versions": p.versions,
            "time": datetime.now(UTC).isoformat(timespec="seconds"),
        }
        return p.world.on_main(lambda: _write(p.output_dir, problem.step, content))

    def _offending_text(self, problem: Problem, batch: StepBatch) -> list[dict[str, Any]]:
        """The beginnings of this process's rows that may be to blame."""
        rank = self._parts.world.rank
        seen = problem.seen[rank]
        blamed = [i for i, each in enumerate(seen) if not math.isfinite(each.loss)]
        if not blamed and problem.kind == "spike":
            blamed = [problem.worst()[1]] if problem.worst()[0] == rank else []
        elif not blamed and problem.kind != "loss" and (rank in problem.ranks or not problem.ranks):
            blamed = list(range(len(seen)))
        rows = [(i, row, window) for i in blamed for row, window in enumerate(seen[i].windows) if window >= 0]
        decode = self._parts.base.tokenizer.decode
        return [
            {
                "rank": rank,
                "micro_batch": i,
                "window": window,
                "text": decode(batch.micro_batches[i].input_ids_BL[row].tolist())[:_TEXT_CHARACTERS],
            }
            for i, row, window in rows[:_TEXT_ROWS]
        ]


def _write(run_dir: Path, step: int, content: Mapping[str, Any]) -> str:
    """To a name that is free: a step may go wrong again after a rollback, with another batch."""
    folder = run_dir / POST_MORTEM
    try:
        folder.mkdir(parents=True, exist_ok=True)
        names = (f"step-{step}.json" if n == 1 else f"step-{step}-{n}.json" for n in range(1, 1000))
        file = next(folder / name for name in names if not (folder / name).exists())
        staging = file.with_suffix(".part")
        staging.write_text(json.dumps(_plain(content), indent=1))
        os.replace(staging, file)
    except OSError as error:
        return f"train.log (no post-mortem: {error.strerror})"
    return f"{POST_MORTEM}/{file.name} in {run_dir}"


def _plain(value: Any) -> Any:
    """JSON has no NaN and no infinity: written as text."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, Mapping):
        return {key: _plain(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    return value
