"""What a run learns and how it is measured: the next token, or labels. Loop, stepper and evaluations are the same for both.

Made by `engine/setup.py`, called by `engine/step.py`, `engine/evaluations.py` and `engine/wrap.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from lora_dist.data.loader import MicroBatch
from lora_dist.data.rows import RowBatch
from lora_dist.evaluation.classes import ClassResult, class_logits, evaluate_classes
from lora_dist.evaluation.perplexity import EvalResult, evaluate_loss
from lora_dist.models.loss import causal_loss_sum, class_losses
from lora_dist.parallel import World


class Task(Protocol):
    """What differs between the tasks."""

    @property
    def best(self) -> str:
        """what the best adapter is chosen by"""

    @property
    def classifies(self) -> bool:
        """rows have labels, or numbers to predict"""

    def loss_sum(self, module: nn.Module, batch: MicroBatch, device: torch.device) -> tuple[Tensor, Tensor | None]:
        """The micro-batch's loss, summed, and how many of its rows are classified rightly (None: no such thing), on the device."""

    def take_parts(self) -> dict[str, Tensor]:
        """What the losses since the last call are made of, by name, each summed as they are, on the device; empty: of one thing."""

    def smallest_loss(self, module: nn.Module, device: torch.device) -> Tensor:
        """A forward pass that costs next to nothing."""

    def evaluate(
        self, module: nn.Module, batches: Iterable[RowBatch], *, world: World, samples: int, on_batch: Callable[[], None]
    ) -> EvalResult:
        """Collective at its end."""


class CausalTask:
    """Predict the next token."""

    best = "eval_loss"
    classifies = False

    def loss_sum(self, module: nn.Module, batch: MicroBatch, device: torch.device) -> tuple[Tensor, Tensor | None]:
        ids_BL = batch.input_ids_BL.to(device, non_blocking=True)
        return causal_loss_sum(module, ids_BL, batch.labels_BL, batch.position_ids_BL), None

    def take_parts(self) -> dict[str, Tensor]:
        return {}

    def smallest_loss(self, module: nn.Module, device: torch.device) -> Tensor:
        ids_BL = torch.zeros((1, 2), dtype=torch.long, device=device)
        return causal_loss_sum(module, ids_BL, ids_BL)

    def evaluate(
        self, module: nn.Module, batches: Iterable[RowBatch], *, world: World, samples: int, on_batch: Callable[[], None]
    ) -> EvalResult:
        pairs = ((batch.input_ids_BL, batch.labels_BL) for batch in batches)
        return evaluate_loss(module, pairs, world=world, samples=samples, on_batch=on_batch)


@dataclass(frozen=True)
class ClassTask:
    """Predict a row's label, or its number."""

    metrics: tuple[str, ...]
    best: str
    classifies = True

    def loss_sum(self, module: nn.Module, batch: MicroBatch, device: torch.device) -> tuple[Tensor, Tensor | None]:
        assert batch.attention_mask_BL is not None and batch.targets_B is not None and batch.weights_B is not None
        types_BL = None if batch.token_types_BL is None else batch.token_types_BL.to(device)
        logits_BC = class_logits(module, batch.input_ids_BL.to(device), batch.attention_mask_BL.to(device), types_BL)
        targets_B, weights_B = batch.targets_B.to(device), batch.weights_B.to(device)
        loss = (class_losses(logits_BC, targets_B) * weights_B).sum()
        if targets_B.is_floating_point():
            return loss, None
        return loss, ((logits_BC.detach().argmax(-1) == targets_B) & (weights_B > 0)).sum()

    def take_parts(self) -> dict[str, Tensor]:
        return {}

    def smallest_loss(self, module: nn.Module, device: torch.device) -> Tensor:
        ids_BL = torch.zeros((1, 2), dtype=torch.long, device=device)
        return class_logits(module, ids_BL, torch.ones_like(ids_BL)).float().sum()

    def evaluate(
        self, module: nn.Module, batches: Iterable[RowBatch], *, world: World, samples: int, on_batch: Callable[[], None]
    ) -> ClassResult:
        return evaluate_classes(module, batches, world=world, samples=samples, metrics=self.metrics, on_batch=on_batch)


def figures_of(result: EvalResult) -> Mapping[str, float]:
    """What an evaluation found beside its loss: metrics, or perplexity."""
    return result.metrics if isinstance(result, ClassResult) else {"perplexity": result.perplexity}


def criterion(result: EvalResult, best: str) -> float:
    """Lower is better: the loss, or a metric with its sign turned."""
    return -result.metrics[best] if isinstance(result, ClassResult) and best in result.metrics else result.loss
