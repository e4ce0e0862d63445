"""Checks `machine`: memory, cores and threads, shared memory, open files, as a container or a Slurm job limits them."""

from __future__ import annotations

import os
import resource
from collections.abc import Generator, Mapping
from pathlib import Path

from lora_dist.operations.doctor.context import Context
from lora_dist.operations.doctor.report import Finding, ok, size_text, warn

LOW_MEMORY_BYTES = 4e9
LOW_SHM_BYTES = 0.9e9
LOW_OPEN_FILES = 1024
CGROUP = Path("/sys/fs/cgroup")


def check_machine(context: Context) -> Generator[Finding, None, None]:
    yield _memory()
    yield _cores(context.env, context.args.processes or 1)
    yield _shared_memory(Path("/dev/shm"))
    yield _open_files()


def _memory() -> Finding:
    import psutil

    memory = psutil.virtual_memory()
    available, total, limit = memory.available, memory.total, memory_limit(CGROUP)
    text = f"{size_text(available)} available of {size_text(total)}"
    if limit is not None and limit[0] < total:
        available = min(available, limit[0] - limit[1])
        text = f"{size_text(available)} available of this container's or job's {size_text(limit[0])}"
    if available < LOW_MEMORY_BYTES:
        return warn(
            "memory", text, "end other processes, or ask for more (Slurm: --mem, docker: --memory); a process takes 1 GB bare"
        )
    return ok("memory", text)


def memory_limit(cgroup: Path) -> tuple[int, int] | None:
    """(limit, used) in bytes of the control group, version 2 or 1; None where there is no limit."""
    for limit, used in (
        ("memory.max", "memory.current"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"),
    ):
        try:
            return int((cgroup / limit).read_text()), int((cgroup / used).read_text())
        except (OSError, ValueError):  # no such file, or "max"
            continue
    return None


def core_limit(cgroup: Path) -> float | None:
    """Cores' worth of time that the control group may use, version 2 or 1; None where there is no limit."""
    try:
        quota, period = (cgroup / "cpu.max").read_text().split()
        return int(quota) / int(period)
    except (OSError, ValueError):
        pass
    try:
        quota_us = int((cgroup / "cpu/cpu.cfs_quota_us").read_text())
        return quota_us / int((cgroup / "cpu/cpu.cfs_period_us").read_text()) if quota_us > 0 else None
    except (OSError, ValueError):
        return None


def usable_cores() -> int:
    """Cores that this process may run on, and has the time of."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    limit = core_limit(CGROUP)
    return max(1, min(allowed, int(limit))) if limit is not None else allowed


def _cores(env: Mapping[str, str], processes: int) -> Finding:
    usable, all_cores = usable_cores(), os.cpu_count() or 1
    text = f"{usable} usable" + (f" of {all_cores}" if usable != all_cores else "")
    threads = env.get("OMP_NUM_THREADS", "")
    advice = f"export OMP_NUM_THREADS={max(1, usable // processes)} OMP_WAIT_POLICY=PASSIVE (the launch scripts set them)"
    if threads and not threads.isdigit():
        return warn("cores", f"{text}, OMP_NUM_THREADS is '{threads}', expected a number", advice)
    if threads and int(threads) * processes > usable:
        return warn("cores", f"{text}, but OMP_NUM_THREADS {threads} x {processes} processes", advice)
    return ok(
        "cores", text + (f", OMP_NUM_THREADS {threads}" if threads else ", OMP_NUM_THREADS unset (the launch scripts set it)")
    )


def _shared_memory(folder: Path) -> Finding:
    try:
        found = os.statvfs(folder)
    except OSError as error:
        return warn(
            "shared memory", f"{folder}: {error.strerror}", "mount a tmpfs there: data workers and NCCL exchange tensors in it"
        )
    total, free = found.f_blocks * found.f_frsize, found.f_bavail * found.f_frsize
    text = f"{size_text(free)} free of {size_text(total)} in {folder}"
    if free < LOW_SHM_BYTES:
        return warn(
            "shared memory", text, "docker run --shm-size=8g (or --ipc=host): data workers and NCCL exchange tensors in it"
        )
    return ok("shared memory", text)


def _open_files() -> Finding:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    shown = "unlimited" if hard == resource.RLIM_INFINITY else f"{hard:,}"
    text = f"{soft:,} at most (hard limit {shown})"
    if 0 <= soft < LOW_OPEN_FILES:
        return warn("open files", text, f"ulimit -n {65536 if hard < 0 else min(65536, hard)}")
    return ok("open files", text)
