"""Curves of a classifier's run, from its metrics.jsonl: loss left, accuracy (or what chooses the best adapter) right.

Called by `scripts/train_lora_basic.py`.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from lora_dist.log import UserError

_TITLES = {"f1": "F1", "eval_loss": "Loss", "spearmanr": "Spearman correlation", "pearson": "Pearson correlation"}
_TRAIN, _EVAL = "tab:blue", "tab:orange"


def draw_curves(metrics: Path, picture: Path, *, measure: str, title: str = "") -> None:
    """Write a PNG; a run without any step leaves none.

    Args:
        measure: of the right half, as the evaluations in metrics.jsonl name it.
        title: above both.

    Raises:
        UserError: a disk that cannot be written.
    """
    records = [json.loads(line) for line in metrics.read_text(encoding="utf-8").splitlines()]
    steps, epochs, evals = ([r for r in records if r["event"] == event] for event in ("train", "epoch", "eval"))
    if not steps:
        return
    figure = Figure(figsize=(11, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    if title:
        figure.suptitle(title)
    loss, score = figure.subplots(1, 2)
    loss.plot(*_points(steps, "loss"), color=_TRAIN, alpha=0.25, linewidth=1, label="train, every few steps")
    loss.plot(*_points(epochs, "train_loss"), "o-", color=_TRAIN, label="train, mean of the epoch")
    loss.plot(*_points(evals, "eval_loss"), "s--", color=_EVAL, label="evaluation")
    if measure == "accuracy":
        score.plot(*_points(steps, "accuracy"), color=_TRAIN, alpha=0.25, linewidth=1, label="train, every few steps")
        score.plot(*_points(epochs, "train_accuracy"), "o-", color=_TRAIN, label="train, mean of the epoch")
    score.plot(*_points(evals, measure), "s--", color=_EVAL, label="evaluation")
    for axes, name in ((loss, "Loss"), (score, _TITLES.get(measure, measure.replace("_", " ").capitalize()))):
        axes.set(title=name, xlabel="Epoch", ylabel=name)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(alpha=0.3)
        axes.legend()
    try:
        figure.savefig(picture, dpi=120)
    except OSError as error:
        raise UserError(f"{picture} cannot be written ({error.strerror})") from error


def _points(records: list[dict[str, Any]], key: str) -> tuple[list[float], list[float]]:
    """An epoch's mean stands at its end."""
    found = [(r["epoch"], r[key]) for r in records if r.get(key) is not None]
    return [x for x, _ in found], [y for _, y in found]
