"""How long the parts of optimizer steps take, without waiting for the device: on GPUs events on its stream, read once they have passed.

Used by `engine/step.py`, and by `engine/loop.py` for what the host alone does (loading data, saving).
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.profiler import record_function

PHASES = ("data", "forward", "backward", "optimizer", "save")
_PENDING = 256
"""pairs of events kept before those that have passed are read"""


class StepClock:
    """Sums up seconds by phase until they are taken."""

    def __init__(self, device: torch.device):
        self._events = device.type == "cuda"
        self._sums_s = dict.fromkeys(PHASES, 0.0)
        self.now = ""
        """what the device is doing: a phase, or evaluation; where an exception came out of it, it stays"""
        self._pending: list[tuple[str, Any, Any]] = []

    @contextmanager
    def device(self, phase: str) -> Iterator[None]:
        """Time of work that the block gives to the device."""
        self.now = phase
        if not self._events:
            with self.host(phase):
                yield
            self.now = ""
            return
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        with record_function(phase):
            yield
        end.record()
        self.now = ""
        self._pending.append((phase, begin, end))
        if len(self._pending) >= _PENDING:
            self._read_passed()

    @contextmanager
    def host(self, phase: str) -> Iterator[None]:
        """Time that the block takes on this process's CPU, waits of its own included."""
        start_s = time.perf_counter()
        with record_function(phase):  # for `train.profile`
            yield
        self._sums_s[phase] += time.perf_counter() - start_s

    def take(self) -> dict[str, float]:
        """Seconds by phase since the last call; what the device has not passed yet counts with the next."""
        self._read_passed()
        taken, self._sums_s = self._sums_s, dict.fromkeys(PHASES, 0.0)
        return taken

    def _read_passed(self) -> None:
        left = []
        for phase, begin, end in self._pending:
            if end.query():  # asks, and does not wait
                self._sums_s[phase] += begin.elapsed_time(end) / 1000
            else:
                left.append((phase, begin, end))
        self._pending = left
