"""The guard: refuses to go on when the frozen base or its pattern is not what it was.

At each check, on this rank's own tensors or its pieces of them: every pruned tile is exactly zero, and a rotating sample of
chunks of the base has the digests it had at the start. `check_all` compares every chunk. Made and called by `engine/`.

A chunk's digest is the sum of its bytes, read as int64, times fixed odd numbers, modulo 2^64. Integer sums do not depend on their
order, so it is exact on any device and number of threads; a change inside one 8-byte word always changes it (odd numbers have
inverses modulo 2^64).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from lora_dist.blocks.kept import first_rows
from lora_dist.blocks.mask import BlockMask, Mask, tiles_any
from lora_dist.blocks.pattern import Pattern
from lora_dist.blocks.piece import Piece
from lora_dist.blocks.rectangles import Rectangle, rectangles
from lora_dist.log import GuardError

CHUNK_WORDS = 1 << 17
"""int64 words a chunk (1 MiB)"""


def _multipliers(device: torch.device) -> Tensor:
    """Fixed odd int64 multipliers, one a word of a chunk."""
    generator = torch.Generator().manual_seed(0x10AD)
    return (torch.randint(-(2**62), 2**62, (CHUNK_WORDS,), generator=generator) * 2 + 1).to(device)


def _chunk_words(tensor: Tensor, start: int) -> Tensor:
    """The tensor's chunk from int64 word `start` on, flat, zero-padded to a whole word; a view where it can be."""
    data = tensor.detach().contiguous().view(-1).view(torch.uint8)[start * 8 : (start + CHUNK_WORDS) * 8]
    if data.numel() % 8 or data.storage_offset() % 8:  # a slice of a flat buffer may begin inside a word of it: no view can
        data = torch.cat([data, data.new_zeros(-data.numel() % 8)])
    return data.view(torch.int64)


@dataclass(frozen=True)
class _Chunk:
    name: str
    start: int
    """in int64 words of what this process holds"""


class _Masked:
    """A base weight, whole or a piece of it, and the mask that it must keep.

    Args:
        read: gives the weight, or what is zero where it is.
    """

    def __init__(self, name: str, read: Callable[[], Piece], transposed: bool, mask: Mask) -> None:
        self.name, self.mask = name, mask
        self._read, self._transposed = read, transposed
        weight = read()
        self.whole = weight.tensor.numel() == math.prod(weight.shape)
        # Of tiles, those that this process holds something of are on the device once, so that a check copies nothing. Elements
        # are as many as the weights: they stay packed, and are unpacked at each check.
        self._pruned = [mask.pruned(part) for part in self.parts()] if isinstance(mask, BlockMask) else []

    def parts(self) -> list[Rectangle]:
        """Views, made anew at each check: the parameter may have been given other storage since."""
        return rectangles(self._read(), self._transposed)

    def violated(self) -> list[Tensor]:
        """One flag a part, on its device: whether it holds a pruned value that is not zero. Waits for nothing."""
        if not isinstance(self.mask, BlockMask):
            return [self.mask.zeros_violated(part.weight_OI, part.at).any() for part in self.parts()]
        return [
            (tiles_any(part.weight_OI != 0, self.mask.block, part.at) & pruned).any()
            for part, pruned in zip(self.parts(), self._pruned, strict=True)
        ]

    def describe(self) -> str:
        """The first violation, for a message."""
        found = self.mask.first_violation_in(self.parts())
        assert found is not None
        return found[0].describe(self.name, self.mask.kind, found[1], self.whole)


class _Tiles:
    """A base weight of which only kept tiles are held: zero elsewhere as long as each lies in a place that the mask keeps.

    Args:
        read: gives the places, as `kept.first_rows`.
    """

    def __init__(self, name: str, read: Callable[[], Tensor], mask: BlockMask) -> None:
        self.name, self._read = name, read
        expected_N, found_N = first_rows(mask), read()
        if found_N.shape != expected_N.shape:
            raise GuardError(f"layer {name}: found {len(found_N)} tiles, expected {len(expected_N)} as in the pattern")
        self._expected_N = expected_N.to(found_N.device)
        self._places_N2 = mask.kept_PQ.nonzero()

    def violated(self) -> list[Tensor]:
        """As `_Masked`'s."""
        return [(self._read() != self._expected_N).any()]

    def describe(self) -> str:
        wrong_N = (self._read() != self._expected_N).nonzero()[:, 0]
        p, q = self._places_N2[int(wrong_N[0])].tolist()
        more = f" ({len(wrong_N)} such tiles in this layer)" if len(wrong_N) > 1 else ""
        return f"layer {self.name}, tile ({p}, {q}): is put in another place of the weight{more}"


class Guard:
    """Watches frozen parameters and their pattern.

    Args:
        base: every frozen parameter, or this process's piece of it, by name, as stored. Kept by reference. A piece may be empty.
        pattern: masks by module name, or None for a base that is guarded as a whole only.
        transposed: names of pattern entries whose weight is stored as (I, O) (GPT-2's Conv1D).
        sample_chunks: chunks compared at each check.
        when: words for the message of the check that is made at once.
        codes: of weights that are stored quantised, by name: reads this process's part of the weight as numbers that are zero where
            it is. Their packed data and scales are entries of `base` like any other.
        tiles: of weights that are held as kept tiles, by the linear's name: reads where these lie. They too are entries of `base`.

    The parameter of pattern entry `m` is `m.weight`, or under peft `m.base_layer.weight`.

    Raises:
        GuardError: a pattern entry that is not in the base or of another shape there, or a pruned tile that is not zero.
        ValueError: a piece of a pattern entry's weight that reaches beyond it.
    """

    def __init__(
        self,
        base: Mapping[str, Tensor | Piece],
        pattern: Pattern | None,
        *,
        transposed: Collection[str] = (),
        sample_chunks: int = 8,
        when: str = "at load",
        codes: Mapping[str, Callable[[], Piece]] | None = None,
        tiles: Mapping[str, Callable[[], Tensor]] | None = None,
    ) -> None:
        self.pattern = pattern
        self._codes = codes or {}
        self._base = {name: held if isinstance(held, Piece) else Piece.whole(held) for name, held in base.items()}
        self._sample = sample_chunks
        self._cursor = 0
        self._chunks = [
            _Chunk(name, start)
            for name, piece in self._base.items()
            for start in range(0, -(-piece.tensor.numel() * piece.tensor.element_size() // 8), CHUNK_WORDS)
        ]
        self._mult = {device: _multipliers(device) for device in {piece.tensor.device for piece in self._base.values()}}
        masked = {name: mask for name, mask in (pattern or {}).items() if not mask.keeps_all}
        held = tiles or {}
        self._masked: list[_Masked | _Tiles] = [
            _Masked(name, self._parameter(name, mask, name in transposed), name in transposed, mask)
            for name, mask in masked.items()
            if name not in held
        ]
        self._masked += [_Tiles(name, read, masked[name]) for name, read in held.items()]  # type: ignore[arg-type]
        self.check_pattern(when)
        self._digests = self._digest(range(len(self._chunks)))

    def _parameter(self, name: str, mask: Mask, transposed: bool) -> Callable[[], Piece]:
        for key in (f"{name}.weight", f"{name}.base_layer.weight"):
            if key in self._base:
                read = self._codes.get(key, partial(self._base.__getitem__, key))
                shape = tuple(read().shape)
                found = shape[::-1] if transposed else shape
                if found != mask.shape:
                    raise GuardError(f"layer {name}: found a weight of {found}, expected {mask.shape} as in the pattern")
                return read
        raise GuardError(f"layer {name}: is in the pattern, but not in the base")

    def _digest(self, indices: range | list[int]) -> list[int]:
        sums = []
        for i in indices:
            chunk = self._chunks[i]
            words = _chunk_words(self._base[chunk.name].tensor, chunk.start)
            sums.append((words * self._mult[words.device][: words.numel()]).sum())
        if not sums:
            return []
        if len({s.device for s in sums}) == 1:
            return torch.stack(sums).tolist()  # one wait for the device
        return [int(s) for s in sums]

    def check_pattern(self, when: str) -> None:
        """Every pruned tile of every layer is exactly zero, as far as this process holds it.

        Args:
            when: words for the message, such as "at step 100".

        Raises:
            GuardError: naming layer and tile.
        """
        flags = [layer.violated() for layer in self._masked]
        by_device: dict[torch.device, list[Tensor]] = {}
        for flag in itertools.chain.from_iterable(flags):
            by_device.setdefault(flag.device, []).append(flag)
        if not any(bool(torch.stack(group).any()) for group in by_device.values()):  # one wait a device
            return
        for layer, bad in zip(self._masked, flags, strict=True):
            if any(bad):
                raise GuardError(f"guard {when}: {layer.describe()}")

    def check(self, when: str) -> None:
        """Pruned tiles are zero, and the next few chunks of the base are what they were.

        Raises:
            GuardError: naming layer and tile, or the parameter that changed.
        """
        self.check_pattern(when)
        count = min(self._sample, len(self._chunks))
        indices = [(self._cursor + i) % len(self._chunks) for i in range(count)]
        self._cursor = (self._cursor + count) % max(len(self._chunks), 1)
        self._compare(indices, when)

    def check_all(self, when: str) -> None:
        """Pruned tiles are zero, and the whole base is what it was. Raises as `check`."""
        self.check_pattern(when)
        self._compare(range(len(self._chunks)), when)

    def _compare(self, indices: range | list[int], when: str) -> None:
        for i, now in zip(indices, self._digest(indices), strict=True):
            if now != self._digests[i]:
                raise GuardError(f"guard {when}: frozen parameter {self._chunks[i].name} changed since the run began")
