"""A curve in characters: eight dots of Unicode braille a place, or stars where the terminal has no such signs. Called by `monitor/watch.py`."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from lora_dist.monitor.runs import Point

_DOTS = np.array([[0x01, 0x08], [0x02, 0x10], [0x04, 0x20], [0x40, 0x80]])
"""of a character, by row and column"""


def plot(points: Sequence[Point], *, width: int, height: int, log: bool = False, unicode: bool = True) -> list[str]:
    """Lines of text: the curve with its least and greatest value to the left, first and last step below.

    Args:
        points: (step, value), steps rising; finite, above 0 if `log`.
        width, height: characters in all, the labels included; 16 x 4 at least.
    """
    steps = np.array([step for step, _ in points], float)
    values = np.array([value for _, value in points], float)
    top, bottom = _label(values.max()), _label(values.min())
    margin = max(len(top), len(bottom)) + 1
    columns, rows = max(4, width - margin - 1), height - 1
    grid = _curve(steps, np.log(values) if log else values, 2 * columns, 4 * rows)
    cells = (grid.reshape(rows, 4, columns, 2) * _DOTS[None, :, None, :]).sum((1, 3))
    edge = "┤" if unicode else "|"
    lines = []
    for i, row in enumerate(cells):
        label = top if i == 0 else bottom if i == rows - 1 else ""
        curve = "".join(chr(0x2800 + cell) if unicode else "*" if cell else " " for cell in row)
        lines.append(f"{label:>{margin - 1}} {edge}{curve}")
    first, last = f"{steps[0]:.0f}", f"{steps[-1]:.0f}"
    lines.append(" " * (margin + 1) + first + last.rjust(columns - len(first)))
    return lines


def _curve(steps: npt.NDArray[np.float64], values: npt.NDArray[np.float64], width: int, height: int) -> npt.NDArray[np.int64]:
    """Dots (height, width): a line through the points, joined where it is steep."""
    span = values.max() - values.min()
    heights = (values.max() - values) / span * (height - 1) if span > 0 else np.full(len(values), (height - 1) / 2)
    if len(steps) == 1:
        at = np.full(1, heights[0])
    else:
        at = np.interp(np.linspace(steps[0], steps[-1], width), steps, heights)
    grid = np.zeros((height, width), np.int64)
    y = np.rint(at).astype(int)
    for x, (here, there) in enumerate(zip(y, np.append(y[1:], y[-1]), strict=True)):
        low, high = sorted((here, there))
        grid[low : max(low + 1, high), x] = 1
        grid[here, x] = 1
    return grid


def _label(value: float) -> str:
    if value != 0 and not 1e-3 <= abs(value) < 1e5:
        return f"{value:.1e}"
    return (
        f"{value:.{max(0, 3 - max(0, math.floor(math.log10(abs(value))) if value else 0))}f}"
        if abs(value) < 1e4
        else f"{value:.0f}"
    )
