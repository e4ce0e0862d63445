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
from lora_dist.parallel import Replicated, World

MIN_LOSS_SCALE = 1.0
"""below this, fp16 overflow is no longer the scale's fault"""


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
    """Holds what every step needs: strategy, optimizer, clipping and the fp16 scale.

    Args:
        max_grad_norm: clip to this global norm; 0 clips nothing.
        scaler: for fp16, else None.
    """

    def __init__(
        self,
        strategy: Replicated,
        optimizer: torch.optim.Optimizer,
        world: World,
        *,
        max_grad_norm: float,
        scaler: torch.amp.GradScaler | None,
    ):
        self.strategy, self.optimizer, self.world = strategy, optimizer, world
        self.max_grad_norm, self.scaler = max_grad_norm, scaler

    def run(self, micro_batches: Sequence[MicroBatch], label_tokens: int, *, rate: float, step: int) -> StepResult:
        """Collective. `label_tokens` is this rank's count; `step` is the number of this step, from 1, for messages.

        Raises:
            NonFiniteError: on every process, naming step and parameter.
        """
        start = time.perf_counter()
        self.strategy.zero_grad()
        total_tokens = self.world.sum([float(label_tokens)])[0]
        if total_tokens == 0:
            raise NonFiniteError(f"step {step}: found no label token in the whole step, expected text")
        loss_sum = self._backward(micro_batches, total_tokens)
        self.strategy.reduce_gradients()
        if self.scaler is not None:
            self.scaler.unscale_(self.optimizer)
        norm = self.strategy.grad_norm()
        # One wait for the device a step: both numbers are needed before the optimizer may move.
        loss = self.world.sum([float(loss_sum)])[0] / total_tokens
        grad_norm = float(norm)
        applied = self._update(loss, grad_norm, norm, rate, step)
        return StepResult(loss, grad_norm, int(total_tokens), applied, time.perf_counter() - start)

    def _backward(self, micro_batches: Sequence[MicroBatch], total_tokens: float) -> Tensor:
        """Gradients of the step's mean loss; returns this rank's loss sum, on the device."""
        device = self.world.device
        loss_sum = torch.zeros((), dtype=torch.float64, device=device)
        for batch in micro_batches:
            torch.manual_seed(batch.dropout_seed)  # dropout is counted, not carried: same position, same masks
            loss = causal_loss_sum(self.strategy.module, batch.input_ids_BL.to(device), batch.labels_BL.to(device))
            loss_sum += loss.detach().double()
            mean = loss / total_tokens
            (mean if self.scaler is None else self.scaler.scale(mean)).backward()
        return loss_sum

    def _update(self, loss: float, grad_norm: float, norm: Tensor, rate: float, step: int) -> bool:
        finite_norm = grad_norm - grad_norm == 0.0
        if loss - loss != 0.0:
            raise NonFiniteError(
                f"step {step}: found a loss of {loss}, expected a finite one; lower train.learning_rate{self._fp16()}"
            )
        if not finite_norm and self.scaler is None:
            names = self.strategy.non_finite()
            raise NonFiniteError(
                f"step {step}: found a non-finite gradient in {names[0] if names else 'the norm'} ({len(names)} parameters), "
                "expected finite ones; lower train.learning_rate"
            )
        if self.max_grad_norm > 0 and finite_norm:
            self.strategy.scale_gradients(torch.clamp(self.max_grad_norm / (norm + 1e-6), max=1.0))
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        if self.scaler is None:
            self.optimizer.step()
            return True
        self.scaler.step(self.optimizer)
        self.scaler.update()
        if not finite_norm and self.scaler.get_scale() < MIN_LOSS_SCALE:
            raise NonFiniteError(
                f"step {step}: fp16 still overflows at a loss scale of {self.scaler.get_scale():g}; use train.bf16"
            )
        return finite_norm

    def _fp16(self) -> str:
        return ", or use train.bf16" if self.scaler is not None else ""
