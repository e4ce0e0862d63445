"""The guard: refuses to go on when the frozen base or its pattern is not what it was.

At each check, on this rank's own tensors: every pruned tile is exactly zero, and a rotating sample of chunks of the base has the
digests it had at the start. `check_all` compares every chunk. Called by `engine/loop.py` and by `engine/trainer_callback.py`.

A chunk's digest is the sum of its bytes, read as int64, times fixed odd numbers, modulo 2^64. Integer sums do not depend on their
order, so it is exact on any device and number of threads; a change inside one 8-byte word always changes it (odd numbers have
inverses modulo 2^64).
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from lora_dist.blocks.mask import BlockMask, tiles_any
from lora_dist.blocks.pattern import Pattern
from lora_dist.log import GuardError

CHUNK_WORDS = 1 << 17
"""int64 words a chunk (1 MiB)"""


def _multipliers(device: torch.device) -> Tensor:
    """Fixed odd int64 multipliers, one a word of a chunk."""
    generator = torch.Generator().manual_seed(0x10AD)
    return (torch.randint(-(2**62), 2**62, (CHUNK_WORDS,), generator=generator) * 2 + 1).to(device)


def _words(tensor: Tensor) -> Tensor:
    """The tensor's bytes as flat int64 words (zero-padded to a whole word); a view where it can be."""
    flat = tensor.detach().contiguous().view(-1).view(torch.uint8)
    short = -flat.numel() % 8
    if short:
        flat = torch.nn.functional.pad(flat, (0, short))
    return flat.view(torch.int64)


@dataclass(frozen=True)
class _Chunk:
    name: str
    start: int
    """in int64 words"""


class Guard:
    """Watches frozen parameters and their pattern.

    Args:
        base: every frozen parameter (or this rank's shard) by name, as stored. Kept by reference.
        pattern: masks by module name, or None for a base that is guarded as a whole only.
        transposed: names of pattern entries whose weight is stored as (I, O) (GPT-2's Conv1D).
        sample_chunks: chunks compared at each check.

    The parameter of pattern entry `m` is `m.weight`, or under peft `m.base_layer.weight`.
    """

    def __init__(
        self,
        base: Mapping[str, Tensor],
        pattern: Pattern | None,
        *,
        transposed: Collection[str] = (),
        sample_chunks: int = 8,
    ) -> None:
        self.pattern = pattern
        self._base = dict(base)
        self._transposed = frozenset(transposed)
        self._sample = sample_chunks
        self._cursor = 0
        self._chunks = [
            _Chunk(name, start)
            for name, tensor in self._base.items()
            for start in range(0, -(-tensor.numel() * tensor.element_size() // 8), CHUNK_WORDS)
        ]
        self._mult = {t.device: _multipliers(t.device) for t in self._base.values()}
        self._masked = [] if pattern is None else [(n, self._parameter(n), m) for n, m in pattern.items() if not m.keeps_all]
        self._pruned = {  # on the device once, so that a check copies nothing
            name: (~mask.kept_PQ).to(weight.device) for name, weight, mask in self._masked if isinstance(mask, BlockMask)
        }
        self.check_pattern("at load")
        self._digests = self._digest(range(len(self._chunks)))

    def _parameter(self, name: str) -> Tensor:
        for key in (f"{name}.weight", f"{name}.base_layer.weight"):
            if key in self._base:
                weight = self._base[key]
                assert self.pattern is not None
                expected = self.pattern[name].shape
                found = tuple(weight.shape)[::-1] if name in self._transposed else tuple(weight.shape)
                if found != expected:
                    raise GuardError(f"layer {name}: found a weight of {found}, expected {expected} as in the pattern")
                return weight
        raise GuardError(f"layer {name}: is in the pattern, but not in the base")

    def _oriented(self, name: str, weight: Tensor) -> Tensor:
        return weight.detach().T if name in self._transposed else weight.detach()

    def _digest(self, indices: range | list[int]) -> list[int]:
        sums = []
        for i in indices:
            chunk = self._chunks[i]
            words = _words(self._base[chunk.name])[chunk.start : chunk.start + CHUNK_WORDS]
            sums.append((words * self._mult[words.device][: words.numel()]).sum())
        if not sums:
            return []
        if len({s.device for s in sums}) == 1:
            return torch.stack(sums).tolist()  # one wait for the device
        return [int(s) for s in sums]

    def check_pattern(self, when: str) -> None:
        """Every pruned tile of every layer is exactly zero.

        Args:
            when: words for the message, such as "at step 100".

        Raises:
            GuardError: naming layer and tile.
        """
        flags = []
        for name, weight, mask in self._masked:
            oriented = self._oriented(name, weight)
            if isinstance(mask, BlockMask):
                flags.append((tiles_any(oriented != 0, mask.block) & self._pruned[name]).any())
            else:
                flags.append(mask.zeros_violated(oriented).any())
        by_device: dict[torch.device, list[Tensor]] = {}
        for flag in flags:
            by_device.setdefault(flag.device, []).append(flag)
        if not any(bool(torch.stack(group).any()) for group in by_device.values()):  # one wait a device
            return
        for (name, weight, mask), bad in zip(self._masked, flags, strict=True):
            if bad:
                found = mask.first_violation(self._oriented(name, weight))
                assert found is not None
                raise GuardError(f"guard {when}: " + found[0].describe(name, mask.kind, found[1]))

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
