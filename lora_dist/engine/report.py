"""A whole evaluation of one model or several, side by side: perplexity, zero-shot accuracy, speed, memory; as a table and as files.

`lora-dist eval --metrics ...`, `scripts/run_evaluation.py`, and whoever wants figures behind a training call `evaluate_models`. A metric
that fails is noted in its place, and the others go on; so are rows of a comparison. docs/evaluation.md says what is in the files.
"""

from __future__ import annotations

import dataclasses
import gc
import importlib.metadata
import json
import platform
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from lora_dist.arguments import EvalArgs
from lora_dist.data.tokenise import tokenizer_digest
from lora_dist.engine.evaluate import KEYS, context_of, dtype_of, open_for_evaluation
from lora_dist.engine.measures import Measures
from lora_dist.engine.model_path import model_directory
from lora_dist.evaluation.footprint import held_bytes
from lora_dist.evaluation.table import add_recovery, conditions, errors, finite, markdown_table
from lora_dist.evaluation.together import say, together
from lora_dist.log import UserError
from lora_dist.monitor.console import Console
from lora_dist.parallel import World
from lora_dist.parallel.heap import trim

FORMAT, VERSION = "lora_dist.evaluation", 1
_LIBRARIES = ("lora_dist", "torch", "transformers", "tokenizers", "datasets")


@dataclass(frozen=True)
class Outcome:
    """What `evaluate_models` returns."""

    report: dict[str, Any]
    """what the JSON file holds"""
    failed: list[str]
    """what could not be measured, and why; one line each"""


def evaluate_models(args: EvalArgs, world: World, console: Console | None = None) -> Outcome:
    """Collective. Measure what `args.metrics` says (ppl, if nothing), print the table and write `output` and `output_markdown`.

    Args:
        console: where to tell what is done; None is silent.

    Raises:
        UserError: a single model that cannot be loaded, or files that cannot be written. What fails later is in the outcome.
    """
    console = console or Console(enabled=False)
    files = world.on_main(lambda: _output_files(args))
    rows = _rows(args)
    reports: list[dict[str, Any]] = []
    for number, (name, model, adapter) in enumerate(rows, start=1):
        console.line(f"[{number}/{len(rows)}] {name}: {model}{f' + {adapter}' if adapter else ''}")
        reports.append(_row(args, name, model, adapter, world, console, alone=len(rows) == 1 and not args.compare))
    add_recovery(reports)
    header = {"format": FORMAT, "version": VERSION, "date": time.strftime("%Y-%m-%dT%H:%M:%S%z")}
    report = finite({**header, **(reports[0] if not args.compare else {"models": reports})})
    failed = [f"{entry['name']}: {line}" for entry in reports for line in errors(entry)]
    _print(reports, failed, console)
    texts = {"output": json.dumps(report, indent=1, allow_nan=False) + "\n", "output_markdown": _markdown(reports, failed)}
    if world.is_main:
        for option, file in files.items():
            file.write_text(texts[option], encoding="utf-8")
            console.line(f"Written: {file}")
    return Outcome(report, failed)


def _rows(args: EvalArgs) -> list[tuple[str, str, str | None]]:
    """Name, model and adapter of each row."""
    if not args.compare:
        return [(Path(args.model).name or args.model, args.model, args.adapter)]
    rows = []
    for entry in args.compare:
        name, _, where = entry.partition("=")
        model, plus, adapter = (where, "", "") if Path(where).exists() else where.partition("+")
        rows.append((name, model, adapter if plus else None))
    return rows


def _row(
    args: EvalArgs, name: str, model: str, adapter: str | None, world: World, console: Console, *, alone: bool
) -> dict[str, Any]:
    """One model's report; of a row that cannot be loaded, why."""
    report: dict[str, Any] = {"name": name, "model": model, "adapter": adapter}
    _free(world)
    before = held_bytes()
    try:
        with _own_names():
            folder = world.broadcast(together(world, partial(_directory, args, model), only_main=True))
            opened = open_for_evaluation(args, folder, adapter, world)
            context = context_of(args, opened)
    except Exception as error:
        if alone:
            raise
        return {**report, "error": say(error)}
    report["how"] = {"directory": folder, **_how(args, opened, world)}
    measures = Measures(args, opened, context, world, before, _bars(console))
    steps: dict[str, tuple[str, Callable[[], dict[str, Any]]]] = {
        "memory": ("memory", measures.memory),  # first: texts and questions that are kept would count
        "ppl": ("perplexity", measures.perplexity),
        "zeroshot": ("zeroshot", measures.zero_shot),
        "speed": ("speed", measures.speed),
    }
    for metric, (key, measure) in steps.items():
        if metric in args.chosen_metrics:
            try:
                with _own_names():
                    report[key] = measure()
            except Exception as error:  # the figures of the others must not be lost; the report and the exit code tell
                report[key] = {"error": say(error)}
    return report


def _directory(args: EvalArgs, model: str) -> str:
    """Where the model lies; a pickle is converted there first."""
    beside = Path(args.output).expanduser().absolute().parent / f"{Path(model).stem}_converted" if args.output else None
    return model_directory(model, trust_pickle=args.trust_pickle, config_name=args.config_name, fallback=beside)


@contextmanager
def _own_names() -> Iterator[None]:
    try:
        yield
    except UserError as error:
        raise error.renamed(KEYS) from error


def _free(world: World) -> None:
    """Before a model is loaded: what the one before held."""
    gc.collect()
    trim()
    if world.device.type == "cuda":
        torch.cuda.empty_cache()


def _bars(console: Console) -> Callable[[int, str], Callable[[], None]]:
    """A progress bar for so many batches, which closes by itself."""

    def progress(batches: int, label: str) -> Callable[[], None]:
        bar, left = console.bar(batches, label), batches

        def tick() -> None:
            nonlocal left
            bar.update()
            left -= 1
            if left == 0:
                bar.close()

        return tick

    return progress


def _how(args: EvalArgs, opened: Any, world: World) -> dict[str, Any]:
    """The conditions that all figures of a model share."""
    tokenizer = opened.base.tokenizer
    cuda = world.device.type == "cuda"
    return {
        "model_class": type(opened.base.model).__name__,
        "fingerprint": opened.base.fingerprint,
        "tokenizer": {"class": type(tokenizer).__name__, "sha256": tokenizer_digest(tokenizer), "tokens": len(tokenizer)},
        "dtype": dtype_of(opened),
        "device": torch.cuda.get_device_name(world.device) if cuda else "cpu",
        "processes": world.size,
        "strategy": args.strategy,
        "threads": torch.get_num_threads(),
        "versions": {"python": platform.python_version(), **{name: importlib.metadata.version(name) for name in _LIBRARIES}},
        "options": {
            field.name: getattr(args, field.name)
            for field in dataclasses.fields(args)
            if field.name not in ("model", "adapter", "bands")
        },
    }


# --- output ---------------------------------------------------------------------------------------------------------------


def _output_files(args: EvalArgs) -> dict[str, Path]:
    """Files to write by option; found out before the evaluation that they can be, not after it."""
    files: dict[str, Path] = {}
    if args.output:
        files["output"] = Path(args.output).expanduser()
        files["output_markdown"] = files["output"].with_suffix(".md")
    if args.output_markdown:
        files["output_markdown"] = Path(args.output_markdown).expanduser()
    if len(set(files.values())) < len(files):
        raise UserError(
            f"output: found {args.output} for JSON and Markdown alike, expected two files (output_markdown names the other)"
        )
    for option, file in files.items():
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            file.open("a").close()
        except OSError as error:
            raise UserError(f"{option}: {file} cannot be written ({error.strerror})") from error
    return files


def _print(reports: list[dict[str, Any]], failed: list[str], console: Console) -> None:
    console.line()
    for line in _markdown(reports, failed).rstrip().split("\n"):
        console.line(line)


def _markdown(reports: list[dict[str, Any]], failed: list[str]) -> str:
    told: dict[str, list[str]] = {}
    for report in reports:
        for line in conditions(report):
            told.setdefault(line, []).append(str(report["name"]))
    shared = [line if len(names) == len(reports) else f"{', '.join(names)}: {line}" for line, names in told.items()]
    lines = [markdown_table(reports), "", *shared, *(["", "Failed:", "", *(f"- {line}" for line in failed)] if failed else [])]
    return "\n".join(lines) + "\n"
