"""`lora-dist doctor`: real processes, folders and servers, each made unfit on purpose, and the line and remedy that say so.

Checks of processes are in `test_doctor_processes.py`. About 10 seconds.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest
from packaging.version import Version

from lora_dist.arguments import DoctorArgs
from lora_dist.log import UserError
from lora_dist.operations.doctor import CHECKS, _guarded, run
from lora_dist.operations.doctor.context import Context, read_model
from lora_dist.operations.doctor.devices import judge as judge_gpus
from lora_dist.operations.doctor.disk import check_lock, check_publishing, mount_of
from lora_dist.operations.doctor.machine import core_limit, memory_limit
from lora_dist.operations.doctor.network import ask
from lora_dist.operations.doctor.peer import FILES, content
from lora_dist.operations.doctor.report import Printer, Status, ok, size_text, time_text
from lora_dist.operations.doctor.save_time import judge as judge_save
from lora_dist.operations.doctor.versions import KNOWN_BAD, Facts, nvidia_driver
from tests.runs import ROOT, environment


def examine(tmp_path: Path, env: dict[str, str] | None = None, **args: Any) -> tuple[int, list[dict[str, str]], str]:
    """Run the doctor in this process. Returns the exit code, the findings, and all that was shown."""
    shown: list[str] = []
    given = DoctorArgs(**{"output_dir": str(tmp_path), "json": True, **args})
    assert list(given.problems()) == []
    code = run(given, env or {}, Printer(shown.append, as_json=True))
    findings = [json.loads(line) for line in shown]
    for finding in findings[:-1]:
        assert finding["remedy"] or finding["status"] in ("OK", "SKIP"), finding
    assert code == (1 if any(f["status"] == "FAIL" for f in findings[:-1]) else 0)
    return code, findings[:-1], "".join(shown)


def only(findings: list[dict[str, str]], name: str) -> dict[str, str]:
    """The one finding of a name."""
    found = [finding for finding in findings if finding["name"] == name]
    assert len(found) == 1, findings
    return found[0]


def command(*argv: str, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "lora_dist", "doctor", *argv], capture_output=True, text=True, cwd=ROOT, env=environment(**env)
    )


# --- the command ---------------------------------------------------------------------------------------------------------------


def test_one_aligned_line_a_check_a_remedy_below_and_a_summary(tmp_path):
    done = command("--only", "environment,space", "--output_dir", str(tmp_path / "run"), WORLD_SIZE="2")
    assert done.returncode == 1 and done.stderr == ""
    lines = done.stdout.splitlines()
    assert lines[0].startswith("FAIL  launcher         WORLD_SIZE=2, but no RANK LOCAL_RANK")
    assert lines[1] == "      -> unset WORLD_SIZE"
    space = next(line for line in lines if " space " in line)
    assert space[:23] == f"{space[:5].strip():<5} {'space':<16} " and "free of" in space
    assert lines[-2] == "" and lines[-1].startswith("not ready: ") and "1 failed" in lines[-1]
    assert not (tmp_path / "run").exists() and list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("argv", "complaint"),
    [
        (["--processes", "0"], "processes: found 0, expected 1 or more"),
        (["--only", "nosuch"], "only: found ['nosuch'], expected a list of one of versions,"),
        (["--backend", "nccl", "--device", "cpu"], "backend: found nccl with device cpu"),
        (["--output_dir", "README.md"], "output_dir: found a file, README.md"),
        (["--grase_s", "3"], "did you mean grace_s?"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(argv, complaint):
    done = command(*argv)
    assert done.returncode == 2 and done.stdout == "" and complaint in done.stderr and len(done.stderr.splitlines()) == 1


def test_under_a_launcher_it_is_refused():
    done = command(RANK="0", LOCAL_RANK="0", WORLD_SIZE="4")
    assert done.returncode == 2 and "found a launcher of 4 processes" in done.stderr


def test_every_name_of_only_is_a_check():
    names = get_args(get_args(get_type_hints(DoctorArgs)["only"])[0])
    assert sorted(names) == sorted(name for group, _ in CHECKS for name in group)


def test_a_check_that_crashes_is_a_failure_with_the_exceptions_line(tmp_path):
    def crashing(context):
        yield ok("first", "fine")
        raise ZeroDivisionError("by\nzero")

    def users(context):
        raise UserError("key: found x, expected y")
        yield

    context = Context(DoctorArgs(), {}, tmp_path)
    first, second = _guarded("disk", crashing, context)
    assert first.status is Status.OK
    assert second.status is Status.FAIL and "ZeroDivisionError: by zero" in second.found and second.remedy
    (only_one,) = _guarded("gpus", users, context)
    assert only_one.status is Status.FAIL and only_one.found == "key: found x, expected y"


def test_texts():
    assert [size_text(x) for x in (0, 999, 1500, 240e6, 5e12)] == ["0 B", "999 B", "1.5 kB", "240 MB", "5 TB"]
    assert [time_text(x) for x in (3.5e-5, 0.0123, 3.21, 600, 7800)] == ["35 us", "12.3 ms", "3.21 s", "10 min", "2 h 10 min"]


# --- versions ------------------------------------------------------------------------------------------------------------------


def test_versions_that_do_not_fit_are_named_with_the_command_that_mends_them(tmp_path):
    for name, version, requires in (
        ("peft", "0.22.0", ""),
        ("torch", "2.5.1", ""),
        ("tokenizers", "0.99", ""),
        ("wandb", "0.1", ""),
    ):
        folder = tmp_path / f"{name}-{version}.dist-info"
        folder.mkdir()
        (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n{requires}")
    done = command("--only", "versions", "--json", PYTHONPATH=str(tmp_path))
    findings = [json.loads(line) for line in done.stdout.splitlines()][:-1]
    assert done.returncode == 1
    peft = only(findings, "peft")
    assert (
        peft["status"] == "FAIL"
        and peft["found"] == "found 0.22.0, expected ~=0.21.0"
        and "pip install 'peft~=0.21.0'" in peft["remedy"]
    )
    assert [f["status"] for f in findings if f["name"] == "torch"] == ["OK", "FAIL"]
    assert "no torch.distributed.fsdp.fully_shard" in only(findings, "torch, fsdp2")["found"]
    assert only(findings, "wandb")["status"] == "WARN"  # an extra
    transformers = only(findings, "transformers")
    assert (
        transformers["status"] == "WARN"
        and "asks for tokenizers" in transformers["found"]
        and "found 0.99" in transformers["found"]
    )
    assert not any(f["name"] == "combinations" for f in findings)


def test_what_is_installed_here_fits(tmp_path):
    code, findings, _ = examine(tmp_path, only=["versions"])
    assert code == 0 and only(findings, "combinations")["status"] == "OK"
    import torch

    assert only(findings, "torch")["found"].startswith(torch.__version__)


@pytest.mark.parametrize(
    ("facts", "expected"),
    [
        (Facts(Version("2.13+cpu"), None, 570, "auto"), ["GPU, CPU torch"]),
        (Facts(Version("2.13+cpu"), None, 570, "cpu"), []),
        (Facts(Version("2.13"), "13.0", 570, "auto"), ["driver, CUDA"]),
        (Facts(Version("2.13"), "13.0", 580, "auto"), []),
        (Facts(Version("2.13"), "12.8", 570, "auto"), []),
        (Facts(Version("2.13"), "12.8", 470, "auto"), ["driver, CUDA"]),
        (Facts(Version("2.13+cpu"), None, None, "auto"), []),
    ],
)
def test_known_bad_combinations(facts, expected):
    found = [combination for combination in KNOWN_BAD if combination.applies(facts)]
    assert [combination.name for combination in found] == expected
    assert all(str(facts.driver) in combination.why(facts) and combination.remedy for combination in found)


def test_the_driver_is_read_from_its_own_file(tmp_path):
    file = tmp_path / "version"
    assert nvidia_driver(file) is None
    file.write_text(
        "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  570.133.20  Release Build  (root@host)  Sun Mar 2\nGCC 12\n"
    )
    assert nvidia_driver(file) == 570
    file.write_text("NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.54.03  Tue Jun  6 22:20:39 UTC 2023\n")
    assert nvidia_driver(file) == 535


# --- environment, machine, GPUs ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("env", "name", "status", "words"),
    [
        ({"RANK": "1"}, "launcher", "FAIL", "but no WORLD_SIZE LOCAL_RANK"),
        ({"WORLD_SIZE": "two"}, "launcher", "FAIL", "WORLD_SIZE is not a number"),
        ({"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "1"}, "launcher", "FAIL", "do not fit"),
        ({"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}, "launcher", "OK", "RANK=0"),
        ({"CUDA_VISIBLE_DEVICES": ""}, "GPUs hidden", "WARN", "CUDA_VISIBLE_DEVICES is ''"),
        ({"GLOO_SOCKET_IFNAME": "nosuch0"}, "interface", "FAIL", "this machine has "),
        ({"GLOO_SOCKET_IFNAME": "l"}, "interface", "FAIL", "this machine has "),
        ({"NCCL_SOCKET_IFNAME": "l"}, "interface", "OK", "is there"),
        ({"SLURM_JOB_ID": "7", "SLURM_JOB_END_TIME": "+8000"}, "slurm", "OK", "job 7, ends in 2 h 13 min"),
        ({"SLURM_JOB_ID": "7", "SLURM_JOB_END_TIME": "+60"}, "slurm", "WARN", "ends in "),
        ({"SLURM_JOB_ID": "7", "SLURM_JOB_END_TIME": "1000000000"}, "slurm", "WARN", "was to end "),
        ({"SLURM_JOB_ID": "7"}, "slurm", "OK", "its end is not known"),
    ],
)
def test_variables(tmp_path, env, name, status, words):
    end = env.get("SLURM_JOB_END_TIME", "")
    if end.startswith("+"):  # seconds from now
        env = {**env, "SLURM_JOB_END_TIME": str(int(time.time()) + int(end))}
    _, findings, _ = examine(tmp_path, env, only=["environment"])
    finding = only(findings, name)
    assert finding["status"] == status and words in finding["found"]


def test_a_proxys_password_is_not_shown(tmp_path):
    _, findings, shown = examine(tmp_path, {"https_proxy": "http://me:hunter2@proxy.example:3128"}, only=["environment"])
    assert only(findings, "proxies")["found"] == "https_proxy proxy.example:3128" and "hunter2" not in shown


def test_limits_of_a_control_group_of_either_version(tmp_path):
    assert memory_limit(tmp_path) is None and core_limit(tmp_path) is None
    (tmp_path / "memory.max").write_text("max\n")
    (tmp_path / "cpu.max").write_text("max 100000\n")
    assert memory_limit(tmp_path) is None and core_limit(tmp_path) is None
    (tmp_path / "memory.max").write_text("8000\n")
    (tmp_path / "memory.current").write_text("3000\n")
    (tmp_path / "cpu.max").write_text("150000 100000\n")
    assert memory_limit(tmp_path) == (8000, 3000) and core_limit(tmp_path) == 1.5
    old = tmp_path / "v1"
    for name, value in (("memory/memory.limit_in_bytes", 9), ("memory/memory.usage_in_bytes", 4)):
        (old / name).parent.mkdir(parents=True, exist_ok=True)
        (old / name).write_text(f"{value}\n")
    assert memory_limit(old) == (9, 4)


def test_too_many_threads_and_too_few_files(tmp_path):
    limited = (
        f"ulimit -n 512; exec {sys.executable} -m lora_dist doctor --only machine --processes 2 --json --output_dir {tmp_path}"
    )
    done = subprocess.run(
        ["bash", "-c", limited], capture_output=True, text=True, cwd=ROOT, env=environment(OMP_NUM_THREADS="512")
    )
    findings = [json.loads(line) for line in done.stdout.splitlines()][:-1]
    assert done.returncode == 0, done.stderr
    files, cores = only(findings, "open files"), only(findings, "cores")
    assert files["status"] == "WARN" and "512 at most" in files["found"] and "ulimit -n 512" in files["remedy"]
    assert (
        cores["status"] == "WARN" and "OMP_NUM_THREADS 512 x 2" in cores["found"] and "export OMP_NUM_THREADS=" in cores["remedy"]
    )


def _gpu(**other: Any) -> dict[str, Any]:
    facts = {"name": "NVIDIA H100", "free": 79e9, "total": 80e9, "capability": "9.0", "bf16": True, "error": ""}
    return {**facts, **other}


def test_gpus_are_judged_by_what_torch_says_of_them():
    good, busy, old, broken = (
        _gpu(),
        _gpu(free=10e9),
        _gpu(bf16=False, capability="7.5"),
        _gpu(error="CUDA error: no kernel image"),
    )
    answer = {"gpus": [good, busy, old, broken], "peer_pairs": 12, "warnings": ["The NVIDIA driver on your system is too old"]}
    findings = list(judge_gpus(answer, "auto"))
    assert [f"{f.status} {f.name}" for f in findings] == [
        "WARN gpus", "OK gpu 0", "WARN gpu 1", "WARN gpu 2", "FAIL gpu 3", "OK gpu peer access",
    ]  # fmt: skip
    assert findings[1].found == "NVIDIA H100, 79 GB free of 80 GB, compute capability 9.0, bf16 yes"
    assert (
        "70 GB is taken" in findings[2].found and "--train.fp16" in findings[3].remedy and "no kernel image" in findings[4].found
    )


def test_gpus_that_were_asked_for_and_are_not_there(tmp_path):
    """The probe runs for real, in a process of its own."""
    import torch

    if torch.cuda.is_available():
        pytest.skip("this machine has GPUs")
    code, findings, _ = examine(tmp_path, device="cuda", only=["gpus"])
    assert code == 1 and findings[-1]["status"] == "FAIL" and "torch sees none" in findings[-1]["found"]
    code, findings, _ = examine(tmp_path, only=["gpus"])
    assert code == 0 and findings[-1]["status"] == "SKIP" and findings[-1]["found"].startswith("CPU only")


# --- disk ----------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=2m,nr_inodes=600", "tmpfs", str(folder)], capture_output=True, text=True
    )
    if mounted.returncode != 0:
        pytest.skip(f"cannot mount a tmpfs here: {mounted.stderr.strip()}")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_good_disk(tmp_path):
    code, findings, _ = examine(tmp_path, only=["disk", "space", "save_time"])
    assert code == 0
    assert "100 folders and 100 files published" in only(findings, "rename")["found"]
    assert only(findings, "lock")["status"] == "OK" and only(findings, "flush")["status"] == "OK"
    assert "for 240 MB" in only(findings, "time to save")["found"]
    assert list(tmp_path.iterdir()) == []  # nothing stays


def test_a_small_disk_in_memory(small_disk):
    code, findings, _ = examine(small_disk, only=["disk", "space", "save_time"])
    assert code == 1
    kind = only(findings, "file system")
    assert kind["status"] == "WARN" and "tmpfs, which is memory" in kind["found"]
    assert only(findings, "write")["found"].endswith("cannot be written (No space left on device)")
    assert only(findings, "space")["status"] == "WARN" and only(findings, "inodes")["status"] == "WARN"
    assert only(findings, "time to save")["status"] == "FAIL" and "no room for 240 MB" in only(findings, "time to save")["found"]
    assert list(small_disk.iterdir()) == []


def test_a_read_only_disk(small_disk):
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    code, findings, _ = examine(small_disk / "runs" / "a", only=["disk"])
    assert code == 1
    write = only(findings, "write")
    assert write["status"] == "FAIL" and "Read-only file system" in write["found"] and "--output_dir" in write["remedy"]
    assert "is not there yet" in only(findings, "file system")["found"]


def test_folders_that_appear_before_their_files_are_seen(tmp_path):
    def file_by_file(staging: Path, final: Path, number: int) -> None:
        final.mkdir()
        for name in FILES:
            time.sleep(0.002)
            (final / name).write_text(content(number))

    finding = check_publishing(tmp_path, publish=file_by_file)
    assert (
        finding.status is Status.FAIL
        and finding.found.startswith("not atomic: published-")
        and "without its file" in finding.found
    )


def test_a_file_that_is_written_in_place_is_seen(tmp_path):
    def in_place(temporary: Path, final: Path, number: int) -> None:
        with final.open("w") as handle:
            handle.write(content(number)[:7000])
            handle.flush()
            time.sleep(0.002)
            handle.write(content(number)[7000:])

    finding = check_publishing(tmp_path, replace=in_place)
    assert finding.status is Status.FAIL and finding.found.startswith("not atomic: status was there with ")


def test_a_lock_that_a_second_process_gets_as_well_is_seen(tmp_path):
    """As where each machine has locks of its own: the file that this process locks is not the one that the other finds."""
    assert check_lock(tmp_path).status is Status.OK

    class Vanishing(type(tmp_path)):  # type: ignore[misc]
        def __truediv__(self, name: str) -> Path:
            return Unlinked(super().__truediv__(name))

    class Unlinked(type(tmp_path)):  # type: ignore[misc]
        def open(self, *args: Any, **kwargs: Any) -> Any:
            handle = super().open(*args, **kwargs)
            self.unlink()
            return handle

    finding = check_lock(Vanishing(tmp_path))
    assert finding.status is Status.FAIL and "a second process got a lock that is held" in finding.found


MOUNTS = """\
/dev/vda / ext4 rw 0 0
server:/home /home nfs4 rw,local_lock=none 0 0
lustre@tcp:/scratch /home/scratch\\040a lustre rw,noflock 0 0
tmpfs /home/scratch\\040a/b tmpfs rw 0 0
/dev/vdb /home/scratch\\040a/b xfs rw 0 0
"""


@pytest.mark.parametrize(
    ("folder", "kind"),
    [("/var", "ext4"), ("/home/me", "nfs4"), ("/homes", "ext4"), ("/home/scratch a", "lustre"), ("/home/scratch a/b/c", "xfs")],
)
def test_the_mount_of_a_folder(folder, kind):
    mount = mount_of(Path(folder), MOUNTS)
    assert mount is not None and mount.kind == kind


@pytest.mark.parametrize(("time_s", "status"), [(10, Status.OK), (20, Status.WARN), (40, Status.FAIL)])
def test_time_to_save_against_the_grace_period(time_s, status):
    finding = judge_save(time_s, 240_000_000, "r 8", 30.0)
    assert finding.status is status and "grace 30 s" in finding.found
    assert status is Status.OK or all(word in finding.remedy for word in ("KillWait", "--signal", "--r", "local disk"))


def test_a_disk_slower_than_the_grace_period_is_given_up_on(tmp_path):
    """240 MB in a millisecond is more than any disk does."""
    code, findings, _ = examine(tmp_path, only=["save_time"], grace_s=1e-3)
    finding = only(findings, "time to save")
    assert code == 1 and finding["status"] == "FAIL" and "240 MB" in finding["found"]
    assert list(tmp_path.iterdir()) == []


# --- network, model ------------------------------------------------------------------------------------------------------------


@contextmanager
def server(status: int = 200, delay_s: float = 0.0, clock_off_s: float = 0.0) -> Iterator[str]:
    """A real HTTP server on this machine; yields its address."""

    class Handler(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            time.sleep(delay_s)
            self.send_response_only(status)
            self.send_header("Date", formatdate(time.time() - clock_off_s, usegmt=True))
            self.end_headers()

        def log_message(self, *args: Any) -> None:
            """Nothing on the test's console."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as http:
        thread = threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield f"http://127.0.0.1:{http.server_address[1]}"
        finally:
            http.shutdown()
            thread.join()


def test_a_hub_that_answers_and_a_token_that_is_not_shown(tmp_path):
    with server() as url:
        _, findings, shown = examine(
            tmp_path, {"HF_ENDPOINT": url, "HF_TOKEN": "hf_secret", "HF_HOME": str(tmp_path)}, only=["hub"]
        )
        assert (
            only(findings, "hub")["status"] == "OK"
            and "token in HF_TOKEN" in only(findings, "hub")["found"]
            and "hf_secret" not in shown
        )
        assert url.removeprefix("http://") in only(findings, "hub")["found"]
        (tmp_path / "token").write_text("hf_secret")
        _, findings, shown = examine(tmp_path, {"HF_ENDPOINT": url + "/", "HF_HOME": str(tmp_path)}, only=["hub"])
        assert "token in its file" in only(findings, "hub")["found"] and "hf_secret" not in shown
    with server(status=401) as url:  # an answer too
        _, findings, _ = examine(tmp_path, {"HF_ENDPOINT": url, "HF_HOME": str(tmp_path / "none")}, only=["hub"])
        assert only(findings, "hub")["status"] == "OK" and "no token" in only(findings, "hub")["found"]


def test_a_hub_that_is_down_away_or_off_limits(tmp_path):
    with server(status=503) as url:
        _, findings, _ = examine(tmp_path, {"HF_ENDPOINT": url}, only=["hub"])
        assert only(findings, "hub")["status"] == "WARN" and "(status 503)" in only(findings, "hub")["found"]
    code, findings, _ = examine(tmp_path, {"HF_ENDPOINT": url}, only=["hub"])  # gone by now
    gone = only(findings, "hub")
    assert (
        code == 0 and gone["status"] == "WARN" and "Connection refused" in gone["found"] and "HF_HUB_OFFLINE=1" in gone["remedy"]
    )
    for env, offline in (({"HF_HUB_OFFLINE": "1", "HF_ENDPOINT": url}, False), ({"HF_ENDPOINT": url}, True)):
        _, findings, _ = examine(tmp_path, env, only=["hub"], offline=offline)
        assert only(findings, "hub")["status"] == "SKIP"


def test_a_slow_server_is_given_up_on():
    with server(delay_s=0.6) as url:
        start = time.monotonic()
        answer = ask(url, timeout_s=0.2)
        assert answer.problem == "no answer within 0.2 s" or "timed out" in answer.problem
        assert time.monotonic() - start < 0.5
        assert ask(url, timeout_s=5.0).problem == ""


def test_a_wrong_clock_is_told(tmp_path):
    with server(clock_off_s=-600) as url:
        _, findings, _ = examine(tmp_path, {"HF_ENDPOINT": url}, only=["hub"])
        assert only(findings, "clock")["status"] == "WARN" and "10 min behind 127.0.0.1" in only(findings, "clock")["found"]


def test_the_tracker(tmp_path):
    nothing = {"NETRC": str(tmp_path / "netrc")}
    with server() as url:
        _, findings, shown = examine(
            tmp_path, {**nothing, "WANDB_BASE_URL": url, "WANDB_API_KEY": "0123secret"}, only=["tracker"]
        )
        assert only(findings, "tracker")["status"] == "OK" and "0123secret" not in shown
        _, findings, _ = examine(tmp_path, {**nothing, "WANDB_BASE_URL": url}, only=["tracker"])
        found = only(findings, "tracker")
        assert found["status"] == "WARN" and "not logged in" in found["found"] and found["remedy"].startswith("wandb login")
        (tmp_path / "netrc").write_text("machine 127.0.0.1 login user password 0123secret\n")
        (tmp_path / "netrc").chmod(0o600)
        _, findings, shown = examine(tmp_path, {**nothing, "WANDB_BASE_URL": url}, only=["tracker"])
        assert only(findings, "tracker")["status"] == "OK" and "key in netrc" in shown and "0123secret" not in shown
    _, findings, _ = examine(tmp_path, {**nothing, "WANDB_BASE_URL": url}, only=["tracker"])
    gone = only(findings, "tracker")
    assert gone["status"] == "WARN" and "Connection refused" in gone["found"] and "--tracker.wandb_mode offline" in gone["remedy"]
    _, findings, _ = examine(tmp_path, {"WANDB_MODE": "offline", "WANDB_BASE_URL": url}, only=["tracker"])
    assert only(findings, "tracker")["status"] == "OK"


def test_a_models_figures_are_those_of_its_adapter(tiny_base, tmp_path):
    from lora_dist.adapter import attach_adapter
    from tests.tiny import tiny_model

    model = attach_adapter(tiny_model(), None, r=4, lora_alpha=8)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    facts = read_model(str(tiny_base), 4)
    assert facts.adapter_elements == trained and facts.stored_bytes == os.path.getsize(tiny_base / "model.safetensors")
    code, findings, _ = examine(tmp_path, model=str(tiny_base), r=4, only=["model", "space", "save_time"])
    assert (
        code == 0 and f"r 4: {trained:,} trained, a checkpoint has {size_text(12 * trained)}" in only(findings, "model")["found"]
    )
    assert f"4 checkpoints of {size_text(12 * trained)}" in only(findings, "space")["found"]
    assert f"for {size_text(12 * trained)}" in only(findings, "time to save")["found"]


def test_a_model_that_cannot_be_read(tiny_base, tmp_path):
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "config.json").write_text("{}")
    code, findings, _ = examine(tmp_path, model=str(broken), only=["model"])
    assert (
        code == 1
        and only(findings, "model")["status"] == "FAIL"
        and "found no configuration in" in only(findings, "model")["found"]
    )
    (broken / "config.json").write_bytes((tiny_base / "config.json").read_bytes())
    code, findings, _ = examine(tmp_path, model=str(broken), only=["model"])
    assert code == 1 and "found no weights" in only(findings, "model")["found"]
    for name in ("/nope", "./nope", "~/nope", "no/such/folder"):  # none of them can be a name on the hub
        for offline in (False, True):
            code, findings, _ = examine(tmp_path, model=name, offline=offline, only=["model", "save_time"])
            found = only(findings, "model")
            assert code == 1 and f"found no directory {name}" in found["found"] and "directory of a model" in found["remedy"]


@pytest.mark.long
def test_offline_a_hub_name_has_to_be_in_the_cache(tiny_base, tmp_path):
    argv = ("--only", "model", "--model", "some/name", "--offline", "--output_dir", str(tmp_path))
    done = command(*argv, HF_HOME=str(tmp_path / "hub"))
    assert done.returncode == 1 and "FAIL  model" in done.stdout and "hf download" in done.stdout
    assert "found neither a directory some/name nor a model of that name in the hub's cache" in done.stdout
    cached = tmp_path / "hub" / "hub" / "models--some--name"
    snapshot = cached / "snapshots" / ("0" * 40)
    snapshot.parent.mkdir(parents=True)
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text("0" * 40)
    shutil.copytree(tiny_base, snapshot)
    done = command(*argv, HF_HOME=str(tmp_path / "hub"))
    assert (
        done.returncode == 0
        and "OK    model" in done.stdout
        and f"parameters in {size_text(os.path.getsize(tiny_base / 'model.safetensors'))}" in done.stdout
    )
    (snapshot / "model.safetensors").unlink()
    done = command(*argv, HF_HOME=str(tmp_path / "hub"))
    assert done.returncode == 1 and "found no weights" in done.stdout
