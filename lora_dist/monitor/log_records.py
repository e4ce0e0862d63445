"""Records like those of `metrics.jsonl`, read from the console's own lines (`train.log`), for a log that came without the file.

The lines are those of `monitor/console.py`; figures are as rounded there. Called by `monitor/runs.py`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

_STEP = re.compile(r"Step (\d+)/(\d+) .*\| Loss: (\S+) \| LR: (\S+) \| Time: (\d+):(\d\d):(\d\d)")
_EVALUATION = re.compile(r"Eval at step (\d+):")
_FIGURE = re.compile(r"  - (?:Eval )?(\S+): (\S+)$")
_SAVED = re.compile(r"✅ Checkpoint saved at step (\d+)")
_FINAL = re.compile(r"  (eval_loss|epoch|(?!eval_)\w+) = (\S+)$")
_WARNING = "⚠️  "


def records_of_log(text: str) -> tuple[list[Mapping[str, Any]], list[tuple[int, str]]]:
    """Records, and warnings with the step they came after. A resumed run's log holds some steps twice: the later ones count."""
    reader = _Reader()
    for line in text.splitlines():
        reader.read(line)
    return reader.records, reader.warnings


class _Reader:
    def __init__(self) -> None:
        self.records: list[Mapping[str, Any]] = []
        self.warnings: list[tuple[int, str]] = []
        self._step, self._seconds = 0, 0
        self._open: dict[str, Any] | None = None
        """the evaluation whose lines are being read"""

    def read(self, line: str) -> None:
        if line.startswith(_WARNING):
            self.warnings.append((self._step, line.removeprefix(_WARNING)))
        elif match := _STEP.match(line):
            self._train(*match.groups())
        elif match := _EVALUATION.match(line):
            self._open = self._add(int(match[1]), "eval")
        elif match := _SAVED.match(line):
            self._add(int(match[1]), "save")
        elif line.startswith("***** Final eval results"):
            self._open = self._add(self._step, "final")
        elif self._open is not None and (match := (_FINAL if self._open["event"] == "final" else _FIGURE).match(line)):
            key = {"Loss": "eval_loss", "Perplexity": "perplexity"}.get(match[1], match[1])
            self._open[key] = _number(match[2])
        elif not line.strip():
            self._open = None

    def _train(self, step: str, total: str, loss: str, rate: str, *clock: str) -> None:
        hours, minutes, seconds = map(int, clock)
        now, steps = hours * 3600 + minutes * 60 + seconds, int(step) - self._step
        record = self._add(int(step), "train", loss=_number(loss), learning_rate=_number(rate), total_steps=int(total))
        if self._step > 0 and steps > 0 and now >= self._seconds:
            record["step_time_s"] = (now - self._seconds) / steps
        self._step, self._seconds = int(step), now

    def _add(self, step: int, event: str, **values: Any) -> dict[str, Any]:
        if event == "train" and step <= self._step:  # gone on from an earlier checkpoint
            self.records = [record for record in self.records if record["step"] < step]
        record = {"step": step, "event": event, **values}
        self.records.append(record)
        return record


def _number(text: str) -> float | None:
    try:
        value = float(text)
    except ValueError:
        return None
    return value if math.isfinite(value) else None
