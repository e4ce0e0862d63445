"""Runs that are asked to stop: by a signal to one of two processes, at any place; nothing is lost, and the resumed run is the same."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from lora_dist.engine.checkpoint import list_checkpoints, verify
from tests.distributed.group import Done, WorkerGroup, free_port
from tests.runs import ROOT, assert_identical, command, descendants, environment, losses, options, records, run

pytestmark = pytest.mark.distributed
STEPS = 40
COMMON = {
    "max_steps": STEPS,
    "eval_steps": 16,
    "save_steps": 50,
    "lr_scheduler_type": "constant",
    "gradient_accumulation_steps": 2,
}


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[WorkerGroup]:
    group = WorkerGroup(2, tmp_path_factory.mktemp("pair"))
    yield group
    group.close()


@pytest.fixture(scope="module")
def whole(pair: WorkerGroup, tiny_base: Path, tiny_text: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The uninterrupted run under a strategy, trained once."""
    folder, done = tmp_path_factory.mktemp("whole"), set()

    def trained(strategy: str) -> Path:
        out = folder / strategy
        if strategy not in done:
            pair.run(*options(tiny_base, tiny_text, out, parallel__strategy=strategy, **COMMON))
            done.add(strategy)
        return out

    return trained


def workers(group: WorkerGroup) -> list[int]:
    """Process ids by rank, once all are there."""
    found: dict[int, int] = {}
    deadline = time.monotonic() + 60
    while len(found) < group.processes and time.monotonic() < deadline:
        for launcher in group._launchers:
            for pid in descendants(launcher.pid):
                with contextlib.suppress(psutil.NoSuchProcess):
                    rank = psutil.Process(pid).environ().get("RANK")
                    if rank is not None:
                        found[int(rank)] = pid
    return [found[rank] for rank in range(group.processes)]


def when(condition: Callable[[], bool], act: Callable[[], None]) -> threading.Thread:
    def watch() -> None:
        deadline = time.monotonic() + 60
        while not condition() and time.monotonic() < deadline:
            time.sleep(0.002)
        act()

    thread = threading.Thread(target=watch)
    thread.start()
    return thread


def stopped(
    group: WorkerGroup, argv: list[str], out: Path, number: int, rank: int, *, at: int = 5, event: str = "train"
) -> tuple[Done, int]:
    """A run of which one process gets a signal after step `at`; with the step that it stopped at."""
    pid = workers(group)[rank]
    thread = when(lambda: any(row["step"] >= at for row in records(out, event)), lambda: os.kill(pid, number))
    done = group.run(*argv, code=75)
    thread.join()
    steps = [step for step, _ in list_checkpoints(out)]
    assert all(verify(path) is None for _, path in list_checkpoints(out))
    assert max(losses(out)) == max(steps) and at <= max(steps) < STEPS
    return done, max(steps)


@pytest.mark.parametrize(
    ("strategy", "number", "rank"),
    [
        pytest.param("ddp", signal.SIGTERM, 1, marks=pytest.mark.matrix),
        ("ddp", signal.SIGUSR1, 0),
        pytest.param("fsdp2", signal.SIGINT, 1, marks=pytest.mark.long),
        pytest.param("zero2", signal.SIGUSR2, 0, marks=pytest.mark.matrix),
        pytest.param("zero3", signal.SIGTERM, 1, marks=pytest.mark.long),
    ],
)
def test_one_signalled_process_stops_both_with_a_checkpoint(pair, whole, tiny_base, tiny_text, tmp_path, strategy, number, rank):
    reference, out = whole(strategy), tmp_path / "out"
    argv = options(tiny_base, tiny_text, out, parallel__strategy=strategy, **COMMON)
    done, step = stopped(pair, argv, out, number, rank)
    assert (
        f"stopped at step {step} of {STEPS} ({number.name}), checkpoint-{step} is whole: go on with --resume auto" in done.output
    )
    assert not (out / "adapter_model.safetensors").exists()
    pair.run(*argv, "--resume", "auto")
    assert_identical(reference, out)
    assert [r["step"] for r in records(out, "eval")] == [r["step"] for r in records(reference, "eval")]


@pytest.mark.parametrize("strategy", ["ddp", pytest.param("zero3", marks=pytest.mark.long)])
def test_an_evaluation_is_broken_off_and_made_up_for(pair, whole, tiny_base, tiny_text, tmp_path, strategy):
    """Asked during the evaluation behind step 16, which takes many batches: it is not finished first."""
    reference, out = whole(strategy), tmp_path / "out"
    slow = {**COMMON, "per_device_eval_batch_size": 1, "data__holdout_windows": 16}
    argv = options(tiny_base, tiny_text, out, parallel__strategy=strategy, **slow)
    _, step = stopped(pair, argv, out, signal.SIGTERM, 1, at=16)
    if [row["step"] for row in records(out, "eval")] == [0]:
        assert step == 16  # the usual case; on a machine that stalls, the signal may come after it
    pair.run(*argv, "--resume", "auto")
    assert losses(out) == losses(reference)
    assert [row["step"] for row in records(out, "eval")] == [0, 16, 32, 40]
    for mine, theirs in zip(records(out, "eval"), records(reference, "eval"), strict=True):
        assert mine["eval_loss"] == pytest.approx(theirs["eval_loss"], rel=1e-6)


def test_a_stop_that_is_asked_for_again_and_again_ends_at_the_same_result(pair, whole, tiny_base, tiny_text, tmp_path):
    reference, out = whole("ddp"), tmp_path / "out"
    argv = [*options(tiny_base, tiny_text, out, **COMMON), "--resume", "auto"]
    reached = 0
    for at in (3, 11, 20):
        _, step = stopped(pair, argv, out, signal.SIGTERM, at % 2, at=at)
        assert step > reached
        reached = step
    pair.run(*argv)
    assert_identical(reference, out)


def test_a_time_limit_stops_before_it_is_reached(pair, tiny_base, tiny_text, tmp_path):
    pair.run(*options(tiny_base, tiny_text, tmp_path / "warm", max_steps=1, eval_strategy="no", save_strategy="no"))
    age = max(time.time() - psutil.Process(pid).create_time() for pid in workers(pair))
    start, limit_s = time.time(), 10
    argv = options(
        tiny_base, tiny_text, tmp_path / "out", max_steps=100000, eval_strategy="no", stop_margin_s=2, save_steps=100000
    )
    done = pair.run(*argv, "--max_runtime", str(age + limit_s), code=75)
    assert time.time() - start < limit_s
    assert "(time limit), checkpoint-" in done.output
    ((step, path),) = list_checkpoints(tmp_path / "out")
    assert step == max(losses(tmp_path / "out")) and verify(path) is None


@pytest.mark.long
def test_torchrun_hands_a_sigterm_on_and_the_checkpoint_fits_into_its_grace(tiny_base, tiny_text, tmp_path):
    out = tmp_path / "out"
    values = options(
        tiny_base, tiny_text, out, max_steps=100000, eval_strategy="no", save_steps=100000, data__dataloader_num_workers=1
    )
    launcher = subprocess.Popen(
        command(2, "train", *values), cwd=ROOT, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    deadline = time.monotonic() + 120
    while not losses(out) and time.monotonic() < deadline:
        time.sleep(0.05)
    start = time.monotonic()
    launcher.terminate()
    output, _ = launcher.communicate(timeout=60)
    took_s = time.monotonic() - start
    assert "(SIGTERM), checkpoint-" in output and took_s < 15, output
    assert launcher.returncode != 0
    ((step, path),) = list_checkpoints(out)
    assert step == max(losses(out)) and verify(path) is None


def test_ctrl_c_twice_ends_at_once_also_in_a_collective(tiny_base, tiny_text, tmp_path):
    """Rank 1 is frozen, so rank 0 waits for it inside a collective: the first SIGINT waits as well, the second one does not."""
    out, port = tmp_path / "out", free_port()
    argv = ["train", *options(tiny_base, tiny_text, out, max_steps=100000, eval_strategy="no", save_steps=100000)]
    ranks = [
        subprocess.Popen(
            command(1, *argv),
            cwd=ROOT,
            env=environment(RANK=str(r), LOCAL_RANK=str(r), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port)),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        for r in range(2)
    ]
    try:
        deadline = time.monotonic() + 120
        while not losses(out) and time.monotonic() < deadline:
            time.sleep(0.05)
        ranks[1].send_signal(signal.SIGSTOP)
        time.sleep(0.5)
        ranks[0].send_signal(signal.SIGINT)
        time.sleep(1.5)
        assert ranks[0].poll() is None
        ranks[0].send_signal(signal.SIGINT)
        _, errors = ranks[0].communicate(timeout=10)
    finally:
        ranks[1].kill()
        ranks[1].communicate()
    assert ranks[0].returncode == 130, errors
    assert "SIGINT: stopping after this step; once more to end at once" in errors
    assert "second SIGINT: ending at once; the last checkpoint stands" in errors


def test_a_signal_before_training_ends_at_once(tiny_base, tiny_text, tmp_path):
    process = subprocess.Popen(
        command(1, "train", *options(tiny_base, tiny_text, tmp_path / "out")), cwd=ROOT, env=environment(), stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    deadline = time.monotonic() + 60
    while _waits_for_signals(process.pid) is False and time.monotonic() < deadline:
        time.sleep(0.001)
    process.send_signal(signal.SIGUSR1)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 75, errors
    assert "SIGUSR1 before training began: nothing to save" in errors


def _waits_for_signals(pid: int) -> bool:
    """Whether the process has taken SIGUSR1 over."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("SigCgt:"):
            return bool(int(line.split()[1], 16) & 1 << (signal.SIGUSR1 - 1))
    return False


@pytest.mark.long
def test_a_stopped_run_on_one_process_exits_with_75(tiny_base, tiny_text, tmp_path):
    out = tmp_path / "out"
    argv = ["train", *options(tiny_base, tiny_text, out, **{**COMMON, "max_steps": 2000, "eval_strategy": "no"})]
    process = subprocess.Popen(command(1, *argv), cwd=ROOT, env=environment(), stdout=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    while not losses(out) and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGUSR2)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 75 and "(SIGUSR2)" in output
    step = max(losses(out))
    done = run(1, *argv, "--resume", "auto", f"--train.max_steps={step}", check=False)
    assert done.returncode == 0, done.stderr
