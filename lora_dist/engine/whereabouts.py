"""Where a process is, by its marks and its Python frames, and what is to be said of several that hang. Called by `engine/watch.py`."""

from __future__ import annotations

import sys
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType

from lora_dist.log import EXIT_HUNG

_PACKAGE = Path(__file__).resolve().parents[1]
_COLLECTIVES = ("/torch/distributed/", "/deepspeed/comm/", f"{_PACKAGE}/parallel/launch.py")
_NAMED = 8  # processes that are described one by one


@dataclass(frozen=True)
class Frames:
    """What a thread is doing."""

    innermost: str
    caller: str | None
    """the innermost frame of this package, where that is another"""
    in_collective: bool
    """whether this package's call waits in torch.distributed, as far as Python frames show it"""


def main_thread() -> Frames:
    """Of this process's main thread, from any thread."""
    frame = sys._current_frames().get(threading.main_thread().ident or 0)
    frames: list[FrameType] = []
    while frame is not None:
        frames.append(frame)
        frame = frame.f_back
    own = next((i for i, each in enumerate(frames) if each.f_code.co_filename.startswith(str(_PACKAGE))), len(frames))
    inside = [each.f_code.co_filename for each in frames[: own + 1]]
    return Frames(
        _shown(frames[0]) if frames else "(ended)",
        _shown(frames[own]) if 0 < own < len(frames) else None,
        any(part in file for part in _COLLECTIVES for file in inside),
    )


def _shown(frame: FrameType) -> str:
    file = Path(frame.f_code.co_filename)
    if file.is_relative_to(_PACKAGE.parent):
        file = file.relative_to(_PACKAGE.parent)
    return f"{file}:{frame.f_lineno} in {frame.f_code.co_name}"


@dataclass(frozen=True)
class Whereabouts:
    """What a process says of itself; plain values, which travel as JSON."""

    rank: int
    host: str
    pid: int
    beat: int
    """counts what the process has posted"""
    sequence: int
    """counts its marks"""
    phase: str
    step: int
    index: int
    quiet_s: float
    """since the last mark"""
    innermost: str
    caller: str | None
    in_collective: bool
    stacks: str | None = None
    """file with the stacks of all its threads, once the process is about to end"""

    def describe(self) -> str:
        called = f", called from {self.caller}" if self.caller else ""
        return (
            f"rank {self.rank} ({self.host}, pid {self.pid}): step {self.step}, {self.doing}, no progress for {self.quiet_s:.0f} s, "
            f"at {self.innermost}{called}"
        )

    @property
    def doing(self) -> str:
        return self.phase if self.index < 0 else f"{self.phase}, batch {self.index}"


@dataclass
class Report:
    """What is known when a run is given up.

    Args:
        size: processes of the run.
        known: what each posted last; a rank is missing if it never did.
        living: ranks that answer.
        stacks: folder.

    Attributes:
        blamed: ranks that do not answer; else those that have not got as far as the others, without those that wait in a collective if
            there are others.
        reason: one line.
        text: several.
    """

    size: int
    known: Mapping[int, Whereabouts]
    living: Sequence[int]
    timeout_s: float
    stacks: Path
    blamed: list[int] = field(init=False)
    reason: str = field(init=False)
    text: str = field(init=False)

    def __post_init__(self) -> None:
        silent = [rank for rank in range(self.size) if rank not in self.living]
        self.blamed = silent or self._behind()
        ranks = f"rank{'s' if len(self.blamed) > 1 else ''} {', '.join(map(str, self.blamed))}"
        place = self.known[self._behind()[0]]
        at = f"step {place.step}, {place.doing}"
        self.reason = f"{ranks} did not answer; rank {place.rank} waits at {at}" if silent else f"{ranks} hung at {at}"
        lines = [
            f"lora-dist train: HUNG: no progress for {self.timeout_s:g} s: {self.reason}",
            *self._lines(self.blamed, "no answer (stopped, or its machine is gone); last heard of: " if silent else "behind: "),
            *self._lines([rank for rank in range(self.size) if rank not in self.blamed], "waiting: "),
            f"  stacks: {self.stacks}/rank-*.txt; ending with exit code {EXIT_HUNG}, go on with --resume auto (health.hang_timeout_s)",
        ]
        self.text = "\n".join(lines)

    def _behind(self) -> list[int]:
        least = min(self.known[rank].sequence for rank in self.living)
        behind = [rank for rank in self.living if self.known[rank].sequence == least]
        return [rank for rank in behind if not self.known[rank].in_collective] or behind

    def _lines(self, ranks: Sequence[int], what: str) -> list[str]:
        lines = [f"  {what}{self.known[r].describe() if r in self.known else f'rank {r}: nothing yet'}" for r in ranks[:_NAMED]]
        return lines + ([f"  {what}and {len(ranks) - _NAMED} more"] if len(ranks) > _NAMED else [])
