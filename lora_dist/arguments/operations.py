"""Options of the verbs around a run: rendezvous, doctor, submit."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal


@dataclass
class RendezvousArgs:
    """Hold the meeting point of elastic runs, on a machine that outlives any of theirs, until it is stopped."""

    port: int = 29400
    """Port to listen on, at all addresses of this machine; 0: one that is free, which is printed."""

    def problems(self) -> Iterator[str]:
        if not 0 <= self.port < 65536:
            yield f"port: found {self.port}, expected a number from 0 to 65535"


@dataclass
class DoctorArgs:
    """Examine this machine before a run: versions, GPUs, disk, network, collectives and strategies tried for real; with remedies."""

    output_dir: str = "."
    """Run folder whose disk is tried; need not exist yet. Nothing stays in it."""
    model: str = ""
    """Model directory (or hub name) to work out the size of a checkpoint from."""
    r: int = 8
    """Rank of the adapter, for the same."""
    processes: int | None = None
    """Processes to start; default: one a GPU, 2 without."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to run collectives and strategies; auto: GPUs if there are any."""
    backend: Literal["auto", "gloo", "nccl"] = "auto"
    """Collectives to try; auto: nccl and gloo on GPUs, gloo on CPUs."""
    grace_s: float = 30.0
    """Seconds between the warning and the end of a run; torchrun and Slurm leave 30."""
    offline: bool = False
    """Ask neither hub nor tracker."""
    timeout_s: float = 120.0
    """Seconds without progress after which processes count as hung."""
    only: list[
        Literal[
            "versions", "environment", "machine", "gpus", "disk", "hub", "tracker", "model", "space", "save_time", "collectives",
            "strategies",
        ]
    ] = field(default_factory=list)  # fmt: skip
    """Leave out all checks but these (comma-separated)."""
    json: bool = False
    """One JSON object a line instead of text; the last holds the counts."""

    def problems(self) -> Iterator[str]:
        for name in ("r", "processes"):
            value = getattr(self, name)
            if value is not None and value < 1:
                yield f"{name}: found {value}, expected 1 or more"
        for name in ("grace_s", "timeout_s"):
            if not getattr(self, name) > 0:
                yield f"{name}: found {getattr(self, name)}, expected a number above 0"
        if not self.output_dir:
            yield "output_dir: found nothing, expected a folder"
        if self.backend == "nccl" and self.device == "cpu":
            yield "backend: found nccl with device cpu, expected gloo, or another device"


@dataclass
class SubmitArgs:
    """Check a training run and queue it under Slurm, to be requeued until it is complete. Options are sbatch's where it has them;
    --config FILE and what follows `--` are those of lora-dist train."""

    nodes: str = "1"
    """Nodes: a number, or MIN-MAX for as many as there are."""
    gpus_per_node: int | None = None
    """GPUs of each node."""
    ntasks_per_node: int | None = None
    """Processes on each node; default: gpus_per_node, else 1."""
    cpus_per_task: int | None = None
    """CPU cores of each process."""
    mem: str | None = None
    """Memory of each node, such as 64G."""
    time: str | None = None
    """Time limit of one attempt: minutes, HH:MM:SS or D-HH:MM; default: the partition's."""
    partition: str | None = None
    """Partition to run in."""
    account: str | None = None
    """Account to charge."""
    qos: str | None = None
    """Quality of service."""
    array: str | None = None
    """Tasks of a job array, such as 0-3%2; {task} in an option's value stands for the task's number, and train.output_dir needs it."""
    sweep: str | None = None
    """File whose line N has further options for the array's task N; default of array with it: all lines."""
    job_name: str | None = None
    """Name in the queue; default: that of the run folder."""
    launcher: Literal["torchrun", "srun"] = "torchrun"
    """torchrun: srun starts one torchrun a node; srun: srun starts every process."""
    sbatch_args: str = ""
    """Further options for sbatch, in one text."""
    requeue: bool = True
    """Queue the job again when it is preempted, out of time or without a node; off: it ends there."""
    max_requeues: int = 100
    """How often at most."""
    signal_s: int = 120
    """Seconds before the time limit at which the run is asked to save and stop (Slurm may be up to 60 s early)."""
    dry_run: bool = False
    """Write the job and show it, but do not queue it."""

    def problems(self) -> Iterator[str]:
        """Every value that is out of range, one line each."""
        if not re.fullmatch(r"[1-9]\d*(-[1-9]\d*)?", self.nodes):
            yield f"nodes: found {self.nodes}, expected a number from 1 up or MIN-MAX"
        for name in ("gpus_per_node", "ntasks_per_node", "cpus_per_task", "signal_s"):
            value = getattr(self, name)
            if value is not None and value < 1:
                yield f"{name}: found {value}, expected 1 or more"
        if self.max_requeues < 0:
            yield f"max_requeues: found {self.max_requeues}, expected 0 or more"
        if self.array is not None and not re.fullmatch(r"\d+([-,:]\d+)*(%\d+)?", self.array):
            yield f"array: found {self.array}, expected task numbers such as 0-3, 1,4 or 0-9%2"
        if self.time is not None and not re.fullmatch(r"\d+(-\d+)?(:\d+){0,2}", self.time):
            yield f"time: found {self.time}, expected minutes, HH:MM:SS or D-HH:MM"
        for name in ("mem", "partition", "account", "qos", "job_name"):
            if re.search(r"[\s'\"]", getattr(self, name) or ""):
                yield f"{name}: found {getattr(self, name)}, expected a word without spaces or quotes"
        if "\n" in self.sbatch_args:
            yield "sbatch_args: found several lines, expected one"
