"""Groups of real processes that run many training jobs, because starting them costs more than a small job does."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.runs import ROOT, descendants, environment

JOB_TIMEOUT_S = 180


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
    """`processes` workers under one torchrun."""

    def __init__(self, processes: int, folder: Path):
        self.processes, self.folder, self._jobs = processes, folder, 0
        folder.mkdir(parents=True)
        script = str(ROOT / "tests" / "distributed" / "worker.py")
        self._log = (folder / "log.txt").open("w")
        self._process = subprocess.Popen(
            [
                sys.executable,
                "-m",
                "torch.distributed.run",
                "--standalone",
                "--nproc_per_node",
                str(processes),
                script,
                str(folder),
            ],
            cwd=ROOT,
            env=environment(PYTHONPATH=str(ROOT)),
            stdout=self._log,
            stderr=subprocess.STDOUT,
        )

    def run(self, *argv: str, code: int = 0) -> Done:
        """One `train` job on all workers; fails the test if a rank ends with another code."""
        job = self.folder / f"job-{self._jobs}"
        part = job.with_suffix(".part")
        part.write_text(json.dumps(list(argv)))
        os.rename(part, job.with_suffix(".json"))
        self._jobs += 1
        files = [self.folder / f"{job.name}.rank-{rank}.json" for rank in range(self.processes)]
        deadline = time.monotonic() + JOB_TIMEOUT_S
        while not all(file.exists() for file in files):
            if self._process.poll() is not None or time.monotonic() > deadline:
                answers = [json.loads(file.read_text()) for file in files if file.exists()]
                self.close()
                raise AssertionError(f"the workers ended or hang; {answers}\n{(self.folder / 'log.txt').read_text()[-4000:]}")
            time.sleep(0.005)
        ranks = [json.loads(file.read_text()) for file in files]
        for number, rank in enumerate(ranks):
            assert rank["code"] == code, f"rank {number} ended with {rank['code']}: {rank['error']}\n{rank['output'][-3000:]}"
        return Done(ranks)

    def close(self) -> None:
        if self._process.poll() is None:
            (self.folder / f"job-{self._jobs}.json").write_text("null")
            try:
                self._process.wait(timeout=20)
            except subprocess.TimeoutExpired:
                for pid in [*descendants(self._process.pid), self._process.pid]:
                    os.kill(pid, 9)
                self._process.wait()
        self._log.close()
