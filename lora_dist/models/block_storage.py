"""A base whose pruned linears hold their kept tiles only (`model.storage: blocks`), read straight into that form.

One stored weight at a time is cut into tiles, so no process ever holds the dense model. Fingerprint and pattern are those of the stored
weights. Linears of which nothing is pruned stay as they are. Called by `engine/base.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lora_dist.blocks import BlockLinear, BlockMask, NamedLinear, Pattern, Scratch, pack_range, rows_of_range, tile_count
from lora_dist.log import UserError
from lora_dist.models.streaming import TensorReader, fill_from


def require_tiles(pattern: Pattern | None, name: str, *, key: str = "model.storage") -> Pattern:
    """The pattern, if it is one of whole tiles.

    Raises:
        UserError: there is nothing that could be held as kept tiles.
    """
    if pattern is None or pattern.kind != "block":
        found = "no pruned tiles" if pattern is None else "pruned weights that make no whole tiles"
        raise UserError(
            f"{key}: found blocks, but {name} has {found} to leave out; leave it dense, or say with which tile it was pruned (block)"
        )
    return pattern


def put_tiles(model: nn.Module, linears: Sequence[NamedLinear], pattern: Pattern) -> dict[str, tuple[NamedLinear, BlockMask]]:
    """Replace the pruned ones of some linears by such that hold kept tiles, placeholders for now. Returns them as they were, by name."""
    held, scratch = {}, Scratch()
    for linear in linears:
        mask = pattern.get(linear.name)
        if not isinstance(mask, BlockMask) or mask.keeps_all:
            continue
        old: Any = linear.module
        zero = torch.zeros((), dtype=old.weight.dtype, device=old.weight.device)
        placeholder = zero.expand(tile_count(mask), mask.block, mask.block)
        model.set_submodule(linear.name, BlockLinear(mask, placeholder, old.bias, scratch).train(old.training))
        held[linear.name] = linear, mask
    return held


class BlockReader:
    """Reads a base in placeholders (`streaming.load_empty`) whose pruned linears hold kept tiles.

    Args:
        model: in placeholders; its pruned linears are replaced at once, by `BlockLinear` in placeholders.
        linears: that may be pruned; as they were before.
        pattern: of whole tiles.
    """

    def __init__(self, model: nn.Module, reader: TensorReader, linears: Sequence[NamedLinear], pattern: Pattern):
        self._reader = reader
        self._held = put_tiles(model, linears, pattern)

    def __contains__(self, name: object) -> bool:
        """Of a linear that holds tiles, these; not its weight."""
        linear, _, leaf = str(name).rpartition(".")
        return leaf == "values" if linear in self._held and leaf in ("values", "weight") else name in self._reader

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """Rows of a parameter; tiles [start, stop) of a linear that holds them, of which only the rows they lie in are read."""
        linear, _, leaf = name.rpartition(".")
        if leaf != "values" or linear not in self._held:
            return self._reader.rows(name, start, stop)
        held, mask = self._held[linear]
        tiles = self._reader.tiles(f"{linear}.weight", start, stop)
        if tiles is not None:
            return tiles
        if held.transposed:
            return pack_range(self._reader.whole(f"{linear}.weight").T, mask, start, stop)
        top, bottom = rows_of_range(mask, start, stop)
        return pack_range(self._reader.rows(f"{linear}.weight", top, bottom), mask, start, stop, first_row=top)

    def whole(self, name: str) -> Tensor:
        """A parameter; under a linear's `weight` also the dense one, as it is stored."""
        linear, _, leaf = name.rpartition(".")
        if leaf != "values" or linear not in self._held:
            return self._reader.whole(name)
        return self.rows(name, 0, tile_count(self._held[linear][1]))

    def fill_quantised(self, unit: nn.Module) -> None:
        """Nothing: no layer is quantised."""

    def fill(self, model: Any) -> None:
        """Every parameter, in the precision of its placeholder."""
        fill_from(model, self)
