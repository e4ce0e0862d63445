"""Results of `run.py` as one Markdown table and one picture, and the ratios that CI watches. Works on the JSON alone."""

from __future__ import annotations

import math
import statistics
from pathlib import Path
from typing import Any

Results = dict[str, Any]

REQUIRED = [
    # preset, part of the case's name, figure, over, under, at least (+) or at most (-)
    ("cpu", "vocabulary 32,000", "tokens_per_s", "plain", "trainer", 1.7),
    ("cpu", "vocabulary 4,096", "tokens_per_s", "plain", "trainer", 1.2),
    ("cpu", "vocabulary 32,000", "peak_bytes", "plain", "trainer", -0.7),
    ("cpu", "", "step_s", "masked", "plain", -1.15),
    ("cpu", "", "tokens_per_s", "masked", "peft-layer", 1.0),
    ("cpu", "", "tokens_per_s", "masked", "dense-masked", 0.97),
    ("cpu", "width 4,096", "tokens_per_s", "masked", "dense-masked", 1.3),
    ("cpu", "", "peak_bytes", "masked", "dense-masked", -1.0),
    ("h200", "width 4,096", "tokens_per_s", "masked", "dense-masked", 1.3),
    ("h200", "width 4,096", "peak_bytes", "masked", "dense-masked", -1.0),
    *(("h200", part, "step_s", way, "plain", -1.08) for part in ("width 4,096", "7B") for way in ("masked", "masked-triton")),
    ("storage", "", "step_s", "masked-blocks", "masked", -1.15),
    ("storage", "", "peak_bytes", "masked-blocks", "masked", -1.0),
]
"""What the project asks of itself (docs/bench.md says why)."""

_BIG = ("7B", "7B, Liger", "7B, compiled")
ASKED = [
    # preset, case, figure, way, at least (+) or at most (-)
    *(("h200", case, "tokens_per_s", "plain", 13_700.0) for case in _BIG),
    *(("h200", case, "tokens_per_s", way, 13_000.0) for case in _BIG for way in ("masked", "masked-triton")),
    *(("h200", case, "mfu", way, 0.5) for case in _BIG for way in ("plain", "masked", "masked-triton")),
    ("h200", "7B, NF4 blocks", "peak_bytes", "masked", -6.0 * 2**30),
]
"""Likewise, of one way alone. MFU counts 4 operations a token and weight (frozen weights get no gradient)."""

QUICK = [("tokens_per_s", "plain", "trainer", 1.0), ("peak_bytes", "plain", "trainer", -1.0), ("step_s", "masked", "plain", -2.0)]
"""Of the smallest case, in processor time of one thread: far from what is measured, so that only a real loss is told."""


def ratios(rounds: list[Results], figure: str, over: str, under: str) -> list[float]:
    """A ratio a round, of rounds that have both ways."""
    return [r[over][figure] / r[under][figure] for r in rounds if over in r and under in r]


def _spread(values: list[float]) -> str:
    return f"{statistics.median(values):,.2f}" + (f" ({min(values):,.2f}-{max(values):,.2f})" if len(values) > 1 else "")


def table(results: Results) -> str:
    """Every case and way, then the ratios that are asked for."""
    lines = []
    for preset in (name for name in results if name != "startup"):
        lines += [
            f"### {preset}",
            "",
            *(["One thread a process; seconds are its processor time.", ""] if _shared(results[preset]) else []),
            "| case | way | tokens/s (rounds) | peak MiB | step s: forward, backward, rest | last loss | MFU |",
        ]
        lines.append("|---|---|---|---|---|---|---|")
        for name, kept in results[preset].items():
            lines += [_row(name, way, kept["rounds"]) for way in kept["case"]["ways"] if kept["rounds"]]
        lines += ["", *_ratio_table(results, preset), ""]
        if preset == "scaling":
            lines += [*_scaling(results[preset]), ""]
    if "startup" in results:
        lines += ["### start-up", "", "| case | way | resumed: launch to end of first step, s |", "|---|---|---|"]
        for name, kept in results["startup"].items():
            for way in kept["rounds"][0] if kept["rounds"] else []:
                lines.append(f"| {name} | {way} | {_spread([r[way]['first_step_s'] for r in kept['rounds']])} |")
        lines.append("")
    return "\n".join(lines)


def _shared(cases: Results) -> bool:
    return any(kept.get("shared") for kept in cases.values())


def _row(name: str, way: str, rounds: list[Results]) -> str:
    found = [r[way] for r in rounds]
    speeds = [each["tokens_per_s"] for each in found]
    phases = [statistics.median(each["phases_s"][phase] for each in found) for phase in ("forward", "backward", "optimizer")]
    peak = statistics.median(each["peak_bytes"] for each in found) / 2**20
    speed = f"{statistics.median(speeds):,.0f} ({min(speeds):,.0f}-{max(speeds):,.0f})"
    split = ", ".join("-" if math.isnan(p) else f"{p:.3f}" for p in phases)
    shares = _values(rounds, "mfu", way)
    mfu = f"{statistics.median(shares):.1%}" if shares else ""
    return f"| {name} | {way} | {speed} | {peak:,.0f} | {split} | {found[0]['losses'][-1]:.4f} | {mfu} |"


def _values(rounds: list[Results], figure: str, way: str) -> list[float]:
    """A figure a round, where it is known."""
    return [r[way][figure] for r in rounds if way in r and r[way].get(figure) is not None]


def _ratio_table(results: Results, preset: str) -> list[str]:
    lines = []
    for case, part, figure, over, under, limit in _met(results, preset):
        values = ratios(results[preset][case]["rounds"], figure, over, under)
        lines.append(f"| {case} | {part}, {over} over {under} | {_asked(values, limit)} |")
    for asked_of, case, figure, way, limit in ASKED:
        rounds = results[preset].get(case, {}).get("rounds", []) if asked_of == preset else []
        if values := _values(rounds, figure, way):
            unit = 2**30 if figure == "peak_bytes" else 1
            name = {"tokens_per_s": "tokens/s", "peak_bytes": "peak memory, GiB", "mfu": "MFU"}[figure]
            lines.append(f"| {case} | {name}, {way} | {_asked([value / unit for value in values], limit / unit)} |")
    return ["| case | figure | asked | measured | met |", "|---|---|---|---|---|", *lines] if lines else []


def _asked(values: list[float], limit: float) -> str:
    """What is asked of the median, what was measured, whether it is met."""
    median = statistics.median(values)
    met = median >= limit if limit > 0 else median <= -limit
    return f"{'at least' if limit > 0 else 'at most'} {abs(limit):,g} | {_spread(values)} | {'yes' if met else 'no'}"


def _met(results: Results, preset: str) -> list[tuple[str, str, str, str, str, float]]:
    words = {"tokens_per_s": "tokens/s", "peak_bytes": "peak memory", "step_s": "step time"}
    found = []
    for asked_of, part, figure, over, under, limit in REQUIRED:
        if asked_of != preset:
            continue
        for case, kept in results[preset].items():
            if part in case and ratios(kept["rounds"], figure, over, under):
                found.append((case, words[figure], figure, over, under, limit))
    return found


def _scaling(cases: Results) -> list[str]:
    """Time of a step against one process, and how far losses are apart."""
    alone = next(iter(cases.values()))
    lines = ["| | way | step time over one process | largest difference of losses, relative |", "|---|---|---|---|"]
    for name, kept in list(cases.items())[1:]:
        for way in kept["case"]["ways"]:
            pairs = list(zip(kept["rounds"], alone["rounds"], strict=False))
            times = [two[way]["step_s"] / one[way]["step_s"] for two, one in pairs]
            apart = max(
                abs(a - b) / abs(a) for two, one in pairs for a, b in zip(one[way]["losses"], two[way]["losses"], strict=True)
            )
            lines.append(f"| {name} | {way} | {_spread(times)} | {apart:.1e} |")
    return lines


def failures(results: Results) -> list[str]:
    """Ratios of the quick preset that are far off."""
    found = []
    for name, kept in results.get("quick", {}).items():
        for figure, over, under, limit in QUICK:
            value = statistics.median(ratios(kept["rounds"], figure, over, under))
            if (value < limit) if limit > 0 else (value > -limit):
                found.append(
                    f"{name}: {figure} of {over} over {under} is {value:.2f}, expected {'at least' if limit > 0 else 'at most'} {abs(limit):g}"
                )
    return found


def picture(results: Results, file: Path) -> None:
    """Tokens/s of every way against the first of its case."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    cases = [(f"{preset}: {name}", kept) for preset in results if preset != "startup" for name, kept in results[preset].items()]
    cases = [(name, kept) for name, kept in cases if kept["rounds"]]
    if not cases:
        return
    ways = list(dict.fromkeys(way for _, kept in cases for way in kept["case"]["ways"]))
    colours = dict(zip(ways, plt.get_cmap("tab10").colors, strict=False))  # type: ignore[attr-defined]
    figure, axes = plt.subplots(1, 2, figsize=(12, 1 + 0.8 * len(cases)), sharey=True)
    for axis, key, title in ((axes[0], "tokens_per_s", "tokens/s"), (axes[1], "peak_bytes", "peak memory")):
        for row, (_, kept) in enumerate(cases):
            first = kept["case"]["ways"][0]
            for place, way in enumerate(kept["case"]["ways"]):
                value = statistics.median(ratios(kept["rounds"], key, way, first))
                height = 0.8 / len(kept["case"]["ways"])
                axis.barh(row - 0.4 + height * (place + 0.5), value, height, color=colours[way], label=way)
                axis.text(value, row - 0.4 + height * (place + 0.5), f" {value:.2f}", va="center", fontsize=7)
        axis.axvline(1.0, color="grey", linewidth=0.8)
        axis.set_title(f"{title}, over the first way of the case")
    axes[0].set_yticks(range(len(cases)), [name for name, _ in cases])
    axes[0].invert_yaxis()
    handles = {label: handle for handle, label in zip(*axes[0].get_legend_handles_labels(), strict=True)}
    figure.legend(handles.values(), handles.keys(), loc="lower center", ncols=len(handles), frameon=False)
    figure.tight_layout(rect=(0, 0.04, 1, 1))
    figure.savefig(file, dpi=110)
    plt.close(figure)
