"""Watching: what is shown of a run, at every width, and an end with the run."""

from __future__ import annotations

import io
import json
import os
import pty
import re
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
from rich.console import Console

from lora_dist.monitor.braille import plot
from lora_dist.monitor.liveness import quiet
from lora_dist.monitor.runs import read_run
from lora_dist.monitor.watch import Gpus, gpu_lines, picture, time_left, view
from tests.runs import ROOT, environment


def _write(folder: Path, *, state: str, steps: int = 40) -> None:
    (folder / "attempts").mkdir(parents=True, exist_ok=True)
    lines = [{"step": 0, "event": "eval", "eval_loss": 5.0, "perplexity": 148.4, "eval_runtime_s": 3.0}]
    for step in range(10, steps + 1, 10):
        lines.append(
            {"step": step, "event": "train", "loss": 50 / step, "learning_rate": 1e-4, "tokens_per_s": 1000.0, "step_time_s": 0.5}
        )
    lines.append({"step": steps, "event": "eval", "eval_loss": 1.5, "perplexity": 4.48, "eval_runtime_s": 4.0})
    lines.append({"step": steps, "event": "warning", "text": "the loss swings: lower train.learning_rate " + "x" * 200})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "run_config.yaml").write_text("train:\n  eval_steps: 40\n  eval_strategy: steps\n  logging_steps: 10\n")
    (folder / "status.json").write_text(json.dumps({"state": state, "reason": "", "step": steps, "total_steps": 100}))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    _write(tmp_path / "run", state="running")
    return tmp_path / "run"


@pytest.mark.parametrize("width", [20, 40, 80, 130])
@pytest.mark.parametrize("height", [None, 12, 40])
def test_no_line_is_wider_than_the_terminal(folder: Path, width: int, height: int | None) -> None:
    console = Console(file=io.StringIO(), width=width, legacy_windows=False)
    console.print(view(read_run(folder), console, height=height))
    lines = console.file.getvalue().splitlines()  # type: ignore[attr-defined]
    assert max(map(len, lines)) <= width
    if height is not None and width >= 40:
        assert len(lines) <= height
    text = " ".join(" ".join(lines).split())
    assert "running" in text
    assert "148.40" in text
    assert "the loss swings" in text or width == 20


def test_a_terminal_of_ascii_gets_ascii(folder: Path) -> None:
    console = Console(file=io.TextIOWrapper(io.BytesIO(), encoding="ascii", errors="replace"), width=60, legacy_windows=False)
    console.print(view(read_run(folder), console))
    console.file.seek(0)
    lines = console.file.read().splitlines()
    assert lines[1] == "=" * 24 + "-" * 36  # 40 of 100 steps
    assert sum(line.count("*") for line in lines) > 40


def test_the_picture_shows_the_same_and_fetches_nothing(folder: Path) -> None:
    svg = picture(folder)
    words = " ".join("".join(ElementTree.fromstring(svg).itertext()).replace("\xa0", " ").split())
    for word in ("running", "step 40 of 100 (40%)", "perplexity 4.48 (from 148.40)", "the loss swings", "train loss"):
        assert word in words, word
    assert "@font-face" not in svg and not re.search(r"url\(|href=", svg.replace("url(#", "("))


def test_time_left_counts_steps_and_evaluations(folder: Path) -> None:
    assert time_left(read_run(folder)) == pytest.approx(60 * 0.5 + 1 * 4.0)  # steps 41 to 100, an evaluation at 80


def test_a_run_that_gives_no_sign_of_life(folder: Path) -> None:
    assert quiet(read_run(folder)) is None
    for file in folder.glob("*.*"):
        os.utime(file, (time.time() - 300,) * 2)
    assert quiet(read_run(folder)) == pytest.approx(300, abs=30)
    _write(folder, state="completed")
    assert quiet(read_run(folder)) is None


def test_the_curve_is_the_values() -> None:
    """Every dot lies on the line between its neighbours."""
    points = [(0, 8.0), (10, 4.0), (40, 1.0)]
    lines = plot(points, width=46, height=9)
    grid = np.array([[ord(c) - 0x2800 for c in line.split("┤")[1]] for line in lines[:-1]])
    bits = [[0x01, 0x08], [0x02, 0x10], [0x04, 0x20], [0x40, 0x80]]
    dots = np.stack([np.stack([grid & bit > 0 for bit in row], -1).reshape(8, -1) for row in bits], 1).reshape(32, -1)
    width = dots.shape[1]
    expected = np.interp(np.linspace(0, 40, width), [0, 10, 40], [8, 4, 1])
    top = np.array([column.argmax() for column in dots.T])
    assert dots.any(0).all()
    assert np.abs(8 - top / 31 * 7 - expected).max() < 7 / 31 * 1.01
    assert lines[0].startswith("8.000 ")
    assert lines[-1].split() == ["0", "40"]
    assert set("".join(plot(points, width=40, height=6, unicode=False)[:-1])) <= set("0123456789. |*")


def test_gpus_of_this_machine_only(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = tmp_path / "nvidia-smi"
    script.write_text(
        "#!/bin/sh\necho '0, NVIDIA H200, 97, 51200, 143771, 612.31'\necho '1, NVIDIA H200, [N/A], [N/A], [N/A], [N/A]'\n"
    )
    script.chmod(script.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    run = read_run(folder)
    assert Gpus().lines(run)[0] == "GPU 0 NVIDIA H200: 97% busy, 50.0 of 140.4 GiB, 612 W"
    assert gpu_lines("1, A, [N/A], [N/A], [N/A], [N/A]\n") == ["GPU 1 A: [N/A]% busy, [N/A], [N/A] W"]
    (folder / "attempts" / "attempt-1.json").write_text(json.dumps({"attempt": 1, "host": "another", "state": "running"}))
    assert Gpus().lines(read_run(folder)) == []


def _watch(folder: Path, *argv: str) -> tuple[subprocess.Popen[bytes], int]:
    """In a terminal of its own; the process and the terminal's other end."""
    ours, theirs = pty.openpty()
    command = [sys.executable, "-m", "lora_dist", "watch", str(folder), "--interval_s", "0.1", *argv]
    env = environment(TERM="xterm-256color", PYTHONIOENCODING="utf-8")
    process = subprocess.Popen(command, cwd=ROOT, env=env, stdin=theirs, stdout=theirs, stderr=theirs, start_new_session=True)
    os.close(theirs)
    return process, ours


def _read_until(descriptor: int, word: str, timeout_s: float = 120) -> str:
    seen, deadline = b"", time.monotonic() + timeout_s
    while word.encode() not in seen:
        assert time.monotonic() < deadline, seen.decode(errors="replace")
        seen += os.read(descriptor, 65536)
    return seen.decode(errors="replace")


def _rest(descriptor: int) -> str:
    seen = b""
    try:
        while part := os.read(descriptor, 65536):
            seen += part
    except OSError:  # the other end is closed
        pass
    os.close(descriptor)
    return seen.decode(errors="replace")


def test_it_follows_and_ends_with_the_run(folder: Path) -> None:
    process, terminal = _watch(folder)
    _read_until(terminal, "step 40 of 100")
    _write(folder, state="running", steps=60)
    _read_until(terminal, "step 60 of 100")
    _write(folder, state="stopped", steps=70)
    rest = _rest(terminal)
    assert process.wait(120) == 75
    assert "step 70 of 100" in rest.split("\x1b[?1049l")[-1]  # stays after the screen is given back


def test_ctrl_c_ends_the_watching_alone(folder: Path) -> None:
    process, terminal = _watch(folder)
    _read_until(terminal, "step 40 of 100")
    process.send_signal(signal.SIGINT)
    rest = _rest(terminal)
    assert process.wait(120) == 0
    assert "\x1b[?1049l" in rest
    assert "Traceback" not in rest


def test_without_a_terminal_it_is_shown_once(folder: Path) -> None:
    command = [sys.executable, "-m", "lora_dist", "watch", str(folder)]
    done = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=120)
    assert done.returncode == 0
    assert "step 40 of 100" in done.stdout
    assert "\x1b" not in done.stdout
