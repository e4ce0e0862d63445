"""Groups of real processes that run many training jobs, because starting them costs more than a small job does."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.runs import ROOT, descendants, environment

JOB_TIMEOUT_S = 120


@dataclass(frozen=True)
class Done:
    """A finished job: rank by rank."""

    ranks: list[dict[str, Any]]

    @property
    def facts(self) -> list[dict[str, Any]]:
        return [rank["facts"] for rank in self.ranks]

    @property
    def output(self) -> str:
        """Rank 0's console."""
        return self.ranks[0]["output"]


class WorkerGroup:
    """`processes` workers, under one torchrun or under one on each of several "machines" (all of them this one)."""

    def __init__(self, processes: int, folder: Path, machines: int = 1):
        self.processes, self.machines, self._root, self._starts = processes, machines, folder, 0
        self._start()

    def _start(self) -> None:
        self._jobs, self.folder = 0, self._root / str(self._starts)
        self._starts += 1
        self.folder.mkdir(parents=True)
        script = str(ROOT / "tests" / "distributed" / "worker.py")
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(self.processes // self.machines)]
        meeting = ["--nnodes", str(self.machines), "--master-addr", "127.0.0.1", "--master-port", str(free_port())]
        self._log = (self.folder / "log.txt").open("w")
        self._launchers = [
            subprocess.Popen(
                [
                    *torchrun,
                    *(["--standalone"] if self.machines == 1 else [*meeting, "--node-rank", str(machine)]),
                    script,
                    str(self.folder),
                ],
                cwd=ROOT,
                env=environment(PYTHONPATH=str(ROOT)),
                stdout=self._log,
                stderr=subprocess.STDOUT,
            )
            for machine in range(self.machines)
        ]

    def run(
        self,
        *argv: str,
        verb: str = "train",
        code: int = 0,
        tamper: dict[str, Any] | None = None,
        faults: list[dict[str, Any]] | None = None,
    ) -> Done:
        """One job on all workers; fails the test if a rank ends with another code. `tamper`: see `worker.py`; `faults`: `faults.py`."""
        job = self.folder / f"job-{self._jobs}"
        part = job.with_suffix(".part")
        part.write_text(json.dumps({"verb": verb, "argv": list(argv), "tamper": tamper, "faults": faults}))
        os.rename(part, job.with_suffix(".json"))
        self._jobs += 1
        files = [self.folder / f"{job.name}.rank-{rank}.json" for rank in range(self.processes)]
        deadline = time.monotonic() + JOB_TIMEOUT_S
        while not all(file.exists() for file in files):
            if any(launcher.poll() is not None for launcher in self._launchers) or time.monotonic() > deadline:
                answers = [json.loads(file.read_text()) for file in files if file.exists()]
                log = (self.folder / "log.txt").read_text()[-4000:]
                self.close()
                self._start()  # one failure is not to be every later test's
                raise AssertionError(f"the workers ended or hang; {answers}\n{log}")
            time.sleep(0.005)
        ranks = [json.loads(file.read_text()) for file in files]
        for number, rank in enumerate(ranks):
            assert rank["code"] == code, f"rank {number} ended with {rank['code']}: {rank['error']}\n{rank['output'][-3000:]}"
        return Done(ranks)

    def close(self) -> None:
        (self.folder / f"job-{self._jobs}.json").write_text("null")
        for launcher in self._launchers:
            try:
                launcher.wait(timeout=20)
            except subprocess.TimeoutExpired:
                for pid in [*descendants(launcher.pid), launcher.pid]:
                    os.kill(pid, 9)
                launcher.wait()
        self._log.close()


class WorkerGroups(dict[int, WorkerGroup]):
    """Groups by their number of processes, each started when it is first asked for."""

    def __init__(self, folder: Path):
        super().__init__()
        self._folder = folder

    def __missing__(self, processes: int) -> WorkerGroup:
        self[processes] = WorkerGroup(processes, self._folder / str(processes))
        return self[processes]

    def close(self) -> None:
        for group in self.values():
            group.close()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
