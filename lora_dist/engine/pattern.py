"""Which pattern a base has: the stored one, or the one found in its weights, and what to say where there is none."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor, nn

from lora_dist.blocks import MASK_FILE, BlockMask, ElementMask, Mask, NamedLinear, Pattern, detect_pattern
from lora_dist.log import UserError
from lora_dist.models.architecture import prunable_linears
from lora_dist.models.hub import resolve
from lora_dist.models.streaming import TensorReader

MIN_BLOCK_SPARSITY = 0.005
"""share of pruned weights from which `auto` believes in a pattern of tiles; a dense model may hold a dead row"""
MIN_ELEMENT_SPARSITY = 0.05
MIN_ZEROS_IN_TILES = 0.01
"""share of exact zeros in the kept tiles of a linear from which they are taken for a pattern (2:4, top-k) and not for chance"""


@dataclass(frozen=True)
class FoundPattern:
    """A base's pattern and where it came from."""

    pattern: Pattern | None
    source: str
    """stored, detected or none"""
    zero_share: float
    """share of exactly zero weights in the prunable linears; of pruned ones, where the mask is stored"""


def _weight_of(linear: NamedLinear) -> Tensor:
    return linear.weight_OI


def zero_share(linears: list[NamedLinear], weight_of: Callable[[NamedLinear], Tensor] = _weight_of) -> float:
    """Share of exactly zero weights."""
    zeros = sum(int((weight_of(linear) == 0).sum()) for linear in linears)
    return zeros / max(1, sum(linear.weight_OI.numel() for linear in linears))


def base_pattern(
    model: nn.Module,
    source_dir: Path | None,
    *,
    block: int,
    weight_of: Callable[[NamedLinear], Tensor] = _weight_of,
) -> FoundPattern:
    """The pattern of a base as it stands: the mask file beside it, else tiles of zeros, else single zeros, else none.

    A linear whose kept tiles hold a pattern of their own (some dense, some 2:4 or top-k) gets a mask of elements beside the others' masks of
    tiles.

    Args:
        source_dir: where the model was read from; None looks at the weights only.
        block: tile side to look for where no mask is stored.
        weight_of: reads a linear's weight_OI, where the model itself holds placeholders only.

    Raises:
        UserError, GuardError: a stored mask that is damaged or does not fit the model.
    """
    linears = prunable_linears(model)
    if source_dir is not None and (source_dir / MASK_FILE).is_file():
        pattern = Pattern.load(source_dir)
        shapes = {linear.name: tuple(linear.weight_OI.shape) for linear in linears}
        for name, mask in pattern.items():
            if shapes.get(name) != mask.shape:
                raise UserError(
                    f"{source_dir / MASK_FILE}: layer {name} has a mask of {mask.shape}, the model has "
                    f"{shapes.get(name, 'no such linear')}: the mask belongs to another model"
                )
        return FoundPattern(pattern, "stored", pattern.sparsity)
    share = zero_share(linears, weight_of)
    tiles = detect_pattern(((linear.name, weight_of(linear)) for linear in linears), "block", block)
    if tiles.sparsity >= MIN_BLOCK_SPARSITY:
        masks = {linear.name: _inside(tiles[linear.name], weight_of(linear)) for linear in linears}
        return FoundPattern(Pattern(masks), "detected", share)
    if share >= MIN_ELEMENT_SPARSITY:
        elements = detect_pattern(((linear.name, weight_of(linear)) for linear in linears), "element", block)
        return FoundPattern(elements, "detected", share)
    return FoundPattern(None, "none", share)


def _inside(tiles: Mask, weight_OI: Tensor) -> Mask:
    """The mask of tiles, or one of elements where kept tiles have enough zeros for a pattern."""
    zeros = int((weight_OI == 0).sum()) - (weight_OI.numel() - tiles.kept_elements())
    return ElementMask.detect(weight_OI) if zeros > MIN_ZEROS_IN_TILES * tiles.kept_elements() else tiles


def pattern_of(folder: str, model: nn.Module, *, block: int) -> Pattern:
    """The pattern of a pruned version of a model: a mask for each of the model's prunable linears.

    Args:
        folder: directory or hub name of the pruned version; only its mask file, or its weights where it has none, are read.
        model: of the same shapes.
        block: tile side to look for where no mask is stored.

    Raises:
        UserError, GuardError: no such directory, no pattern, or that of a model of other shapes.
    """
    source_dir = resolve(folder, "from_pruned")
    try:
        if (source_dir / MASK_FILE).is_file():
            pattern = base_pattern(model, source_dir, block=block).pattern
        else:
            reader = TensorReader(model, source_dir)

            def read_OI(linear: NamedLinear) -> Tensor:
                weight = reader.whole(f"{linear.name}.weight")
                return weight.T if linear.transposed else weight

            pattern = base_pattern(model, None, block=block, weight_of=read_OI).pattern
    except UserError as error:
        raise error.renamed({"model.name_or_path": "from_pruned"}) from error
    if pattern is None:
        raise UserError(f"from_pruned: {folder} has no pattern: no mask file, and no {block}x{block} tiles of zeros (block)")
    rest = {linear.name: tuple(linear.weight_OI.shape) for linear in prunable_linears(model) if linear.name not in pattern}
    return Pattern({**pattern, **{name: BlockMask.full((shape[0], shape[1]), pattern.block) for name, shape in rest.items()}})


def adapter_pattern(found: FoundPattern, mask: str, *, block: int, model_name: str) -> Pattern | None:
    """The pattern that the adapter is to respect, by `adapter.mask`: None means plain LoRA.

    Raises:
        UserError: a pattern is asked for that the base does not have.
    """
    pattern = found.pattern
    if mask == "none":
        return None
    if mask == "auto":
        return pattern
    if mask == "block" and pattern is not None and pattern.is_mixed:
        inner = [name for name, one in pattern.items() if one.kind == "element"]
        raise UserError(
            f"adapter.mask: found block, but {len(inner)} linears of {model_name} have zeros inside of kept tiles too (first {inner[0]}), which "
            "a mask of tiles would let the update fill; set adapter.mask auto"
        )
    if mask == "block" and (pattern is None or pattern.kind != "block"):
        raise UserError(
            f"adapter.mask: found block, but {model_name} has no {block}x{block} tiles of zeros ({found.zero_share:.1%} of the weights "
            "of its decoder layers are zero); prune it first (lora-dist prune), set adapter.block to the tile it was pruned with, "
            "or adapter.mask none for plain LoRA"
        )
    if mask == "element" and pattern is None:
        raise UserError(
            f"adapter.mask: found element, but only {found.zero_share:.1%} of {model_name}'s weights are zero; "
            "set adapter.mask none for plain LoRA"
        )
    return pattern
