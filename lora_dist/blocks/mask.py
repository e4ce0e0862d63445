"""Masks of one weight matrix: whole tiles (`BlockMask`) or single elements (`ElementMask`).

Shapes: O/I out/in features, b block side, P = ceil(O/b) block rows, Q = ceil(I/b) block columns. `True` = kept, everywhere.
Weights come as `weight_OI`; a transposed storage (GPT-2's Conv1D) is turned by the caller (`weight.T` is a view). A process
that holds only a part of a weight checks it as rectangles, each with the place `at` (row, column) of its first element.
The mask is stored, never inferred again from `W != 0` once a run has begun: a kept weight may be 0 (design section 3).
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from lora_dist.blocks.rectangles import Rectangle


def pack_bits(bits: Tensor) -> Tensor:
    """Bool tensor of any shape -> uint8 tensor of ceil(n/8) bytes, most significant bit first (as `numpy.packbits`)."""
    flat = bits.reshape(-1).to(torch.uint8)
    flat = torch.nn.functional.pad(flat, (0, -flat.numel() % 8)).view(-1, 8)
    weights = torch.tensor([128, 64, 32, 16, 8, 4, 2, 1], dtype=torch.uint8, device=bits.device)
    return (flat * weights).sum(1, dtype=torch.uint8)


def unpack_bits(packed: Tensor, numel: int) -> Tensor:
    """Inverse of `pack_bits`: the first `numel` bits as a flat bool tensor."""
    shifts = torch.tensor([7, 6, 5, 4, 3, 2, 1, 0], dtype=torch.uint8, device=packed.device)
    return ((packed.unsqueeze(1) >> shifts) & 1).reshape(-1)[:numel].bool()


def grid(shape: tuple[int, int], block: int) -> tuple[int, int]:
    """(P, Q): block rows and columns of a matrix of `shape` (O, I)."""
    return -(-shape[0] // block), -(-shape[1] // block)


def tiles_any(flags_OI: Tensor, block: int, at: tuple[int, int] = (0, 0)) -> Tensor:
    """Bool (rows, columns) -> bool (p, q): whether a tile holds any `True`. Edge tiles may be smaller than the block.

    Args:
        flags_OI: of a matrix (O, I), or of a rectangle of it.
        block: tile side.
        at: place of the first flag in the matrix. The answer's first tile is the one that holds it.
    """
    if block == 1:
        return flags_OI
    rows, columns = flags_OI.shape
    top, left = at[0] % block, at[1] % block
    P, Q = grid((top + rows, left + columns), block)
    pad = (left, Q * block - left - columns, top, P * block - top - rows)
    if any(pad):
        flags_OI = torch.nn.functional.pad(flags_OI, pad)
    # A max over rows first keeps the innermost dimension contiguous, which is what makes this fast on CPU.
    rows_PI = flags_OI.view(torch.uint8).view(P, block, Q * block).amax(1)
    return rows_PI.view(P, Q, block).amax(2).bool()


@dataclass(frozen=True)
class Violation:
    """A place that had to be zero and is not."""

    row: int
    col: int
    """tile indices for a block mask, element indices for an element mask"""
    value: float

    def describe(self, name: str, kind: str, count: int, whole: bool = True) -> str:
        """One line for a message.

        Args:
            name: the layer's.
            kind: the mask's.
            count: such places in all that was looked at.
            whole: whether that was the layer, and not only the part of it that this process holds.
        """
        place = "tile" if kind == "block" else "element"
        where = "this layer" if whole else "this process's part of the layer"
        more = f" ({count} such {place}s in {where})" if count > 1 else ""
        return f"layer {name}, {place} ({self.row}, {self.col}): found {self.value:g}, expected exactly 0{more}"


class _ZeroCheck:
    """The search for values where a mask expects zeros, alike for both kinds: a single element is a tile of side 1."""

    shape: tuple[int, int]
    block: int

    def pruned(self, part: Rectangle) -> Tensor:
        """Bool (p, q) on the part's device: which of the tiles that it touches are pruned."""
        raise NotImplementedError

    def zeros_violated(self, weight_OI: Tensor, at: tuple[int, int] = (0, 0)) -> Tensor:
        """Bool (p, q) on the weight's device: pruned tiles that hold something other than exact zero.

        Args:
            weight_OI: (O, I), or a rectangle of it.
            at: place of its first element. The answer's first tile is the one that holds it.
        """
        return tiles_any(weight_OI.detach() != 0, self.block, at) & self.pruned(Rectangle(weight_OI, at))

    def first_violation(self, weight_OI: Tensor) -> tuple[Violation, int] | None:
        """The first pruned tile that is not exactly zero and how many there are, or None. Waits for the device.

        Raises:
            ValueError: if the weight is not of the mask's shape.
        """
        if tuple(weight_OI.shape) != self.shape:
            raise ValueError(f"weight: found shape {tuple(weight_OI.shape)}, expected {self.shape} as in the mask")
        return self.first_violation_in([Rectangle(weight_OI)])

    def first_violation_in(self, parts: Sequence[Rectangle]) -> tuple[Violation, int] | None:
        """As `first_violation`, of the parts of a matrix; a tile that lies in several of them counts once."""
        b = self.block
        bad_PQ = torch.zeros(grid(self.shape, b), dtype=torch.bool)
        for part in parts:
            found = self.zeros_violated(part.weight_OI, part.at).cpu()
            p, q = part.at[0] // b, part.at[1] // b
            bad_PQ[p : p + found.shape[0], q : q + found.shape[1]] |= found
        if not bad_PQ.any():
            return None
        p, q = (int(i) for i in bad_PQ.nonzero()[0])
        values = []
        for part in parts:
            top, left = p * b - part.at[0], q * b - part.at[1]  # of the tile, seen from the part
            tile = part.weight_OI.detach()[max(top, 0) : max(top + b, 0), max(left, 0) : max(left + b, 0)]
            values.append(tile[tile != 0])
        return Violation(p, q, float(torch.cat(values)[0])), int(bad_PQ.sum())


@dataclass(frozen=True, eq=False)
class BlockMask(_ZeroCheck):
    """Which `b x b` tiles of an (O, I) matrix are kept.

    Attributes:
        kept_PQ: bool (P, Q) on CPU, `True` = kept.
        shape: (O, I).
        block: tile side b.
    """

    kept_PQ: Tensor
    shape: tuple[int, int]
    block: int

    kind = "block"

    def __post_init__(self) -> None:
        if self.block < 1:
            raise ValueError(f"block: found {self.block}, expected 1 or more")
        expected = grid(self.shape, self.block)
        if tuple(self.kept_PQ.shape) != expected or self.kept_PQ.dtype != torch.bool:
            raise ValueError(
                f"mask of a {self.shape} matrix with {self.block}x{self.block} tiles: found {self.kept_PQ.dtype} of shape "
                f"{tuple(self.kept_PQ.shape)}, expected bool of shape {expected}"
            )

    @classmethod
    def detect(cls, weight_OI: Tensor, block: int) -> BlockMask:
        """Find the all-zero tiles of a weight: kept = some element is not exactly 0 (NaN counts as not 0)."""
        kept_PQ = tiles_any(weight_OI.detach() != 0, block).cpu()
        return cls(kept_PQ, (weight_OI.shape[0], weight_OI.shape[1]), block)

    @classmethod
    def full(cls, shape: tuple[int, int], block: int) -> BlockMask:
        """The mask that keeps every tile."""
        return cls(torch.ones(grid(shape, block), dtype=torch.bool), shape, block)

    @cached_property
    def keeps_all(self) -> bool:
        return bool(self.kept_PQ.all())

    def kept_elements(self) -> int:
        """Elements inside kept tiles; edge tiles count what they hold."""
        O, I = self.shape
        P, Q = self.kept_PQ.shape
        heights_P = torch.full((P,), self.block)
        heights_P[-1] = O - (P - 1) * self.block
        widths_Q = torch.full((Q,), self.block)
        widths_Q[-1] = I - (Q - 1) * self.block
        return int((heights_P[:, None] * widths_Q[None, :])[self.kept_PQ].sum())

    def expand(self, device: torch.device | str = "cpu") -> Tensor:
        """Bool (O, I): the mask element by element."""
        kept = self.kept_PQ.to(device)
        return kept.repeat_interleave(self.block, 0)[: self.shape[0]].repeat_interleave(self.block, 1)[:, : self.shape[1]]

    def pruned(self, part: Rectangle) -> Tensor:
        b = self.block
        rows, columns = (slice(at // b, -(-(at + n) // b)) for at, n in zip(part.at, part.weight_OI.shape, strict=True))
        return (~self.kept_PQ[rows, columns]).to(part.weight_OI.device)

    def packed(self) -> Tensor:
        return pack_bits(self.kept_PQ)

    @classmethod
    def from_packed(cls, packed: Tensor, shape: tuple[int, int], block: int) -> BlockMask:
        P, Q = grid(shape, block)
        return cls(unpack_bits(packed, P * Q).view(P, Q), shape, block)


@dataclass(frozen=True, eq=False)
class ElementMask(_ZeroCheck):
    """Which elements of an (O, I) matrix are kept; bit-packed, for 2:4 and unstructured patterns.

    Attributes:
        bits: uint8 (ceil(O*I/8),) on CPU, row-major, most significant bit first.
        shape: (O, I).
    """

    bits: Tensor
    shape: tuple[int, int]

    kind = "element"
    block = 1

    @classmethod
    def detect(cls, weight_OI: Tensor) -> ElementMask:
        """kept = not exactly 0."""
        return cls(pack_bits((weight_OI.detach() != 0).cpu()), (weight_OI.shape[0], weight_OI.shape[1]))

    @cached_property
    def keeps_all(self) -> bool:
        return self.kept_elements() == self.shape[0] * self.shape[1]

    def kept_elements(self) -> int:
        return int(self.expand().sum())

    def expand(self, device: torch.device | str = "cpu") -> Tensor:
        return unpack_bits(self.bits.to(device), self.shape[0] * self.shape[1]).view(self.shape)

    def pruned(self, part: Rectangle) -> Tensor:
        (row, column), (rows, columns), I = part.at, part.weight_OI.shape, self.shape[1]
        packed = self.bits[row * I // 8 : -(-(row + rows) * I // 8)].to(part.weight_OI.device)  # only these rows are unpacked
        before = row * I % 8  # bits of the row above in the first byte
        kept = unpack_bits(packed, before + rows * I)[before:].view(rows, I)
        return ~kept[:, column : column + columns]

    def packed(self) -> Tensor:
        return self.bits

    @classmethod
    def from_packed(cls, packed: Tensor, shape: tuple[int, int], block: int = 1) -> ElementMask:
        return cls(packed.clone(), shape)


Mask = BlockMask | ElementMask


def mask_digest(mask: Mask) -> str:
    """sha256 of kind, shape, block and bits."""
    head = f"{mask.kind} {mask.shape[0]}x{mask.shape[1]} b{mask.block}\n".encode()
    return hashlib.sha256(head + mask.packed().numpy().tobytes()).hexdigest()
