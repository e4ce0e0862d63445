"""The pattern and the adapter's norms, by layer and projection: pictures from `pattern.json`, and tables of what was recorded.

Called by `monitor/report.py`.
"""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from lora_dist.monitor.charts import COLOURS, GRID, Chart, rendered, style
from lora_dist.monitor.runs import Run, is_number

_LAYER = re.compile(r"(?P<before>.*?)\.(?P<layer>\d+)\.(?P<rest>.+)")
_CELL = 72
"""pixels of a picture and the space beside it"""
_KEPT = (47, 127, 193)
_FAINT = 0.12
"""opacity of what is pruned, on any paper"""
_PASSED = ("q_proj", "query", "k_proj", "key", "v_proj", "value", "qkv", "c_attn", "o_proj", "out_proj", "attention.output", "attn.c_proj",
           "gate", "up", "fc1", "intermediate", "c_fc", "down", "fc2", "output", "c_proj")  # fmt: skip
"""parts of projections' names, in the order in which data passes them"""
_TALL = 12
"""layers that are stacked; more stand side by side"""
_MOST_CELLS = 600
"""pictures in one chart; the layers between are left out evenly"""


@dataclass(frozen=True)
class Grid:
    """Values by layer and projection.

    Attributes:
        rows: names of the layers.
        columns: projections.
        values: by (row, column); not every place has one.
    """

    rows: list[str]
    columns: list[str]
    values: dict[tuple[str, str], Any]

    def spread(self) -> tuple[float, float]:
        return min(self.values.values()), max(self.values.values())


def place(names: Iterable[str]) -> dict[str, tuple[str, str]]:
    """Layer and projection of each module: `model.layers.3.self_attn.q_proj` -> ("3", "q_proj"). The projection's name is as short as
    tells it from the others (`output.dense` beside `attention.output.dense`)."""
    split: dict[str, tuple[str, str]] = {}
    for name in names:
        match = _LAYER.fullmatch(name)
        split[name] = (match["layer"], match["rest"]) if match else ("-", name)
    rests = sorted({rest for _, rest in split.values()})
    last = [rest.rsplit(".", 1)[-1] for rest in rests]
    short = {rest: end if last.count(end) == 1 else rest for rest, end in zip(rests, last, strict=True)}
    return {name: (layer, short[rest]) for name, (layer, rest) in split.items()}


def grid(values: Mapping[str, Any]) -> Grid:
    """Values by module name -> by layer and projection, layers by number, projections as data passes them."""
    places = place(values)
    rows = sorted(
        {layer for layer, _ in places.values()}, key=lambda layer: (not layer.isdigit(), int(layer) if layer.isdigit() else 0)
    )
    columns = sorted({projection for _, projection in places.values()}, key=_order)
    return Grid(rows, columns, {places[name]: value for name, value in values.items()})


def _order(projection: str) -> tuple[int, str]:
    return next((i for i, part in enumerate(_PASSED) if part in projection), len(_PASSED)), projection


def sparsity_grid(run: Run) -> Grid | None:
    linears = _linears(run)
    return grid({linear["name"]: float(linear["sparsity"]) for linear in linears}) if linears else None


def norms(run: Run) -> tuple[int, Grid] | None:
    """The last adapter norms that were recorded, and their step."""
    for record in reversed(run.of("adapter_norms")):
        values = {key: float(v) for key, v in record.items() if key not in ("step", "event") and is_number(v)}
        if values:
            return record["step"], grid(values)
    return None


def pattern_charts(run: Run) -> list[Chart]:
    """Kept tiles by layer, and a picture of each linear; nothing where no pattern was recorded."""
    linears = _linears(run)
    return [chart for chart in (_kept(linears), _pictures(linears)) if chart is not None] if linears else []


def norm_chart(run: Run) -> Chart | None:
    """One line a projection over the layers."""
    found = norms(run)
    if found is None:
        return None
    step, values = found
    with style():
        figure = Figure(figsize=(5.0, 3.0), layout="constrained")
        axes = figure.add_subplot()
        for number, column in enumerate(values.columns):
            points = [(i, values.values[row, column]) for i, row in enumerate(values.rows) if (row, column) in values.values]
            axes.plot(*zip(*points, strict=True), label=column, color=COLOURS[number % len(COLOURS)], marker="o", ms=3, lw=1.2)
        _by_layer(axes, values.rows, "Frobenius norm")
        axes.set_ylim(bottom=0)
        axes.legend(
            loc="lower left", bbox_to_anchor=(-0.02, 1.0), ncols=4, borderaxespad=0.1, columnspacing=1.0, handlelength=1.2
        )
        low, high = values.spread()
        alt = f"Norm of the adapter's update of each linear by layer, after step {step}: {low:.3g} to {high:.3g}."
        return rendered(figure, "adapter-norms", f"Adapter norms after step {step}", alt)


def _linears(run: Run) -> list[dict[str, Any]]:
    """Entries of `pattern.json` that can be drawn."""
    found = (run.pattern or {}).get("linears")
    return [
        linear
        for linear in (found if isinstance(found, list) else [])
        if isinstance(linear, dict) and isinstance(linear.get("name"), str) and is_number(linear.get("sparsity"))
    ]


def _kept(linears: Sequence[Mapping[str, Any]]) -> Chart | None:
    """Bars: kept and pruned tiles of each layer."""
    places = place(linear["name"] for linear in linears)
    tiles: dict[str, list[int]] = {}
    for linear in linears:
        counts = tiles.setdefault(places[linear["name"]][0], [0, 0])
        if is_number(linear.get("tiles")) and is_number(linear.get("kept_tiles")):
            counts[0] += int(linear["tiles"])
            counts[1] += int(linear["kept_tiles"])
    if not any(counts[0] for counts in tiles.values()):
        return None
    rows = grid(dict.fromkeys((linear["name"] for linear in linears), 0)).rows
    with style():
        figure = Figure(figsize=(5.0, 3.0), layout="constrained")
        axes = figure.add_subplot()
        at = range(len(rows))
        kept = [tiles[row][1] for row in rows]
        axes.bar(at, kept, color=COLOURS[0], label="kept", width=0.8)
        axes.bar(at, [tiles[row][0] - tiles[row][1] for row in rows], bottom=kept, color=GRID, label="pruned", width=0.8)
        _by_layer(axes, rows, "tiles")
        axes.legend(loc="lower left", bbox_to_anchor=(-0.02, 1.0), ncols=2, borderaxespad=0.1)
        alt = "; ".join(f"layer {row}: {tiles[row][1]} of {tiles[row][0]} kept" for row in rows)
        return rendered(figure, "kept-tiles", "Kept tiles by layer", f"Tiles of each layer. {alt}.")


def _pictures(linears: Sequence[Mapping[str, Any]]) -> Chart | None:
    """One picture a linear, by layer and projection; a point is a tile, or the mean of several. Many layers stand side by side."""
    shares = {linear["name"]: found for linear in linears if (found := _shares(linear.get("picture"))) is not None}
    if not shares:
        return None
    pictures = grid(shares)
    every = -(-len(pictures.rows) * len(pictures.columns) // _MOST_CELLS)
    layers, wide = pictures.rows[::every], len(pictures.rows) > _TALL
    rows, columns = (pictures.columns, layers) if wide else (layers, pictures.columns)
    image = np.empty((len(rows) * _CELL, len(columns) * _CELL, 4), np.uint8)
    image[:] = (*_KEPT, 0)
    for i, row in enumerate(rows):
        for j, column in enumerate(columns):
            share = pictures.values.get((column, row) if wide else (row, column))
            if share is not None:
                image[i * _CELL : i * _CELL + 64, j * _CELL : j * _CELL + 64, 3] = _opacity(share)
    left_out = "" if every == 1 else f" Every {every}th layer."
    note = f"Blue: kept. Output rows downwards, input columns to the right.{left_out}"
    alt = f"The kept tiles of {len(shares)} linears, one small picture each, by layer and projection.{left_out}"
    with style():
        side = 0.36 if wide else 0.58
        figure = Figure(figsize=(max(3.2, side * len(columns) + 0.8), side * len(rows) + 0.6), layout="constrained")
        _show(figure.add_subplot(), image, rows, columns, by_layer=not wide)
        return rendered(figure, "pattern", "Pattern of each linear" + (", by layer" if wide else ""), alt, note, wide=wide)


def _show(axes: Axes, image: npt.NDArray[np.uint8], rows: list[str], columns: list[str], *, by_layer: bool) -> None:
    """The image with the names of rows and columns beside it."""
    axes.imshow(image, interpolation="nearest", aspect="auto")
    middle = _CELL // 2 - 4
    axes.set_xticks(
        [_CELL * j + middle for j in range(len(columns))],
        columns,
        fontsize=8,
        rotation=35 if by_layer else 0,
        ha="left" if by_layer else "center",
    )
    axes.set_yticks([_CELL * i + middle for i in range(len(rows))], rows, fontsize=8)
    axes.xaxis.tick_top()
    if by_layer:
        axes.set_ylabel("layer")
    axes.tick_params(length=0)
    axes.grid(False)
    axes.spines[:].set_visible(False)


def _shares(picture: Any) -> npt.NDArray[np.float64] | None:
    """(rows, columns) from 0 to 1; None where it is damaged."""
    try:
        kept = np.frombuffer(base64.b64decode(picture["kept"], validate=True), np.uint8)
        return kept.reshape(int(picture["rows"]), int(picture["columns"])) / 255 if kept.size else None
    except (TypeError, KeyError, ValueError, binascii.Error):
        return None


def _opacity(share: npt.NDArray[np.float64]) -> npt.NDArray[np.uint8]:
    """64x64, from 0 to 255; smaller pictures are stretched point by point."""
    rows, columns = (np.arange(64) * length // 64 for length in share.shape)
    return np.rint(255 * (_FAINT + (1 - _FAINT) * share[rows][:, columns])).astype(np.uint8)


def _by_layer(axes: Axes, rows: Sequence[str], label: str) -> None:
    axes.set_xlabel("layer")
    axes.set_ylabel(label)
    if len(rows) <= 16:
        axes.set_xticks(range(len(rows)), rows)
    else:
        axes.xaxis.set_major_locator(MaxNLocator(8, integer=True))
