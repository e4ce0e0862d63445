"""What Slurm tells a process: its place among the tasks that one `srun` started, the job's ids, and when the job ends.

torchrun, accelerate and deepspeed set RANK and its companions; `srun` sets names of its own. `adopt_step` translates them, so that
everything that reads the launchers' names (torch, DeepSpeed, this package) works under plain `srun` as well. Called by `__main__` before
anything else; the ids and the end time by `engine/`.
"""

from __future__ import annotations

import os
import re
import socket
from collections.abc import Mapping, MutableMapping

from lora_dist.log import UserError

_FIRST_PORT, _PORTS = 15000, 15000  # below the range that systems hand out by themselves (32768 up)
_IDS = (
    "SLURM_JOB_ID",
    "SLURM_ARRAY_JOB_ID",
    "SLURM_ARRAY_TASK_ID",
    "SLURM_RESTART_COUNT",
    "SLURM_STEP_ID",
    "SLURM_JOB_PARTITION",
)


def adopt_step(environ: MutableMapping[str, str] = os.environ) -> bool:
    """Set RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE, MASTER_ADDR and MASTER_PORT from what srun has set; whether it did.

    Nothing is done where a launcher has set RANK (torchrun inside srun), and where this is no task of a step of several: a batch script
    and the shell of `salloc` carry the job's SLURM_PROCID and SLURM_NTASKS too, but are one process.

    Raises:
        UserError: the first host has no address that this machine knows.
    """
    if "RANK" in environ or "SLURM_PROCID" not in environ or not environ.get("SLURM_STEP_ID", "").isdigit():
        return False
    tasks = int(environ.get("SLURM_STEP_NUM_TASKS") or environ.get("SLURM_NTASKS") or 1)
    if tasks == 1:
        return False
    environ.update(
        RANK=environ["SLURM_PROCID"],
        WORLD_SIZE=str(tasks),
        LOCAL_RANK=environ.get("SLURM_LOCALID", "0"),
        LOCAL_WORLD_SIZE=str(tasks_here(environ, tasks)),
    )
    environ.setdefault("MASTER_PORT", str(port(environ)))
    if "MASTER_ADDR" not in environ:
        environ["MASTER_ADDR"] = _master(environ)
    interface = _interface_to(environ["MASTER_ADDR"])
    if interface is not None:
        environ.setdefault("GLOO_SOCKET_IFNAME", interface)
    return True


def tasks_here(environ: Mapping[str, str], tasks: int) -> int:
    """Tasks of the step on this node: this node's number in a list such as `4(x2),3`."""
    text = environ.get("SLURM_STEP_TASKS_PER_NODE", "")
    counts: list[int] = []
    for count, _, repeat in re.findall(r"(\d+)(\(x(\d+)\))?", text):
        counts += [int(count)] * int(repeat or 1)
    node = int(environ.get("SLURM_NODEID", "0"))
    if node < len(counts):
        return counts[node]
    return int(environ.get("SLURM_NTASKS_PER_NODE") or tasks)


def first_host(nodelist: str) -> str:
    """First name of Slurm's short form of a list: `gpu[07-09,12],login` is gpu07 first. "" for none."""
    first = re.match(r"(?:[^,\[]|\[[^\]]*\])*", nodelist.strip())
    return re.sub(r"\[(\w+)[^\]]*\]", r"\1", first.group() if first else "")


def port(environ: Mapping[str, str]) -> int:
    """A port that follows from job and step, so that all tasks know it, and jobs that share a node differ."""
    job, step = int(environ.get("SLURM_JOB_ID", "0")), int(environ.get("SLURM_STEP_ID", "0"))
    return _FIRST_PORT + (7 * job + step) % _PORTS


def job_ids(environ: Mapping[str, str] | None = None) -> dict[str, str]:
    """Ids of the Slurm job that this process runs in, by Slurm's names; empty outside of one."""
    environ = (
        os.environ if environ is None else environ
    )  # looked up now: `datasets` puts another object there when it starts processes
    return {name: environ[name] for name in _IDS if name in environ} if "SLURM_JOB_ID" in environ else {}


def job_end_time_s(environ: Mapping[str, str] | None = None) -> float | None:
    """When Slurm ends the job, seconds since the epoch; None outside of a job, or where it has no limit or does not say.

    Slurm sets SLURM_JOB_END_TIME from version 23.02; `launch/slurm.sbatch` sets it under older ones.
    """
    environ = os.environ if environ is None else environ
    text = environ.get("SLURM_JOB_END_TIME", "") if "SLURM_JOB_ID" in environ else ""
    return float(text) if text.isdigit() and int(text) > 0 else None


def _master(environ: Mapping[str, str]) -> str:
    variable = next((name for name in ("SLURM_STEP_NODELIST", "SLURM_JOB_NODELIST", "SLURM_NODELIST") if environ.get(name)), "")
    host = first_host(environ.get(variable, ""))
    try:
        socket.getaddrinfo(host or None, 1)
    except OSError as error:
        raise UserError(
            f"MASTER_ADDR: found nothing, and {variable or 'SLURM_STEP_NODELIST'} begins with '{host}', which has no address here "
            f"({error}); set it to the first node's name or address"
        ) from error
    return host


def _interface_to(master: str) -> str | None:
    """Name of the interface that leads to the first node, or of the one that has its address; None where it cannot be told.

    gloo takes what the machine's own name resolves to, which on many is the loopback.
    """
    import psutil  # comes with accelerate

    try:
        family, _, _, _, address = socket.getaddrinfo(master, 1, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.connect(address)  # asks the routing table and sends nothing
            own = probe.getsockname()[0]
    except OSError:
        return None
    if own.startswith("127.") and not (master.startswith("127.") or master == "localhost"):
        return None  # the first node itself, whose own name resolves to its loopback
    return next((name for name, rows in psutil.net_if_addrs().items() if any(row.address == own for row in rows)), None)
