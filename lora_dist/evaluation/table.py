"""Figures of several models side by side, and as valid JSON. Called by `engine/report.py`.

recovery = (ln ppl_pruned - ln ppl) / (ln ppl_pruned - ln ppl_dense)        design section 1: 0 as pruned, 1 as before
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

Report = Mapping[str, Any]
MIB = 2**20


def finite(value: Any) -> Any:
    """The same with what JSON has no number for as text: inf, -inf, nan."""
    if isinstance(value, Mapping):
        return {str(key): finite(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [finite(entry) for entry in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value


def add_recovery(reports: Sequence[dict[str, Any]], dense: str = "dense", pruned: str = "pruned") -> None:
    """Note under `recovery`, text by text, how much of what pruning cost a model has back; where both ends are rows with figures."""
    by_name = {report["name"]: report for report in reports}
    if dense not in by_name or pruned not in by_name:
        return
    for name, report in by_name.items():
        if name in (dense, pruned):
            continue
        found = {}
        for text in report.get("perplexity", {}):
            losses = [_at(by_name[row], "perplexity", text, "loss") for row in (dense, pruned, name)]
            if all(loss is not None for loss in losses) and losses[1] > losses[0]:
                found[text] = (losses[1] - losses[2]) / (losses[1] - losses[0])
        if found:
            report["recovery"] = found


def _at(report: Any, *keys: str) -> Any:
    """A figure by its path; None where it, or anything on the way, is not there."""
    for key in keys:
        if not isinstance(report, Mapping) or key not in report:
            return None
        report = report[key]
    return report


Cell = Callable[[Report], str]


def _cell(path: Sequence[str], form: Callable[[float], str]) -> Cell:
    def show(report: Report) -> str:
        for length in range(len(path) + 1):  # an error anywhere on the way is the cell's
            if _at(report, *path[:length], "error") is not None:
                return "failed"
        value = _at(report, *path)
        return "" if value is None else form(float(value))

    return show


def perplexity_form(value: float) -> str:
    return f"{value:.2f}" if value < 1e5 else f"{value:.3g}"


def _with_error(task: str, metric: str) -> Cell:
    value, error = (_cell(("zeroshot", "tasks", task, key), lambda v: f"{100 * v:.1f}") for key in (metric, f"{metric}_stderr"))
    return lambda report: f"{value(report)} ± {error(report)}" if error(report) not in ("", "failed") else value(report)


def _percent(value: float) -> str:
    return f"{100 * value:.1f}%"


def _plain(value: float) -> str:
    return f"{value:,.1f}" if value < 1000 else f"{value:,.0f}"


def _ms(value: float) -> str:
    return f"{1000 * value:.1f}"


def _mib(value: float) -> str:
    return f"{value / MIB:,.1f}"


def _lines(reports: Sequence[Report]) -> list[tuple[str, Cell]]:
    """Labels and cells of the figures that any of the reports has."""

    def names(*path: str) -> list[str]:
        return list(dict.fromkeys(name for report in reports for name in (_at(report, *path) or {}) if name != "error"))

    texts, tasks = names("perplexity"), names("zeroshot", "tasks")
    lines: list[tuple[str, Cell]] = []
    for text in texts:
        lines.append((f"perplexity, {text}", _cell(("perplexity", text, "perplexity"), perplexity_form)))
        lines.append((f"  word perplexity, {text}", _cell(("perplexity", text, "word_perplexity"), perplexity_form)))
        lines.append((f"  bits per byte, {text}", _cell(("perplexity", text, "bits_per_byte"), lambda v: f"{v:.3f}")))
    lines += [(f"recovery, {text}", _cell(("recovery", text), _percent)) for text in texts]
    for task in tasks:
        lines.append((f"{task}, acc %", _with_error(task, "acc")))
        lines.append((f"  {task}, acc_norm %", _with_error(task, "acc_norm")))
    lines.append(("mean acc %", _cell(("zeroshot", "mean_acc"), lambda v: f"{100 * v:.1f}")))
    lines.append(("mean acc_norm (else acc) %", _cell(("zeroshot", "mean_acc_norm"), lambda v: f"{100 * v:.1f}")))
    lines += [
        ("prefill, tokens/s", _cell(("speed", "prefill_tokens_per_s", "median"), _plain)),
        ("decode, tokens/s", _cell(("speed", "decode_tokens_per_s", "median"), _plain)),
        ("first token, ms", _cell(("speed", "first_token_latency_s", "median"), _ms)),
        ("token to token p50, ms", _cell(("speed", "inter_token_latency_s", "p50"), _ms)),
        ("token to token p95, ms", _cell(("speed", "inter_token_latency_s", "p95"), _ms)),
        ("weights, MiB", _cell(("memory", "weights_bytes"), _mib)),
        ("  not zero, MiB", _cell(("memory", "weights_nonzero_bytes"), _mib)),
        ("adapter, MiB", _cell(("memory", "adapter_bytes"), _mib)),
        ("peak evaluating, MiB", _cell(("memory", "peak_evaluating_bytes"), _mib)),
        ("peak generating, MiB", _cell(("memory", "peak_generating_bytes"), _mib)),
        ("zero weights", _cell(("memory", "zero_weights"), _percent)),
        ("zero tiles", _cell(("memory", "zero_tiles"), _percent)),
    ]
    loaded = [report for report in reports if "error" not in report] or reports
    return [(label, cell) for label, cell in lines if any(cell(report) for report in loaded)]


def markdown_table(reports: Sequence[Report]) -> str:
    """One line a figure, one column a model; padded, so that it reads well on a console too."""
    head = ["", *(str(report["name"]) for report in reports)]
    body = [[label.strip(), *(cell(report) for report in reports)] for label, cell in _lines(reports)]
    widths = [max(3, *(len(row[column]) for row in [head, *body])) for column in range(len(head))]

    def line(row: Sequence[str]) -> str:
        first, *rest = [
            text.ljust(width) if i == 0 else text.rjust(width) for i, (text, width) in enumerate(zip(row, widths, strict=True))
        ]
        return f"| {' | '.join([first, *rest])} |"

    rule = f"|{'|'.join(['-' * (widths[0] + 2), *('-' * (width + 1) + ':' for width in widths[1:])])}|"
    return "\n".join([line(head), rule, *map(line, body)])


def errors(report: Report) -> list[str]:
    """What failed, one line each, with where."""
    found: list[str] = []

    def walk(entry: Any, path: tuple[str, ...]) -> None:
        if isinstance(entry, Mapping):
            if "error" in entry:
                found.append(f"{', '.join(path)}: {entry['error']}" if path else str(entry["error"]))
            for key, value in entry.items():
                walk(value, (*path, str(key)))

    walk({key: value for key, value in report.items() if key != "how"}, ())
    return found


def conditions(report: Report) -> list[str]:
    """How the figures were obtained, in lines to stand below a table."""
    lines = []
    how = report.get("how", {})
    if how:
        versions = ", ".join(f"{name} {version}" for name, version in how["versions"].items())
        lines.append(f"{how['dtype']} on {how['device']}, {how['processes']} process(es), {how['strategy']}; {versions}.")
    for name, text in report.get("perplexity", {}).items():
        if "error" not in text:
            lines.append(
                f"Perplexity, {name}: {text['windows']:,} windows of {text['context']} tokens, stride {text['stride']}, average "
                f"{text['average']}, {text['tokens']:,} scored tokens, {text['text']}."
            )
    zero = report.get("zeroshot", {})
    if "tasks" in zero:
        cut = sum(task.get("truncated", 0) for task in zero["tasks"].values())
        asked = sum(task.get("questions", 0) for task in zero["tasks"].values())
        lines.append(
            f"Zero-shot: lm-eval {zero['lm_eval']}, {zero['num_fewshot']} examples, {asked:,} questions"
            f"{'' if zero['limit'] is None else ' (limit ' + str(zero['limit']) + ' a task)'}, context {zero['context']}, "
            f"{cut:,} requests cut off from the left; ± is lm-eval's standard error."
        )
        lines += [f"lm-eval: {note}" for note in zero.get("warnings", [])]
    speed = report.get("speed", {})
    if "batch_size" in speed:
        lines.append(
            f"Speed: {speed['batch_size']} prompt(s) of {speed['prompt_tokens']} tokens, {speed['max_new_tokens']} new ones; median of "
            f"{speed['repetitions']} repetitions behind {speed['warmup']} warm-up; {speed['threads']} thread(s)."
        )
    memory = report.get("memory", {})
    if "peak_of" in memory:
        lines.append(f"Peak memory: {memory['peak_of']}. Zeros: {memory['zeros_of']}.")
    return lines
