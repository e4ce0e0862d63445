"""`metrics.jsonl`: one JSON object a line, by optimizer step, the machine-readable twin of the console. Rank 0 only."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def _plain(value: Any) -> Any:
    """JSON has no NaN or infinity: written as null."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


class MetricsFile:
    """Appends records to one file.

    A resumed run first drops the records after the step it goes on from (`drop_after`), so that no step stands in the file twice.
    """

    def __init__(self, file: Path):
        self.file = file

    def drop_after(self, step: int) -> int:
        """Drop records of later steps, of an earlier end, and a half-written last line; returns how many went. Atomic."""
        if not self.file.exists():
            return 0
        kept, dropped = [], 0
        for line in self.file.read_text(encoding="utf-8").splitlines():
            try:
                record = json.loads(line)
                later = record["step"] > step or record["event"] == "final"
            except (json.JSONDecodeError, KeyError):
                later = True  # cut off by the kill
            if later:
                dropped += 1
            else:
                kept.append(line + "\n")
        staging = self.file.with_suffix(".tmp")
        staging.write_text("".join(kept), encoding="utf-8")
        os.replace(staging, self.file)
        return dropped

    def write(self, step: int, event: str, values: Mapping[str, float | int | str | bool | None]) -> None:
        """One record: step, event (train, eval, save, final, ...) and values with units in their names."""
        record = {"step": step, "event": event, **{k: _plain(v) for k, v in values.items()}}
        with self.file.open("a", encoding="utf-8") as handle:
            handle.write(json.dumps(record) + "\n")


def read_metrics(file: Path) -> list[dict[str, Any]]:
    """All records of a metrics file, in order."""
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
