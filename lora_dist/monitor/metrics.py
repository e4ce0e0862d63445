"""`metrics.jsonl`: one JSON object a line, by optimizer step, the machine-readable twin of the console. Rank 0 only."""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lora_dist.log import UserError, disk_advice
from lora_dist.monitor.line_file import LineFile


def _plain(value: Any) -> Any:
    """JSON has no NaN or infinity: written as null."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


class MetricsFile:
    """Appends records to one file; a disk that cannot be written does not end the run (`LineFile`).

    A resumed run first drops the records after the step it goes on from (`drop_after`), so that no step stands in the file twice.
    """

    def __init__(self, file: Path):
        self.file = file
        self._lines = LineFile(file)

    def drop_after(self, step: int, *, evaluated: bool = True) -> int:
        """Drop records of later steps, of an earlier end, and what is no record (a half-written line); returns how many went. Atomic.

        Args:
            evaluated: False drops the evaluation of `step` itself too, because it is made again.

        Raises:
            UserError: the file cannot be read or written.
        """
        try:
            if not self.file.exists():
                return 0
            kept, dropped = [], 0
            for line in self.file.read_text(encoding="utf-8", errors="replace").splitlines():
                if _stays(line, step, evaluated):
                    kept.append(line + "\n")
                else:
                    dropped += 1
            staging = self.file.with_suffix(".tmp")
            with staging.open("w", encoding="utf-8") as handle:
                handle.write("".join(kept))
                handle.flush()
                os.fsync(handle.fileno())
            os.replace(staging, self.file)
        except OSError as error:
            advice = disk_advice(error, self.file, "free space")
            raise UserError(f"train.output_dir: {self.file} cannot be rewritten ({error.strerror}); {advice}") from error
        return dropped

    def write(self, step: int, event: str, values: Mapping[str, Any]) -> None:
        """One record: step, event (train, eval, save, final, ...) and values with units in their names."""
        self._lines.write(json.dumps({"step": step, "event": event, **{k: _plain(v) for k, v in values.items()}}))

    def records(self) -> list[dict[str, Any]]:
        """All records, in order; empty where there is no file. A half-written line is left out.

        Raises:
            UserError: the file cannot be read.
        """
        try:
            text = self.file.read_text(encoding="utf-8", errors="replace") if self.file.exists() else ""
        except OSError as error:
            raise UserError(f"train.output_dir: {self.file} cannot be read ({error.strerror})") from error
        return [json.loads(line) for line in text.splitlines() if _stays(line, sys.maxsize, True)]

    def close(self) -> int:
        """Try once more to write what could not be written; how many records are not in the file, told on stderr as well."""
        return self._lines.close()


def _stays(line: str, step: int, evaluated: bool) -> bool:
    try:
        record = json.loads(line)
        again = record["event"] in ("eval", "epoch") and record["step"] == step and not evaluated
        return bool(record["step"] <= step and record["event"] != "final" and not again)
    except (json.JSONDecodeError, KeyError, TypeError):  # cut off by a kill
        return False
