"""The job that `lora-dist submit` writes, what it refuses, and what becomes of a job after an attempt. A few seconds; a real Slurm is in
tests/cluster."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from lora_dist.operations.attempts import Limits, Verdict, begin, conclude
from tests.runs import ROOT

SBATCH = """#!/bin/sh
echo "$@" > "$(dirname "$0")/arguments"
echo '4711;cluster'
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A configuration, in a folder whose name has a space."""
    folder = tmp_path / "my runs"
    folder.mkdir()
    values = {
        "model": {"name_or_path": "base"},
        "data": {"dataset_name": "text.txt"},
        "train": {"output_dir": "out", "learning_rate": 1e-3},
    }
    (folder / "my.yaml").write_text(yaml.safe_dump(values))
    return folder


def submit(folder: Path, *argv: str, sbatch: str | None = SBATCH) -> subprocess.CompletedProcess[str]:
    """Run the command in `folder` with that sbatch on PATH, or with none."""
    tools = folder / "bin"
    tools.mkdir(exist_ok=True)
    if sbatch is not None:
        (tools / "sbatch").write_text(sbatch)
        (tools / "sbatch").chmod(0o755)
    git = Path("/usr/bin/git")
    if git.exists() and not (tools / "git").exists():
        (tools / "git").symlink_to(git)
    # /bin has what the stand-in for sbatch needs, and on a merged /usr a real sbatch too.
    path = f"{tools}:/usr/bin:/bin" if sbatch is not None else str(tools)
    env = {**os.environ, "PATH": path, "PYTHONPATH": str(ROOT)}
    argv = ("submit", "--config", "my.yaml", *argv)
    return subprocess.run([sys.executable, "-m", "lora_dist", *argv], cwd=folder, env=env, capture_output=True, text=True)


def job_folder(folder: Path, run: str = "out") -> Path:
    (one,) = (folder / run / "jobs").iterdir()
    return one


def directives(script: Path) -> list[str]:
    return [line.removeprefix("#SBATCH ") for line in script.read_text().splitlines() if line.startswith("#SBATCH")]


def test_a_job_is_written_and_queued(folder: Path) -> None:
    options = ["--nodes", "2-4", "--gpus_per_node=8", "--time", "04:00:00", "--partition", "main", "--account=x", "--qos", "y"]
    done = submit(
        folder,
        *options,
        "--sbatch_args",
        "--exclusive --comment='a b'",
        "--signal_s",
        "90",
        "--",
        "--train.learning_rate",
        "3e-4",
    )
    assert done.returncode == 0, done.stderr
    job = job_folder(folder)
    assert (folder / "bin" / "arguments").read_text().strip() == f"--parsable {job / 'job.sbatch'}"
    assert directives(job / "job.sbatch") == [
        "--job-name=out",
        "--nodes=2-4",
        "--ntasks=4",
        "--overcommit",
        "--cpus-per-task=8",
        "--gpus-per-node=8",
        "--time=04:00:00",
        "--partition=main",
        "--account=x",
        "--qos=y",
        f"--chdir='{folder}'",
        f"--output='{job}/slurm-%j.out'",
        "--open-mode=append",
        "--signal=B:USR1@90",
        "--requeue",
        "--exclusive --comment='a b'",
    ]
    assert "export NPROC=8" in (job / "job.sbatch").read_text()
    assert "job 4711 is queued" in done.stdout
    assert "out/attempts/slurm-4711-R.out" in done.stdout
    assert "scancel --batch --signal=USR1 4711" in done.stdout
    assert (job / "job_id").read_text() == "4711\n"


def test_a_later_edit_changes_no_queued_job(folder: Path) -> None:
    """The script runs the configuration, DeepSpeed's file and the launch scripts as they were."""
    (folder / "zero.json").write_text('{"zero_optimization": {"stage": 2}}')
    argv = ["--parallel.strategy=zero2", "--parallel.ds_config=zero.json", "--train.learning_rate", "3e-4"]
    assert submit(folder, "--", *argv).returncode == 0
    job = job_folder(folder)
    for name in ("my.yaml", "zero.json"):
        (folder / name).write_text("{}")
    values = yaml.safe_load((job / "config.yaml").read_text())
    assert values["train"]["learning_rate"] == 3e-4
    assert values["model"]["name_or_path"] == "base"
    assert json.loads(Path(values["parallel"]["ds_config"]).read_text()) == {"zero_optimization": {"stage": 2}}
    # What the job runs in the end, shown by the copied script, with nothing of the checkout's launch/ in it.
    script = (job / "job.sbatch").read_text().replace("slurm.sbatch' train", "slurm.sbatch' --dry-run train")
    done = subprocess.run(
        ["bash", "-c", script], cwd=folder, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)}
    )
    assert done.returncode == 0, done.stderr
    assert f"'{job}/torchrun.sh' train --config '{job}/config.yaml' --resume auto" in done.stdout
    assert f"PYTHON={sys.executable}" in done.stdout
    assert str(ROOT / "launch") not in done.stdout


def test_what_the_code_was_is_kept(folder: Path) -> None:
    assert submit(folder, "--dry_run").returncode == 0
    job = job_folder(folder)
    code = json.loads((job / "code.json").read_text())
    revision = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    if revision.returncode == 0:
        assert code["revision"] == revision.stdout.strip()
        assert isinstance(code["dirty"], bool)
    versions = dict(line.split("==") for line in (job / "versions.txt").read_text().splitlines())
    assert "torch" in versions and versions == dict(sorted(versions.items(), key=lambda item: item[0].lower()))


def test_all_problems_are_reported_and_nothing_is_written(folder: Path) -> None:
    (folder / "sweep.txt").write_text("--train.seed 1\n--train.sed 2\n")
    argv = ["--nodes", "two", "--arry", "1", "--", "--train.learning_rat", "1", "--train.overwrite_output_dir"]
    done = submit(folder, *argv)
    assert done.returncode == 2
    for problem in ("nodes: found two", "arry: unknown key, did you mean array?", "train.learning_rat: unknown key"):
        assert problem in done.stderr
    done = submit(folder, "--sweep", "sweep.txt", "--", "--train.overwrite_output_dir")
    assert done.returncode == 2
    for problem in (
        "sweep: line 2: train.sed: unknown key",
        "train.output_dir: found out with an array, expected {task} in it",
        "train.overwrite_output_dir: found true",
    ):
        assert problem in done.stderr
    assert not (folder / "out").exists()


def test_options_of_train_before_the_dashes_are_told_where_they_belong(folder: Path) -> None:
    done = submit(folder, "--train.max_steps", "4", "--", "--train.learning_rate", "3e-4")
    assert done.returncode == 2 and not (folder / "out").exists()
    assert done.stderr.splitlines() == [
        "lora-dist submit: --train.max_steps: found before --, expected behind it, where options of lora-dist train stand: "
        "lora-dist submit ... -- --train.max_steps VALUE"
    ]


@pytest.mark.parametrize("words", [["train.output_dir=x"], ["--output_dir", "x"], ["--strategy=ddp"]])
def test_other_spellings_of_them_too(folder: Path, words: list[str]) -> None:
    done = submit(folder, *words)
    name = words[0].partition("=")[0]
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert f"{name}: found before --" in done.stderr and f"-- --{name.removeprefix('--')} VALUE" in done.stderr


def test_without_sbatch(folder: Path) -> None:
    done = submit(folder, sbatch=None)
    assert done.returncode == 2
    assert done.stderr.startswith("lora-dist submit: sbatch: found no such command") and done.stderr.count("\n") == 1
    dry = submit(folder, "--dry_run", sbatch=None)
    assert dry.returncode == 0
    assert "not queued" in dry.stdout


def test_what_sbatch_says_is_shown(folder: Path) -> None:
    done = submit(folder, sbatch="#!/bin/sh\necho 'sbatch: error: invalid partition specified: nope' >&2\nexit 1\n")
    assert done.returncode == 2
    assert done.stderr == "lora-dist submit: sbatch: error: invalid partition specified: nope\n"


def test_an_array_has_a_run_folder_for_each_task(folder: Path) -> None:
    (folder / "sweep.txt").write_text("--train.learning_rate 1e-3\n--train.learning_rate 2e-3 --tracker.run_name 'a b'\n")
    done = submit(folder, "--sweep", "sweep.txt", "--", "--train.output_dir", "runs/lr-{task}")
    assert done.returncode == 0, done.stderr
    job = job_folder(folder, "runs/lr-array")
    assert "--array=1-2" in directives(job / "job.sbatch")
    script = (job / "job.sbatch").read_text()
    assert "--train.output_dir=runs/lr-{task}" in script
    shown = subprocess.run(
        ["bash", str(job / "slurm.sbatch"), "--dry-run", "--train.output_dir=runs/lr-{task}"],
        env={
            **os.environ,
            "PYTHON": sys.executable,
            "SWEEP": str(job / "sweep.txt"),
            "SLURM_ARRAY_TASK_ID": "2",
            "SLURM_ARRAY_JOB_ID": "7",
        },
        capture_output=True,
        text=True,
    )
    assert shown.returncode == 0, shown.stderr
    assert "--train.output_dir=runs/lr-2 --train.learning_rate 2e-3 --tracker.run_name 'a b' --resume auto" in shown.stdout


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({"SLURM_JOB_NUM_NODES": "2", "SLURM_NTASKS_PER_NODE": "8"}, "NNODES=2 NPROC=8"),
        ({"SLURM_NTASKS_PER_NODE": "1", "SLURM_GPUS_ON_NODE": "4"}, "NPROC=4"),
        ({"SLURM_TASKS_PER_NODE": "3(x2)", "SLURM_JOB_NUM_NODES": "2"}, "NNODES=2 NPROC=3"),
        ({"LAUNCHER": "srun", "SLURM_NTASKS_PER_NODE": "1", "SLURM_GPUS_ON_NODE": "4"}, "--ntasks=1 --ntasks-per-node=1"),
        ({"LAUNCHER": "srun", "SLURM_NTASKS_PER_NODE": "2", "SLURM_CPUS_PER_TASK": "6"}, "--ntasks-per-node=2 --cpus-per-task=6"),
        ({"LAUNCHER": "srun", "NPROC": "2", "SLURM_JOB_CPUS_PER_NODE": "8", "SLURM_CPUS_PER_TASK": "8"}, "--cpus-per-task=4"),
        ({"SLURM_NTASKS_PER_NODE": "2", "SLURM_JOB_CPUS_PER_NODE": "8(x2)"}, "OMP_NUM_THREADS=4"),
    ],
)
def test_what_slurm_gives_decides_the_processes(variables: dict[str, str], expected: str) -> None:
    env = {
        name: value
        for name, value in os.environ.items()
        if name not in ("NPROC", "OMP_NUM_THREADS", "MASTER_ADDR", "MASTER_PORT")
    }
    script = [str(ROOT / "launch" / "slurm.sbatch"), "--dry-run", "--config", "my.yaml"]
    done = subprocess.run(script, env={**env, "PYTHON": sys.executable, **variables}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert expected in done.stdout


# --- after an attempt ---------------------------------------------------------------------------------------------------------


LIMITS = Limits(requeues=100, idle=3)


def attempt(run: Path, restart: int, exit_code: int, status: dict | None, *, steps: int = 0, limits: Limits = LIMITS) -> Verdict:
    """One attempt that reached a checkpoint at `steps` and wrote that status."""
    file = begin(run, "7", restart)
    if steps:
        (run / f"checkpoint-{steps}").mkdir(exist_ok=True)
    if status is not None:
        (run / "status.json").write_text(json.dumps({"attempt": restart, "exit_code": exit_code, "reason": "", **status}))
    return conclude(file, exit_code, limits)


@pytest.mark.parametrize(
    ("exit_code", "status", "requeue", "code"),
    [
        (0, {"state": "completed"}, False, 0),
        (1, {"state": "completed"}, False, 0),  # the launcher stumbled after the end
        (75, {"state": "stopped", "reason": "SIGUSR1"}, True, 75),
        (1, {"state": "stopped", "reason": "SIGTERM", "exit_code": 75}, True, 75),  # torchrun
        (0, {"state": "stopped", "reason": "time limit"}, True, 75),  # torchrun with restarts
        (130, {"state": "stopped", "reason": "SIGINT"}, False, 75),
        (76, {"state": "hung", "reason": "rank 1"}, True, 75),
        (137, {"state": "running", "exit_code": None}, True, 75),
        (1, None, True, 75),
        (1, {"state": "failed", "reason": "rank 0: lost another process at step 8"}, True, 75),
        (1, {"state": "failed", "reason": "division by zero"}, False, 1),
        (2, {"state": "failed", "reason": "guard"}, False, 2),
        (1, {"state": "failed", "reason": "guard", "exit_code": 2}, False, 2),
        (2, None, False, 2),
    ],
)
def test_how_an_attempt_ended_decides(tmp_path: Path, exit_code: int, status: dict | None, requeue: bool, code: int) -> None:
    verdict = attempt(tmp_path, 0, exit_code, status, steps=5)
    assert (verdict.requeue, verdict.exit_code) == (requeue, code), verdict.text


def test_an_earlier_attempts_status_is_not_this_ones(tmp_path: Path) -> None:
    """Bad input before the run says anything: what stands in status.json is of the attempt before."""
    assert attempt(tmp_path, 0, 75, {"state": "stopped", "reason": "SIGUSR1"}, steps=5).requeue
    verdict = attempt(tmp_path, 1, 2, None)
    assert (verdict.requeue, verdict.exit_code) == (False, 2)


def test_torchruns_report_tells_bad_input(tmp_path: Path) -> None:
    file = begin(tmp_path, "7", 0)
    file.with_suffix(".out").write_text("Root Cause:\n[0]:\n  rank      : 0 (local_rank: 0)\n  exitcode  : 2 (pid: 77)\n")
    assert conclude(file, 1, LIMITS).exit_code == 2


def test_no_progress_ends_the_job(tmp_path: Path) -> None:
    """Three in a row; one that moves starts the count anew, and another job's attempts do not count."""
    stopped = {"state": "stopped", "reason": "SIGUSR1"}
    conclude(begin(tmp_path, "71", 0), 1, LIMITS)
    assert [attempt(tmp_path, n, 75, stopped, steps=s).requeue for n, s in enumerate([0, 0, 5, 5, 5])] == [True] * 5
    verdict = attempt(tmp_path, 5, 75, stopped, steps=5)
    assert (verdict.requeue, verdict.exit_code) == (False, 1)
    assert verdict.text == "no progress: 3 attempts in a row left the newest checkpoint at step 5: not requeued"


def test_requeues_are_limited(tmp_path: Path) -> None:
    stopped = {"state": "stopped", "reason": "SIGUSR1"}
    assert attempt(tmp_path, 1, 75, stopped, steps=5, limits=Limits(2, 3)).requeue
    verdict = attempt(tmp_path, 2, 75, stopped, steps=6, limits=Limits(2, 3))
    assert (verdict.requeue, verdict.exit_code) == (False, 75)


def test_a_failure_is_retried_only_where_asked(tmp_path: Path) -> None:
    failed = {"state": "failed", "reason": "division by zero"}
    assert attempt(tmp_path, 0, 1, failed, steps=5, limits=Limits(100, 3, retry_failed=True)).requeue
