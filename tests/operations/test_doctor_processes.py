"""`lora-dist doctor`'s processes: collectives and strategies under a real torchrun, a rank that hangs, a wrong interface, an
interrupt, a kill. About a minute.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from lora_dist.arguments import DoctorArgs
from lora_dist.operations.doctor.context import Context
from lora_dist.operations.doctor.processes import Group, _examine, _groups, _hung, _State, _strategy, worker_environment
from lora_dist.operations.doctor.report import Status
from lora_dist.operations.doctor.worker import Job
from tests.runs import ROOT, descendants, environment

pytestmark = pytest.mark.distributed

COMMAND = [sys.executable, "-m", "lora_dist", "doctor", "--json"]


def doctor(*argv: str, **env: str) -> tuple[int, dict[str, dict[str, str]]]:
    """Exit code, and findings by name."""
    done = subprocess.run([*COMMAND, *argv], capture_output=True, text=True, cwd=ROOT, env=environment(**env))
    findings = [json.loads(line) for line in done.stdout.splitlines()[:-1]]
    assert "Traceback" not in done.stderr and findings, done.stderr
    return done.returncode, {finding["name"]: finding for finding in findings}


def wait_for(what: Callable[[], bool], timeout_s: float = 60.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not what():
        assert time.monotonic() < deadline, "waited for too long"
        time.sleep(0.02)


def workers(pid: int) -> list[int]:
    """Ids of a doctor's workers, rank 0 first."""
    ranks = {}
    for child in descendants(pid):
        try:
            words = Path(f"/proc/{child}/cmdline").read_bytes().split(b"\0")
            variables = dict(line.split("=", 1) for line in Path(f"/proc/{child}/environ").read_text().split("\0") if "=" in line)
        except (FileNotFoundError, ProcessLookupError):
            continue
        if b"--as-worker" in words and "RANK" in variables:
            ranks[int(variables["RANK"])] = child
    return [ranks[rank] for rank in sorted(ranks)]


def alive(pids: list[int]) -> list[int]:
    """Of these, the processes that are more than an entry in their parent's table."""
    found = []
    for pid in pids:
        try:
            if Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z":
                found.append(pid)
        except (FileNotFoundError, ProcessLookupError):
            continue
    return found


def test_collectives_and_every_strategy_work_here(tmp_path):
    """And give the same losses; the base is cut where it is to be."""
    code, found = doctor(
        "--only", "collectives,strategies", "--device", "cpu", "--processes", "2", "--output_dir", str(tmp_path), WORLD_SIZE="9"
    )
    assert code == 0 and {f["status"] for f in found.values()} == {"OK"}, found
    assert found["gloo join"]["found"].startswith("2 processes under torchrun found each other")
    for name in ("all_reduce", "broadcast", "all_gather"):
        assert "16 MB" in found[f"gloo {name}"]["found"] and "values right" in found[f"gloo {name}"]["found"]
    losses = {name: finding["found"].split(",")[0] for name, finding in found.items() if name.startswith("strategy ")}
    assert list(losses) == [f"strategy {name}" for name in ("ddp", "fsdp2", "zero1", "zero2", "zero3")]
    assert len(set(losses.values())) == 1, losses
    held = {
        name.split()[1]: finding["found"].split(" of the base")[0][-4:].strip()
        for name, finding in found.items()
        if name in losses
    }
    assert held == {"ddp": "100%", "fsdp2": "50%", "zero1": "100%", "zero2": "100%", "zero3": "50%"}
    assert all("same losses" in found[name]["found"] for name in list(losses)[1:])


@pytest.mark.long
def test_a_rank_that_never_joins_is_a_failure_and_is_ended(tmp_path):
    process = subprocess.Popen(
        [*COMMAND, "--device=cpu", "--only=collectives,strategies", "--processes", "2", "--timeout_s", "12", "--output_dir", str(tmp_path)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT, env=environment(),
    )  # fmt: skip
    try:
        wait_for(lambda: len(workers(process.pid)) == 2)
        started = workers(process.pid)
        os.kill(started[1], signal.SIGSTOP)
        output, _ = process.communicate(timeout=90)
    finally:
        process.kill()
    findings = {f["name"]: f for f in map(json.loads, output.splitlines()[:-1])}
    join = findings["gloo join"]
    assert process.returncode == 1 and join["status"] == "FAIL"
    assert join["found"].startswith("no progress for 12 s: ")
    assert "GLOO_SOCKET_IFNAME" in join["remedy"] and "--timeout_s 24" in join["remedy"]
    assert findings["strategies"]["status"] == "SKIP"
    wait_for(lambda: not alive(started))  # a stopped process too


def test_a_wrong_interface_is_a_failure_that_names_the_variable(tmp_path):
    code, found = doctor(
        "--only",
        "environment,collectives",
        "--device",
        "cpu",
        "--processes",
        "2",
        "--output_dir",
        str(tmp_path),
        GLOO_SOCKET_IFNAME="nosuch0",
    )
    assert code == 1 and found["interface"]["status"] == "FAIL" and "nosuch0" in found["interface"]["found"]
    assert found["gloo join"]["status"] == "FAIL" and "nosuch0" in found["gloo join"]["found"]
    assert "GLOO_SOCKET_IFNAME" in found["gloo join"]["remedy"]


def test_gpus_that_are_not_there_are_no_reason_to_try_the_cpus_instead(tmp_path):
    import torch

    if torch.cuda.is_available():
        pytest.skip("this machine has GPUs")

    def groups(**args: str) -> list[tuple[str, int, list[str]]]:
        context = Context(DoctorArgs(**args), {}, tmp_path)  # type: ignore[arg-type]
        found = _groups(context, collectives=True, strategies=["ddp"])
        return [(group.job.backend, group.processes, group.job.strategies) for group in found]

    assert groups() == groups(device="cpu") == [("gloo", 2, ["ddp"])]
    assert groups(device="cuda") == [("nccl", 1, ["ddp"]), ("gloo", 2, [])]
    nccl = Group(1, Job("nccl", "cuda", 60.0, True, ["ddp"]))
    failed, skipped = _examine(Context(DoctorArgs(), environment(), tmp_path), nccl, {})
    assert failed.status is Status.FAIL and failed.name == "nccl join" and "torch sees no GPU" in failed.found
    assert failed.remedy == "--device cpu, or --backend gloo" and skipped.status is Status.SKIP


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_nothing_is_left_behind_whatever_ends_it(number, tmp_path):
    out, temporary = tmp_path / "out", tmp_path / "temporary"
    out.mkdir()
    temporary.mkdir()
    process = subprocess.Popen(
        [*COMMAND, "--device", "cpu", "--only", "collectives", "--processes", "2", "--output_dir", str(out)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT, env=environment(TMPDIR=str(temporary)),
    )  # fmt: skip
    wait_for(lambda: len(workers(process.pid)) == 2)
    below = descendants(process.pid)
    assert len(below) >= 3  # torchrun and its workers
    process.send_signal(number)
    _, problem = process.communicate(timeout=20)
    wait_for(lambda: not alive(below), timeout_s=20)
    if number == signal.SIGKILL:
        return
    assert process.returncode == 130
    assert problem.strip() == "lora-dist doctor: interrupted"
    assert not list(temporary.glob("lora-dist-doctor-*"))


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_ctrl_c_that_a_destructor_swallows_counts_all_the_same(monkeypatch, capsys):
    from lora_dist.cli.doctor import main

    class Swallowing:
        def __del__(self) -> None:
            os.kill(os.getpid(), signal.SIGINT)

    def examine(*_: object) -> int:
        held = Swallowing()
        del held
        return 0

    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr("lora_dist.operations.doctor.run", examine)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        assert main([]) == 130
    finally:
        for number, handler in zip((signal.SIGINT, signal.SIGTERM), before, strict=True):
            signal.signal(number, handler)
    assert "interrupted" in capsys.readouterr().err


@pytest.mark.long
def test_behind_a_strategy_that_fails_the_next_is_tried(tmp_path):
    """There is no zero9: DeepSpeed's file of that stage is missing."""
    context = Context(DoctorArgs(device="cpu"), environment(), tmp_path)
    found = list(_examine(context, Group(1, Job("gloo", "cpu", 60.0, False, ["zero9", "ddp"])), {}))
    assert [(f.status, f.name) for f in found] == [
        (Status.OK, "gloo join"), (Status.FAIL, "strategy zero9"), (Status.OK, "gloo join"), (Status.OK, "strategy ddp"),
    ]  # fmt: skip
    assert "zero9.json" in found[1].found and "lora-dist[deepspeed]" in found[1].remedy


def test_the_rank_that_hangs_is_named():
    group = Group(3, Job("gloo", "cpu", 9.0, True, ["ddp"]))

    def hung(**reached: str) -> str:
        ended = _hung(group, _State({int(rank[1:]): at for rank, at in reached.items()}))
        return f"{ended.item} | {ended.text}"

    assert hung(r0="gloo join", r2="gloo join") == "gloo join | no progress for 9 s: rank 1 is still at gloo join: starting"
    assert hung(r0="ddp", r1="ddp", r2="gloo barrier") == "ddp | no progress for 9 s: rank 2 is still at gloo barrier"
    assert hung(r0="ddp", r1="ddp", r2="ddp") == "ddp | no progress for 9 s: all 3 processes are at ddp"


def test_another_loss_than_the_first_strategys_is_a_failure():
    losses: dict[str, list[float]] = {}
    first = {"item": "ddp", "losses": [5.0, 4.0], "step_s": 0.1, "base_share": 1.0}
    assert _strategy(first, losses).status is Status.OK
    assert _strategy({**first, "item": "fsdp2", "losses": [5.0, 4.00001]}, losses).status is Status.OK
    other = _strategy({**first, "item": "zero1", "losses": [5.0, 4.001]}, losses)
    assert other.status is Status.FAIL and "differ from ddp's by 2.5e-04" in other.found and other.remedy == "--strategy ddp"


def test_workers_are_told_nothing_of_another_launcher():
    env = worker_environment(
        {"RANK": "3", "MASTER_PORT": "1", "SLURM_PROCID": "2", "TORCHELASTIC_RUN_ID": "x", "HOME": "/root"}, 2
    )
    assert {name for name in env if not name.startswith("OMP_")} == {"HOME"} and int(env["OMP_NUM_THREADS"]) >= 1
