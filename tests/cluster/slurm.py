"""A real Slurm of two nodes on this machine: munged, slurmctld and two slurmd of its own, in one folder, on free ports.

Nodes are lost as machines are: slurmd, its step daemons and their tasks killed at once. Nothing outlives `stop`, and no daemon that
the system itself runs is touched.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from lora_dist.process import end_with_parent
from tests.runs import ROOT, descendants, environment

DAEMONS = ("munged", "slurmctld", "slurmd")
_SBIN = f"{os.environ.get('PATH', '')}:/usr/sbin:/usr/local/sbin:/sbin"

# In the order of the lines: requeued jobs wait cred_expire + 1 s (5 is the least that Slurm takes; default 120); nodes that do not answer are
# down after SlurmdTimeout; what is preempted gets GraceTime.
CONFIGURATION = """\
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
AuthType=auth/munge
AuthInfo=socket={folder}/munge/socket,cred_expire=5
SlurmUser=root
SlurmctldPort={ports[0]}
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool/%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SchedulerType=sched/backfill
SchedulerParameters=bf_interval=2,sched_interval=2
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
JobAcctGatherType=jobacct_gather/none
ReturnToService=2
MpiDefault=none
JobRequeue=1
SlurmctldDebug=debug2
SlurmdTimeout=10
KillWait=30
NodeName=n1 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]} CPUs=1 RealMemory=1000 State=UNKNOWN
NodeName=n2 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[2]} CPUs=1 RealMemory=1000 State=UNKNOWN
PartitionName=main Nodes=n1,n2 Default=YES MaxTime=INFINITE State=UP GraceTime=30
PartitionName=high Nodes=n1,n2 MaxTime=INFINITE State=UP PriorityTier=10
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
"""


def missing() -> str | None:
    """Why no cluster can be started here."""
    if os.geteuid() != 0:
        return "a Slurm cluster needs root"
    absent = [name for name in (*DAEMONS, "sbatch") if shutil.which(name, path=_SBIN) is None]
    return f"no {', '.join(absent)} (Debian: apt-get install slurm-wlm munge; `make test-cluster` does it)" if absent else None


class Cluster:
    """Started by `start`, ended by `stop`, which also ends what its nodes still run."""

    def __init__(self, folder: Path):
        self.folder = folder
        self._daemons: dict[str, subprocess.Popen[bytes]] = {}

    def start(self) -> None:
        for name in ("munge", "state", "log", "spool/n1", "spool/n2"):
            (self.folder / name).mkdir(parents=True)
        host = socket.gethostname().partition(".")[0]
        text = CONFIGURATION.format(host=host, folder=self.folder, ports=_free_ports(3))
        (self.folder / "slurm.conf").write_text(text)
        munge = self.folder / "munge"
        (munge / "key").write_bytes(os.urandom(128))
        (munge / "key").chmod(0o600)
        files = [f"--{kind}-file={munge / kind}" for kind in ("key", "pid", "log", "seed")]
        self._launch("munged", "--foreground", "--force", f"--socket={munge / 'socket'}", *files)
        wait_for(lambda: (munge / "socket").exists(), "munged")
        self._launch("slurmctld", "-D")
        for node in ("n1", "n2"):
            self.return_node(node)
        self.wait_idle()

    def wait_idle(self) -> None:
        """Until both nodes are there and free: a job may otherwise start on one, where it can."""
        wait_for(lambda: self.node_states() == {"n1": "idle", "n2": "idle"}, "two idle nodes")

    def stop(self) -> None:
        with contextlib.suppress(AssertionError, subprocess.TimeoutExpired):
            self.run("scancel", "--user=root", check=False)
            wait_for(lambda: not self.run("squeue", "--noheader", check=False), "an empty queue", timeout_s=10)
        for node in ("n1", "n2"):
            self.lose_node(node)
        for name in ("slurmctld", "munged"):
            process = self._daemons.pop(name, None)
            if process is not None:
                process.terminate()
                try:
                    process.wait(timeout=10)
                except subprocess.TimeoutExpired:
                    process.kill()
                    process.wait()

    def run(self, *argv: str, check: bool = True, **variables: str) -> str:
        """A command of Slurm's; its output."""
        env = environment(SLURM_CONF=str(self.folder / "slurm.conf"), PYTHON=sys.executable, CUDA_VISIBLE_DEVICES="", **variables)
        done = subprocess.run(argv, capture_output=True, text=True, env=env, cwd=ROOT, timeout=60)
        if check and done.returncode != 0:
            raise AssertionError(f"{argv}: exit {done.returncode}\n{done.stdout}\n{done.stderr}")
        return done.stdout.strip()

    def job(self, job: str) -> dict[str, str]:
        """A job's fields, as `scontrol show job` has them."""
        return dict(re.findall(r"(\S+?)=(\S*)", self.run("scontrol", "show", "job", "--oneliner", job)))

    def state(self, job: str) -> str:
        return self.job(job)["JobState"]

    def node_states(self) -> dict[str, str]:
        lines = self.run("sinfo", "--noheader", "--Node", "--partition=main", "--format=%N %t", check=False).splitlines()
        return {line.split()[0]: line.split()[1] for line in lines}

    def wait_for_limits_check(self) -> None:
        """Until the controller has looked for jobs near their limits, which it does every 30 s."""
        log, words = self.folder / "log" / "slurmctld.log", "Testing job time limits"
        seen = log.read_text().count(words)
        wait_for(lambda: log.read_text().count(words) > seen, "the controller's look at time limits", timeout_s=60)

    def lose_node(self, node: str) -> None:
        """Kill the node's daemon and everything that it has started, at once."""
        process = self._daemons.pop(node, None)
        pids = [process.pid] if process is not None else []
        for step in self._step_daemons(node):
            pids += [step, *descendants(step)]
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, 9)
        if process is not None:
            process.wait()

    def return_node(self, node: str) -> None:
        self._launch("slurmd", "-D", "-N", node, name=node)

    def _launch(self, program: str, *options: str, name: str | None = None) -> None:
        name = name or program
        path = shutil.which(program, path=_SBIN)
        assert path is not None
        env = {**os.environ, "SLURM_CONF": str(self.folder / "slurm.conf")}
        with (self.folder / "log" / f"{name}.log").open("ab") as log:
            self._daemons[name] = subprocess.Popen(
                [path, *options], stdout=log, stderr=log, env=env, start_new_session=True, preexec_fn=end_with_parent
            )

    def _step_daemons(self, node: str) -> list[int]:
        """Ids of the node's slurmstepd processes: those that hold a socket in its spool folder."""
        spool = str(self.folder / "spool" / node)
        inodes = {
            f"socket:[{line.split()[6]}]" for line in Path("/proc/net/unix").read_text().splitlines() if f" {spool}/" in line
        }
        found = []
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit():
                with contextlib.suppress(OSError):
                    if any(os.readlink(fd) in inodes for fd in (entry / "fd").iterdir()):
                        found.append(int(entry.name))
        return found


def wait_for(condition: Callable[[], bool], what: str, timeout_s: float = 180, every_s: float = 0.2) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"waited {timeout_s} s for {what}"
        time.sleep(every_s)


def _free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    for one in sockets:
        one.bind(("127.0.0.1", 0))
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports
