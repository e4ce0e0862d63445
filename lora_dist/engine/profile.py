"""A trace of some steps of an attempt, by torch's profiler, for Perfetto or chrome://tracing. Called by `engine/loop.py`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity

TRACES = "profile"
"""folder of a run's traces"""
ROWS = 60
"""of the table of operations"""


class Profile:
    """Steps `first` to `last`, the first step that this attempt takes being 1; every process writes its own files.

    Args:
        steps: (first, last); None: nothing is traced.
        folder: gets rank-0.json.gz (the trace) and rank-0.txt (operations by the time they take), ...
    """

    def __init__(self, steps: tuple[int, int] | None, folder: Path, rank: int, device: torch.device):
        self._first, self._last = steps or (0, 0)
        self.folder, self._rank, self._cuda = folder, rank, device.type == "cuda"
        self._step = 0
        self._running: Any = None

    def next_step(self) -> bool:
        """Before every step; whether a trace has just been written."""
        self._step += 1
        if self._step == self._first:
            activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if self._cuda else [])]
            self._running = torch.profiler.profile(activities=activities, record_shapes=True)
            self._running.start()
        return self._step == self._last + 1 and self.close()

    def close(self) -> bool:
        """After the last step, however the run ends; whether a trace has just been written. On GPUs: waits for the device."""
        if self._running is None:
            return False
        running, self._running = self._running, None
        running.stop()
        self.folder.mkdir(parents=True, exist_ok=True)
        running.export_chrome_trace(str(self.folder / f"rank-{self._rank}.json.gz"))
        by = "self_cuda_time_total" if self._cuda else "self_cpu_time_total"
        table = running.key_averages().table(sort_by=by, row_limit=ROWS, max_name_column_width=80)
        (self.folder / f"rank-{self._rank}.txt").write_text(table + "\n", encoding="utf-8")
        return True
