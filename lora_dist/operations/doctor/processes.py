"""Checks `collectives` and `strategies`: starts real processes under torchrun, follows what they report, and ends them if they hang.

One group of processes does everything, as long as nothing fails; after a strategy that fails, a new group goes on with the next. With
GPUs the group is on nccl, one process a GPU (a GPU holds no two NCCL ranks), and a second one times gloo on the CPUs.
"""

from __future__ import annotations

import contextlib
import json
import subprocess
import tempfile
import time
from collections.abc import Generator, Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from lora_dist.operations.doctor import launcher
from lora_dist.operations.doctor.context import Context
from lora_dist.operations.doctor.devices import probe
from lora_dist.operations.doctor.environment import LAUNCHER_VARIABLES
from lora_dist.operations.doctor.machine import usable_cores
from lora_dist.operations.doctor.report import Finding, fail, ok, size_text, skip, time_text, warn
from lora_dist.operations.doctor.versions import torch_cuda
from lora_dist.operations.doctor.worker import COLLECTIVES, LAUNCHER_PID, Job

STRATEGIES = ("ddp", "fsdp2", "zero1", "zero2", "zero3")
SAME_LOSS = 1e-5
"""relative; strategies sum in different orders"""
SLOW_BYTES_S = {"gloo": 0.02e9, "nccl": 0.5e9}
"""all_reduce of 16 MB below this makes sums of gradients the longest part of a step"""
POLL_S = 0.02
FOREIGN = ("TORCHELASTIC_", "GROUP_", "ROLE_", "ACCELERATE_", "SLURM_", "OMPI_", "PMI")
"""beginnings of variables by which a launcher would tell these processes that they are others"""


@dataclass(frozen=True)
class Group:
    """Processes to start, and what they do."""

    processes: int
    job: Job


@dataclass
class _State:
    """What has been heard of a group."""

    reached: dict[int, str] = field(default_factory=dict)
    """rank -> what it last began"""
    failed: dict[str, Any] | None = None
    done: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Ended:
    """How a group ended, where it did not do all: the item it stopped in, and the words for it."""

    item: str
    text: str
    hung: bool


def check_processes(context: Context) -> Generator[Finding, None, None]:
    chosen = context.args.only or ["collectives", "strategies"]
    strategies = list(STRATEGIES) if "strategies" in chosen else []
    if find_spec("deepspeed") is None:
        for name in [name for name in strategies if name.startswith("zero")]:
            yield skip(f"strategy {name}", "deepspeed is not installed", "pip install 'lora-dist[deepspeed]'")
        strategies = [name for name in strategies if not name.startswith("zero")]
    losses: dict[str, list[float]] = {}
    for group in _groups(context, collectives="collectives" in chosen, strategies=strategies):
        yield from _examine(context, group, losses)


def _groups(context: Context, *, collectives: bool, strategies: list[str]) -> Iterator[Group]:
    """The groups to start, one after the other."""
    args = context.args
    gpus = 0
    if args.device != "cpu" and (torch_cuda() is not None or args.device == "cuda"):
        gpus = len(probe(args.timeout_s)["gpus"])
    on_gpus = args.backend == "nccl" or (args.backend == "auto" and (gpus > 0 or args.device == "cuda"))
    if on_gpus:  # also where there are none: the processes say so
        count = min(args.processes or gpus, gpus) or 1
        yield Group(count, Job("nccl", "cuda", args.timeout_s, collectives, strategies))
    if args.backend != "nccl" and (collectives or not on_gpus):
        yield Group(args.processes or 2, Job("gloo", "cpu", args.timeout_s, collectives, [] if on_gpus else strategies))


def _examine(context: Context, group: Group, losses: dict[str, list[float]]) -> Iterator[Finding]:
    """One group's findings; started anew behind a strategy that failed."""
    while True:
        with tempfile.TemporaryDirectory(prefix="lora-dist-doctor-", ignore_cleanup_errors=True) as folder:
            ended: Ended | None = None
            for event in run_group(context.env, group, Path(folder)):
                if isinstance(event, Ended):
                    ended = event
                else:
                    yield _finding(event, group, losses)
        if ended is None:
            return
        remaining = group.job.strategies
        if ended.item not in remaining:
            yield fail(ended.item, ended.text, _remedy(group, ended))
            if remaining:
                yield skip("strategies", f"not tried: {', '.join(remaining)} need working collectives")
            return
        yield fail(f"strategy {ended.item}", ended.text, _strategy_remedy(group, ended))
        rest = remaining[remaining.index(ended.item) + 1 :]
        if not rest:
            return
        group = replace(group, job=replace(group.job, collectives=False, strategies=rest))


def run_group(env: Mapping[str, str], group: Group, folder: Path) -> Iterator[dict[str, Any] | Ended]:
    """Start the processes and hand on what they report; an `Ended` comes last where they did not do everything."""
    (folder / "job.json").write_text(json.dumps(asdict(group.job)))
    state = _State()
    with (folder / "log.txt").open("w") as log:
        options = (
            "--standalone",
            "--nproc_per_node",
            str(group.processes),
            "-m",
            "lora_dist",
            "doctor",
            "--as-worker",
            str(folder),
        )
        process = subprocess.Popen(
            launcher.command(*options),
            env=worker_environment(env, group.processes),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,  # a Ctrl-C is this process's to handle
        )
        try:
            (folder / LAUNCHER_PID).write_text(str(process.pid))
            yield from _follow(process, group, folder, state)
        finally:
            _end(process)
    yield from _verdict(process.returncode, group, folder, state)


def _end(process: subprocess.Popen[bytes]) -> None:
    """Kill torchrun and its workers, also one that is stopped, or too young to be tied to its launcher."""
    import psutil

    workers = psutil.Process(process.pid).children(recursive=True) if process.poll() is None else []
    process.kill()
    process.wait()
    for worker in workers:
        with contextlib.suppress(psutil.NoSuchProcess):
            worker.kill()


def worker_environment(env: Mapping[str, str], processes: int) -> dict[str, str]:
    """The user's, without what a launcher has left in it, and threads shared out."""
    kept = {name: value for name, value in env.items() if name not in LAUNCHER_VARIABLES and not name.startswith(FOREIGN)}
    kept.setdefault("OMP_NUM_THREADS", str(max(1, usable_cores() // processes)))
    kept.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    return kept


def _follow(process: subprocess.Popen[bytes], group: Group, folder: Path, state: _State) -> Iterator[dict[str, Any] | Ended]:
    """Events of rank 0 as they come, until the processes end, fail, or make no progress for the job's `timeout_s`."""
    offsets = [0] * group.processes
    last_news = time.monotonic()
    while True:
        running = process.poll() is None
        for rank in range(group.processes):
            events, offsets[rank] = _new_events(folder / f"rank-{rank}.jsonl", offsets[rank])
            for event in events:
                last_news = time.monotonic()
                if "at" in event:
                    state.reached[rank] = event["at"]
                elif "problem" in event:
                    state.failed = state.failed or event
                else:
                    state.done.append(event["item"])
                    yield event
        if state.failed is not None or not running:
            return
        if time.monotonic() - last_news > group.job.timeout_s:
            yield _hung(group, state)
            state.done.append("hung")
            return
        time.sleep(POLL_S)


def _new_events(file: Path, offset: int) -> tuple[list[dict[str, Any]], int]:
    """Whole lines behind `offset`, and where they end."""
    try:
        with file.open("rb") as handle:
            handle.seek(offset)
            text = handle.read()
    except FileNotFoundError:
        return [], offset
    whole = text[: text.rfind(b"\n") + 1]
    return [json.loads(line) for line in whole.splitlines()], offset + len(whole)


def _hung(group: Group, state: _State) -> Ended:
    join = f"{group.job.backend} join"
    at = {rank: state.reached.get(rank, f"{join}: starting") for rank in range(group.processes)}
    order = [f"{join}: starting", f"{join}: importing", *_items(group.job), "the end"]
    behind = min(at, key=lambda rank: order.index(at[rank]))
    item = max(at.values(), key=order.index)
    same = len(set(at.values())) == 1
    where = f"all {group.processes} processes are at {item}" if same else f"rank {behind} is still at {at[behind]}"
    return Ended(item.split(":")[0], f"no progress for {time_text(group.job.timeout_s)}: {where}", hung=True)


def _items(job: Job) -> list[str]:
    names = [f"{job.backend} {name}" for name in COLLECTIVES] if job.collectives else []
    return [f"{job.backend} join", *names, *job.strategies]


def _verdict(code: int, group: Group, folder: Path, state: _State) -> Iterator[Ended]:
    if state.failed is not None:
        who = f"rank {state.failed['rank']}: " if group.processes > 1 else ""
        yield Ended(state.failed["item"], who + state.failed["problem"], hung=False)
    elif "hung" not in state.done and (missing := [item for item in _items(group.job) if item not in state.done]):
        lines = [line for line in (folder / "log.txt").read_text(errors="replace").splitlines() if line.strip()]
        telling = [line for line in lines if "Error" in line or "error" in line]
        last = " ".join((telling or lines or ["no message"])[-1].split())[:240]
        yield Ended(missing[0], f"the processes ended early (exit code {code}): {last}", hung=False)


def _finding(event: dict[str, Any], group: Group, losses: dict[str, list[float]]) -> Finding:
    item = event["item"]
    if item.endswith(" join"):
        word = "processes" if group.processes > 1 else "process"
        return ok(item, f"{group.processes} {word} under torchrun found each other in {time_text(event['time_s'])}")
    return _collective(event, group) if "times_s" in event else _strategy(event, losses)


def _collective(event: dict[str, Any], group: Group) -> Finding:
    item, times = event["item"], event["times_s"]
    if "bytes" not in event:
        return ok(item, f"{time_text(times[''])} (median of {group.processes} processes)")
    largest = list(times)[-1]
    rate = event["bytes"][largest] / times[largest]
    text = ", ".join(f"{size} {time_text(time_s)}" for size, time_s in times.items()) + f" ({size_text(rate)}/s), values right"
    if group.processes > 1 and rate < SLOW_BYTES_S[group.job.backend]:
        return warn(item, text, _INTERFACES[group.job.backend])
    return ok(item, text)


def _strategy(event: dict[str, Any], losses: dict[str, list[float]]) -> Finding:
    name, mine = event["item"], event["losses"]
    text = f"loss {mine[0]:.5f} -> {mine[-1]:.5f}, {time_text(event['step_s'])} a step, {event['base_share']:.0%} of the base a process"
    first = next(iter(losses), None)
    losses[name] = mine
    if first is not None:
        off = max(abs(a - b) / abs(b) for a, b in zip(mine, losses[first], strict=True))
        if off > SAME_LOSS:
            return fail(
                f"strategy {name}",
                f"{text}; losses differ from {first}'s by {off:.1e}, expected {SAME_LOSS:.0e}",
                f"--strategy {first}",
            )
        text += ", same losses"
    return ok(f"strategy {name}", text)


_INTERFACES = {
    "gloo": "ip -brief address shows the interfaces; set GLOO_SOCKET_IFNAME to the one that leads to the other machines",
    "nccl": "NCCL_DEBUG=INFO shows what it chose; set NCCL_SOCKET_IFNAME to the right interface, or try NCCL_P2P_DISABLE=1",
}


def _remedy(group: Group, ended: Ended) -> str:
    if "no GPU" in ended.text:
        return "--device cpu, or --backend gloo"
    longer = f"; --timeout_s {2 * group.job.timeout_s:g} if this machine is only slow" if ended.hung else ""
    return _INTERFACES[group.job.backend] + longer


def _strategy_remedy(group: Group, ended: Ended) -> str:
    if ended.hung:
        return f"--timeout_s {2 * group.job.timeout_s:g} if this machine is only slow; else another --strategy"
    if ended.item.startswith("zero"):
        return "pip install -U 'lora-dist[deepspeed]', or train with --strategy fsdp2 or ddp"
    return "see `versions` above; or train with another --strategy"
