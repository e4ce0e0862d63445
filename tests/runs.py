"""Starting real runs of the command from tests, and reading back what they left."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file

ROOT = Path(__file__).resolve().parents[1]


def command(processes: int, *argv: str) -> list[str]:
    """`lora-dist argv` on one process, or on several under torchrun."""
    if processes == 1:
        return [sys.executable, "-m", "lora_dist", *argv]
    return [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node",
        str(processes),
        "-m",
        "lora_dist",
        *argv,
    ]


def environment(**extra: str) -> dict[str, str]:
    """One thread a process, no progress bars; what the caller sets comes last."""
    return {**os.environ, "OMP_NUM_THREADS": "1", "HF_DATASETS_DISABLE_PROGRESS_BARS": "1", **extra}


def run(processes: int, *argv: str, check: bool = True, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    """Run to the end. With `check`, a failure shows the run's whole output."""
    done = subprocess.run(command(processes, *argv), capture_output=True, text=True, cwd=ROOT, env=environment(**(env or {})))
    if check and done.returncode != 0:
        raise AssertionError(f"exit {done.returncode}\n{done.stdout}\n{done.stderr}")
    return done


def run_killed(processes: int, when: Callable[[], bool], *argv: str, timeout_s: float = 120) -> None:
    """Start, and SIGKILL the whole process group (launcher and workers) the moment `when()` holds."""
    process = subprocess.Popen(
        command(processes, *argv),
        cwd=ROOT,
        env=environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    deadline = time.monotonic() + timeout_s
    try:
        while not when():
            if process.poll() is not None or time.monotonic() > deadline:
                raise AssertionError(f"the run ended (exit {process.poll()}) or hung before it was to be killed")
            time.sleep(0.005)
    finally:
        # torchrun starts its workers in sessions of their own: end every process below it by id
        for pid in [*descendants(process.pid), process.pid]:
            with contextlib.suppress(ProcessLookupError):  # gone already, which is what was wanted
                os.kill(pid, 9)
        process.wait()


def descendants(pid: int) -> list[int]:
    """Ids of all processes below one, read from /proc."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                parent = int((entry / "stat").read_text().rsplit(")", 1)[1].split()[1])
            except (FileNotFoundError, ProcessLookupError):
                continue
            if parent == pid:
                found += [int(entry.name), *descendants(int(entry.name))]
    return found


def read_metrics(file: Path) -> list[dict]:
    """All records of a metrics file, in order; a line that is none is an error."""
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def records(run_dir: Path, event: str) -> list[dict]:
    """Records of one event in metrics.jsonl; an unfinished last line is left out."""
    rows = []
    if (run_dir / "metrics.jsonl").exists():
        for line in (run_dir / "metrics.jsonl").read_text().splitlines():
            try:
                rows.append(json.loads(line))
            except json.JSONDecodeError:
                continue
    return [row for row in rows if row["event"] == event]


def losses(run_dir: Path) -> dict[int, float]:
    """Logged training losses by step; a step that stands twice is an error."""
    rows = records(run_dir, "train")
    steps = [row["step"] for row in rows]
    assert len(steps) == len(set(steps)), f"steps stand twice in {run_dir}: {steps}"
    return {row["step"]: row["loss"] for row in rows}


def adapter(run_dir: Path) -> dict[str, torch.Tensor]:
    return load_file(run_dir / "adapter_model.safetensors")


def largest_relative_difference(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    """Over tensors, by relative norm: single elements after AdamW differ where gradients are near zero (design section 5)."""
    assert a.keys() == b.keys()
    return max(float((a[k] - b[k]).norm() / a[k].norm().clamp_min(1e-12)) for k in a)


def assert_identical(a: Path, b: Path) -> None:
    """Losses and final adapter bit for bit."""
    assert losses(a) == losses(b)
    x, y = adapter(a), adapter(b)
    assert x.keys() == y.keys() and all(torch.equal(x[k], y[k]) for k in x)


def options(base: Path, text: Path, out: Path, **train: object) -> list[str]:
    """`train` options of a small run; keyword `a__b` is option `a.b`, a bare one is of section train."""
    values: dict[str, object] = {
        "model.name_or_path": base,
        "data.dataset_name": text,
        "data.block_size": 32,
        "data.holdout_windows": 16,
        "data.cache_dir": text.parent / "cache",
        "train.output_dir": out,
        "train.learning_rate": 3e-3,
        "train.logging_steps": 1,
    }
    for key, value in train.items():
        values[key.replace("__", ".") if "__" in key else f"train.{key}"] = value
    return [f"--{key}={value}" for key, value in values.items()]
