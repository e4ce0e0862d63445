"""One optimizer step: forward and backward over its micro-batches, the gradients' sum, clipping, the update.

The loss is summed over the label tokens (or labelled rows) of the whole step (all micro-batches, all processes) and divided by their
number, so how a batch is split changes nothing (design section 6). Behind a loss or gradients that are not finite the optimizer does
not move on any process; what was found is reported, and `engine/health.py` decides. Called by `engine/loop.py` only.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal, Protocol

import torch
from torch import Tensor

from lora_dist.data.loader import MicroBatch
from lora_dist.engine.clock import StepClock
from lora_dist.engine.task import CausalTask, Task
from lora_dist.log import UserError
from lora_dist.parallel import Strategy, World

Mark = Callable[[str, int, int], None]
"""told where the process is: phase, step, number of the micro-batch (-1: of none)"""


_LISTED = 8  # samples that a message names


class Allocation(Protocol):
    """What an adapter whose ranks change adds to a step (`adapter/adalora.py`)."""

    def penalty(self) -> Tensor: ...

    def after_update(self, step: int, applied: bool) -> None: ...


class NonFiniteError(UserError):
    """Loss or gradients are not finite; no process has moved its optimizer."""


@dataclass(frozen=True)
class Seen:
    """What a process saw of one of its micro-batches."""

    loss: float
    """mean over the micro-batch's label tokens, nats; 0 without any"""
    label_tokens: int
    windows: tuple[int, ...]
    """numbers of its training windows; -1: filler"""


@dataclass(frozen=True)
class Problem:
    """Why a step was not taken; equal on all processes."""

    step: int
    kind: Literal["loss", "gradient", "overflow", "spike"]
    """`overflow`: fp16 overflows at the smallest loss scale; `spike`: a loss above the limit that was given"""
    value: float
    """the loss; where it is finite and no spike, the gradients' norm"""
    parameters: tuple[str, ...]
    """with non-finite gradients on any process, in the model's order"""
    ranks: tuple[int, ...]
    """whose micro-batches it came from; empty where only the sum over processes is known"""
    seen: tuple[tuple[Seen, ...], ...]
    """by rank, by micro-batch"""

    def describe(self) -> str:
        """What was found, where, and what was expected."""
        if self.kind in ("gradient", "overflow"):
            windows = [n for r in self.ranks for seen in self.seen[r] for n in seen.windows]
            where = (
                f"rank {', '.join(map(str, self.ranks))}, samples {_listed(windows)}" if self.ranks else "the sum over processes"
            )
            if self.kind == "overflow":
                return f"step {self.step}: fp16 still overflows at the smallest loss scale ({where})"
            name = self.parameters[0] if self.parameters else "their norm"
            return (
                f"step {self.step}: found a non-finite gradient in {name} ({len(self.parameters)} parameters; {where}), "
                "expected finite ones"
            )
        rank, batch = self.worst()
        where = f"rank {rank}, micro-batch {batch}, samples {_listed(self.seen[rank][batch].windows)}"
        expected = "a finite one" if self.kind == "loss" else "one near those before it"
        return f"step {self.step}: found a loss of {self.value} ({where}), expected {expected}"

    def worst(self) -> tuple[int, int]:
        """(rank, micro-batch) with the first loss that is not finite, else with the highest."""
        found = [(r, b, seen.loss) for r, each in enumerate(self.seen) for b, seen in enumerate(each)]
        rank, batch, _ = max(found, key=lambda entry: (not math.isfinite(entry[2]), math.isfinite(entry[2]) and entry[2]))
        return rank, batch


def _listed(windows: Sequence[int]) -> str:
    real = [str(n) for n in windows if n >= 0]
    return ", ".join(real[:_LISTED]) + (f" and {len(real) - _LISTED} more" if len(real) > _LISTED else "")


@dataclass(frozen=True)
class StepResult:
    """What one optimizer step did; equal on all processes."""

    loss: float
    """mean over the step's label tokens, nats"""
    grad_norm: float
    """before clipping; not a number where the loss alone stopped the step"""
    label_tokens: int
    applied: bool
    """False where nothing moved: fp16 overflowed, or there is a problem"""
    step_time_s: float
    problem: Problem | None = None
    correct: int | None = None
    """rows that were classified rightly in the forward pass of training, over all processes; None: not a classifier"""
    parts: Mapping[str, float] = field(default_factory=dict)
    """what the loss is made of, means over the step's label tokens"""


class Stepper:
    """Takes optimizer steps on a strategy."""

    def __init__(self, strategy: Strategy, world: World, allocation: Allocation | None = None, task: Task | None = None):
        self.strategy, self.world, self._allocation, self._task = strategy, world, allocation, task or CausalTask()
        self.clock = StepClock(world.device)
        self._correct: list[Tensor] = []
        self._losses: list[Tensor] = []  # of this rank's micro-batches, sums over label tokens, on the device

    def run(
        self,
        micro_batches: Sequence[MicroBatch],
        total_tokens: float,
        *,
        rate: float,
        step: int,
        loss_limit: float = math.inf,
        mark: Mark = lambda phase, step, micro_batch: None,
    ) -> StepResult:
        """Collective. `total_tokens`: label tokens of all ranks; `step`: the number of this step, from 1, for messages.

        Args:
            loss_limit: a loss above it is a problem, and the step is not taken.
            mark: told of every phase.

        Raises:
            NonFiniteError: on every process, for a step without any label token.
        """
        start = time.perf_counter()
        self.strategy.zero_grad()
        if total_tokens == 0:
            what = "example that counts (train.class_weights)" if self._task.classifies else "label token"
            raise NonFiniteError(f"step {step}: found no {what} in the whole step, expected some")
        loss_sum = self._backward(micro_batches, total_tokens, step, mark)
        mark("agreeing on the loss", step, -1)
        with self.clock.device("optimizer"):
            result = self._update(micro_batches, loss_sum, total_tokens, rate, step, loss_limit, mark)
        return replace(result, step_time_s=time.perf_counter() - start)

    def _update(
        self,
        micro_batches: Sequence[MicroBatch],
        loss_sum: Tensor,
        total_tokens: float,
        rate: float,
        step: int,
        loss_limit: float,
        mark: Mark,
    ) -> StepResult:
        """Collective: agree on the loss, sum and clip the gradients, move."""
        # A wait for the device: the optimizer may move only behind a finite loss.
        parts = self._task.take_parts()
        own = [float(loss_sum), *map(float, parts.values()), *([float(sum(self._correct))] if self._correct else [])]
        loss, *rest = self.world.sum(own)
        loss /= total_tokens
        means = {name: value / total_tokens for name, value in zip(parts, rest, strict=False)}
        correct = rest[len(parts) :]
        finite = math.isfinite(loss)
        problem, norm, applied = None, math.nan, False
        if finite and loss <= loss_limit:
            mark("the optimizer's step", step, -1)
            update = self.strategy.update(rate)
            norm, applied = update.grad_norm, update.applied
            if self._allocation is not None:
                self._allocation.after_update(step, applied)
            if not applied:
                problem = self._not_applied(step, norm, micro_batches)
        else:
            problem = self._problem(step, "spike" if finite else "loss", loss, micro_batches)
            self.strategy.discard()
        return StepResult(loss, norm, int(total_tokens), applied, 0.0, problem, int(correct[0]) if correct else None, means)

    def _backward(self, micro_batches: Sequence[MicroBatch], total_tokens: float, step: int, mark: Mark) -> Tensor:
        """Gradients of the step's mean loss; returns this rank's loss sum, on the device."""
        device = self.world.device
        loss_sum = torch.zeros((), dtype=torch.float64, device=device)
        self._losses.clear()
        self._correct.clear()
        for i, batch in enumerate(micro_batches):
            mark("forward and backward", step, i)
            torch.manual_seed(batch.dropout_seed)  # dropout is counted, not carried: same position, same masks
            with self.clock.device("forward"):
                loss, correct = self._task.loss_sum(self.strategy.module, batch, device)
            self._losses.append(loss.detach())
            if correct is not None:
                self._correct.append(correct)
            loss_sum += loss.detach().double()
            share = loss / total_tokens
            if self._allocation is not None and i == 0 and self.world.is_main:  # once a step: gradients are summed
                share = share + self._allocation.penalty()
            with self.clock.device("backward"):
                self.strategy.backward(share, last=i == len(micro_batches) - 1)
        return loss_sum

    def _not_applied(self, step: int, norm: float, micro_batches: Sequence[MicroBatch]) -> Problem | None:
        """Collective. Under fp16 an overflow is normal, down to the floor of the scale; anything else is a problem."""
        scale = self.strategy.loss_scale
        if scale is not None and not scale.exhausted:
            return None
        return self._problem(step, "gradient" if scale is None else "overflow", norm, micro_batches)

    def _problem(
        self, step: int, kind: Literal["loss", "gradient", "overflow", "spike"], value: float, micro_batches: Sequence[MicroBatch]
    ) -> Problem:
        """Collective: what every process saw of the step, put together."""
        seen = []
        for batch, loss in zip(micro_batches, self._losses, strict=True):
            counts = batch.counts
            seen.append(Seen(float(loss) / (counts or 1), int(counts), batch.windows))
        own = self.strategy.own_gradients_finite() if kind in ("gradient", "overflow") else None
        everywhere = self.world.gather((tuple(seen), self.strategy.non_finite(), own))
        bad_names = {name for _, names, _ in everywhere for name in names}
        if kind == "loss":
            ranks = [r for r, (each, _, _) in enumerate(everywhere) if not all(math.isfinite(s.loss) for s in each)]
        elif kind == "spike":
            ranks = list(range(self.world.size))
        else:
            ranks = [r for r, (_, _, finite) in enumerate(everywhere) if finite is False]
        parameters = tuple(name for name in self.strategy.trainable if name in bad_names)
        return Problem(step, kind, value, parameters, tuple(ranks), tuple(each for each, _, _ in everywhere))
