"""This process's part of a stored tensor. Crosses rooms as a plain value: strategies cut tensors, the guard checks the pieces."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Piece:
    """A contiguous range of a tensor's elements in row-major order: whole, some of its rows, or a flat slice that cuts rows.

    Attributes:
        tensor: the range itself, contiguous, of any shape; kept by reference. May be empty.
        shape: of the whole tensor as stored.
        start: number of the range's first element in the whole tensor.
    """

    tensor: Tensor
    shape: tuple[int, ...]
    start: int = 0

    @classmethod
    def whole(cls, tensor: Tensor) -> Piece:
        return cls(tensor, tuple(tensor.shape))
