"""The hang watch: what is said of processes that hang, and real ones that do; about half a minute."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
import timeit
from dataclasses import replace
from pathlib import Path

import pytest

from lora_dist.engine.watch import Watch
from lora_dist.engine.whereabouts import Report, Whereabouts, main_thread
from lora_dist.log import EXIT_HUNG
from lora_dist.parallel import World
from tests.runs import ROOT, descendants, environment, losses, options

HERE = Whereabouts(0, "a", 7, 1, 30, "forward and backward", 5, 0, 600.0, "file.py:3 in wait", "lora_dist/x.py:9 in go", True)


def report(*known: Whereabouts, size: int = 2, living: list[int] | None = None) -> Report:
    by_rank = {each.rank: each for each in known}
    return Report(size, by_rank, sorted(by_rank) if living is None else living, 600.0, Path("run/stacks/attempt-1"))


# --- the report ------------------------------------------------------------------------------------------------------------------


def test_the_process_that_got_least_far_is_blamed():
    found = report(HERE, replace(HERE, rank=1, sequence=29, phase="loading data", index=-1, in_collective=False))
    assert found.blamed == [1]
    assert found.reason == "rank 1 hung at step 5, loading data"
    lines = found.text.splitlines()
    assert lines[1] == (
        "  behind: rank 1 (a, pid 7): step 5, loading data, no progress for 600 s, at file.py:3 in wait, "
        "called from lora_dist/x.py:9 in go"
    )
    assert lines[2].startswith("  waiting: rank 0 (a, pid 7): step 5, forward and backward, batch 0,")
    assert "run/stacks/attempt-1/rank-*.txt" in lines[3] and "exit code 76" in lines[3]


def test_of_those_at_the_same_place_the_one_outside_a_collective_is_blamed():
    assert report(replace(HERE, in_collective=False), replace(HERE, rank=1)).blamed == [0]
    assert report(HERE, replace(HERE, rank=1)).blamed == [0, 1]  # nobody knows


def test_processes_that_do_not_answer_are_blamed_before_any_other():
    found = report(replace(HERE, sequence=2), replace(HERE, rank=1), replace(HERE, rank=2), size=4, living=[0, 2])
    assert found.blamed == [1, 3]
    assert found.reason == "ranks 1, 3 did not answer; rank 0 waits at step 5, forward and backward, batch 0"
    assert "last heard of: rank 3: nothing yet" in found.text


def test_of_many_processes_some_are_described():
    found = report(*(replace(HERE, rank=rank, sequence=rank > 0) for rank in range(100)), size=100)
    assert found.blamed == [0] and "waiting: and 91 more" in found.text


def test_where_the_main_thread_is():
    frames = main_thread()
    assert frames.innermost.startswith("lora_dist/engine/whereabouts.py") and not frames.in_collective


# --- marking ---------------------------------------------------------------------------------------------------------------------


def test_marking_costs_nothing(tmp_path):
    watch = Watch(World(), timeout_s=600, stacks=tmp_path, on_hang=lambda reason, text: None)
    best = min(timeit.repeat(lambda: watch.mark("forward and backward", 3, 1), number=10_000, repeat=5)) / 10_000
    print(f"one mark takes {best * 1e6:.2f} us")
    assert best < 1e-4  # 0.1 us here; a file, a lock that is waited for or a message would be far above


SUSPENDED = """
import sys
from pathlib import Path
from lora_dist.engine.watch import Watch
from lora_dist.parallel import World
watch = Watch(World(), timeout_s=2, stacks=Path(sys.argv[1]), on_hang=lambda reason, text: None)
watch.start()
print("watching", flush=True)
sys.stdin.readline()
print("fine", flush=True)
sys.stdin.readline()
"""


def test_time_in_which_the_whole_process_was_suspended_does_not_count(tmp_path):
    """Stopped for twice the limit it is not ended; awake for longer than the limit without a mark it is."""
    with subprocess.Popen(
        [sys.executable, "-c", SUSPENDED, str(tmp_path / "stacks")],
        cwd=ROOT,
        env=environment(PYTHONPATH=str(ROOT)),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdin is not None and process.stdout is not None and process.stderr is not None
        assert process.stdout.readline() == "watching\n"
        process.send_signal(signal.SIGSTOP)
        time.sleep(4)
        process.send_signal(signal.SIGCONT)
        time.sleep(0.5)
        process.stdin.write("\n")
        process.stdin.flush()
        assert process.stdout.readline() == "fine\n"
        assert process.wait(timeout=10) == EXIT_HUNG
        assert "rank 0 hung at step 0, starting" in process.stderr.read()
    assert (tmp_path / "stacks" / "rank-0.txt").exists()


# --- real processes --------------------------------------------------------------------------------------------------------------

TIMEOUT_S = 3


class Hung:
    """A run on two processes that was given a fault, watched until it has ended."""

    def __init__(self, base: Path, text: Path, out: Path, fault: dict, **train: object):
        self.out = out
        values = options(
            base,
            text,
            out,
            **{"max_steps": 50, "eval_strategy": "no", "save_strategy": "no", "health__hang_timeout_s": TIMEOUT_S, **train},
        )
        program = [str(ROOT / "tests" / "distributed" / "faults.py"), json.dumps([fault]), *values]
        self.process = subprocess.Popen(
            [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", *program],
            cwd=ROOT,
            env=environment(PYTHONPATH=str(ROOT)),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )

    def end(self, *, stopped: bool = False) -> str:
        """Wait for the last step that is taken, and then for the end; the error output."""
        deadline = time.monotonic() + 120
        while len(losses(self.out)) < 4 and time.monotonic() < deadline:
            time.sleep(0.05)
        pids = descendants(self.process.pid)
        start = time.monotonic()
        try:
            if stopped:
                self._kill_stopped(pids)
            _, error = self.process.communicate(timeout=3 * TIMEOUT_S + 25)
        finally:
            for pid in [*pids, self.process.pid]:
                if Path(f"/proc/{pid}").exists() and self.process.poll() is None:
                    os.kill(pid, signal.SIGKILL)
        print(f"ended {time.monotonic() - start:.1f} s after the last step\n{error}")
        left = [pid for pid in pids if Path(f"/proc/{pid}").exists()]
        assert not left
        return error

    def _kill_stopped(self, pids: list[int]) -> None:
        """torchrun would, 30 s after it has asked them to end."""
        deadline = time.monotonic() + 3 * TIMEOUT_S + 20
        while time.monotonic() < deadline:
            states = {pid: Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] for pid in pids if alive(pid)}
            halted = [pid for pid, state in states.items() if state == "T"]
            if halted and len([pid for pid in states if states[pid] != "Z"]) == len(halted):
                os.kill(halted[0], signal.SIGKILL)
                return
            time.sleep(0.1)

    def stacks(self, rank: int) -> str:
        return (self.out / "stacks" / "attempt-1" / f"rank-{rank}.txt").read_text()

    def status(self) -> dict:
        return json.loads((self.out / "status.json").read_text())


def alive(pid: int) -> bool:
    return Path(f"/proc/{pid}").exists()


def cursors(step: int) -> list[int]:
    return [2 * step]  # one window a process


@pytest.mark.distributed
@pytest.mark.long
def test_a_process_that_hangs_in_its_data_is_named(tiny_base, tiny_text, tmp_path):
    run = Hung(tiny_base, tiny_text, tmp_path / "run", {"what": "hang in loading", "rank": 1, "cursors": cursors(5)})
    error = run.end()
    assert error.count("HUNG") == 1
    assert "HUNG: no progress for 3 s: rank 1 hung at step 5, loading data\n" in error
    line = next(line for line in error.splitlines() if line.startswith("  behind: "))
    assert re.search(r"rank 1 \(.*\): step 5, loading data, .* at tests/distributed/faults.py:\d+ in steps_from, called from "
                     r"lora_dist/engine/loop.py:\d+ in _batches", line)  # fmt: skip
    assert "  waiting: rank 0" in error and "exitcode  : 76" in error
    assert run.stacks(1).startswith("rank 1 (") and "step 5, loading data" in run.stacks(1).splitlines()[0]
    assert "steps_from" in run.stacks(1) and "steps_from" not in run.stacks(0)
    assert "agreeing to go on" in run.stacks(0) and "all_reduce" in run.stacks(0)
    status = run.status()
    assert (status["state"], status["exit_code"], status["step"]) == ("hung", 76, 4)
    assert "rank 1" in status["reason"]


@pytest.mark.distributed
@pytest.mark.long
def test_rank_0_that_hangs_in_a_forward_pass_is_named(tiny_base, tiny_text, tmp_path):
    """The other process waits for its part of the next layer, within the same forward and backward pass."""
    fault = {"what": "hang in forward", "rank": 0, "cursors": cursors(5)}
    run = Hung(tiny_base, tiny_text, tmp_path / "run", fault, parallel__strategy="fsdp2")
    error = run.end()
    assert "rank 0 hung at step 5, forward and backward, batch 0\n" in error
    line = next(line for line in error.splitlines() if line.startswith("  behind: "))
    assert "rank 0 (" in line and "faults.py" in line and "called from lora_dist/models/loss.py" in line
    assert "waiting: rank 1" in error and "rank 0 hung" in (run.out / "train.log").read_text()
    assert run.status()["state"] == "hung"
    assert all("step 5, forward and backward" in run.stacks(rank).splitlines()[0] for rank in (0, 1))


@pytest.mark.long
@pytest.mark.distributed
def test_a_process_that_is_stopped_is_named_by_the_other(tiny_base, tiny_text, tmp_path):
    run = Hung(tiny_base, tiny_text, tmp_path / "run", {"what": "stopped", "rank": 0, "cursors": cursors(5)})
    error = run.end(stopped=True)
    assert error.count("HUNG") == 1
    assert "HUNG: no progress for 3 s: rank 0 did not answer; rank 1 waits at step 5, agreeing on the loss\n" in error
    assert "no answer (stopped, or its machine is gone); last heard of: rank 0 (" in error
    assert "rank 1" in run.stacks(1) and not (run.out / "stacks" / "attempt-1" / "rank-0.txt").exists()
