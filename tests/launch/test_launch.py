"""The scripts of `launch/`: the commands they make, and that all three train to the same figures."""

from __future__ import annotations

import base64
import functools
import json
import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from itertools import takewhile
from pathlib import Path

import pytest

from tests.launch.start import end, largest_difference, launch, run_together, script_file, variables
from tests.runs import ROOT, assert_identical, descendants, losses

SCRIPTS = ["torchrun", "deepspeed", "accelerate"]
ODD = ["--a", "two words", '--b=it\'s "quoted" $HOME', "", "*", 'c={"d": [1, 2]}', "line\nbreak"]


def dry(script: str, *argv: str, **own: str) -> tuple[dict[str, str], list[str]]:
    """(assignments, words) of the printed command; the assignments stand before it, as a shell reads them."""
    words = shlex.split(launch(script, "--dry-run", *argv, **own).stdout)
    assigned = list(takewhile(lambda word: word != sys.executable, words))
    return dict(word.split("=", 1) for word in assigned), words[len(assigned) :]


def option(words: list[str], name: str) -> str:
    return words[words.index(name) + 1]


def world(words: list[str]) -> dict[str, list[str]]:
    return json.loads(base64.urlsafe_b64decode(option(words, "--world_info")))


def refusal(script: str, *argv: str, **own: str) -> str:
    """The one line of a command that is refused."""
    done = launch(script, "--dry-run", *argv, check=False, **own)
    lines = [line for line in done.stderr.splitlines() if "NPROC is not set" not in line]
    assert done.returncode == 2
    assert done.stdout == ""
    assert len(lines) == 1
    return lines[0]


@pytest.fixture
def stub(tmp_path: Path) -> str:
    """A Python that answers the scripts' small questions, counts FAKE_GPUS, and records a launch instead of doing it."""
    file, record = (
        tmp_path / "stub python",
        "import json, os, sys; json.dump([os.getpid(), sys.argv[1:]], open(sys.argv[0], 'w'))",
    )
    file.write_text(
        f"""#!/usr/bin/env bash
case "$1 ${{2:-}}" in
  *device_count*) echo "${{FAKE_GPUS:-0}}"; exit ;;
  -c*|-" "*) exec {sys.executable} "$@" ;;
esac
exec {sys.executable} -c "import sys; sys.argv[0] = '{tmp_path}/record'; {record}; sys.exit(int('${{STUB_EXIT:-0}}'))" "$@"
"""
    )
    file.chmod(0o755)
    (tmp_path / "nvidia-smi").write_text("#!/bin/sh\n")
    (tmp_path / "nvidia-smi").chmod(0o755)
    return str(file)


@pytest.mark.parametrize("script", SCRIPTS)
def test_one_machine(script):
    assigned, words = dry(script, "--config", "my.yaml", NPROC="3", OMP_NUM_THREADS="")
    assert words[-4:] == ["lora_dist", "train", "--config", "my.yaml"]
    assert assigned["OMP_WAIT_POLICY"] == "PASSIVE"
    assert int(assigned["OMP_NUM_THREADS"]) == max(1, len(os.sched_getaffinity(0)) // 3)
    if script == "torchrun":
        assert words[1:3] == ["-m", "torch.distributed.run"]
        assert "--standalone" in words
        assert option(words, "--nproc-per-node") == "3"
    elif script == "deepspeed":
        assert assigned["DS_ACCELERATOR"] == "cpu"
        assert "deepspeed.launcher.launch" in words
        assert "--no_local_rank" in words
        assert world(words) == {"machine0": ["-1"] * 3}
        assert option(words, "--master_addr") == "127.0.0.1"
        assert int(option(words, "--master_port")) > 1023
    else:
        assert option(words, "--num_processes") == "3"
        assert option(words, "--config_file") == str(ROOT / "launch" / "accelerate.yaml")
        assert "--cpu" not in words  # one process, and no DeepSpeed


@pytest.mark.parametrize("script", SCRIPTS)
def test_many_machines(script):
    own = {"NPROC": "4", "NNODES": "2", "NODE_RANK": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29555"}
    assigned, words = dry(script, **own)
    assert assigned["GLOO_SOCKET_IFNAME"] == "lo"
    if script == "torchrun":
        assert option(words, "--nnodes") == "2"
        assert option(words, "--rdzv-backend") == "c10d"
        assert option(words, "--rdzv-endpoint") == "127.0.0.1:29555"
        assert option(words, "--rdzv-conf") == "is_host=0"
        assert option(words, "--local-addr") == "127.0.0.1"
    elif script == "deepspeed":
        assert world(words) == {"machine0": ["-1"] * 4, "machine1": ["-1"] * 4}
        assert [option(words, f"--{name}") for name in ("node_rank", "master_addr", "master_port")] == ["1", "127.0.0.1", "29555"]
    else:
        assert option(words, "--num_processes") == "8"
        assert [option(words, f"--{name}") for name in ("num_machines", "machine_rank")] == ["2", "1"]
        assert [option(words, f"--main_process_{name}") for name in ("ip", "port")] == ["127.0.0.1", "29555"]


def test_torchrun_takes_a_range_of_machines_restarts_and_a_rendezvous_elsewhere():
    own = {"NPROC": "1", "NNODES": "1:4", "MASTER_ADDR": "127.0.0.1", "RDZV_ID": "mine", "MAX_RESTARTS": "3"}
    assigned, words = dry("torchrun", **own)
    assert [option(words, f"--{name}") for name in ("nnodes", "rdzv-id", "max-restarts")] == ["1:4", "mine", "3"]
    assert assigned["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] == "1"
    quick = option(words, "--rdzv-conf")
    assert "is_host" not in quick
    assert "keep_alive_interval=2,keep_alive_max_attempt=5" in quick
    assert option(dry("torchrun", **own, NODE_RANK="0")[1], "--rdzv-conf") == f"is_host=1,{quick}"
    del own["MASTER_ADDR"]
    _, words = dry("torchrun", **own, RDZV_ENDPOINT="127.0.0.1:29400", RDZV_CONF="join_timeout=60")
    assert option(words, "--rdzv-endpoint") == "127.0.0.1:29400"
    assert option(words, "--rdzv-conf") == f"is_host=0,{quick},join_timeout=60"
    del own["MAX_RESTARTS"], own["RDZV_ID"]
    assert "RDZV_ID: found nothing with RDZV_ENDPOINT" in refusal("torchrun", **own, RDZV_ENDPOINT="127.0.0.1:29400")
    assert "RDZV_ENDPOINT: found '127.0.0.1'" in refusal("torchrun", **own, RDZV_ID="mine", RDZV_ENDPOINT="127.0.0.1")


@pytest.mark.parametrize("script", SCRIPTS)
def test_arguments_arrive_as_they_were_given_and_the_printed_command_can_be_pasted(script, stub, tmp_path):
    launch(script, "eval", *ODD, PYTHON=stub, NPROC="2", MASTER_PORT="29555", cwd=tmp_path)
    record = tmp_path / "record"
    _, given = json.loads(record.read_text())
    assert given[-len(ODD) - 2 :] == ["lora_dist", "eval", *ODD]
    printed = launch(script, "--dry-run", "eval", *ODD, PYTHON=stub, NPROC="2", MASTER_PORT="29555").stdout
    record.unlink()
    subprocess.run(["bash", "-c", printed], check=True, cwd=tmp_path)
    assert json.loads(record.read_text())[1] == given


@pytest.mark.parametrize("script", SCRIPTS)
def test_the_launcher_takes_the_scripts_place(script, stub, tmp_path):
    """Same process, so that signals reach it, and its exit code is the script's."""
    process = subprocess.Popen([script_file(script)], env=variables(PYTHON=stub, NPROC="2", STUB_EXIT="7"))
    assert process.wait() == 7
    assert json.loads((tmp_path / "record").read_text())[0] == process.pid


@pytest.mark.parametrize("script", SCRIPTS)
def test_processes_are_as_many_as_gpus_where_nproc_is_not_set(script, stub, tmp_path):
    path = f"{tmp_path}:{os.environ['PATH']}"
    done = launch(script, "--dry-run", PYTHON=stub, PATH=path, FAKE_GPUS="4")
    assert done.stderr.splitlines() == [f"{script}.sh: NPROC is not set: 4 processes on this machine, one a GPU"]
    assert "DS_ACCELERATOR" not in done.stdout
    done = launch(script, "--dry-run", PYTHON=stub, PATH=path, FAKE_GPUS="0")
    assert done.stderr.splitlines() == [f"{script}.sh: NPROC is not set: 1 process, since torch sees no GPU"]
    done = launch(script, "--dry-run", "merge", "a", "b", "c", PYTHON=stub, PATH=path, FAKE_GPUS="4")
    assert done.stderr == ""
    assert "4" not in shlex.split(done.stdout)


def test_deepspeed_keeps_to_the_visible_gpus(stub, tmp_path):
    own = {"PYTHON": stub, "PATH": f"{tmp_path}:{os.environ['PATH']}", "FAKE_GPUS": "2", "CUDA_VISIBLE_DEVICES": "2,GPU-5f"}
    words = shlex.split(launch("deepspeed", "--dry-run", **own).stdout)
    assert world(words) == {"machine0": ["2", "GPU-5f"]}
    assert "NPROC: found 3, expected 2 at most" in refusal("deepspeed", NPROC="3", **own)


@pytest.mark.parametrize("script", SCRIPTS)
def test_what_is_missing_is_one_line_and_exit_code_2(script):
    assert "MASTER_ADDR: found nothing with NNODES=2" in refusal(script, NPROC="1", NNODES="2", NODE_RANK="0")
    several = {"NPROC": "1", "NNODES": "2", "MASTER_ADDR": "127.0.0.1"}
    assert "NODE_RANK: found 2, expected 0 to 1" in refusal(script, NODE_RANK="2", **several)
    if script != "torchrun":
        assert "NODE_RANK: found nothing with NNODES=2" in refusal(script, **several)
    assert "NPROC: found 'many', expected a whole number" in refusal(script, NPROC="many")
    assert "NNODES: found 'x'" in refusal(script, NPROC="1", NNODES="x")
    if script == "torchrun":
        assert "NNODES: found '2:1', expected a number of machines, or MIN:MAX with MIN no larger" in refusal(
            script, NPROC="1", NNODES="2:1"
        )
    assert "NPROC: found '2', expected 1: prune runs on one process" in refusal(script, "prune", NPROC="2")
    words = shlex.split(launch(script, "--dry-run", "merge", "a", "b", "c", "--strategy", "fsdp2", NPROC="2").stdout)
    assert "merge" in words
    if script == "deepspeed":
        assert len(world(words)["machine0"]) == 2
    else:
        assert "2" in words
    assert "PYTHON: found '/no/such/python'" in launch(script, PYTHON="/no/such/python", check=False).stderr


def test_files_that_are_missing_or_wrong(tmp_path):
    assert "HOSTFILE: found no file '/no/hosts'" in refusal("deepspeed", HOSTFILE="/no/hosts")
    assert "ACCELERATE_CONFIG: found no file '/no/config'" in refusal("accelerate", NPROC="1", ACCELERATE_CONFIG="/no/config")
    hosts = tmp_path / "hosts"
    hosts.write_text("node0 slots=2\nnode1 gpus=2\n")
    assert "HOSTFILE: found 'node1 gpus=2'" in refusal("deepspeed", HOSTFILE=str(hosts))
    hosts.write_text("# none\n")
    assert "HOSTFILE: found no host" in refusal("deepspeed", HOSTFILE=str(hosts))
    hosts.write_text("localhost slots=1\nnode1 slots=1\n")
    assert "MASTER_ADDR: found nothing" in refusal("deepspeed", HOSTFILE=str(hosts))
    hosts.write_text("node0 slots=1\nnode1 slots=1\n")
    assert "expected pdsh or openmpi" in refusal("deepspeed", HOSTFILE=str(hosts), DS_LAUNCHER="carrier pigeon")
    assert "prune runs on one process" in refusal("deepspeed", "prune", HOSTFILE=str(hosts))


def test_a_hostfile_becomes_deepspeeds_command(tmp_path):
    hosts = tmp_path / "hosts"
    hosts.write_text("# two\nnode0 slots=2\n\nnode1 slots=4")
    for command in ("pdsh", "mpirun"):  # looked for, not run
        (tmp_path / command).write_text("")
        (tmp_path / command).chmod(0o755)
    own = {"HOSTFILE": str(hosts), "PATH": f"{tmp_path}:{os.environ['PATH']}", "NCCL_SOCKET_IFNAME": "eth1"}
    own |= {"HF_TOKEN": "secret", "DS_SSH_PORT": "2222", "OMP_NUM_THREADS": ""}
    assigned, words = dry("deepspeed", "--a", 'x $y "z"', "50%n", **own)
    assert words[1:3] == ["-m", "deepspeed.launcher.runner"]
    assert [option(words, f"--{name}") for name in ("hostfile", "launcher", "master_addr")] == [str(hosts), "pdsh", "node0"]
    assert option(words, "--ssh_port") == "2222"
    assert "NCCL_SOCKET_IFNAME=eth1" in words
    assert f"OMP_NUM_THREADS={assigned['OMP_NUM_THREADS']}" in words
    assert int(assigned["OMP_NUM_THREADS"]) == max(1, len(os.sched_getaffinity(0)) // 4)
    assert not any("secret" in word for word in words)
    assert words[-3:] == ["--a", 'x \\$y "z"', "50%%n"]  # quoted once more for the remote shell
    words = dry("deepspeed", "--a", 'x $y "z"', "50%n", **own, DS_LAUNCHER="openmpi")[1]
    assert words[-3:] == ["--a", 'x $y "z"', "50%n"]
    hosts.write_text("localhost slots=3\n")
    assert world(dry("deepspeed", HOSTFILE=str(hosts))[1]) == {"machine0": ["-1"] * 3}


def test_an_accelerate_config_decides_what_no_variable_says(tmp_path):
    file = tmp_path / "a.yaml"
    file.write_text("distributed_type: MULTI_GPU\nnum_processes: 2\n")
    _, words = dry("accelerate", ACCELERATE_CONFIG=str(file))
    assert words[1:5] == ["-m", "accelerate.commands.launch", "--config_file", str(file)]
    assert words[5] == "-m"
    assert option(dry("accelerate", ACCELERATE_CONFIG=str(file), NPROC="4")[1], "--num_processes") == "4"


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_lists_the_variables_that_the_script_reads(script):
    text = launch(script, "--help").stdout
    assert text.startswith("Start lora-dist under")
    assert all(name in text for name in ("NPROC", "MASTER_ADDR", "NNODES", "NODE_RANK", "OMP_NUM_THREADS", "--dry-run"))


@pytest.mark.skipif(shutil.which("make") is None, reason="no make")
@pytest.mark.parametrize(
    "target,missing",
    [("train", "CONFIG"), ("train-deepspeed", "CONFIG"), ("resume", "CONFIG"), ("eval", "MODEL"), ("merge", "BASE")],
)
def test_make_names_the_variable_that_is_missing(target, missing):
    done = subprocess.run(["make", target], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith(f"{missing}: found nothing, expected")


@pytest.mark.skipif(shutil.which("make") is None, reason="no make")
def test_make_hands_its_variables_on():
    def commands(*argv: str) -> str:
        return subprocess.run(["make", "-n", *argv], cwd=ROOT, capture_output=True, text=True, check=True).stdout

    text = commands("train-deepspeed", "CONFIG=c.yaml", "ZERO=3", "OFFLOAD=cpu", "NPROC=2", "ARGS=--train.seed 1")
    assert "NPROC='2' launch/deepspeed.sh train --config 'c.yaml' --parallel.strategy zero3" in text
    assert "--parallel.offload_optimizer cpu --parallel.offload_param cpu --train.seed 1" in text
    assert "offload_param" not in commands("train-deepspeed", "CONFIG=c.yaml", "ZERO=2", "OFFLOAD=cpu")
    assert "launch/torchrun.sh train --config 'c.yaml' --parallel.strategy fsdp2" in commands("train-fsdp", "CONFIG=c.yaml")
    assert "python -m lora_dist train --config 'c.yaml' --resume auto" in commands("resume", "CONFIG=c.yaml", "NPROC=1")
    assert "launch/torchrun.sh train --config 'c.yaml' --resume auto" in commands("resume", "CONFIG=c.yaml", "NPROC=2")
    assert "python -m lora_dist eval 'm' --adapter 'a'" in commands("eval", "MODEL=m", "ADAPTER=a")


@pytest.fixture(scope="module")
def launched(config: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Run folder of two processes under a launcher, run once; a configuration in the user's cache that accelerate could not read."""
    folder = tmp_path_factory.mktemp("launched runs")
    (folder / "accelerate").mkdir()
    (folder / "accelerate" / "default_config.yaml").write_text("distributed_type: FSDP\nno_such_key: 1\n")

    @functools.cache
    def run_under(script: str) -> Path:
        argv = ["--config", str(config), "--train.output_dir", str(folder / script)]
        launch(script, *argv, NPROC="2", HF_HOME=str(folder), cwd=folder)
        return folder / script

    return run_under


@pytest.mark.distributed
def test_torchrun_trains_what_one_process_does(one_process, launched):
    out = launched("torchrun")
    difference = largest_difference(one_process, out)
    print(f"two processes under torchrun: losses differ from one process's by {difference:.1e} relative at most")
    assert difference < 1e-5
    assert "Strategy zero3 on 2 processes" in (out / "train.log").read_text()


@pytest.mark.distributed
@pytest.mark.long
@pytest.mark.parametrize("script", ["deepspeed", "accelerate"])
def test_the_other_launchers_train_to_the_same_figures(script, launched):
    assert "Strategy zero3 on 2 processes" in (launched(script) / "train.log").read_text()
    assert_identical(launched("torchrun"), launched(script))


@pytest.mark.distributed
@pytest.mark.long
def test_two_agents_meet_at_one_address(one_process, config, tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    own = {"NPROC": "1", "NNODES": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    command = [
        script_file("torchrun"),
        "--config",
        str(config),
        "--train.output_dir",
        str(tmp_path / "out"),
        "--strategy",
        "fsdp2",
    ]
    run_together([(command, {**own, "NODE_RANK": rank}) for rank in "01"], tmp_path)
    assert largest_difference(one_process, tmp_path / "out") < 1e-5


@pytest.mark.distributed
@pytest.mark.long
def test_a_stopped_deepspeed_launch_leaves_no_process_behind(config, tmp_path):
    out = tmp_path / "out"
    command = [script_file("deepspeed"), "--config", str(config), "--train.output_dir", str(out), "--train.max_steps", "100000"]
    launcher = subprocess.Popen(command, env=variables(NPROC="2"), cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 120
        while not losses(out) and time.monotonic() < deadline:
            time.sleep(0.1)
        workers = descendants(launcher.pid)
        assert len(workers) >= 2
        launcher.send_signal(signal.SIGTERM)
        assert launcher.wait(60) != 0
        deadline = time.monotonic() + 10
        while any(map(runs, workers)) and time.monotonic() < deadline:
            time.sleep(0.1)
        assert not [pid for pid in workers if runs(pid)]
    finally:
        end(launcher)


def runs(pid: int) -> bool:
    """Whether a process is there and is not just waiting for its parent to take note of its end."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False
