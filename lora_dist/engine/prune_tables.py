"""What `lora-dist prune` prints of each layer: tiles pruned, and what reconstruction did."""

from __future__ import annotations

from collections.abc import Mapping

from lora_dist.blocks import BlockMask, Mask, Pattern
from lora_dist.pruning import Reconstruction


def _by_layer(names: list[str], prefix: str) -> dict[int, dict[str, str]]:
    """Layer number -> linear inside the layer -> its name in the model."""
    found: dict[int, dict[str, str]] = {}
    for name in names:
        number, linear = name.removeprefix(f"{prefix}.").split(".", 1)
        found.setdefault(int(number), {})[linear] = name
    return found


def _aligned(rows: list[list[str]]) -> str:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join("  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)


def error_table(done: Mapping[str, Reconstruction], prefix: str) -> str:
    """One line a decoder layer: each linear's relative error on the calibration inputs, tiles dropped and then reconstructed."""
    layers = _by_layer(list(done), prefix)
    linears = list(dict.fromkeys(linear for names in layers.values() for linear in names))
    rows = [["layer", *_short(linears)]]
    for index, names in sorted(layers.items()):
        cells = [done[names[n]] if n in names else None for n in linears]
        rows.append([str(index), *("-" if c is None else f"{c.error_before:.3f} > {c.error_after:.3f}" for c in cells)])
    return _aligned(rows)


def pattern_table(pattern: Pattern, names: list[str], prefix: str) -> str:
    """One line a decoder layer: tiles pruned, sparsity, and the sparsity of each of its linears; then the total.

    Args:
        pattern: block masks by module name.
        names: those modules, in the order of the model.
        prefix: name of the list of decoder layers; names below it are `<prefix>.<index>.<linear>`.
    """
    by_layer = {i: {n: pattern[name] for n, name in found.items()} for i, found in _by_layer(names, prefix).items()}
    linears = list(dict.fromkeys(linear for masks in by_layer.values() for linear in masks))
    shapes = [{masks[name].shape for masks in by_layer.values() if name in masks} for name in linears]
    sizes = ["{}x{}".format(*next(iter(found))) if len(found) == 1 else "uneven" for found in shapes]
    rows = [["layer", "tiles pruned", "sparsity", *_short(linears)], ["", "", "", *sizes]]
    for index, masks in sorted(by_layer.items()):
        rows.append([str(index), *_figures(list(masks.values())), *(_share([masks[n]]) if n in masks else "-" for n in linears)])
    columns = [[masks[name] for masks in by_layer.values() if name in masks] for name in linears]
    rows.append(["total", *_figures([mask for column in columns for mask in column]), *(_share(column) for column in columns)])
    return _aligned(rows)


def _short(linears: list[str]) -> list[str]:
    """`self_attn.q_proj` -> `q_proj`, where that names one linear only (GPT-2 has two `c_proj`)."""
    last = [name.rsplit(".", 1)[-1] for name in linears]
    return [short if last.count(short) == 1 else name for short, name in zip(last, linears, strict=True)]


def _figures(masks: list[Mask]) -> list[str]:
    tiles = [mask.kept_PQ for mask in masks if isinstance(mask, BlockMask)]
    pruned, count = sum(int((~kept_PQ).sum()) for kept_PQ in tiles), sum(kept_PQ.numel() for kept_PQ in tiles)
    return [f"{pruned:,}/{count:,}", _share(masks)]


def _share(masks: list[Mask]) -> str:
    """Share of pruned weights."""
    return f"{1 - sum(mask.kept_elements() for mask in masks) / sum(mask.shape[0] * mask.shape[1] for mask in masks):.1%}"
