"""Losses, summed: whoever calls divides by the label tokens, or the weights, of the whole optimizer step (design section 6)."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

IGNORE = -100
"""label of a token that does not count"""


def causal_loss_sum(model: nn.Module, input_ids_BL: Tensor, labels_BL: Tensor, position_ids_BL: Tensor | None = None) -> Tensor:
    """Cross-entropy summed over label tokens, float32 scalar.

    Args:
        input_ids_BL: token ids.
        labels_BL: the same ids, -100 where a token does not count; shifted here, so the first column never counts.
        position_ids_BL: rows of several examples: positions that start anew with each, which keeps them apart; None: one sequence a row.

    No attention mask: padding stands behind what counts, where causal attention does not reach.
    """
    positions = {} if position_ids_BL is None else {"position_ids": position_ids_BL}
    logits_BLV = model(input_ids=input_ids_BL, use_cache=False, **positions).logits
    targets = labels_BL[:, 1:].reshape(-1)
    return F.cross_entropy(logits_BLV[:, :-1].flatten(0, 1).float(), targets, ignore_index=IGNORE, reduction="sum")


def class_losses(logits_BC: Tensor, targets_B: Tensor) -> Tensor:
    """A row's cross-entropy of its label number, or squared error of its number to predict; float32 (B,).

    Args:
        logits_BC: C classes, or one number.
        targets_B: int64 label numbers, or float32 numbers.
    """
    if targets_B.is_floating_point():
        return (logits_BC.squeeze(-1).float() - targets_B) ** 2
    return F.cross_entropy(logits_BC.float(), targets_B, reduction="none")
