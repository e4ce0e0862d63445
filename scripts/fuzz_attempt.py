"""One attempt of a training run on two processes: start it, kill it at the planned moment, say how it ended.

Called by scripts/fuzz_kills.py. An attempt's own files (consoles, file operations counted) lie beside the run folder, so that a
failure can be read up. Linux only.
"""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fuzz_checks import RUNNING, last_step
from fuzz_plan import RANKS, Plan
from kill_moments import CHECKPOINT, STAGING, FolderWatch
from preloaded import QUIET, Parent, Rank, free_port

ROOT = Path(__file__).resolve().parents[1]
HANG_S = 300
"""an attempt that takes longer hangs; and a rank has `SURVIVOR_S` to end by itself when the other died"""
SURVIVOR_S = 60
JOIN_S = 10
"""after which a launcher would end a rank that waits for one that was killed before both had joined: nobody can tell it from one that
is late, and torch waits for `parallel.timeout_s`"""
_SPIN_S = 0.002


@dataclass
class Outcome:
    """How an attempt ended."""

    codes: list[int | None] = field(default_factory=list)
    """exit code by rank (under torchrun: torchrun's own), negative for a signal"""
    killed_at: float | None = None
    """`time.monotonic()` of the kill, or of the signal to stop; None: it ended by itself"""
    ended_at: float = 0.0
    first_step_at: float | None = None
    """when it finished its first step"""
    last_step_at: float | None = None
    training_at: float | None = None
    ended_by_launcher: bool = False
    """the rank that was left waited for the other to join"""
    saves_s: list[float] = field(default_factory=list)
    """from a staging folder's appearance to its renaming"""


class ForkedRanks:
    """Ranks forked from a preloaded process."""

    def __init__(self, parent: Parent, argv: Sequence[str], files: Path, run: Path, plan: Plan):
        self._parent = parent
        common = {
            "WORLD_SIZE": str(RANKS),
            "LOCAL_WORLD_SIZE": str(RANKS),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(free_port()),
        }
        self._ranks: list[Rank] = []
        for rank in reversed(range(RANKS)):  # rank 0, which writes and may have to kill the others, last
            env = {**common, "RANK": str(rank), "LOCAL_RANK": str(rank)}
            output = files.with_name(f"{files.name}.rank-{rank}.txt")
            aim = self._aim(plan, files, run) if rank == 0 else None
            self._ranks.insert(0, parent.start(rank, argv, env=env, output=output, aim=aim))
        self.sessions = [rank.pid for rank in self._ranks]

    def _aim(self, plan: Plan, files: Path, run: Path) -> dict[str, Any] | None:
        if plan.aim not in ("operation", "save operation", "none"):
            return None
        return {
            "folder": str(run),
            "only": CHECKPOINT if plan.aim == "save operation" else "",
            "number": plan.operation,
            "victims": [rank.pid for rank in self._ranks if rank.number in plan.victims],
            "itself": 0 in plan.victims,
            "record": str(files.with_name(f"{files.name}.operations.txt")),
        }

    def fileno(self) -> int:
        return self._parent.fileno()

    def collect(self) -> list[int | None]:
        """Exit codes so far."""
        self._parent.collect()
        return [rank.code for rank in self._ranks]

    def send(self, victims: Sequence[int], number: signal.Signals) -> None:
        for rank in self._ranks:
            if rank.number in victims and rank.code is None:
                with suppress(ProcessLookupError):
                    os.kill(rank.pid, number)


class Torchrun:
    """The same under `torchrun`, whose whole process group is killed; its workers, in sessions of their own, have to end with it."""

    def __init__(self, argv: Sequence[str], files: Path):
        command = [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            f"--nproc_per_node={RANKS}",
            "-m",
            "lora_dist",
            *argv,
        ]
        with files.with_name(f"{files.name}.rank-0.txt").open("w") as output:
            self._process = subprocess.Popen(
                command, cwd=ROOT, env={**os.environ, **QUIET}, stdout=output, stderr=output, start_new_session=True
            )
        self._handle = os.pidfd_open(self._process.pid)
        self.sessions = [self._process.pid]

    def fileno(self) -> int:
        return self._handle

    def collect(self) -> list[int | None]:
        return [self._process.poll()]

    def send(self, victims: Sequence[int], number: signal.Signals) -> None:
        """To all, whatever `victims` are."""
        self.sessions += children(self._process.pid)
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, number)


def children(pid: int) -> list[int]:
    with suppress(FileNotFoundError):
        return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    return []


def processes_of(sessions: Sequence[int]) -> list[int]:
    """Processes that still run in these sessions."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with suppress(FileNotFoundError, ProcessLookupError):
                state, _, _, session = (entry / "stat").read_text().rsplit(")", 1)[1].split()[:4]
                if int(session) in sessions and state != "Z":
                    found.append(int(entry.name))
    return found


class Attempt:
    """Follows one attempt to its end. `run()` once.

    Args:
        files: what the names of the attempt's own files begin with.
        done: the step it goes on from.
    """

    def __init__(self, launch: ForkedRanks | Torchrun, run: Path, files: Path, plan: Plan, done: int = 0):
        self.launch, self.plan, self.outcome = launch, plan, Outcome()
        self._step = done
        self._run, self._console = run, files.with_name(f"{files.name}.rank-0.txt")
        self._start = time.monotonic()
        self._kill_at = self._start + plan.delay_s if plan.aim == "time" and not plan.after_step else None
        self._saves, self._staged_at = 0, 0.0

    def run(self) -> Outcome:
        watch, o = FolderWatch(self._run), self.outcome
        try:
            while True:
                o.codes = self.launch.collect()
                if o.killed_at is None and -signal.SIGKILL in o.codes:
                    o.killed_at = time.monotonic()  # by a rank, at the planned operation
                if None not in o.codes:
                    break
                self._wait(watch)
                for what, name in watch.read():
                    self._seen(what, name)
                if self._kill_at is not None and time.monotonic() >= self._kill_at:
                    self.launch.send(self.plan.victims, self.plan.signal)
                    self._kill_at, o.killed_at = None, time.monotonic()
                self._check_time()
        finally:
            watch.close()
        o.ended_at = time.monotonic()
        return o

    def _wait(self, watch: FolderWatch) -> None:
        """Until something happens, or it is time to kill; the last moments without sleeping, to be exact."""
        left_s = 1.0 if self._kill_at is None else self._kill_at - time.monotonic()
        select.select([self.launch, watch], [], [], min(1.0, max(0.0, left_s - _SPIN_S)))
        if self._kill_at is not None and self._kill_at - time.monotonic() < _SPIN_S:
            while time.monotonic() < self._kill_at:
                pass

    def _seen(self, what: str, name: str) -> None:
        o, now = self.outcome, time.monotonic()
        if o.training_at is None and RUNNING in self._console.read_text(errors="replace"):
            o.training_at = now
        if name == "metrics.jsonl" and what == "changed" and o.training_at is not None:
            self._step_seen(now)
        if what == "created" and name.startswith(f"{STAGING}{CHECKPOINT}"):
            self._saves, self._staged_at = self._saves + 1, now
            if self.plan.aim == "save" and self._saves == self.plan.save:
                self._kill_at = now + self.plan.delay_s
        elif what == "moved" and name.startswith(CHECKPOINT) and self._staged_at:
            o.saves_s.append(now - self._staged_at)

    def _step_seen(self, now: float) -> None:
        """Records that a kill took back are gone by the time that training begins."""
        step, o, plan = last_step(self._run), self.outcome, self.plan
        if step <= self._step:
            return
        if plan.aim == "time" and self._step < plan.after_step <= step:
            self._kill_at = now + plan.delay_s
        self._step, o.last_step_at = step, now
        if o.first_step_at is None:
            o.first_step_at = now

    def _check_time(self) -> None:
        o, now = self.outcome, time.monotonic()
        alive = [rank for rank, code in enumerate(o.codes) if code is None]
        if o.killed_at is not None and o.training_at is None and now - o.killed_at > JOIN_S and not o.ended_by_launcher:
            o.ended_by_launcher = True
            self.launch.send(range(RANKS), signal.SIGKILL)
        if now - self._start > HANG_S or (o.killed_at is not None and now - o.killed_at > SURVIVOR_S):
            self.launch.send(range(RANKS), signal.SIGKILL)
            limit = f"the attempt's {HANG_S} s" if o.killed_at is None else f"{SURVIVOR_S} s of the kill"
            raise HangError(f"ranks {alive} did not end within {limit}")


class HangError(Exception):
    """Something did not end by itself; it has been killed."""
