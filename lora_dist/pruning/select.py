"""Which tiles to drop: the lowest of a whole matrix, or the same number in every block row, or as many as a budget gives the matrix.

    matrix   drops the floor(sparsity * P * Q) lowest tiles of the matrix
    row      drops the floor(sparsity * Q) lowest tiles of each block row: every row of tiles costs hardware the same
    global   drops the lowest tiles of each matrix, how many `budget.py` says: together floor(sparsity * all tiles)

Never more than was asked for: a fraction of a tile cannot be dropped, so matrices of few tiles come out below the requested
sparsity (`row` at 20% drops nothing from a matrix 4 tiles wide). The sums of pruned and of all tiles are printed for that reason.
Both keep at least one tile (of the matrix, or of each row), and break ties by position, so equal scores give equal patterns.
Called by `pruning/prune.py`. P/Q: block rows and columns.
"""

from __future__ import annotations

import math
from typing import Literal, get_args

import torch
from torch import Tensor

Select = Literal["matrix", "row", "global"]
SELECTS: tuple[str, ...] = get_args(Select)


def _keep_all_but_lowest(scores_NM: Tensor, drop: int) -> Tensor:
    """Bool (N, M): False at the `drop` lowest of each row; ties go by position."""
    kept_NM = torch.ones(scores_NM.shape, dtype=torch.bool)
    if drop > 0:
        lowest = torch.sort(scores_NM, dim=1, stable=True).indices[:, :drop]
        kept_NM.scatter_(1, lowest, False)
    return kept_NM


def drop_count(sparsity: float, tiles: int) -> int:
    """Of so many tiles, how many go: rounded down, and never all."""
    if not 0 <= sparsity < 1:
        raise ValueError(f"sparsity: found {sparsity}, expected a number from 0 up to but not including 1")
    return min(math.floor(sparsity * tiles + 1e-9), tiles - 1)  # the small term: 0.29 * 100 is 28.999999999999996


def select_matrix(scores_PQ: Tensor, sparsity: float) -> Tensor:
    """Bool (P, Q), True = kept: all but the floor(sparsity * P * Q) lowest tiles. A block row may lose all of its tiles."""
    return select_lowest(scores_PQ, drop_count(sparsity, scores_PQ.numel()))


def select_lowest(scores_PQ: Tensor, drop: int) -> Tensor:
    """Bool (P, Q), True = kept: all but the `drop` lowest tiles of the matrix."""
    return _keep_all_but_lowest(scores_PQ.reshape(1, -1), drop).view(scores_PQ.shape)


def select_row(scores_PQ: Tensor, sparsity: float) -> Tensor:
    """Bool (P, Q), True = kept: all but the floor(sparsity * Q) lowest tiles of each block row."""
    return _keep_all_but_lowest(scores_PQ, drop_count(sparsity, scores_PQ.shape[1]))


def select_tiles(how: str, scores_PQ: Tensor, sparsity: float) -> Tensor:
    """Bool (P, Q), True = kept, by the named rule."""
    if how == "matrix":
        return select_matrix(scores_PQ, sparsity)
    if how == "row":
        return select_row(scores_PQ, sparsity)
    raise ValueError(f"select: found {how!r}, expected one of {', '.join(SELECTS)}")
