"""The report of one run or several: one HTML page that needs no network, and its charts as PNG files beside it.

`write_report` takes what `monitor/runs.py` has read. Called by `cli/report.py` and `scripts/demo.py`.
"""

from __future__ import annotations

import json
import math
import shlex
import statistics
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from lora_dist.log import UserError
from lora_dist.monitor.advice import perplexity_band
from lora_dist.monitor.console import clock, perplexity_text
from lora_dist.monitor.events import Event, events_of, seconds_between
from lora_dist.monitor.liveness import quiet
from lora_dist.monitor.runs import Record, Run, is_number
from lora_dist.monitor.shown import difference_rows, setting_text

_TEMPLATE = Path(__file__).with_name("report.html.jinja")


def write_report(
    runs: Sequence[Run], output: Path, *, title: str | None = None, bands: Sequence[float] = (), measured: Path | None = None
) -> list[Path]:
    """Write the page and its pictures; the files written, the page first.

    Args:
        output: the page; pictures are named after it.
        bands: upper ends of ideal, good and fair perplexities; empty: no bands.
        measured: JSON of `lora-dist eval --output`, or of perplexities by name, to show as a table.

    Raises:
        UserError: matplotlib or jinja2 is not installed, a file cannot be read or written.
    """
    try:
        import jinja2

        from lora_dist.monitor.charts import curves, write_pngs
        from lora_dist.monitor.pattern_charts import norm_chart, norms, pattern_charts, sparsity_grid
    except ImportError as error:
        raise UserError(f"report: {error.name} is not installed; pip install 'lora_dist[report]'") from error
    charts, pictures = curves(runs, bands), []
    shown = []
    drawn: dict[str, str] = {}
    """run that a pattern is drawn for, by digest"""
    for number, run in enumerate(runs, start=1):
        found, of_norms = norms(run), norm_chart(run)
        first = drawn.setdefault(_digest(run), run.name)
        own = pattern_charts(run) if first == run.name else []
        pictures.append((f"-{number}" if len(runs) > 1 else "", [*own, *([of_norms] if of_norms else [])]))
        text = _pattern_text(run) + ("" if first == run.name else f": the same as of {first}")
        pattern = {"pattern_charts": own, "sparsity": sparsity_grid(run) if first == run.name else None, "pattern_text": text}
        shown.append({**_shown(run, bands), **pattern, "norm_chart": of_norms, "norms": found[1] if found else None})
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    page = environment.from_string(_TEMPLATE.read_text(encoding="utf-8")).render(
        title=title or " · ".join(run.name for run in runs),
        version=version("lora_dist"),
        date=f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC",
        runs=shown,
        charts=charts,
        compared=_compared(shown) if len(runs) > 1 else [],
        differences=difference_rows([run.config for run in runs]) if len(runs) > 1 else [],
        measured=_measured(measured) if measured is not None else None,
    )
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(page, encoding="utf-8")
        files = [output, *write_pngs(charts, output.with_suffix(""))]
        for suffix, each in pictures:
            files += write_pngs(each, output.with_name(output.stem + suffix))
    except OSError as error:
        raise UserError(f"output: {error.filename or output} cannot be written ({error.strerror})") from error
    return files


def _shown(run: Run, bands: Sequence[float]) -> dict[str, Any]:
    """What the template asks of a run, but for its pictures."""
    figures = run.figures
    banded = bool(bands) and "perplexity" in figures
    rows = [_evaluation(record, figures, bands) for record in run.of("eval", "final")]
    attempt: Record = run.attempts[-1] if run.attempts else {}
    versions, code = attempt.get("versions"), attempt.get("code")
    pairs = list(versions.items()) if isinstance(versions, Mapping) else []
    if isinstance(code, Mapping) and code.get("revision"):
        pairs.append(("code", str(code["revision"])[:12] + (" and changes" if code.get("dirty") else "")))
    argv = attempt.get("argv")
    return {
        "name": run.name,
        "state": run.state,
        "reason": run.status.get("reason"),
        "quiet": clock(quiet_s) if (quiet_s := quiet(run)) is not None else None,
        "facts": list(_facts(run, bands)),
        "gaps": run.gaps,
        "figures": figures,
        "banded": banded,
        "evaluations": _before_after(run, rows),
        "all_evaluations": rows,
        "events": _grouped(events_of(run)),
        "versions": pairs,
        "command": shlex.join(map(str, argv)) if isinstance(argv, list) else None,
        "config": [
            (section, [(key, setting_text(value)) for key, value in values.items()]) for section, values in run.config.items()
        ],
    }


def _facts(run: Run, bands: Sequence[float]) -> Iterator[dict[str, str]]:
    """The figures at the top."""

    def fact(name: str, value: str, more: str = "") -> dict[str, str]:
        return {"name": name, "value": value, "more": more}

    for name in run.figures:
        points = run.series(name, "eval", "final")
        first, last = points[0][1], points[-1][1]
        if not run.is_finite(name, "eval", "final"):
            yield fact(name, "not finite", f"{_figure_text(name, last)} at step {points[-1][0]}")
            continue
        if name != "perplexity":
            yield fact(name, f"{last:.4f}", f"from {first:.4f}" if len(points) > 1 else "")
            continue
        change = f"from {perplexity_text(first)}, {100 * (last / first - 1):+.1f}%" if len(points) > 1 else ""
        band = perplexity_band(last, bands) if bands else ""
        yield fact("perplexity", perplexity_text(last), ", ".join(filter(None, (change, band))))
        best = min(points, key=lambda point: point[1])
        if best[1] < last:
            yield fact("best", perplexity_text(best[1]), f"perplexity at step {best[0]}")
    for name, key, events in (("evaluation loss", "eval_loss", ("eval", "final")), ("train loss", "loss", ("train",))):
        losses = run.series(key, *events)
        if not run.is_finite(key, *events):
            yield fact(name, "not finite", f"{losses[-1][1]:.4f} at step {losses[-1][0]}" if losses else "")
        elif losses:
            yield fact(name, f"{losses[-1][1]:.4f}", f"from {losses[0][1]:.4f}" if len(losses) > 1 else "")
    yield fact("steps", f"{run.step:,}", f"of {run.total_steps:,}" if run.total_steps is not None else "")
    yield from (fact(*each) for each in _costs(run))


def _costs(run: Run) -> Iterator[tuple[str, str, str]]:
    tokens, rates = run.series("tokens"), [value for _, value in run.series("tokens_per_s")]
    if tokens:
        yield "tokens", f"{tokens[-1][1]:,.0f}", "trained on"
    if rates:
        yield "throughput", f"{statistics.median(rates):,.0f}", "tokens/s, median"
    peaks = [value for _, value in run.series("peak_mem_gib")]
    if peaks:
        yield "peak memory", f"{max(peaks):.3g} GiB", "of a process"
    times = [seconds_between(attempt.get("started"), attempt.get("ended")) for attempt in run.attempts]
    known = [time for time in times if time is not None]
    if known:
        count = len(run.attempts)
        missing = len(times) - len(known)
        yield (
            "time",
            clock(sum(known)),
            f"{count} attempt{'s' if count > 1 else ''}" + (f", {missing} not ended" if missing else ""),
        )
    processes = run.attempts[-1].get("processes") if run.attempts else None
    if is_number(processes):
        yield (
            "processes",
            f"{processes}",
            "" if run.setting("parallel.strategy") in (None, "auto") else str(run.setting("parallel.strategy")),
        )
    if run.pattern is not None and is_number(run.pattern.get("sparsity")):
        yield "sparsity", f"{run.pattern['sparsity']:.2%}", _unit(run.pattern)
    if run.setting("model.name_or_path"):
        yield "base", Path(str(run.setting("model.name_or_path"))).name, ""


def _unit(pattern: Record) -> str:
    return f"{pattern.get('block')}x{pattern.get('block')} tiles" if pattern.get("kind") == "block" else "single elements"


def _digest(run: Run) -> str:
    """Of the pattern; one of its own where it is not recorded."""
    return str((run.pattern or {}).get("digest") or f"of {run.name}")


def _pattern_text(run: Run) -> str:
    if run.pattern is None:
        return ""
    linears, sparsity = run.pattern["linears"], run.pattern.get("sparsity")
    share = (
        f"{sparsity:.2%} of the weights of {len(linears)} linears pruned" if is_number(sparsity) else f"{len(linears)} linears"
    )
    return f"{share}, {_unit(run.pattern)}, digest {str(run.pattern.get('digest', 'unknown'))[:12]}"


def _evaluation(record: Record, figures: Sequence[str], bands: Sequence[float]) -> dict[str, Any]:
    perplexity = record.get("perplexity")
    return {
        "step": record["step"],
        "kind": record["event"],
        "loss": _figure_text("eval_loss", record.get("eval_loss")),
        "figures": [_figure_text(name, record.get(name)) for name in figures],
        "band": perplexity_band(perplexity, bands) if bands and is_number(perplexity) else "",
        "eval_loss": record.get("eval_loss"),
        "first_figure": record.get(figures[0]) if figures else None,
        "first_name": figures[0] if figures else "eval_loss",
    }


def _figure_text(name: str, value: Any) -> str:
    if not is_number(value):
        return "not finite"
    return perplexity_text(value) if name == "perplexity" else f"{value:.4f}"


def _before_after(run: Run, rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """First, best and last evaluation, as far as they are different ones."""
    if not rows:
        return []
    during = [row for row in rows if row["kind"] == "eval"] or list(rows)
    lower_is_better = rows[0]["first_name"] in ("perplexity", "eval_loss")

    def rank(row: dict[str, Any]) -> float:
        value = row["first_figure"] if row["first_figure"] is not None else row["eval_loss"]
        if not is_number(value):
            return math.inf
        return float(value) if lower_is_better else -float(value)

    first, best, last = during[0], min(during, key=rank), rows[-1]
    found = [{**first, "name": "before training" if first["step"] == 0 else "first"}]
    if best is not first:
        found.append({**best, "name": "best"})
    if last["kind"] == "final":
        found.append({**last, "name": "final (best adapter)" if run.setting("train.load_best_model_at_end") else "final"})
    elif last is not best and last is not first:
        found.append({**last, "name": "latest"})
    return found


def _grouped(events: Sequence[Event]) -> list[Event]:
    """Saves that follow each other become one row."""
    found: list[Event] = []
    saves: list[Event] = []

    def close() -> None:
        if len(saves) > 2:
            text = f"{len(saves)} checkpoints, of steps {', '.join(str(s.step) for s in saves[:4])}"
            found.append(Event(saves[0].step, "saved", text + (f", ... {saves[-1].step}" if len(saves) > 4 else "")))
        else:
            found.extend(saves)
        saves.clear()

    for event in events:
        if event.kind == "saved":
            saves.append(event)
        else:
            close()
            found.append(event)
    close()
    return found


def _compared(shown: Sequence[dict[str, Any]]) -> list[tuple[str, list[str]]]:
    """Rows of the table of several runs: the facts that any of them has."""
    names = dict.fromkeys(fact["name"] for run in shown for fact in run["facts"])
    rows = []
    for name in names:
        texts = [
            {fact["name"]: _on_one_line(fact["value"], fact["more"]) for fact in run["facts"]}.get(name, "–") for run in shown
        ]
        rows.append((name, texts))
    return rows


def _on_one_line(value: str, more: str) -> str:
    return f"{value} {more}" if more.startswith(("of ", "tokens/s", "trained on")) else ", ".join(filter(None, (value, more)))


def _measured(file: Path) -> dict[str, Any]:
    """The table of an evaluation's JSON."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"evaluation: {file} cannot be read ({error}), expected JSON of lora-dist eval --output") from error
    rows: dict[str, dict[str, str]] = {}
    if isinstance(content, dict) and all(is_number(value) for value in content.values()):
        rows = {name: {"perplexity": perplexity_text(value)} for name, value in content.items()}
    elif isinstance(content, dict):
        models = content.get("models", [content])
        rows = {str(model.get("name")): dict(_model_figures(model)) for model in models if isinstance(model, dict)}
    columns = list(dict.fromkeys(column for row in rows.values() for column in row))
    if not columns:
        raise UserError(f"evaluation: found no figures in {file}, expected JSON of lora-dist eval --output")
    return {
        "file": file.name,
        "columns": columns,
        "rows": [(name, [row.get(column, "–") for column in columns]) for name, row in rows.items()],
    }


def _model_figures(model: Record) -> Iterator[tuple[str, str]]:
    """Figures of one row of `lora-dist eval`: perplexities by text, mean accuracy, speed, memory."""
    perplexity = model.get("perplexity")
    if is_number(perplexity):
        yield "perplexity", perplexity_text(perplexity)
    for text, found in (perplexity if isinstance(perplexity, dict) else {}).items():
        if isinstance(found, dict) and is_number(found.get("perplexity")):
            yield f"perplexity, {text}", perplexity_text(found["perplexity"])
    zero_shot = model.get("zeroshot")
    if isinstance(zero_shot, dict) and is_number(zero_shot.get("mean")):
        yield "mean zero-shot accuracy", f"{zero_shot['mean']:.1%}"
