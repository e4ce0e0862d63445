"""A recipe: stages that prune, train, merge and evaluate, each beginning with what the one before it left.

    OUT/01-prune/model/   OUT/02-train/run/   OUT/03-merge/model/   OUT/04-eval/figures.json
    OUT/NN-NAME/stage.json    written last: what the stage was, and the files that it left

Every stage is a process of its own, with the command line that a user would type. A stage whose `stage.json` says that it is done is
skipped; one that was broken off begins again, a training from its last checkpoint. A stage that is done with other options than the
recipe has now, or whose files are not there any more, stops the recipe before anything runs. Called by `cli/recipe.py`.
"""

from __future__ import annotations

import hashlib
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

import yaml

from lora_dist.log import UserError
from lora_dist.process import end_with_parent, flush

VERSION = 1
STAGE = "stage.json"
OUTPUT = {"prune": "model", "train": "run", "merge": "model", "eval": "figures.json"}
"""what a stage leaves in its folder, by verb"""
OWN = {
    "prune": ("model", "out"),
    "train": ("model.name_or_path", "train.output_dir", "train.resume_from_checkpoint", "train.overwrite_output_dir"),
    "merge": ("base", "adapter", "out"),
    "eval": ("model", "adapter", "output", "compare"),
}
"""options that the recipe itself sets"""
_KEYS = ("output_dir", "model", "processes", "defaults", "stages")


@dataclass(frozen=True)
class Stage:
    """One stage.

    Attributes:
        folder: its own, in `output_dir`.
        options: dotted key -> value, as the verb takes them.
        argv: behind `lora-dist`.
        digest: of all that decides what it makes, the stages before it included.
    """

    folder: Path
    verb: str
    options: Mapping[str, Any]
    argv: Sequence[str]
    digest: str
    processes: int = 1

    @property
    def name(self) -> str:
        return self.folder.name

    @property
    def output(self) -> Path:
        return self.folder / OUTPUT[self.verb]

    @property
    def command(self) -> list[str]:
        if self.processes == 1:
            return [sys.executable, "-m", "lora_dist", *self.argv]
        torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(self.processes)]
        return [sys.executable, *torchrun, "-m", "lora_dist", *self.argv]


@dataclass
class _State:
    """What a stage begins with."""

    model: str
    dense: str
    adapter: str = ""
    """trained on `model`, and not merged yet"""
    digest: str = ""
    problems: list[str] = field(default_factory=list)


def read_recipe(file: Path) -> list[Stage]:
    """The stages of a recipe, their options not checked yet.

    Raises:
        UserError: all problems together.
    """
    try:
        recipe = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError) as error:
        raise UserError(f"FILE: {file} cannot be read ({error})") from error
    if not isinstance(recipe, dict):
        raise UserError(f"FILE: {file} holds {type(recipe).__name__}, expected keys {', '.join(_KEYS)}")
    problems = [f"{key}: is no key of a recipe, expected {', '.join(_KEYS)}" for key in recipe if key not in _KEYS]
    for key, kind in (("output_dir", str), ("model", str), ("stages", list)):
        if not isinstance(recipe.get(key), kind) or not recipe[key]:
            problems.append(f"{key}: found {recipe.get(key)!r}, expected {'a list of stages' if kind is list else 'a path'}")
    processes, defaults = recipe.get("processes", 1), recipe.get("defaults") or {}
    if not isinstance(processes, int) or processes < 1:
        problems.append(f"processes: found {processes}, expected a number from 1")
    if not isinstance(defaults, dict) or not all(verb in OUTPUT and isinstance(d, dict) for verb, d in defaults.items()):
        problems.append(f"defaults: found {defaults}, expected options by verb: {', '.join(OUTPUT)}")
    if problems:
        raise UserError(problems)
    state = _State(recipe["model"], recipe["model"], digest=hashlib.sha256(recipe["model"].encode()).hexdigest())
    root, stages = Path(recipe["output_dir"]).expanduser(), []
    for number, entry in enumerate(recipe["stages"], start=1):
        stage = _stage(number, entry, root, state, defaults, processes)
        if stage is not None:
            stages.append(stage)
    if state.problems:
        raise UserError(state.problems)
    return stages


def _stage(number: int, entry: Any, root: Path, state: _State, defaults: Mapping[str, Any], processes: int) -> Stage | None:
    """One entry of the list; `state` becomes what the next one begins with."""
    given = {entry: {}} if isinstance(entry, str) else dict(entry) if isinstance(entry, dict) else {}
    name = given.pop("name", None)
    verb, own = next(iter(given.items()), (None, None))
    if len(given) != 1 or verb not in OUTPUT or not isinstance(own or {}, dict):
        state.problems.append(f"stages: number {number} is {entry!r}, expected one of {', '.join(OUTPUT)} with its options")
        return None
    assert isinstance(verb, str)
    folder = root / f"{number:02d}-{name or verb}"
    values = {"${model}": state.model, "${adapter}": state.adapter, "${dense}": state.dense}
    asked = _flat(defaults.get(verb, {})) | _flat(own or {})
    options = {key: _filled(value, values) for key, value in asked.items()}
    state.problems += [f"{folder.name}: {key} is set by the recipe: leave it out" for key in options if key in OWN[verb]]
    state.problems += [f"{folder.name}: {problem}" for problem in _order(verb, state)]
    output = str(folder / OUTPUT[verb])
    positionals = {
        "prune": [state.model, output],
        "train": [f"--model.name_or_path={state.model}", f"--train.output_dir={output}", "--train.resume_from_checkpoint=auto"],
        "merge": [state.model, state.adapter, output],
        "eval": [state.model, *([f"--adapter={state.adapter}"] if state.adapter else []), f"--output={output}"],
    }[verb]
    files = options.pop("config", [])
    files = [files] if isinstance(files, str) else files
    texts = [_content(file, folder.name, state.problems) for file in files]
    decides = [verb, asked, texts, state.digest]
    state.digest = hashlib.sha256(json.dumps(decides, sort_keys=True, default=str).encode()).hexdigest()
    argv = [verb, *(word for file in files for word in ("--config", file)), *positionals]
    argv += [f"--{key}={_text(value)}" for key, value in options.items() if value is not None]
    if verb in ("prune", "merge"):
        state.model, state.adapter = output, ""
    elif verb == "train":
        state.adapter = output
    return Stage(folder, verb, options, argv, state.digest, 1 if verb in ("merge", "eval") else processes)


def _order(verb: str, state: _State) -> Iterator[str]:
    if verb in ("prune", "train") and state.adapter:
        yield f"{verb} follows a train whose adapter is not merged, expected a merge between them"
    if verb == "merge" and not state.adapter:
        yield "merge follows no train, expected one before it"


def _flat(options: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Sections (`train: {max_steps: 5}`) as dotted keys."""
    flat: dict[str, Any] = {}
    for key, value in options.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat


def _filled(value: Any, values: Mapping[str, str]) -> Any:
    if isinstance(value, list):
        return [_filled(each, values) for each in value]
    for mark, text in values.items() if isinstance(value, str) else ():
        value = value.replace(mark, text)
    return value


def _text(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return json.dumps(value) if isinstance(value, list) else str(value)


def _content(file: str, stage: str, problems: list[str]) -> str:
    try:
        return Path(file).read_text(encoding="utf-8")
    except OSError as error:
        problems.append(f"{stage}: config: {file} cannot be read ({error.strerror})")
        return ""


def is_done(stage: Stage) -> bool:
    """Whether it need not be run.

    Raises:
        UserError: it was done with other options, or what it left is not there any more.
    """
    try:
        record = json.loads((stage.folder / STAGE).read_bytes())
        digest, files = record["digest"], record["files"]
    except FileNotFoundError:
        return False
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{stage.name}: {stage.folder / STAGE} cannot be read ({error}); remove the stage's folder to do it again"
        ) from error
    remedy = "remove its folder and those of the stages after it to do them again, or choose another output_dir"
    if digest != stage.digest:
        raise UserError(
            f"{stage.name}: was done with other options than the recipe has now for it, or for a stage before it; {remedy}"
        )
    for name, size in files.items():
        file = stage.folder / name
        if not file.is_file() or file.stat().st_size != size:
            raise UserError(f"{stage.name}: is done, but {file} is not as it left it; {remedy}")
    return True


def run_stage(stage: Stage) -> int:
    """Run a stage in a process of its own; its exit code. SIGTERM and SIGINT are handed on, and waited for."""
    stage.folder.mkdir(parents=True, exist_ok=True)
    if stage.verb != "train":  # a training goes on with what it has; others write their output at one go
        for path in [stage.output] if stage.output.exists() else []:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    started = time.perf_counter()
    # In a session of its own, or a terminal's Ctrl-C would reach it twice, which trainings take for "at once, without saving".
    process = subprocess.Popen(stage.command, start_new_session=True, preexec_fn=end_with_parent)

    def hand_on(number: int, _frame: FrameType | None) -> None:
        process.send_signal(number)

    before = {number: signal.signal(number, hand_on) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        code = process.wait()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if code == 0:
        _mark_done(stage, time.perf_counter() - started)
    return code if code >= 0 else 128 - code


def _mark_done(stage: Stage, time_s: float) -> None:
    paths = [stage.output] if stage.output.is_file() else sorted(p for p in stage.output.iterdir() if p.is_file())
    grows = ("train.log", "metrics.jsonl", "status.json")
    record = {
        "version": VERSION,
        "verb": stage.verb,
        "command": shlex.join(["lora-dist", *stage.argv]),
        "digest": stage.digest,
        "time_s": round(time_s, 3),
        "finished_at": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "files": {str(p.relative_to(stage.folder)): p.stat().st_size for p in paths if p.name not in grows and p.name[0] != "."},
    }
    staging = stage.folder / f".{STAGE}.tmp"
    staging.write_text(json.dumps(record, indent=1))
    flush(staging)
    os.replace(staging, stage.folder / STAGE)
    flush(stage.folder)


def summary(stages: Sequence[Stage]) -> list[str]:
    """A line for each stage that is done: its time, and what an evaluation found."""
    lines = []
    for stage in stages:
        record = json.loads((stage.folder / STAGE).read_bytes())
        found = ""
        if stage.verb == "eval":
            figures = json.loads(stage.output.read_bytes())
            found = f"  perplexity {figures['perplexity']:.2f}" if "perplexity" in figures else f"  {stage.output}"
        lines.append(f"{stage.name:<24}{record['time_s']:>10.1f} s{found}")
    return lines
