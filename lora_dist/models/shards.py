"""An open safetensors file of weights, as any reader sees it: dense tensors under their names, whether the file holds these or kept tiles.

A file of kept tiles (`model_blocks*.safetensors`, `block_files.py`) holds `NAME.values` (N, b, b) in the place of `NAME.weight`; which tiles
they are says the mask file beside it. Its name is one that transformers does not look for: it would draw the missing weights at random.
Called by `sources.py`.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from lora_dist.blocks import BlockMask, Pattern, tile_count
from lora_dist.blocks.tiles import places, scatter_tiles
from lora_dist.log import UserError

BLOCK_PREFIX = "model_blocks"
BLOCK_FORMAT, BLOCK_VERSION = "lora_dist.blocks", 1


@dataclass(frozen=True)
class Shard:
    """An open file of weights."""

    names: list[str]
    tensor: Callable[[str], Tensor]
    """reads one tensor, on CPU"""
    shape: Callable[[str], tuple[int, ...]]
    """reads one tensor's shape, and not the tensor"""
    rows: Callable[[str, int, int], Tensor]
    """reads rows [from, to) of one tensor"""
    tiles: Callable[[str, int, int], Tensor] | None = None
    """of a file of kept tiles: reads tiles [from, to) of a weight, by its name"""
    tiled: frozenset[str] = frozenset()
    """weights of which the file holds tiles"""


def is_block_file(file: Path) -> bool:
    """Whether a file of weights holds kept tiles, by its name."""
    return file.name.startswith(BLOCK_PREFIX)


def plain_shard(handle: Any) -> Shard:
    """Of a file that holds tensors as they are."""
    return Shard(
        list(handle.keys()),
        handle.get_tensor,
        lambda name: tuple(handle.get_slice(name).get_shape()),
        lambda name, start, stop: handle.get_slice(name)[start:stop],
    )


@dataclass(frozen=True)
class _Weight:
    """One weight of which a file holds the kept tiles.

    Attributes:
        key: of its tiles in the file.
        transposed: whether the model stores it as (I, O).
    """

    key: str
    mask: BlockMask
    transposed: bool

    @property
    def shape(self) -> tuple[int, ...]:
        return self.mask.shape[::-1] if self.transposed else self.mask.shape


class _BlockFile:
    """Reads an open file of kept tiles. Raises UserError where it, or the mask beside it, is not of use."""

    def __init__(self, handle: Any, file: Path):
        self._handle = handle
        metadata = handle.metadata() or {}
        if metadata.get("format") != BLOCK_FORMAT:
            raise UserError(f"{file}: was not written by lora_dist (metadata {metadata}), expected kept tiles")
        if int(metadata["version"]) > BLOCK_VERSION:
            raise UserError(f"{file}: has version {metadata['version']}, this lora_dist reads {BLOCK_VERSION}")
        pattern = Pattern.load(file.parent)
        self._weights: dict[str, _Weight] = {}
        for stem, told in json.loads(metadata["layers"]).items():
            mask, key = pattern.get(told["layer"]), f"{stem}.values"
            if not isinstance(mask, BlockMask):
                raise UserError(f"{file}: {key}: found no mask of tiles for {told['layer']} in the mask file beside it")
            found, expected = tuple(handle.get_slice(key).get_shape()), (tile_count(mask), mask.block, mask.block)
            if found != expected:
                raise UserError(f"{file}: {key} is {found}, by the mask file beside it {expected}: they do not belong together")
            self._weights[f"{stem}.weight"] = _Weight(key, mask, told["transposed"])

    def shard(self) -> Shard:
        keys = {weight.key for weight in self._weights.values()}
        names = [*self._weights, *(key for key in self._handle.keys() if key not in keys)]  # noqa: SIM118 -- not a dict
        return Shard(names, self.tensor, self.shape, self.rows, self.tiles, frozenset(self._weights))

    def shape(self, name: str) -> tuple[int, ...]:
        weight = self._weights.get(name)
        return tuple(self._handle.get_slice(name).get_shape()) if weight is None else weight.shape

    def tensor(self, name: str) -> Tensor:
        weight = self._weights.get(name)
        if weight is None:
            return self._handle.get_tensor(name)
        dense_OI = _unpacked(self._handle.get_tensor(weight.key), weight.mask)
        return dense_OI.T.contiguous() if weight.transposed else dense_OI

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        weight = self._weights.get(name)
        if weight is None:
            return self._handle.get_slice(name)[start:stop]
        if weight.transposed or stop <= start:
            return self.tensor(name)[start:stop]
        mask, b = weight.mask, weight.mask.block
        top, bottom = start // b, -(-stop // b)  # rows of tiles
        before, inside = int(mask.kept_PQ[:top].sum()), int(mask.kept_PQ[top:bottom].sum())
        part = BlockMask(mask.kept_PQ[top:bottom], (min(bottom * b, mask.shape[0]) - top * b, mask.shape[1]), b)
        values = self._handle.get_slice(weight.key)[before : before + inside]
        return _unpacked(values, part)[start - top * b : stop - top * b]

    def tiles(self, name: str, start: int, stop: int) -> Tensor:
        return self._handle.get_slice(self._weights[name].key)[start:stop]


def _unpacked(values_Nbb: Tensor, mask: BlockMask) -> Tensor:
    """A dense (O, I) weight of its tiles."""
    kept = int(mask.kept_PQ.sum())
    return scatter_tiles(values_Nbb[:kept], places(mask.kept_PQ), mask.block, mask.shape).contiguous()


def block_shard(handle: Any, file: Path) -> Shard:
    """Of a file that holds kept tiles."""
    return _BlockFile(handle, file).shard()
