"""The forward pass of a causal language model on token ids, without a wait for the device.

transformers asks of every batch's positions whether a row holds several examples, which attention then keeps apart, and waits for the answer
on the device. Whoever made the batch knows it. Called by `loss.py` and `engine/teacher.py`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import masking_utils

_ASKING = "find_packed_sequence_indices"
"""of transformers, from positions (B, L) to the number of each token's example in its row, (B, L), or None: one a row. Where a version has no
such function, it is left to ask in its own way."""


def forward(model: nn.Module, ids_BL: Tensor, positions_BL: Tensor | None) -> Tensor:
    """Logits, or what the head gives in their place.

    Args:
        positions_BL: of rows of several examples: they start anew with each, which keeps them apart; None: one sequence a row. On the host
            they spare a wait for the device.
    """
    if positions_BL is None:
        with _answered(packed=False):
            found = model(input_ids=ids_BL, use_cache=False).logits
    else:
        moved_BL = positions_BL.to(ids_BL.device, non_blocking=True)
        with _answered(packed=bool((positions_BL.diff() != 1).any())):
            found = model(input_ids=ids_BL, use_cache=False, position_ids=moved_BL).logits
    assert isinstance(found, Tensor)
    return found


@contextmanager
def _answered(*, packed: bool) -> Iterator[None]:
    """Within: transformers takes the answer from here."""
    before: Any = getattr(masking_utils, _ASKING, None)
    if before is not None:
        setattr(masking_utils, _ASKING, _numbers if packed else lambda position_ids: None)
    try:
        yield
    finally:
        if before is not None:
            setattr(masking_utils, _ASKING, before)


def _numbers(position_ids: Tensor) -> Tensor:
    """(B, L): the number of each token's example in its row, from 0."""
    starts_BL = position_ids.diff() != 1
    return torch.nn.functional.pad(starts_BL, (1, 0)).cumsum(-1)
