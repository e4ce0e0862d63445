"""A piece of a stored weight as rectangles of its (O, I) matrix, on which a mask can be laid. Called by `guard.py`."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise

from torch import Tensor

from lora_dist.blocks.piece import Piece


@dataclass(frozen=True)
class Rectangle:
    """A rectangle of an (O, I) matrix.

    Attributes:
        weight_OI: its elements, a view (rows, columns) of what the process holds.
        at: out feature and in feature of its first element.
    """

    weight_OI: Tensor
    at: tuple[int, int] = (0, 0)


def rectangles(piece: Piece, transposed: bool = False) -> list[Rectangle]:
    """Views of a piece of a matrix: what it holds of its first row, its full rows, what it holds of its last row.

    Args:
        piece: of a matrix (O, I), or (I, O) where `transposed`.
        transposed: whether the matrix is stored as (I, O).

    Returns:
        Up to three rectangles that together hold every element of the piece once, in the order of storage. None for an empty
        piece, one for whole rows. A tile may lie in several of them.

    Raises:
        ValueError: if the piece reaches beyond its matrix.
    """
    tensor = piece.tensor.detach()
    stop = piece.start + tensor.numel()
    if piece.start < 0 or stop > math.prod(piece.shape):
        raise ValueError(f"piece: found elements {piece.start} to {stop}, expected a range inside a matrix of {piece.shape}")
    if not tensor.numel():
        return []
    if tuple(tensor.shape) == piece.shape:
        stored = [Rectangle(tensor)]  # a whole weight need not be contiguous
    else:
        columns = piece.shape[1]
        full_rows = -(-piece.start // columns) * columns, stop // columns * columns  # from and to, counted in elements
        edges = [piece.start, *sorted({edge for edge in full_rows if piece.start < edge < stop}), stop]  # neither inside one row
        flat = tensor.view(-1)
        stored = [
            Rectangle(
                flat[first - piece.start : last - piece.start].view(max((last - first) // columns, 1), -1),
                divmod(first, columns),
            )
            for first, last in pairwise(edges)
        ]
    if transposed:
        return [Rectangle(part.weight_OI.T, part.at[::-1]) for part in stored]
    return stored
