"""What a loader reads from: numbered rows of token ids, whatever they were made of.

Windows of text (`windows.py`), examples (`examples.py`) and packed rows of examples (`packing.py`) are such rows. Letters for shapes:
`B` rows, `L` tokens of the longest of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import numpy as np
from torch import Tensor

FILLER = -1
"""stands for no row: ids 0, labels IGNORE_LABEL"""
IGNORE_LABEL = -100


class RowBatch(NamedTuple):
    """Rows side by side, shorter ones filled up on the right with ids 0 and labels -100. Labels are not shifted."""

    input_ids_BL: Tensor
    labels_BL: Tensor
    position_ids_BL: Tensor | None
    """where they start anew within a row, which then holds several sequences; None: counted from the row's beginning"""
    tokens: int
    """without what was filled up"""
    attention_mask_BL: Tensor | None = None
    """1 for tokens, 0 for what was filled up; None: nothing needs it"""
    targets_B: Tensor | None = None
    """of classified rows: label numbers (int64), or the numbers to predict (float32); such rows have no label tokens"""
    weights_B: Tensor | None = None
    """what each of these counts in the loss, float32; fillers 0"""
    token_types_BL: Tensor | None = None
    """of pairs: 0 for the first text, 1 for the second; None: the model is not told"""

    @property
    def counts(self) -> float:
        """What the loss is divided by: label tokens after the causal shift, or the weights of classified rows."""
        if self.weights_B is not None:
            return float(self.weights_B.double().sum())
        return int((self.labels_BL[:, 1:] != IGNORE_LABEL).sum())


class Rows(Protocol):
    """Rows that are read at random; picklable, so that workers can read them."""

    def __len__(self) -> int: ...

    @property
    def digest(self) -> str:
        """sha256 of all that is trained on: token ids, labels, and what is in one row."""

    @property
    def lengths(self) -> np.ndarray | None:
        """Tokens of each row (N,), int64; None: all of one length."""

    def batch(self, rows: Sequence[int] | np.ndarray) -> RowBatch:
        """These rows, FILLER for none."""
