"""What a model directory, an adapter or a mask file holds of a pattern, and what is wrong with it."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors.torch import load_file

from lora_dist.adapter import (
    ADAPTER_CONFIG,
    ADAPTER_FILE,
    adapter_folder,
    adapter_identity,
    adapter_type,
    describe,
    read_adapter_config,
)
from lora_dist.arguments import InspectArgs
from lora_dist.blocks import MASK_FILE, BlockMask, LayerStats, NamedLinear, Pattern
from lora_dist.engine.pattern import base_pattern, zero_share
from lora_dist.log import UserError
from lora_dist.models.architecture import prunable_linears
from lora_dist.models.loading import load_base
from lora_dist.models.sources import some
from lora_dist.models.uneven import recorded_widths

OTHER_BLOCKS = (4, 8, 16, 32, 64)
MIN_EXPLAINED = 0.99
"""share of the zero weights that a tile side must account for to be called the pattern's"""


@dataclass
class Inspection:
    """What was found. `findings` says what is wrong, one line each; empty means sound."""

    what: str
    """model, adapter or mask"""
    pattern: Pattern | None
    source: str
    """stored, detected or none"""
    rows: list[LayerStats] = field(default_factory=list)
    facts: list[str] = field(default_factory=list)
    findings: list[str] = field(default_factory=list)


def inspect(args: InspectArgs) -> Inspection:
    """Look at a path. Raises UserError where there is nothing to look at."""
    path = adapter_folder(args.path)
    if (path / ADAPTER_CONFIG).is_file():
        return _adapter(path)
    if path.is_file():
        pattern = Pattern.load(path)
        return Inspection("mask", pattern, "stored", pattern.stats())
    if (path / MASK_FILE).is_file() and not (path / "config.json").is_file():
        pattern = Pattern.load(path)
        return Inspection("mask", pattern, "stored", pattern.stats())
    return _model(args.path, args.block)


def _adapter(folder: Path) -> Inspection:
    config = read_adapter_config(folder)
    trained_on, pattern = adapter_identity(folder, config)
    found = Inspection("adapter", pattern, "stored" if pattern else "none", pattern.stats() if pattern else [])
    found.facts += [describe(config)]
    if not (folder / ADAPTER_FILE).is_file():
        raise UserError(f"PATH: found no {ADAPTER_FILE} in {folder}")
    tensors = load_file(str(folder / ADAPTER_FILE))
    if trained_on:
        found.facts.append(f"trained on base {trained_on[:12]}")
    found.facts.append(f"{sum(t.numel() for t in tensors.values()):,} parameters in {len(tensors)} tensors")
    bad = [name for name, tensor in tensors.items() if not torch.isfinite(tensor).all()]
    if bad:
        found.findings.append(f"{len(bad)} tensors are not finite, first {bad[0]}: the training diverged")
    kind = adapter_type(config)
    start, value = {"adalora": ("lora_E", 0), "ia3": ("ia3_l", 1), "sparse_full": ("lora_delta", 0)}.get(kind, ("lora_B", 0))
    if kind != "dora" and not any(start in name and bool((tensor != value).any()) for name, tensor in tensors.items()):
        word = "zero" if value == 0 else "one"
        found.findings.append(f"every {start} is {word}: this adapter was never trained and changes nothing")
    if pattern is not None:
        adapted = (name for name in tensors if ".lora_" in name and ".lora_whole_" not in name)
        targets = {name.removeprefix("base_model.model.").split(".lora_")[0] for name in adapted}
        unknown = sorted(t for t in targets if t not in pattern)
        if unknown:
            found.facts.append(f"{len(unknown)} adapted linears are outside the pattern (dense update), first {unknown[0]}")
    return found


def _model(name: str, block: int) -> Inspection:
    base = load_base(name)
    linears = prunable_linears(base.model)
    pattern_found = base_pattern(base.model, base.source_dir, block=block)
    pattern = pattern_found.pattern
    found = Inspection("model", pattern, pattern_found.source, pattern.stats() if pattern else [])
    found.facts += [
        f"{type(base.model).__name__}, {sum(p.numel() for p in base.model.parameters()):,} parameters, fingerprint {base.fingerprint[:12]}",
        f"{len(linears)} linears in the decoder layers, {zero_share(linears):.2%} of their weights are zero",
    ]
    widths = recorded_widths(base.model.config)
    if widths is not None:
        found.facts.append(f"layers of uneven widths: {widths}")
    bad = [n for n, p in base.model.named_parameters() if not bool(torch.isfinite(p).all())]
    if bad:
        found.findings.append(f"{len(bad)} parameters hold NaN or infinity, first {bad[0]}")
    if pattern_found.source == "stored":
        found.findings += _stored_against_weights(linears, pattern)
    elif widths is not None and pattern_found.zero_share == 0:
        pass  # pruned, by taking heads and neurons out
    elif pattern is not None and pattern.is_mixed:
        inner = [name for name, mask in pattern.items() if mask.kind == "element"]
        found.facts.append(f"{len(inner)} linears have zeros inside of kept tiles too and get a mask of elements: {some(inner)}")
        found.findings += _other_side(linears, block, pattern_found.zero_share)
    elif pattern is None or pattern.kind == "element":
        found.findings += _other_blocks(linears, block, pattern_found.zero_share)
    else:
        explained = pattern.sparsity / pattern_found.zero_share if pattern_found.zero_share else 1.0
        if explained < MIN_EXPLAINED:
            found.findings.append(
                f"only {explained:.1%} of the zero weights lie in whole {block}x{block} tiles; the rest would be trained as kept weights"
            )
            found.findings += _other_blocks(linears, block, pattern_found.zero_share)
    return found


def _stored_against_weights(linears: list[NamedLinear], pattern: Pattern | None) -> list[str]:
    assert pattern is not None
    findings = []
    for linear in linears:
        mask = pattern.get(linear.name)
        if mask is None:
            findings.append(f"layer {linear.name}: not in the stored mask")
            continue
        violation = mask.first_violation(linear.weight_OI)
        if violation is not None:
            findings.append(violation[0].describe(linear.name, mask.kind, violation[1]))
        if isinstance(mask, BlockMask):
            empty = int((mask.kept_PQ & ~BlockMask.detect(linear.weight_OI, mask.block).kept_PQ).sum())
            if empty:
                findings.append(f"layer {linear.name}: {empty} tiles are kept by the mask, but all zero in the weights")
    return findings


def _other_blocks(linears: list[NamedLinear], block: int, share: float) -> list[str]:
    """Which tile side would account for the zeros that are there."""
    if share == 0:
        return ["no zero weights at all: this model is not pruned"]
    return _other_side(linears, block, share) or [
        f"the zeros ({share:.1%} of the weights) do not form tiles of {', '.join(map(str, OTHER_BLOCKS))}: an element pattern"
    ]


def _other_side(linears: list[NamedLinear], block: int, share: float) -> list[str]:
    """The advice to take another tile side, if one accounts for the zeros."""
    for side in sorted(OTHER_BLOCKS, reverse=True):
        if side == block:
            continue
        total = sum(linear.weight_OI.numel() for linear in linears)
        inside = sum(linear.weight_OI.numel() - BlockMask.detect(linear.weight_OI, side).kept_elements() for linear in linears)
        if inside / total >= MIN_EXPLAINED * share:
            return [f"the zeros lie in whole {side}x{side} tiles: use --block {side} (adapter.block {side})"]
    return []
