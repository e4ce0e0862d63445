"""A run folder as plain data, for the report and for watching: records, status, attempts, configuration, pattern, and what is missing.

Reads only, tolerates a run at work, a killed one, and a copy from another machine: what is missing or broken is told in `Run.gaps`. A
single `metrics.jsonl` or `train.log` is a run too. Called by `monitor/report.py` and `monitor/watch.py`.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeGuard

import yaml

from lora_dist.log import UserError
from lora_dist.monitor.log_records import records_of_log
from lora_dist.state import ATTEMPTS, CONFIG, LOG, METRICS, PATTERN, POST_MORTEM, RUN, STATUS

Record = Mapping[str, Any]
Point = tuple[int, float]

_ATTEMPT = re.compile(r"attempt-(\d+)\.json")
_LAST_STEP = re.compile(r"^Step (\d+)/", re.MULTILINE)
_NO_FIGURES = {
    "step", "event", "eval_loss", "eval_runtime_s", "eval_tokens", "epoch",
}  # fmt: skip
"""of an evaluation's record, what is no figure of quality beside the loss"""


@dataclass
class Run:
    """What is known of one run.

    Attributes:
        path: folder, or the file that stands for it.
        records: of metrics.jsonl in order; of train.log, where there is no such file.
        status: status.json; empty where there is none.
        attempts: attempts/*.json by number.
        post_mortems: by file name.
        gaps: files that are missing or broken, one line each.
    """

    path: Path
    name: str
    records: list[Record] = field(default_factory=list)
    status: Record = field(default_factory=dict)
    identity: Record = field(default_factory=dict)
    config: Record = field(default_factory=dict)
    pattern: Record | None = None
    attempts: list[Record] = field(default_factory=list)
    post_mortems: dict[str, Record] = field(default_factory=dict)
    log_warnings: list[tuple[int, str]] = field(default_factory=list)
    """step and text of the console's warnings"""
    gaps: list[str] = field(default_factory=list)

    def of(self, *events: str) -> list[Record]:
        return [record for record in self.records if record["event"] in events]

    def series(self, key: str, *events: str) -> list[Point]:
        """(step, value) of the records that have a finite number under `key`."""
        points = ((record["step"], record.get(key)) for record in self.of(*(events or ("train",))))
        return [(step, float(value)) for step, value in points if is_number(value)]

    def is_finite(self, key: str, *events: str) -> bool:
        """Whether the last record that has `key` has a finite number there: `series` leaves the others out."""
        told = [record[key] for record in self.of(*(events or ("train",))) if key in record]
        return not told or is_number(told[-1])

    @property
    def figures(self) -> list[str]:
        """What its evaluations tell beside the loss: perplexity, accuracy, ..."""
        named = dict.fromkeys(key for record in self.of("eval", "final") for key in record if key not in _NO_FIGURES)
        return [key for key in named if self.series(key, "eval", "final")]

    @property
    def step(self) -> int:
        told = self.status.get("step")
        return max((record["step"] for record in self.records), default=int(told) if is_number(told) else 0)

    @property
    def total_steps(self) -> int | None:
        total = self.status.get("total_steps")
        if total is None:
            total = next((record["total_steps"] for record in reversed(self.records) if "total_steps" in record), None)
        return int(total) if is_number(total) else None

    @property
    def state(self) -> str:
        """running, stopped, completed, failed, hung; of a log or metrics alone completed, or unknown."""
        if self.status.get("state"):
            return str(self.status["state"])
        return "completed" if self.of("final") else "unknown"

    def setting(self, key: str) -> Any:
        """Of the configuration, by dotted key; None where it is not recorded."""
        section, _, leaf = key.partition(".")
        values = self.config.get(section)
        return values.get(leaf) if isinstance(values, Mapping) else None


def is_number(value: Any) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def read_runs(paths: Iterable[str]) -> list[Run]:
    """Read several, with names that tell them apart.

    Raises:
        UserError: paths that are no runs, all together.
    """
    runs, problems = [], []
    for path in paths:
        try:
            runs.append(read_run(Path(path)))
        except UserError as error:
            problems += error.problems
    if problems:
        raise UserError(problems)
    names = [run.name for run in runs]
    for run in runs:
        if names.count(run.name) > 1:
            run.name = f"{run.path.absolute().parent.name}/{run.name}"
    names = [run.name for run in runs]
    for number, run in enumerate(runs, start=1):
        if names.count(run.name) > 1:
            run.name = f"{run.name} ({number})"
    return runs


def read_run(path: Path) -> Run:
    """Read one.

    Raises:
        UserError: nothing is there, or it is no run.
    """
    if not path.exists():
        raise UserError(f"RUN: found no {path}, expected the folder of a run (train.output_dir), its {METRICS} or its {LOG}")
    if path.is_file():
        return _file(path)
    if not any((path / name).exists() for name in (METRICS, STATUS, LOG, RUN)):
        raise UserError(
            f"RUN: found neither {METRICS} nor {STATUS} nor {LOG} in {path}, expected the folder of a run (train.output_dir)"
        )
    run = Run(path, path.absolute().name)
    run.status = _numbers(run, STATUS, _json(run, STATUS, "how the run stands is not known"), "step", "total_steps")
    run.identity = _json(run, RUN, "the run has no id here")
    run.config = _config(run)
    pattern = _json(run, PATTERN, "the pattern is not drawn (runs of earlier versions have none, nor has a base without pattern)")
    run.pattern = pattern if isinstance(pattern.get("linears"), list) else None
    if pattern and run.pattern is None:
        run.gaps.append(f"{PATTERN} holds no list of linears: the pattern is not drawn")
    _read_attempts(run)
    for file in sorted((path / POST_MORTEM).glob("step-*.json")):
        run.post_mortems[file.name] = _json(run, f"{POST_MORTEM}/{file.name}", "left out")
    log = _text(path / LOG)
    from_log, run.log_warnings = records_of_log(log or "")
    if (path / METRICS).exists():
        run.records = _metrics(run, path / METRICS)
    else:
        run.records = from_log
        run.gaps.append(
            f"{METRICS} is missing: " + (f"curves are read from {LOG}, rounded" if from_log else "there are no curves")
        )
    return run


def _file(path: Path) -> Run:
    run = Run(path, f"{path.absolute().parent.name}/{path.name}")
    text = _text(path)
    if text is None:
        raise UserError(f"RUN: {path} cannot be read, expected the folder of a run, its {METRICS} or its {LOG}")
    if path.suffix == ".jsonl":
        run.records = _metrics(run, path)
    else:
        run.records, run.log_warnings = records_of_log(text)
    if not run.records:
        raise UserError(f"RUN: found no line of a run in {path}, expected the folder of a run, its {METRICS} or its {LOG}")
    run.gaps.append(f"{path.name} alone: no configuration, versions, attempts or pattern")
    return run


def _text(file: Path) -> str | None:
    try:
        return file.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None


def _metrics(run: Run, file: Path) -> list[Record]:
    """The records; lines that are none are counted in `gaps`, but for the last, which may be half written."""
    text = _text(file)
    if text is None:
        run.gaps.append(f"{file.name} cannot be read: there are no curves")
        return []
    records: list[Record] = []
    broken = []
    lines = text.splitlines()
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
            if not (isinstance(record, dict) and isinstance(record["step"], int) and isinstance(record["event"], str)):
                raise ValueError
            records.append(record)
        except (ValueError, KeyError):
            if number < len(lines) or text.endswith("\n"):
                broken.append(number)
    if broken:
        run.gaps.append(
            f"{file.name}: {len(broken)} of {len(lines)} lines are no records (first: line {broken[0]}) and are left out"
        )
    if not records:
        run.gaps.append(f"{file.name} holds no records yet: there are no curves")
    return records


def _json(run: Run, name: str, so: str) -> Record:
    """A JSON object of the folder; a gap and an empty one where there is none."""
    return _object(run, name, so, json.loads)


def _object(run: Run, name: str, so: str, read: Callable[[str], Any]) -> Record:
    text = _text(run.path / name)
    if text is None:
        run.gaps.append(f"{name} is missing: {so}")
        return {}
    try:
        found = read(text)
    except (ValueError, yaml.YAMLError):
        run.gaps.append(f"{name} is damaged: {so}")
        return {}
    if not isinstance(found, dict):
        run.gaps.append(f"{name} holds no object: {so}")
        return {}
    return found


def _numbers(run: Run, name: str, record: Record, *keys: str) -> Record:
    """The record without those of `keys` that hold something else; each is a gap."""
    wrong = [key for key in keys if record.get(key) is not None and not is_number(record[key])]
    run.gaps += [f"{name}: {key} is {record[key]!r}, which is no number" for key in wrong]
    return {key: value for key, value in record.items() if key not in wrong}


def _config(run: Run) -> Record:
    config = _object(run, CONFIG, "settings are not shown", yaml.safe_load)
    return {section: values for section, values in config.items() if isinstance(values, dict)}


def _read_attempts(run: Run) -> None:
    folder = run.path / ATTEMPTS
    found = sorted((int(match[1]), file) for file in folder.glob("*.json") if (match := _ATTEMPT.fullmatch(file.name)))
    for number, file in found:
        name = f"{ATTEMPTS}/{file.name}"
        record = _numbers(run, name, _json(run, name, "this attempt is left out"), "first_step", "last_step", "processes")
        if not record:
            continue
        if record.get("last_step") is None:
            steps = _LAST_STEP.findall(_text(folder / f"attempt-{number}.log") or "")
            record = {**record, "last_step": int(steps[-1]) if steps else None}
        run.attempts.append(record)
    if not found:
        run.gaps.append(f"{ATTEMPTS}/ is missing or empty: starts, resumes and versions are not known")
