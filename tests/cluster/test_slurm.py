"""Jobs on a real two-node Slurm that are preempted, run out of time, or lose a node: each completes by itself, with the uninterrupted
run's result. About 6 minutes on 2 cores; run by `make test-cluster`."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.cluster.conftest import Figures, Pace
from tests.cluster.slurm import Cluster, wait_for
from tests.runs import ROOT, adapter, assert_identical, environment, largest_relative_difference, losses, records, run

pytestmark = [pytest.mark.cluster, pytest.mark.distributed]

OVER = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY")


def submit(cluster: Cluster, config: Path, out: Path, *options: str, train: tuple[str, ...] = (), **variables: str) -> str:
    """Queue a run through `lora-dist submit`, once both nodes are free; the job's number."""
    cluster.wait_idle()
    argv = ["submit", "--config", str(config), *options, "--", "--train.output_dir", str(out), *train]
    env = environment(SLURM_CONF=str(cluster.folder / "slurm.conf"), CUDA_VISIBLE_DEVICES="", **variables)
    done = subprocess.run([sys.executable, "-m", "lora_dist", *argv], env=env, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()[1]


def last_step(out: Path) -> int:
    return max((row["step"] for row in records(out, "train")), default=0)


def attempts(out: Path, job: str) -> list[dict]:
    """What the script noted of each attempt of a job, in order."""
    files = (out / "attempts").glob(f"slurm-{job}-*.json")
    return sorted((json.loads(file.read_text()) for file in files), key=lambda one: one["restart"])


def console(out: Path) -> str:
    return "\n".join(f"--- {file.name}\n{file.read_text()}" for file in sorted((out / "attempts").glob("slurm-*.out")))


def wait_over(cluster: Cluster, job: str, out: Path, timeout_s: float = 300) -> dict[str, str]:
    """Wait for the job's end, whatever it is; its fields."""
    try:
        wait_for(lambda: cluster.state(job) in OVER, f"job {job}", timeout_s)
    except AssertionError as error:
        raise AssertionError(f"{error}\n{cluster.job(job)}\n{console(out)}") from None
    return cluster.job(job)


@dataclass
class Fault:
    """Watches a run from the fault on: what was lost, and when it trains again."""

    out: Path
    step_before: int = 0

    def strike(self, fault: Callable[[], object]) -> None:
        fault()
        self.began_s = time.monotonic()

    def recover(self, is_again: Callable[[], bool], timeout_s: float = 200) -> dict[str, float]:
        """Wait for the first step of the next attempt; steps lost and seconds."""
        deadline = time.monotonic() + timeout_s
        while not is_again():
            self.step_before = max(self.step_before, last_step(self.out))
            assert time.monotonic() < deadline, f"no second attempt\n{console(self.out)}"
            time.sleep(0.1)
        started_s = time.monotonic()
        wait_for(lambda: re.search(r"^Step \d+/", newest_console(self.out), flags=re.MULTILINE) is not None, "a step", timeout_s)
        return {
            "steps_lost": self.step_before - resumed_from(self.out),
            "seconds_until_started_again": round(started_s - self.began_s, 1),
            "seconds_until_first_step": round(time.monotonic() - self.began_s, 1),
        }


def newest(out: Path, suffix: str) -> Path:
    """Of what the script wrote for each attempt, the last; restarts count up."""
    return max((out / "attempts").glob(f"slurm-*{suffix}"), key=lambda file: int(file.stem.rpartition("-")[2]))


def newest_console(out: Path) -> str:
    file = newest(out, ".json").with_suffix(".out")
    return file.read_text() if file.exists() else ""


def resumed_from(out: Path) -> int:
    return int(json.loads(newest(out, ".json").read_text())["first_checkpoint"])


def assert_complete(cluster: Cluster, job: str, out: Path, reference: Path, restarts: int) -> None:
    fields = wait_over(cluster, job, out)
    assert fields["JobState"] == "COMPLETED", f"{fields}\n{console(out)}"
    assert int(fields["Restarts"]) == restarts, f"{fields}\n{attempts(out, job)}"
    assert_identical(reference, out)


def test_preempted(cluster: Cluster, config: Path, reference: Path, tmp_path: Path, note: Figures) -> None:
    """A job in the higher partition takes both nodes; Slurm gives this one its grace time. srun starts the processes."""
    out = tmp_path / "out"
    job = submit(cluster, config, out, "--nodes=2", "--launcher=srun", "--partition=main")
    wait_for(lambda: last_step(out) >= 8, "step 8")
    fault = Fault(out)
    fault.strike(lambda: cluster.run("sbatch", "--partition=high", "--nodes=2", "--output=/dev/null", "--wrap=sleep 1"))
    note["preempted (srun)"] = fault.recover(lambda: len(attempts(out, job)) == 2)
    assert_complete(cluster, job, out, reference, restarts=1)
    first, second = attempts(out, job)
    assert first["state"] == "stopped" and first["reason"] == "SIGTERM"
    assert second["first_checkpoint"] == first["last_checkpoint"] >= 8
    assert note["preempted (srun)"]["steps_lost"] == 0
    for restart in (0, 1):  # each attempt's console in a file of its own
        assert (out / "attempts" / f"slurm-{job}-{restart}.out").stat().st_size > 0
    fields = cluster.job(job)
    assert Path(fields["StdOut"]).parent.parent == out / "jobs"


def test_time_limit(cluster: Cluster, config: Path, pace: Pace, tmp_path: Path, note: Figures) -> None:
    """Slurm sends SIGUSR1 to the script alone; the script has torchrun's workers save, and queues the job again, as often as it takes.

    Limits are in minutes, and Slurm looks every 30 s: a job that starts right after a look, with a limit of 2 minutes and the signal 30 s
    before it, is told 58 s after its start, or 88 s when that look comes a moment early. The run is made to last half as long again as
    that, so it may be told more than once.
    """
    steps = max(20, int(1.5 * (88 - pace.start_s) / pace.step_s))
    longer = (f"--train.max_steps={steps}", f"--train.eval_steps={steps}", f"--train.save_steps={steps}")
    out, uninterrupted = tmp_path / "out", tmp_path / "uninterrupted"
    cluster.wait_for_limits_check()
    job = submit(cluster, config, out, "--nodes=2", "--time=2", "--signal_s=30", train=longer)
    wait_for(lambda: "asking the run to save and stop" in console(out), "SIGUSR1")
    fault = Fault(out)
    fault.strike(lambda: None)
    note["time limit (torchrun)"] = fault.recover(lambda: len(attempts(out, job)) == 2)
    fields = wait_over(cluster, job, out, timeout_s=600)
    assert fields["JobState"] == "COMPLETED", f"{fields}\n{console(out)}"
    assert int(fields["Restarts"]) >= 1
    first = attempts(out, job)[0]
    assert (first["state"], first["reason"]) == ("stopped", "SIGTERM") and 0 < first["last_checkpoint"] < steps
    assert note["time limit (torchrun)"]["steps_lost"] == 0
    run(2, "train", "--config", str(config), "--train.output_dir", str(uninterrupted), *longer)
    assert_identical(uninterrupted, out)


def test_lost_node(cluster: Cluster, config: Path, reference: Path, tmp_path: Path, note: Figures) -> None:
    """One node dies with all that runs on it. Started by plain sbatch. The job waits for the node, goes on when it is back."""
    out = tmp_path / "out"
    cluster.wait_idle()
    script = str(ROOT / "launch" / "slurm.sbatch")
    argv = ["--config", str(config), "--train.output_dir", str(out)]
    output = f"--output={tmp_path}/slurm.out"
    job = cluster.run("sbatch", "--parsable", "--nodes=2", "--ntasks-per-node=1", output, script, *argv, WAIT_S="20")
    wait_for(lambda: last_step(out) >= 8, "step 8")
    fault = Fault(out)
    try:
        fault.strike(lambda: cluster.lose_node("n2"))
        wait_for(lambda: cluster.state(job) == "PENDING", "the job to be queued again")
        down_s = time.monotonic()
    finally:
        cluster.return_node("n2")
    figures = fault.recover(lambda: len(attempts(out, job)) == 2)
    note["lost node (torchrun)"] = {**figures, "seconds_until_noticed": round(down_s - fault.began_s, 1)}
    assert_complete(cluster, job, out, reference, restarts=1)
    assert 0 <= figures["steps_lost"] <= 5  # since the last checkpoint


def test_goes_on_with_the_node_that_is_left(cluster: Cluster, config: Path, reference: Path, tmp_path: Path) -> None:
    """With --nodes 1-2 the job does not wait for the lost node: same samples a step on half the processes, equal to rounding."""
    out = tmp_path / "out"
    job = submit(cluster, config, out, "--nodes=1-2", "--launcher=srun")
    wait_for(lambda: last_step(out) >= 8, "step 8")
    try:
        cluster.lose_node("n2")
        fields = wait_over(cluster, job, out)
    finally:
        cluster.return_node("n2")
        cluster.wait_idle()
    assert fields["JobState"] == "COMPLETED" and fields["NumNodes"] == "1", f"{fields}\n{console(out)}"
    starts = [json.loads((out / "attempts" / f"attempt-{n}.json").read_text()) for n in (1, 2)]
    assert [one["processes"] for one in starts] == [2, 1]
    mine, theirs = losses(out), losses(reference)
    assert mine.keys() == theirs.keys()
    assert max(abs(mine[step] - theirs[step]) / theirs[step] for step in theirs) < 1e-5
    assert largest_relative_difference(adapter(reference), adapter(out)) < 1e-5


def test_array_with_a_stop_in_one_task(cluster: Cluster, config: Path, tmp_path: Path, note: Figures) -> None:
    """Each line of the sweep is a run of its own, one node each at the same time; one of the two is told to give way."""
    sweep = tmp_path / "sweep.txt"
    sweep.write_text("--train.learning_rate 1e-3\n--train.learning_rate 2e-3 --adapter.r 4\n")
    short = ("--train.max_steps=20",)
    job = submit(cluster, config, tmp_path / "out-{task}", "--sweep", str(sweep), "--launcher=srun", train=short)
    outs = {1: tmp_path / "out-1", 2: tmp_path / "out-2"}
    wait_for(lambda: last_step(outs[2]) >= 4, "step 4 of task 2")
    fault = Fault(outs[2])
    fault.strike(lambda: cluster.run("scancel", "--batch", "--signal=USR1", f"{job}_2"))
    note["told to give way (srun, array)"] = fault.recover(lambda: len(attempts(outs[2], f"{job}_2")) == 2)
    for task, restarts in ((1, "0"), (2, "1")):
        fields = wait_over(cluster, f"{job}_{task}", outs[task])
        assert (fields["JobState"], fields["Restarts"]) == ("COMPLETED", restarts), f"{fields}\n{console(outs[task])}"
    first = attempts(outs[2], f"{job}_2")[0]
    assert (first["state"], first["reason"]) == ("stopped", "SIGUSR1")
    alone = tmp_path / "alone"
    words = sweep.read_text().splitlines()[1].split()
    run(1, "train", "--config", str(config), "--train.output_dir", str(alone), *short, *words)
    assert_identical(alone, outs[2])


def test_bad_input_is_not_requeued(cluster: Cluster, config: Path, tmp_path: Path) -> None:
    """What the parser cannot see, and only the run finds: a base that is not there. torchrun turns the workers' 2 into 1."""
    out = tmp_path / "out"
    job = submit(cluster, config, out, "--nodes=2", train=("--model.name_or_path", str(tmp_path / "no-base")))
    fields = wait_over(cluster, job, out)
    assert (fields["JobState"], fields["Restarts"], fields["ExitCode"]) == ("FAILED", "0", "2:0"), f"{fields}\n{console(out)}"
    assert "bad input" in attempts(out, job)[0]["decision"]


def test_no_progress_ends(cluster: Cluster, config: Path, tmp_path: Path) -> None:
    """A job whose processes die before a step is requeued so often, and no more. This Python kills itself where training begins."""
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\ncase "$*" in *"lora_dist train"*) kill -9 $$ ;; esac\nexec {sys.executable} "$@"\n')
    python.chmod(0o755)
    out = tmp_path / "out"
    argv = ["--config", str(config), "--train.output_dir", str(out)]
    options = ["--parsable", "--nodes=1", "--ntasks-per-node=1", f"--output={tmp_path}/slurm.out"]
    script = str(ROOT / "launch" / "slurm.sbatch")
    variables = {"LAUNCHER": "srun", "MAX_IDLE": "2", "PYTHON": str(python)}
    job = cluster.run("env", *(f"{k}={v}" for k, v in variables.items()), "sbatch", *options, script, *argv)
    fields = wait_over(cluster, job, out)
    assert (fields["JobState"], fields["Restarts"], fields["ExitCode"]) == ("FAILED", "1", "1:0"), f"{fields}\n{console(out)}"
    first, second = attempts(out, job)
    assert first["decision"] == "ended without a word, newest checkpoint at step 0: requeued"
    assert second["decision"].startswith("no progress: 2 attempts in a row")


def test_cancelled_stays_cancelled(cluster: Cluster, config: Path, tmp_path: Path) -> None:
    """scancel gives the run time to save, and the script does not queue the job again."""
    out = tmp_path / "out"
    job = submit(cluster, config, out, "--nodes=2", "--launcher=srun")
    wait_for(lambda: last_step(out) >= 2, "step 2")
    cluster.run("scancel", job)
    assert wait_over(cluster, job, out)["JobState"] == "CANCELLED"
    cluster.wait_idle()  # the script has ended
    assert cluster.state(job) == "CANCELLED"
    assert json.loads((out / "status.json").read_text())["state"] == "stopped"
    assert os.listdir(out / "attempts").count(f"slurm-{job}-1.json") == 0
