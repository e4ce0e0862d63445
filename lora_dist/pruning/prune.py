"""Prune decoder layers one after another, each by what it sees behind the layers pruned before it.

For each layer: sums of its linears' inputs while it is still dense but fed by the pruned prefix; scores; selection; the dropped
tiles become exactly +0.0 in place, and with `reconstruct` the kept weights are solved for (`solve.py`); then its outputs, now pruned, are
the next layer's inputs (as SparseGPT and Wanda do). Tiles are all scored before any is dropped within a layer; only where reconstruction
aims at the dense model (`target.py`) this is done stage by stage. Called by `engine/prune.py`.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from lora_dist.blocks import Mask, NamedLinear, Pattern, find_linears
from lora_dist.log import UserError
from lora_dist.pruning.budget import budgets, sensitivities
from lora_dist.pruning.calibration import Calibration
from lora_dist.pruning.choose import Choice, PruneSettings
from lora_dist.pruning.gram import Gram, Peers
from lora_dist.pruning.solve import Fit, Solved, reconstruct
from lora_dist.pruning.target import DenseModel, Target


@dataclass(frozen=True)
class Reconstruction:
    """What solving did to one linear; see `Solved`."""

    error_before: float
    error_after: float
    rows_kept_alone: int
    solved_again: int


@dataclass(frozen=True)
class Pruned:
    """What was done to one layer, or to all of them, by linear."""

    masks: dict[str, Mask]
    reconstructions: dict[str, Reconstruction]
    """empty where nothing was reconstructed"""
    damages: dict[str, float] = field(default_factory=dict)
    """to the model's output, of each linear pruned alone; for select global, else empty"""

    @property
    def pattern(self) -> Pattern:
        return Pattern(self.masks)

    def update(self, other: Pruned) -> None:
        self.masks.update(other.masks)
        self.reconstructions.update(other.reconstructions)


def prune_linears(linears: list[NamedLinear], norms: Mapping[str, Tensor] | None, choice: Choice) -> dict[str, Mask]:
    """Score and select every linear's tiles, then set the dropped ones to exactly +0.0 in place; the rest is untouched.

    Args:
        linears: their weights are written through `weight_OI`, a view whichever way round the weight is stored.
        norms: ||x_I||_2 by name, needed by the wanda and energy scores.
        choice: how.

    Returns:
        The mask of each linear by name, in the order given.

    Raises:
        UserError: if a score is not finite; no weight has been changed then.
    """
    masks = {linear.name: choice.by_score(linear, None if norms is None else norms[linear.name]) for linear in linears}
    for linear in linears:
        weight_OI = linear.weight_OI
        weight_OI.masked_fill_(~masks[linear.name].expand(weight_OI.device), 0.0)
    return masks


def bias_of(linear: NamedLinear) -> Tensor | None:
    bias = getattr(linear.module, "bias", None)
    return bias.detach() if isinstance(bias, Tensor) else None


def prune_solved(
    linears: list[NamedLinear],
    grams: Mapping[str, Gram],
    choice: Choice,
    peers: Peers,
    *,
    targets: Mapping[str, Target] | None = None,
) -> Pruned:
    """Collective: choose every linear's tiles, or take the given masks, and write the kept weights solved for.

    Args:
        linears: written in place.
        grams: of their inputs, by name.
        choice: how.
        targets: of their outputs, by name; None: what they put out now.

    Raises:
        UserError: if a score is not finite; no weight has been changed then.
    """
    masks: dict[str, Mask] = {}
    damping = choice.settings.damping
    for linear in linears:
        gram, target = grams[linear.name], None if targets is None else targets[linear.name]
        _require_finite(linear, gram)
        if choice.settings.score == "obs" and choice.given is None:
            fit = Fit.of(linear.weight_OI, gram, target, bias_of(linear), damping)
            masks[linear.name] = choice.by_removal(linear, fit, peers)
        else:
            masks[linear.name] = choice.by_score(linear, gram.norm_I)
    done = {}
    for linear in linears:
        bias_O = bias_of(linear)
        solved = reconstruct(
            linear.weight_OI,
            masks[linear.name],
            grams[linear.name],
            target=None if targets is None else targets[linear.name],
            bias_O=bias_O,
            damping=damping,
            peers=peers,
        )
        _write(linear, solved, bias_O)
        done[linear.name] = Reconstruction(solved.error_before, solved.error_after, solved.rows_kept_alone, solved.solved_again)
    return Pruned(masks, done)


def _require_finite(linear: NamedLinear, gram: Gram) -> None:
    for what, values in (("weights", linear.weight_OI), ("inputs on the calibration text", gram.products_II)):
        if not torch.isfinite(values).all():  # waits for the device
            raise UserError(
                f"layer {linear.name}: found {what} that are not finite (float16 overflows: try dtype=bfloat16 or float32)"
            )


def _write(linear: NamedLinear, solved: Solved, bias_O: Tensor | None) -> None:
    linear.weight_OI.copy_(solved.weight_OI)
    if bias_O is not None and solved.bias_O is not None:
        bias_O.copy_(solved.bias_O)


def prune_layers(
    layers: nn.ModuleList,
    prefix: str,
    settings: PruneSettings,
    calibration: Calibration | None,
    *,
    given: Pattern | None = None,
    on_layer: Callable[[int, Pruned], None] | None = None,
) -> Pruned:
    """Prune every linear of the decoder layers, in place. Collective where the calibration is.

    Args:
        layers: the decoder layers; their linears are all pruned, nothing else is touched.
        prefix: their name in the model (`model.layers`).
        settings: how.
        calibration: inputs of the first layer, from `capture`; used up layer by layer. None for scores that need none.
        given: masks of all linears, to be reconstructed instead of chosen.
        on_layer: called with each layer's index and what was done once it is pruned.

    Returns:
        What was done to all linears, by name in the model.

    Raises:
        UserError: if a score is not finite, or a linear saw no calibration token.
    """
    if calibration is None and settings.sees_text:
        raise ValueError(f"score {settings.score}: found no calibration, expected the result of capture()")
    done = Pruned({}, {})
    drops = None
    if calibration is not None and settings.select == "global" and given is None:
        found = sensitivities(layers, prefix, calibration, sparsity=settings.sparsity, block=settings.block)
        drops = budgets(found, settings.sparsity)
        done.damages.update({name: one.damage for name, one in found.items()})
    choice = Choice(settings, drops, given)
    to_dense = settings.reconstruct and settings.target == "dense"
    dense = DenseModel(calibration) if to_dense and calibration is not None else None
    for index, layer in enumerate(layers):
        one = _prune_layer(layer, index, prefix, choice, calibration, dense, is_last=index + 1 == len(layers))
        done.update(one)
        if on_layer is not None:
            on_layer(index, one)
    return done


@torch.no_grad()
def _prune_layer(
    layer: nn.Module,
    index: int,
    prefix: str,
    choice: Choice,
    calibration: Calibration | None,
    dense: DenseModel | None,
    *,
    is_last: bool,
) -> Pruned:
    """Prune one layer and make the next one's inputs; its statistics live no longer than this call."""
    linears = find_linears(layer, f"{prefix}.{index}")
    if calibration is None:
        return Pruned(prune_linears(linears, None, choice), {})
    home = next(layer.parameters()).device
    layer.to(calibration.device)  # one layer at a time, so that a model larger than the device can be pruned
    if dense is not None:
        done = _prune_stages(layer, index, linears, choice, calibration, dense, is_last=is_last)
    elif choice.settings.reconstruct:
        done = prune_solved(linears, calibration.grams(index, layer, linears), choice, calibration.peers)
    else:
        done = Pruned(prune_linears(linears, calibration.norms(index, layer, linears), choice), {})
    if not is_last:
        calibration.advance(index, layer)
    layer.to(home)
    return done


def _prune_stages(
    layer: nn.Module,
    index: int,
    linears: list[NamedLinear],
    choice: Choice,
    calibration: Calibration,
    dense: DenseModel,
    *,
    is_last: bool,
) -> Pruned:
    """One layer towards the dense model, stage by stage; then the dense model's next inputs are made too."""
    before = copy.deepcopy(layer)
    stages = dense.stages(index, before, linears)
    done = Pruned({}, {})
    for number, stage in enumerate(stages):
        gram, targets = dense.aims(index, layer, before, stages, number)
        grams = {linear.name: gram for linear in stage}
        done.update(prune_solved(stage, grams, choice, calibration.peers, targets=targets))
    if not is_last:
        dense.advance(index, before)
    return done
