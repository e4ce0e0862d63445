"""Prune decoder layers one after another, each by what it sees behind the layers pruned before it.

For each layer: norms of its linears' inputs while it is still dense but fed by the pruned prefix; scores; selection; the dropped
tiles become exactly +0.0 in place; then its outputs, now pruned, are the next layer's inputs (as SparseGPT and Wanda do). Tiles
are all scored before any is dropped within a layer. Called by `engine/prune.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from lora_dist.blocks import BlockMask, NamedLinear, Pattern, find_linears
from lora_dist.pruning.calibration import Calibration
from lora_dist.pruning.scores import layer_scores
from lora_dist.pruning.select import select_tiles


@dataclass(frozen=True)
class PruneSettings:
    """How tiles are scored and dropped."""

    sparsity: float
    """share of the tiles of each matrix (or block row) to drop, in [0, 1)"""
    block: int = 16
    """tile side"""
    score: str = "wanda"
    """wanda, magnitude or random"""
    select: str = "matrix"
    """matrix or row"""
    seed: int = 0
    """of the random score"""


def prune_linears(
    linears: list[NamedLinear], norms: dict[str, torch.Tensor] | None, settings: PruneSettings
) -> dict[str, BlockMask]:
    """Score and select every linear's tiles, then set the dropped ones to exactly +0.0 in place; the rest is untouched.

    Args:
        linears: their weights are written through `weight_OI`, a view whichever way round the weight is stored.
        norms: ||x_I||_2 by name, needed by the wanda score.
        settings: how.

    Returns:
        The mask of each linear by name, in the order given.

    Raises:
        UserError: if a score is not finite; no weight has been changed then.
    """
    masks = {}
    for linear in linears:
        weight_OI = linear.weight_OI
        scores_PQ = layer_scores(
            settings.score,
            linear.name,
            weight_OI,
            settings.block,
            norm_I=None if norms is None else norms[linear.name],
            seed=settings.seed,
        )
        shape = (weight_OI.shape[0], weight_OI.shape[1])
        masks[linear.name] = BlockMask(select_tiles(settings.select, scores_PQ, settings.sparsity), shape, settings.block)
    for linear in linears:
        weight_OI = linear.weight_OI
        weight_OI.masked_fill_(~masks[linear.name].expand(weight_OI.device), 0.0)
    return masks


def prune_layers(
    layers: nn.ModuleList,
    prefix: str,
    settings: PruneSettings,
    calibration: Calibration | None,
    *,
    on_layer: Callable[[int, dict[str, BlockMask]], None] | None = None,
) -> Pattern:
    """Prune every linear of the decoder layers, in place.

    Args:
        layers: the decoder layers; their linears are all pruned, nothing else is touched.
        prefix: their name in the model (`model.layers`).
        settings: how.
        calibration: inputs of the first layer, from `capture`; used up layer by layer. None for scores that need none.
        on_layer: called with each layer's index and masks once it is pruned.

    Returns:
        The masks of all linears, by name in the model.

    Raises:
        UserError: if a score is not finite, or a linear saw no calibration token.
    """
    if calibration is None and settings.score == "wanda":
        raise ValueError("score wanda: found no calibration, expected the result of capture()")
    masks: dict[str, BlockMask] = {}
    for index, layer in enumerate(layers):
        layer_masks = _prune_layer(layer, index, prefix, settings, calibration, is_last=index + 1 == len(layers))
        masks.update(layer_masks)
        if on_layer is not None:
            on_layer(index, layer_masks)
    return Pattern(masks)


def _prune_layer(
    layer: nn.Module, index: int, prefix: str, settings: PruneSettings, calibration: Calibration | None, *, is_last: bool
) -> dict[str, BlockMask]:
    """Prune one layer and make the next one's inputs; its statistics live no longer than this call."""
    linears = find_linears(layer, f"{prefix}.{index}")
    if calibration is None:
        return prune_linears(linears, None, settings)
    home = next(layer.parameters()).device
    layer.to(calibration.device)  # one layer at a time, so that a model larger than the device can be pruned
    masks = prune_linears(linears, calibration.norms(index, layer, linears), settings)
    if not is_last:
        calibration.advance(index, layer)
    layer.to(home)
    return masks
