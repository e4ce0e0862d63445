"""Losses, summed: whoever calls divides by the label tokens, or the weights, of the whole optimizer step (design section 6)."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from lora_dist.models.chunked import IGNORE, chunked_head
from lora_dist.models.lesson import Lesson
from lora_dist.models.packed import forward

__all__ = ["IGNORE", "causal_loss_sum", "class_losses"]


def causal_loss_sum(
    model: nn.Module, input_ids_BL: Tensor, labels_BL: Tensor, position_ids_BL: Tensor | None = None, lesson: Lesson | None = None
) -> Tensor:
    """Cross-entropy summed over label tokens, float32 scalar.

    Args:
        input_ids_BL: token ids.
        labels_BL: the same ids, -100 where a token does not count; shifted here, so the first column never counts. On the host they
            spare a wait for the device.
        position_ids_BL: as `packed.forward` takes them.

    A `ChunkedHead` that losses may be taken from (`chunked.py`) computes it without logits. No attention mask: padding stands behind what
    counts, where causal attention does not reach.
    """
    head = chunked_head(model)
    if head is not None and head.chunked and (lesson is None or lesson.chunked):
        with head.scoring(labels_BL, lesson):
            return forward(model, input_ids_BL, position_ids_BL)
    logits_BLV = forward(model, input_ids_BL, position_ids_BL)
    targets_T = labels_BL[:, 1:].reshape(-1).to(logits_BLV.device, non_blocking=True)
    logits_TV = logits_BLV[:, :-1].flatten(0, 1).float()
    cross_entropy = F.cross_entropy(logits_TV, targets_T, ignore_index=IGNORE, reduction="sum")
    if lesson is None:
        return cross_entropy
    counted_N = (targets_T != IGNORE).nonzero().squeeze(1)
    lesson.select(counted_N, len(targets_T))
    return lesson.note(cross_entropy, lesson.divergence(logits_TV[counted_N]))


def class_losses(logits_BC: Tensor, targets_B: Tensor) -> Tensor:
    """A row's cross-entropy of its label number, or squared error of its number to predict; float32 (B,).

    Args:
        logits_BC: C classes, or one number.
        targets_B: int64 label numbers, or float32 numbers.
    """
    if targets_B.is_floating_point():
        return (logits_BC.squeeze(-1).float() - targets_B) ** 2
    return F.cross_entropy(logits_BC.float(), targets_B, reduction="none")
