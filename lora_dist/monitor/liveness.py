"""Whether a run that says it is at work gives signs of life: when its files last changed, against what its steps and evaluations take.

Called by `monitor/report.py` and `monitor/watch.py`.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path

from lora_dist.monitor.runs import Point, Run, is_number
from lora_dist.state import LOG, METRICS, STATUS

ENDED = ("completed", "stopped", "failed", "hung")
RECENT = 10
"""logged steps that rates are the median of"""
QUIET_S = 60.0
"""without a sign of life from which a running run is worth a word; longer where a step takes long"""


def stamps(path: Path) -> Iterator[os.stat_result | None]:
    """Of the files that change while a run is at work; None for one that is not there."""
    for file in [path / name for name in (METRICS, STATUS, LOG)] if path.is_dir() else [path]:
        try:
            yield file.stat()
        except FileNotFoundError:
            yield None


def recent(points: list[Point]) -> list[float]:
    return [value for _, value in points[-RECENT:]]


def quiet(run: Run) -> float | None:
    """Seconds since the files of a run at work last changed, where that is longer than its steps and evaluations explain."""
    if run.state in ENDED:
        return None
    changed = [stat.st_mtime for stat in stamps(run.path) if stat is not None]
    steps = recent(run.series("step_time_s")) + [value for _, value in run.series("eval_runtime_s", "eval")[-1:]]
    logging_steps = run.setting("train.logging_steps")
    expected = max(steps, default=0.0) * (float(logging_steps) if is_number(logging_steps) else 10)
    quiet_s = time.time() - max(changed, default=time.time())
    return quiet_s if quiet_s > max(QUIET_S, 3 * expected) else None
