"""One optimizer step: forward and backward over its micro-batches, the gradients' sum, clipping, the update.

The loss is the cross-entropy summed over the label tokens of the whole step (all micro-batches, all processes) divided by their
number, so how a batch is split changes nothing (design section 6). A non-finite loss or gradient stops every process before the
optimizer moves. Called by `engine/loop.py` only.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lora_dist.data.loader import MicroBatch
from lora_dist.log import UserError
from lora_dist.models.loss import causal_loss_sum
from lora_dist.parallel import Strategy, World


class NonFiniteError(UserError):
    """Loss or gradients are not finite; no process has moved its optimizer."""


@dataclass(frozen=True)
class StepResult:
    """What one optimizer step did; equal on all processes."""

    loss: float
    """mean over the step's label tokens, nats"""
    grad_norm: float
    """before clipping"""
    label_tokens: int
    applied: bool
    """False where fp16 overflowed and the update was skipped"""
    step_time_s: float


class Stepper:
    """Takes optimizer steps on a strategy."""

    def __init__(self, strategy: Strategy, world: World):
        self.strategy, self.world = strategy, world

    def run(self, micro_batches: Sequence[MicroBatch], total_tokens: float, *, rate: float, step: int) -> StepResult:
        """Collective. `total_tokens`: label tokens of all ranks; `step`: the number of this step, from 1, for messages.

        Raises:
            NonFiniteError: on every process, naming step and parameter.
        """
        start = time.perf_counter()
        self.strategy.zero_grad()
        if total_tokens == 0:
            raise NonFiniteError(f"step {step}: found no label token in the whole step, expected text")
        loss_sum = self._backward(micro_batches, total_tokens)
        # A wait for the device: the optimizer may move only behind a finite loss.
        loss = self.world.sum([float(loss_sum)])[0] / total_tokens
        if loss - loss != 0.0:
            raise NonFiniteError(
                f"step {step}: found a loss of {loss}, expected a finite one; lower train.learning_rate{self._fp16()}"
            )
        update = self.strategy.update(rate)
        if not update.applied:
            self._not_applied(step)
        return StepResult(loss, update.grad_norm, int(total_tokens), update.applied, time.perf_counter() - start)

    def _backward(self, micro_batches: Sequence[MicroBatch], total_tokens: float) -> Tensor:
        """Gradients of the step's mean loss; returns this rank's loss sum, on the device."""
        device = self.world.device
        loss_sum = torch.zeros((), dtype=torch.float64, device=device)
        for i, batch in enumerate(micro_batches):
            torch.manual_seed(batch.dropout_seed)  # dropout is counted, not carried: same position, same masks
            loss = causal_loss_sum(self.strategy.module, batch.input_ids_BL.to(device), batch.labels_BL.to(device))
            loss_sum += loss.detach().double()
            self.strategy.backward(loss / total_tokens, last=i == len(micro_batches) - 1)
        return loss_sum

    def _not_applied(self, step: int) -> None:
        """Under fp16 an overflow is normal, down to the floor of the scale; anything else stops the run."""
        scale = self.strategy.loss_scale
        if scale is None:
            names = self.strategy.non_finite()
            self.world.agree(None if not names else self._non_finite_gradient(step, names[0], len(names)))
            raise self._non_finite_gradient(step, "the norm", 0)
        if scale.exhausted:
            raise NonFiniteError(f"step {step}: fp16 still overflows at a loss scale of {scale.scale:g}; use train.bf16")

    @staticmethod
    def _non_finite_gradient(step: int, name: str, count: int) -> NonFiniteError:
        return NonFiniteError(
            f"step {step}: found a non-finite gradient in {name} ({count} parameters), expected finite ones; "
            "lower train.learning_rate"
        )

    def _fp16(self) -> str:
        return ", or use train.bf16" if self.strategy.loss_scale is not None else ""
