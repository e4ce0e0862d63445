"""The hang watch: which process stopped making progress, at which step, where, instead of a silent wait.

The loop marks what it is about to do (`mark`, a tuple assignment). A thread of each process looks whether the mark changes, and posts
it to the others through a connection of its own to the processes' store. When no process that answers has made progress for the time
limit, each writes the stacks of all its threads into the run folder, the lowest rank says who did not get as far as the others, and
all end with `EXIT_HUNG`, so that a launcher can start them again. A process that does not answer at all (stopped, or its machine gone)
is named first. Time in which this whole process was suspended does not count. Made and marked by `engine/loop.py`.
"""

from __future__ import annotations

import dataclasses
import faulthandler
import itertools
import json
import logging
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from lora_dist.engine.whereabouts import Report, Whereabouts, main_thread
from lora_dist.log import EXIT_HUNG, logger
from lora_dist.parallel import SideStore, World, side_store

STACKS = "stacks"
COLLECT_S = 10.0
"""how long other processes may take to answer, at most"""
DISK_S = 5.0
"""how long a disk may take to accept stacks or status, which may be what hangs"""
_POLL_S = 5.0
_REPORTED = "reported"
_numbers = itertools.count()  # the same in all processes, which make their watches in the same order


class Watch:
    """Watches from `start` to `stop`.

    Args:
        timeout_s: without progress, after which the run ends; 0 for never.
        stacks: the folder for this attempt's stacks, made when it is needed.
        on_hang: called on rank 0, if that answers, with a one-line reason and the whole report, from a thread, before the process ends.
    """

    def __init__(self, world: World, *, timeout_s: float, stacks: Path, on_hang: Callable[[str, str], None]):
        self._world, self._timeout_s, self._stacks, self._on_hang = world, timeout_s, stacks, on_hang
        self._poll_s = min(_POLL_S, timeout_s / 20)
        self._collect_s = min(COLLECT_S, 2 * timeout_s)
        self._now: tuple[int, str, int, int] = (0, "starting", 0, -1)
        self._beats = itertools.count()
        self._ended = threading.Event()
        self._thread: threading.Thread | None = None
        self._talking: threading.Thread | None = None
        self._store: SideStore | None = None

    def mark(self, phase: str, step: int, index: int = -1) -> None:
        """This process is about to do this; `index`: of the micro-batch or evaluation batch. All processes make the same marks."""
        self._now = (self._now[0] + 1, phase, step, index)

    def start(self) -> None:
        if self._timeout_s == 0:
            return
        self._store = side_store(self._world, f"watch/{next(_numbers)}")
        self._thread = threading.Thread(target=self._run, name="hang watch", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        self._ended.set()
        if self._thread is not None:
            self._thread.join(timeout=DISK_S)

    # The thread

    def _run(self) -> None:
        seen, quiet_s, before_s = -1, 0.0, time.monotonic()
        self._post(0.0)  # so that the others know host and pid, however soon this process is stopped
        while not self._ended.wait(self._poll_s):
            # A process that was stopped and goes on has not been quiet for all that time.
            now_s = time.monotonic()
            quiet_s, before_s = quiet_s + min(now_s - before_s, 2 * self._poll_s), now_s
            if self._now[0] != seen:
                seen, quiet_s = self._now[0], 0.0
            self._post(quiet_s)
            if quiet_s >= self._timeout_s:
                answers = self._none_makes_progress(quiet_s)
                if answers is not None:
                    self._end(quiet_s, *answers)

    def _own(self, quiet_s: float, stacks: str | None = None) -> Whereabouts:
        sequence, phase, step, index = self._now
        frames = main_thread()
        return Whereabouts(
            self._world.rank, socket.gethostname(), os.getpid(), next(self._beats), sequence, phase, step, index, quiet_s,
            frames.innermost, frames.caller, frames.in_collective, stacks,
        )  # fmt: skip

    def _post(self, quiet_s: float, stacks: str | None = None) -> Whereabouts:
        own = self._own(quiet_s, stacks)
        text = json.dumps(dataclasses.asdict(own))
        self._talk(lambda store: store.set(str(self._world.rank), text), limit_s=self._poll_s)
        return own

    def _everyone(self) -> dict[int, Whereabouts]:
        """What each process posted last; empty where the store does not answer."""
        found: dict[int, Whereabouts] = {}

        def read(store: SideStore) -> None:
            texts = {rank: store.get(str(rank)) for rank in range(self._world.size)}
            found.update({rank: Whereabouts(**json.loads(text)) for rank, text in texts.items() if text is not None})

        self._talk(read, limit_s=self._collect_s / 2)
        return dict(found)

    def _talk(self, work: Callable[[SideStore], Any], *, limit_s: float) -> None:
        """Use the store, but wait no longer than this: its host may be what hangs. One thread at most waits for it."""
        store = self._store
        if store is None or (self._talking is not None and self._talking.is_alive()):
            return
        self._talking = _within(
            limit_s, lambda: work(store), level=logging.DEBUG
        )  # at the end of a run its host may be gone already

    # The decision

    def _none_makes_progress(self, quiet_s: float) -> tuple[dict[int, Whereabouts], list[int]] | None:
        """Wait for the others' answers. What is known of every process, and the ranks that answer, if none of those has made progress
        for the time limit; None if one has, or this one goes on."""
        sequence, first = self._now[0], self._everyone()
        start_s = time.monotonic()
        while True:
            own = self._post(quiet_s + time.monotonic() - start_s)
            known = {**first, **self._everyone(), self._world.rank: own}
            if self._now[0] != sequence or self._ended.is_set():
                return None
            answering = _answering(first, known, self._world.rank)
            if any(known[rank].quiet_s < self._timeout_s for rank in answering):
                return None
            late = time.monotonic() - start_s >= self._collect_s
            if len(answering) == self._world.size or late:
                return known, answering
            time.sleep(self._poll_s)

    def _end(self, quiet_s: float, known: dict[int, Whereabouts], living: list[int]) -> None:
        """Stacks, the report, the end of this process."""
        file = self._stacks / f"rank-{self._world.rank}.txt"
        _within(DISK_S, lambda: self._write_stacks(file, quiet_s))
        deadline_s = time.monotonic() + self._collect_s
        while True:
            own = self._post(quiet_s, str(file))
            known = {**known, **self._everyone(), self._world.rank: own}
            if all(known[rank].stacks for rank in living) or time.monotonic() >= deadline_s:
                break
            time.sleep(self._poll_s)
        if self._world.rank == min(living):
            self._report(Report(self._world.size, known, living, self._timeout_s, self._stacks))
        else:
            self._wait_for_report()
        os._exit(EXIT_HUNG)

    def _report(self, report: Report) -> None:
        print(f"\n{report.text}", file=sys.stderr, flush=True)
        if self._world.rank == 0:
            _within(DISK_S, lambda: self._on_hang(report.reason, report.text))
        self._talk(lambda store: store.set(_REPORTED, "1"), limit_s=1.0)

    def _wait_for_report(self) -> None:
        """The first process to end makes its launcher end the others."""
        deadline_s, told = time.monotonic() + self._collect_s + DISK_S, threading.Event()

        def ask(store: SideStore) -> None:
            if store.get(_REPORTED) is not None:
                told.set()

        while not told.is_set() and time.monotonic() < deadline_s:
            self._talk(ask, limit_s=1.0)
            time.sleep(self._poll_s)

    def _write_stacks(self, file: Path, quiet_s: float) -> None:
        own = self._own(quiet_s)
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            with file.open("w") as handle:
                handle.write(f"{own.describe()}\nmark {own.sequence}, at {time.strftime('%Y-%m-%dT%H:%M:%S%z')}\n\n")
                handle.flush()
                faulthandler.dump_traceback(handle, all_threads=True)
        except OSError as error:
            logger.warning("rank %d: stacks cannot be written to %s (%s)", self._world.rank, file, error.strerror)
            faulthandler.dump_traceback(all_threads=True)


def _answering(first: Mapping[int, Whereabouts], known: Mapping[int, Whereabouts], own: int) -> list[int]:
    """Ranks that have posted something since `first` was read, or had posted that they are about to end."""
    return [
        rank
        for rank in sorted(known)
        if rank == own or known[rank].stacks or rank not in first or known[rank].beat != first[rank].beat
    ]


def _within(limit_s: float, work: Callable[[], Any], *, level: int = logging.WARNING) -> threading.Thread:
    """Run `work` in a thread that nobody waits for longer than this; what it raises is logged at `level`."""

    def run() -> None:
        try:
            work()
        except Exception as error:  # the watch itself must go on, whatever a store or a disk has
            logger.log(level, "hang watch: %s", error)

    thread = threading.Thread(target=run, name="hang watch, talking", daemon=True)
    thread.start()
    thread.join(timeout=limit_s)
    return thread
