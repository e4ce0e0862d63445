"""Curves of one run or several, as SVG for a page and as PNG files. Plain values in; matplotlib's figures without its global state.

In the SVG, text stays text, and the colours of text and grid are the page's own (`currentColor`, `--line`), so that it follows the page into
print and dark mode. Called by `monitor/report.py`.
"""

from __future__ import annotations

import io
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from lora_dist.monitor.events import MARKED, events_of
from lora_dist.monitor.runs import Point, Run, is_number

INK, GRID = "#1b1e24", "#d5d9e0"
COLOURS = ("#2f7fc1", "#d5662a", "#1f9e77", "#b0589b", "#a98600", "#5b6fd6", "#8a6d55", "#7f8791")
"""told apart by eyes that confuse red and green, and seen on white and on black"""
DASHES = ("-", "--", "-.", ":")
BAND_COLOURS = (("ideal", "#1f9e77"), ("good", "#8fbf3f"), ("fair", "#e0a100"), ("poor", "#cc4b37"))
MAX_POINTS = 1500
"""of a curve; longer ones are drawn by the least and the greatest of each stretch"""
PHASES = ("data_time_s", "forward_time_s", "backward_time_s", "optimizer_time_s", "save_time_s")

_STYLE = {
    "font.size": 10, "font.family": "sans-serif", "font.sans-serif": ["DejaVu Sans"], "svg.fonttype": "none",
    "text.color": INK, "axes.labelcolor": INK, "axes.edgecolor": INK, "xtick.color": INK, "ytick.color": INK,
    "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.color": GRID, "grid.linewidth": 0.7,
    "axes.axisbelow": True, "legend.frameon": False, "legend.fontsize": 9, "lines.linewidth": 1.6, "axes.linewidth": 0.8,
    "figure.facecolor": "none", "axes.facecolor": "none", "savefig.facecolor": "none",
}  # fmt: skip


@dataclass(frozen=True)
class Chart:
    """One picture of the report."""

    key: str
    """short, for the file's name"""
    title: str
    alt: str
    """what it shows, in words, with its first and last figures"""
    svg: str
    png: bytes
    note: str = ""
    wide: bool = False
    """across the page; scrolled on a phone"""


def style() -> Any:
    """Context in which figures of the report are made."""
    return mpl.rc_context(_STYLE)


def rendered(figure: Figure, key: str, title: str, alt: str, note: str = "", *, wide: bool = False) -> Chart:
    """Draw a finished figure, in both forms."""
    svg = io.StringIO()
    with mpl.rc_context(
        {"svg.hashsalt": key}
    ):  # names within the picture that are the same at every drawing, and unlike another's
        figure.savefig(svg, format="svg", metadata={"Date": None, "Creator": None})
    figure.set_layout_engine("none")  # it is laid out
    png = io.BytesIO()
    figure.savefig(png, format="png", dpi=150, facecolor="white", metadata={"Software": None})
    return Chart(key, title, alt, _inline(svg.getvalue(), alt), png.getvalue(), note, wide)


def _inline(svg: str, alt: str) -> str:
    """Without XML's head and fixed sizes, in the page's colours and fonts, and named for those who do not see it."""
    svg = svg[svg.index("<svg ") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    head, body = svg.split(">", 1)
    box = re.search(r'viewBox="[^"]+"', head)
    assert box is not None
    for text, end in (("&", "&amp;"), ("<", "&lt;"), ('"', "&quot;")):
        alt = alt.replace(text, end)
    body = body.replace(INK, "currentColor").replace(GRID, "var(--line)").replace("'DejaVu Sans', sans-serif", "inherit")
    body = re.sub(r"font: ([\d.]+px) [^;\"]*", r"font-size: \1", body)
    return f'<svg {box[0]} role="img" aria-label="{alt}" xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink">{body}'


def curves(runs: Sequence[Run], bands: Sequence[float]) -> list[Chart]:
    """All curves that there is anything for.

    Args:
        bands: upper ends of ideal, good and fair perplexities; none: not drawn.
    """
    charts: list[Chart | None] = [_loss(runs)]
    figures = dict.fromkeys(name for run in runs for name in run.figures)
    charts += [_quality(runs, name, bands if name == "perplexity" else ()) for name in figures]
    charts += [
        _lines(runs, "train-accuracy", "Accuracy in training", "accuracy", ""),
        _lines(runs, "learning-rate", "Learning rate", "learning_rate", "", log=_far_apart(runs, "learning_rate")),
        _lines(runs, "gradient-norm", "Gradient norm before clipping", "grad_norm", "", log=True),
        _lines(runs, "throughput", "Throughput", "tokens_per_s", "tokens/s", zero=True),
        _memory(runs),
        _step_time(runs[0]) if len(runs) == 1 else _lines(runs, "step-time", "Time of a step", "step_time_s", "s", zero=True),
    ]
    return [chart for chart in charts if chart is not None]


# One chart each


def _loss(runs: Sequence[Run]) -> Chart | None:
    series = [(run, run.series("loss"), run.series("eval_loss", "eval", "final")) for run in runs]
    if not any(train or evaluated for _, train, evaluated in series):
        return None
    with style():
        figure, axes = _figure("loss (nats)")
        for number, (run, train, evaluated) in enumerate(series):
            colour = COLOURS[number % len(COLOURS)]
            alone = len(runs) == 1
            _draw(
                axes,
                train,
                f"loss-train-{number}",
                color=colour,
                lw=1.2,
                alpha=0.9 if alone else 0.6,
                label="train" if alone else None,
            )
            _draw_evaluations(
                axes, run, "eval_loss", number, color=COLOURS[1] if alone else colour, label="evaluation" if alone else run.name
            )
            if not evaluated and not alone:
                _draw(axes, train[:1], f"loss-name-{number}", color=colour, label=run.name)
        if len(runs) == 1:
            _mark_events(axes, runs[0])
        _legend(axes)
        alt = "; ".join(
            f"{run.name}: train loss {_from_to(train)}, evaluation loss {_from_to(evaluated)}" for run, train, evaluated in series
        )
        note = "" if len(runs) == 1 else "Thin: train loss. With dots: evaluation loss."
        return rendered(figure, "loss", "Loss", f"Loss by step. {alt}.", f"{note}{_final_note(runs)}".strip())


def _quality(runs: Sequence[Run], name: str, bands: Sequence[float]) -> Chart | None:
    series = [(run, run.series(name, "eval", "final")) for run in runs]
    values = [value for _, points in series for _, value in points]
    if not values:
        return None
    title = {"perplexity": "Perplexity", "f1": "F1"}.get(name, name.replace("_", " ").capitalize())
    with style():
        log = name == "perplexity" and max(values) > 3 * min(values) > 0
        figure, axes = _figure(title.lower() if name != "f1" else title, log=log)
        for number, run in enumerate(runs):
            label = run.name if len(runs) > 1 else None
            _draw_evaluations(axes, run, name, number, color=COLOURS[number % len(COLOURS)], label=label)
        if bands:
            _shade(axes, bands)
        if len(runs) == 1:
            _mark_events(axes, runs[0])
        _legend(axes)
        alt = "; ".join(f"{run.name}: {_from_to(points)}" for run, points in series)
        ends = f" Bands: ideal to {bands[0]:g}, good to {bands[1]:g}, fair to {bands[2]:g}, poor above." if bands else ""
        return rendered(
            figure,
            name.replace("_", "-"),
            title,
            f"{title} of the evaluations by step. {alt}.{ends}",
            f"{ends}{_final_note(runs)}".strip(),
        )


def _memory(runs: Sequence[Run]) -> Chart | None:
    ranks = _by_rank(runs[0]) if len(runs) == 1 else []
    if len(ranks) < 2:
        return _lines(runs, "memory", "Peak memory of a process", "peak_mem_gib", "GiB", zero=True)
    with style():
        figure, axes = _figure("GiB")
        for rank, points in enumerate(ranks):
            _draw(axes, points, f"memory-{rank}", color=COLOURS[rank % len(COLOURS)], label=f"rank {rank}" if rank < 8 else None)
        axes.set_ylim(bottom=0)
        _legend(axes)
        alt = "; ".join(f"rank {rank}: {_from_to(points)} GiB" for rank, points in enumerate(ranks))
        return rendered(figure, "memory", "Peak memory by rank", f"Peak memory by step. {alt}.")


def _by_rank(run: Run) -> list[list[Point]]:
    found: list[list[Point]] = []
    for record in run.of("train"):
        each = record.get("peak_mem_gib_by_rank")
        for rank, value in enumerate(each if isinstance(each, list) else []):
            while len(found) <= rank:
                found.append([])
            if is_number(value):
                found[rank].append((record["step"], float(value)))
    return found


def _step_time(run: Run) -> Chart | None:
    """Split into its phases where they are recorded."""
    rows = [record for record in run.of("train") if all(is_number(record.get(phase)) for phase in PHASES[:4])]
    if len(rows) < 2:
        return _lines([run], "step-time", "Time of a step", "step_time_s", "s", zero=True)
    phases = [phase for phase in PHASES if all(is_number(record.get(phase)) for record in rows)]
    with style():
        figure, axes = _figure("s")
        steps = [record["step"] for record in rows]
        names = [phase.removesuffix("_time_s") for phase in phases]
        axes.stackplot(
            steps, *([record[phase] for record in rows] for phase in phases), labels=names, colors=COLOURS, alpha=0.85, lw=0
        )
        axes.set_ylim(bottom=0)
        _legend(axes, columns=3)
        means = ", ".join(
            f"{name} {sum(record[phase] for record in rows) / len(rows):.3g} s" for name, phase in zip(names, phases, strict=True)
        )
        return rendered(figure, "step-time", "Time of a step", f"Mean time of a step by phase: {means}.")


def _lines(
    runs: Sequence[Run], key: str, title: str, value: str, unit: str, *, zero: bool = False, log: bool = False
) -> Chart | None:
    """One value of the train records by step."""
    series = [(run, run.series(value)) for run in runs]
    values = [value for _, points in series for _, value in points]
    if not values:
        return None
    with style():
        positive = [value for value in values if value > 0]
        figure, axes = _figure(unit, log=log and bool(positive) and max(positive) > 20 * min(positive))
        for number, (run, points) in enumerate(series):
            _draw(
                axes, points, f"{key}-{number}", color=COLOURS[number % len(COLOURS)], ls=DASHES[number // len(COLOURS) % 4],
                label=run.name if len(runs) > 1 else None,
            )  # fmt: skip
        if zero:
            axes.set_ylim(0, 1.08 * max(values))
        _legend(axes)
        alt = "; ".join(f"{run.name}: {_from_to(points)}{' ' + unit if unit else ''}" for run, points in series)
        return rendered(figure, key, title, f"{title} by step. {alt}.")


def _far_apart(runs: Sequence[Run], value: str) -> bool:
    """Whether the least of several runs would be a flat line beside the greatest."""
    peaks = [max(found) for run in runs if (found := [each for _, each in run.series(value) if each > 0])]
    return bool(peaks) and max(peaks) > 20 * min(peaks)


# Parts of a chart


def _figure(label: str, *, log: bool = False) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(5.0, 3.0), layout="constrained")
    axes = figure.add_subplot()
    axes.set_xlabel("step")
    axes.set_ylabel(label)
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    if log:
        axes.set_yscale("log", nonpositive="mask")
    else:
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: tick_text(value)))
    return figure, axes


def tick_text(value: float) -> str:
    """A number on an axis, whole, so that no power of ten stands above it, where the legend is."""
    return f"{value:,.0f}" if abs(value) >= 1e4 else f"{value:.6g}"


def _draw(axes: Axes, points: Sequence[Point], gid: str, **how: Any) -> None:
    if not points:
        return
    if len(points) == 1 and "marker" not in how:
        how |= {"marker": "o", "ms": 3.5}
    steps, values = zip(*thinned(points), strict=True)
    axes.plot(steps, values, gid=gid, **how)


def _draw_evaluations(axes: Axes, run: Run, key: str, number: int, *, color: str, label: str | None) -> None:
    """A line of those in training, and a diamond for the final one, which may be of an earlier adapter."""
    during, final = run.series(key, "eval"), run.series(key, "final")
    dashes = DASHES[number // len(COLOURS) % 4]
    _draw(axes, during, f"{key}-{number}", color=color, marker="o", ms=3.5, ls=dashes, label=label)
    final_label = None if during else label
    _draw(axes, final, f"{key}-final-{number}", color=color, marker="D", ms=6, mfc="none", ls="none", label=final_label)


def _final_note(runs: Sequence[Run]) -> str:
    return " Diamond: what the run ended with." if any(run.of("final") for run in runs) else ""


def thinned(points: Sequence[Point], most: int = MAX_POINTS) -> list[Point]:
    """Not many more than `most` points: of each stretch the least and the greatest, in their order; first and last stay."""
    if len(points) <= most:
        return list(points)
    stretch = -(-2 * len(points) // most)
    kept: dict[int, None] = {0: None}
    for start in range(0, len(points), stretch):
        part = range(start, min(start + stretch, len(points)))
        kept |= dict.fromkeys(sorted((min(part, key=lambda i: points[i][1]), max(part, key=lambda i: points[i][1]))))
    return [points[i] for i in [*kept, *([] if len(points) - 1 in kept else [len(points) - 1])]]


def _shade(axes: Axes, bands: Sequence[float]) -> None:
    """The bands of a perplexity behind the curve, as far as the curve goes, each with its name beside the axes, where no curve is."""
    low, high = axes.get_ylim()
    log = axes.get_yscale() == "log"
    if not log:
        low = max(0.0, low)
    for (name, colour), start, end in _bands(bands, low, high):
        axes.axhspan(start, end, color=colour, alpha=0.16, lw=0, zorder=0)
        share = axes.transData.transform((0, end))[1] - axes.transData.transform((0, start))[1]
        if share > 18:  # pixels: a name that has room
            middle = (start * end) ** 0.5 if log else (start + end) / 2
            axes.annotate(
                name, (1, middle), xycoords=("axes fraction", "data"), ha="left", va="center", fontsize=9, xytext=(4, 0),
                textcoords="offset points", color=INK, alpha=0.8, annotation_clip=False,
            )  # fmt: skip
    axes.set_ylim(low, high)


def _bands(ends: Sequence[float], low: float, high: float) -> Iterator[tuple[tuple[str, str], float, float]]:
    edges = [0.0, *ends, float("inf")]
    for band, start, end in zip(BAND_COLOURS, edges, edges[1:], strict=False):
        if end > low and start < high:
            yield band, max(start, low), min(end, high)


def _mark_events(axes: Axes, run: Run) -> None:
    """A line at each resume, skip and rollback, as far as they can be told apart."""
    counts = Counter((event.step, event.kind) for event in events_of(run) if event.kind in MARKED)
    for (step, kind), count in list(counts.items())[:20]:
        axes.axvline(step, color=INK, lw=0.9, ls=(0, (2, 2)), alpha=0.7)
        axes.annotate(
            kind if count == 1 else f"{count} {kind}s", (step, 1), xycoords=("data", "axes fraction"), rotation=90, va="top",
            ha="right", fontsize=8, xytext=(-1, -2), textcoords="offset points", color=INK,
        )  # fmt: skip


def _legend(axes: Axes, columns: int = 2) -> None:
    """Above the axes, where it covers no curve."""
    handles, labels = axes.get_legend_handles_labels()
    if not handles:
        return
    widest = max(map(len, labels))
    columns = 1 if widest > 22 else columns if widest > 12 else 3
    axes.legend(
        handles, labels, loc="lower left", bbox_to_anchor=(-0.02, 1.0), ncols=columns, borderaxespad=0.1, columnspacing=1.2
    )


def _from_to(points: Sequence[Point]) -> str:
    if not points:
        return "not recorded"
    return f"{points[0][1]:.4g} at step {points[0][0]} to {points[-1][1]:.4g} at step {points[-1][0]}"


def write_pngs(charts: Sequence[Chart], stem: Path) -> list[Path]:
    """Beside the report, `STEM-loss.png` and so on. Raises OSError."""
    files = []
    for chart in charts:
        file = stem.with_name(f"{stem.name}-{chart.key}.png")
        file.write_bytes(chart.png)
        files.append(file)
    return files
