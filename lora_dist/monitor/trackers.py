"""Experiment trackers: rows of numbers by step, handed to each tracker in a thread of its own, once. Rank 0 only.

A tracker never stops or slows training: it starts, writes and ends in its thread; rows wait in a queue of bounded length, and what does
not fit is left out (metrics.jsonl has it). A failure is told once and ends that tracker alone; the end of the run waits for a tracker no
longer than a time limit.

No step is sent twice. A row is sent once the run has gone past its step, whole. After a resume a tracker first says which steps stand in
it already, and those are left out; rows before the checkpoint that were lost with a killed process are sent from metrics.jsonl.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

Row = dict[str, float | int | str]

_UNTRACKED = {"adapter_norms"}
"""events with hundreds of values, which metrics.jsonl keeps"""
_CURVES = {"train", "eval", "final"}
"""events that belong to their step; another that comes after its row was sent goes with the next"""
_POLL_S = 0.05


class Sink(Protocol):
    """One tracker. Its methods are called in its own thread, and may wait and fail as they like."""

    name: str

    def start(self) -> set[int]:
        """Begin, or go on with, the run; the steps that stand in it already."""

    def write(self, step: int, row: Row) -> None: ...

    def keep(self, files: Sequence[Path]) -> None:
        """Store files as artifacts, where the tracker can."""

    def finish(self, exit_code: int) -> None: ...


def flat(event: str, values: Mapping[str, Any]) -> Row:
    """`event/name`; a list has one series a rank, a warning is a text under its sign."""
    if event == "warning":
        return {f"warning/{values['sign']}": str(values["text"])}
    row: Row = {}
    for name, value in values.items():
        if isinstance(value, list):
            row.update({f"{event}/{name.removesuffix('_by_rank')}/rank{rank}": each for rank, each in enumerate(value)})
        elif value is not None:
            row[f"{event}/{name}"] = value
    return row


class Trackers:
    """All trackers of one run.

    Args:
        history: records of metrics.jsonl up to the step that the run goes on from, for what a tracker has lost.
        timeout_s: a tracker that has not started after so long is told of; the end of the run waits so long for all together.
        queue_rows: that may wait for a tracker.
    """

    def __init__(
        self,
        sinks: Sequence[Sink],
        *,
        warn: Callable[[str], None],
        history: Iterable[Mapping[str, Any]] = (),
        timeout_s: float = 60.0,
        queue_rows: int = 1000,
    ):
        self._timeout_s = timeout_s
        self._row: Row = {}
        self._step = -1  # of the row that is being put together
        self._sent = -1
        past: list[tuple[int, Row]] = []
        for record in history:
            self.log(record["step"], record["event"], _values(record), send=lambda step, row: past.append((step, row)))
        self._feeds = [_Feed(sink, past, warn=warn, timeout_s=timeout_s, queue_rows=queue_rows) for sink in sinks]

    def log(self, step: int, event: str, values: Mapping[str, Any], *, send: Callable[[int, Row], None] | None = None) -> None:
        """Add to the row of a step. Waits for nothing.

        Args:
            send: takes the rows that are whole by this; default: the trackers' queues.
        """
        if event in _UNTRACKED:
            return
        if step <= self._sent:
            if event in _CURVES:
                return  # after a rollback: the step was sent before it
            step = self._sent + 1
        if step != self._step:
            self._send(send)
            self._step = step
        self._row.update(flat(event, values))

    def passed(self, step: int) -> None:
        """The run goes on behind this step: its row is whole."""
        if self._step <= step:
            self._send(None)

    def _send(self, send: Callable[[int, Row], None] | None) -> None:
        if not self._row or self._step <= self._sent:
            return
        row, self._row, self._sent = self._row, {}, self._step
        if send is not None:
            send(self._step, row)
            return
        for feed in self._feeds:
            feed.put(self._step, row)

    def finish(self, *, completed: bool, exit_code: int = 0, artifacts: Sequence[Path] = ()) -> None:
        """End all trackers, within the time limit. A run that is to go on does so before its last row: that may get more values."""
        if completed:
            self._send(None)
        deadline_s = time.monotonic() + self._timeout_s
        for feed in self._feeds:
            feed.end(exit_code, artifacts if completed else ())
        for feed in self._feeds:
            feed.join(deadline_s)


def _values(record: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in record.items() if key not in ("step", "event")}


class _Feed:
    """One tracker's thread and queue."""

    def __init__(
        self, sink: Sink, past: Sequence[tuple[int, Row]], *, warn: Callable[[str], None], timeout_s: float, queue_rows: int
    ):
        self._sink, self._past, self._warn, self._timeout_s = sink, past, warn, timeout_s
        self._queue: queue.Queue[tuple[int, Row]] = queue.Queue(queue_rows)
        self._end: tuple[int, Sequence[Path]] | None = None
        self._begun_s = time.monotonic()
        self._started = self._failed = self._told = False
        self._thread = threading.Thread(target=self._run, name=f"tracker {sink.name}", daemon=True)
        self._thread.start()

    def put(self, step: int, row: Row) -> None:
        if self._failed:
            return
        if not self._started and time.monotonic() - self._begun_s > self._timeout_s:
            self._tell(f"has not started after {self._timeout_s:g} s")
        try:
            self._queue.put_nowait((step, row))
        except queue.Full:
            self._tell("does not keep up, rows are left out")

    def end(self, exit_code: int, artifacts: Sequence[Path]) -> None:
        self._end = (exit_code, artifacts)

    def join(self, deadline_s: float) -> None:
        self._thread.join(timeout=max(0.0, deadline_s - time.monotonic()))
        if self._thread.is_alive():
            self._tell(f"has not ended after {self._timeout_s:g} s and is left behind")

    def _tell(self, what: str) -> None:
        """Once a run."""
        if not self._told:
            self._told = True
            self._warn(f"tracker {self._sink.name} {what}: the run goes on, metrics.jsonl has every number")

    def _run(self) -> None:
        try:
            there = self._sink.start()
            self._started = True
            for step, row in self._past:
                self._write(step, row, there)
            while (item := self._next()) is not None:
                self._write(*item, there)
            assert self._end is not None
            exit_code, artifacts = self._end
            if artifacts:
                self._sink.keep(artifacts)
            self._sink.finish(exit_code)
        except BaseException as error:  # trackers raise many kinds, SystemExit too; none is the run's affair
            self._failed = True
            self._tell(f"failed ({type(error).__name__}: {' '.join(str(error).split())[:200]})")

    def _write(self, step: int, row: Row, there: set[int]) -> None:
        if step not in there:
            self._sink.write(step, row)

    def _next(self) -> tuple[int, Row] | None:
        """The next row; None at the end."""
        while True:
            try:
                return self._queue.get(timeout=_POLL_S)
            except queue.Empty:
                if self._end is not None:
                    return None
