"""Loss and perplexity over packed windows, token-weighted, spread over all processes.

perplexity = exp(sum of token losses / number of label tokens). Called by `engine/loop.py` and by `lora-dist eval`.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lora_dist.models.loss import IGNORE, causal_loss_sum
from lora_dist.parallel import World


@dataclass(frozen=True)
class EvalResult:
    """One evaluation, over all processes."""

    loss: float
    """mean cross-entropy a label token, nats"""
    tokens: int
    samples: int
    steps: int
    """batches a process"""
    runtime_s: float

    @property
    def perplexity(self) -> float:
        """exp(loss); infinite where that overflows."""
        return math.exp(self.loss) if self.loss < 700 else math.inf


@torch.no_grad()
def evaluate_loss(
    model: nn.Module,
    batches: Iterable[tuple[Tensor, Tensor]],
    *,
    world: World,
    samples: int,
    on_batch: Callable[[], None] | None = None,
) -> EvalResult:
    """Mean loss of `model` over `batches`.

    Args:
        batches: this rank's (input ids, labels), the same number on every rank (filler rows have labels of -100 only).
        samples: rows over all ranks, for the report.
        on_batch: called after each batch (progress); what it raises ends the evaluation.

    Collective at its end. The model's train/eval mode is restored.

    Raises:
        ValueError: no label token at all.
    """
    was_training = model.training
    model.eval()
    start, steps, label_tokens = time.perf_counter(), 0, 0
    loss_sum = torch.zeros((), dtype=torch.float64, device=world.device)
    try:
        for input_ids_BL, labels_BL in batches:
            label_tokens += int((labels_BL[:, 1:] != IGNORE).sum())
            loss_sum += causal_loss_sum(model, input_ids_BL.to(world.device), labels_BL).double()
            steps += 1
            if on_batch is not None:
                on_batch()
        total, tokens = world.sum([float(loss_sum), float(label_tokens)])
    finally:
        model.train(was_training)
    if tokens == 0:
        raise ValueError("evaluation: found no label token, expected text of 2 tokens or more")
    return EvalResult(total / tokens, int(tokens), samples, steps, time.perf_counter() - start)
