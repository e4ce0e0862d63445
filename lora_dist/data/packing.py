"""Several examples in one row: best fit, longest first. They do not attend to each other, since positions start anew with each.

transformers makes a block-diagonal mask of such positions where it is given no attention mask and no cache; that a model does so is
proven before training (`engine/packing.py`). Called by `engine/data.py`.

Letters for shapes: `N` examples, `M` rows.
"""

from __future__ import annotations

import hashlib
from bisect import bisect_left, insort
from collections.abc import Sequence

import numpy as np

from lora_dist.data.examples import Examples, side_by_side
from lora_dist.data.rows import FILLER, RowBatch
from lora_dist.data.sampler import stable_permutation


class PackedExamples:
    """Rows of `capacity` tokens at most, each of one example or more, every example in exactly one.

    Args:
        examples: none longer than `capacity`.
        capacity: tokens.
        seed: decides which of equally long examples are put together.
    """

    def __init__(self, examples: Examples, capacity: int, seed: int):
        self.examples, self.capacity = examples, capacity
        self._members_N, self._starts = best_fit(examples.lengths, capacity, seed)

    def __len__(self) -> int:
        return len(self._starts) - 1

    def members(self, row: int) -> np.ndarray:
        """Numbers of the examples in a row, in order."""
        return self._members_N[self._starts[row] : self._starts[row + 1]]

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each row (M,), int64."""
        return np.asarray(np.add.reduceat(self.examples.lengths[self._members_N], self._starts[:-1]))

    @property
    def fill(self) -> float:
        """Share of the rows' tokens that are an example's."""
        return float(self.examples.lengths.sum() / (len(self) * self.capacity))

    @property
    def digest(self) -> str:
        """sha256 of the examples and of what is in which row."""
        digest = hashlib.sha256(f"packed {self.examples.digest} {len(self)}\n".encode())
        for numbers in (self._members_N, self._starts):
            digest.update(np.ascontiguousarray(numbers, dtype="<i8").data)
        return digest.hexdigest()

    def batch(self, rows: Sequence[int] | np.ndarray) -> RowBatch:
        """Rows (len(rows), L) filled up on the right, with their positions."""
        return side_by_side(
            [None if row == FILLER else [self.examples.arrays(i) for i in self.members(row)] for row in rows], packed=True
        )


def best_fit(lengths_N: np.ndarray, capacity: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Members (N,) of all rows, one row behind the other, and where each row begins (M + 1,).

    From the longest to the shortest, equally long ones by seed, each goes into the row whose room it fills best. O(N log capacity).
    """
    assert len(lengths_N) and lengths_N.max() <= capacity
    shuffled = stable_permutation(len(lengths_N), "packing", seed).numpy()
    rooms: list[int] = []  # distinct, ascending
    rows_with: dict[int, list[int]] = {}
    rows: list[list[int]] = []
    for i in shuffled[np.argsort(-lengths_N[shuffled], kind="stable")].tolist():
        length = int(lengths_N[i])
        place = bisect_left(rooms, length)
        if place == len(rooms):
            row, room = len(rows), capacity
            rows.append([])
        else:
            room = rooms[place]
            row = rows_with[room].pop()
            if not rows_with[room]:
                del rows_with[room], rooms[place]
        rows[row].append(i)
        left = room - length
        if left:
            if left not in rows_with:
                insort(rooms, left)
            rows_with.setdefault(left, []).append(row)
    starts = np.concatenate([[0], np.cumsum([len(row) for row in rows])]).astype(np.int64)
    return np.concatenate([np.array(row, dtype=np.int64) for row in rows]), starts
