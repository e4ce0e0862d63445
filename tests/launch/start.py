"""Starting the scripts of `launch/` from tests, with none of the caller's own settings in the way."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from tests.runs import ROOT, descendants, environment, losses

# What the scripts read: a test sets those it means, and the machine that runs the tests none.
READ = [
    "NPROC",
    "NNODES",
    "NODE_RANK",
    "MASTER_ADDR",
    "MASTER_PORT",
    "RDZV_ID",
    "RDZV_ENDPOINT",
    "RDZV_CONF",
    "LOCAL_ADDR",
    "MAX_RESTARTS",
    "HOSTFILE",
    "DS_LAUNCHER",
    "DS_LAUNCHER_ARGS",
    "DS_SSH_PORT",
    "DS_ACCELERATOR",
    "PDSH_SSH_ARGS",
    "PDSH_SSH_ARGS_APPEND",
    "ACCELERATE_CONFIG",
    "GLOO_SOCKET_IFNAME",
]


def variables(**own: str) -> dict[str, str]:
    """The caller's environment without what the scripts read and without GPUs, and `own`."""
    kept = {k: v for k, v in environment(PYTHON=sys.executable, CUDA_VISIBLE_DEVICES="").items() if k not in READ}
    return {**kept, **own}


def launch(script: str, *argv: str, check: bool = True, cwd: Path = ROOT, **own: str) -> subprocess.CompletedProcess[str]:
    """Run `launch/SCRIPT.sh` to the end. With `check`, a failure shows the whole output."""
    done = subprocess.run([script_file(script), *argv], env=variables(**own), cwd=cwd, capture_output=True, text=True)
    if check and done.returncode != 0:
        raise AssertionError(f"exit {done.returncode}\n{done.stdout}\n{done.stderr}")
    return done


def script_file(script: str) -> str:
    return str(ROOT / "launch" / f"{script}.sh")


def run_together(commands: Sequence[tuple[Sequence[str], dict[str, str]]], folder: Path, timeout_s: float = 180) -> list[str]:
    """Run commands at the same time, each with its own variables, to the end; their outputs. None outlives this call."""
    logs = [folder / f"machine{i}.log" for i in range(len(commands))]
    processes = []
    try:
        for (command, own), log in zip(commands, logs, strict=True):
            with log.open("w") as file:
                processes.append(subprocess.Popen(command, env=variables(**own), cwd=ROOT, stdout=file, stderr=subprocess.STDOUT))
        deadline = time.monotonic() + timeout_s
        while any(p.poll() is None for p in processes) and time.monotonic() < deadline:
            if any(p.returncode for p in processes):
                deadline = min(deadline, time.monotonic() + 10)  # one failed: the others would wait for it
            time.sleep(0.1)
    finally:
        for process in processes:
            end(process)
    outputs = [log.read_text() for log in logs]
    if any(p.returncode for p in processes):
        raise AssertionError("\n".join(f"exit {p.returncode}\n{text}" for p, text in zip(processes, outputs, strict=True)))
    return outputs


def end(process: subprocess.Popen) -> None:
    """Kill a process and all below it, by id, if it still runs."""
    if process.poll() is None:
        for pid in [*descendants(process.pid), process.pid]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, 9)
        process.wait()


def largest_difference(reference: Path, other: Path) -> float:
    """Between the two runs' logged losses, relative; both have logged the same steps."""
    a, b = losses(reference), losses(other)
    assert a
    assert list(a) == list(b)
    return max(abs(b[step] - a[step]) / a[step] for step in a)
