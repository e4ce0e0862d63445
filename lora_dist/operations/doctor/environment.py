"""Checks `environment`: variables that contradict each other or the machine, the Slurm job, proxies.

A variable left over in a shell makes a run wait for processes that nobody starts, which is silent; here it is one line.
"""

from __future__ import annotations

import socket
import time
from collections.abc import Generator, Iterator, Mapping
from urllib.parse import urlsplit

from lora_dist.log import UserError
from lora_dist.operations.doctor.context import Context
from lora_dist.operations.doctor.report import Finding, fail, ok, time_text, warn

RANK_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
LAUNCHER_VARIABLES = (*RANK_VARIABLES, "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
SHORT_JOB_S = 600.0


def refuse_launcher(env: Mapping[str, str]) -> None:
    """Raises UserError under a launcher of several processes: each of them would examine the machine, and start processes."""
    size = env.get("WORLD_SIZE", "")
    if "RANK" in env and "LOCAL_RANK" in env and size.isdigit() and int(size) > 1:
        raise UserError(
            f"doctor: found a launcher of {size} processes, expected one process a machine: start it without launcher, it starts "
            "--processes of its own (in a Slurm job: srun --ntasks-per-node=1 with one node, or from the batch script)"
        )


def check_environment(context: Context) -> Generator[Finding, None, None]:
    env = context.env
    yield _launcher(env)
    yield from _interfaces(env)
    if env.get("CUDA_VISIBLE_DEVICES") is not None and not env["CUDA_VISIBLE_DEVICES"].strip("-1 "):
        if context.args.device != "cpu":
            yield warn(
                "GPUs hidden",
                f"CUDA_VISIBLE_DEVICES is '{env['CUDA_VISIBLE_DEVICES']}'",
                "unset CUDA_VISIBLE_DEVICES (or --device cpu)",
            )
    if "SLURM_JOB_ID" in env:
        yield _slurm(env)
    proxies = sorted(name for name in env if name.lower() in ("http_proxy", "https_proxy", "all_proxy") and env[name])
    if proxies:
        yield _proxies(env, proxies)


def _launcher(env: Mapping[str, str]) -> Finding:
    found = {name: env[name] for name in LAUNCHER_VARIABLES if name in env}
    if not found:
        return ok("launcher", "no variables left over from a launcher")
    text = " ".join(f"{name}={value}" for name, value in found.items())
    unset = f"unset {' '.join(found)}"
    numbers = {name: int(value) for name, value in found.items() if name != "MASTER_ADDR" and value.isdigit()}
    wrong = [name for name in found if name != "MASTER_ADDR" and name not in numbers]
    if wrong:
        return fail("launcher", f"{text}: {wrong[0]} is not a number", unset)
    several = numbers.get("WORLD_SIZE", 1) > 1 or numbers.get("RANK", 0) > 0
    missing = [name for name in RANK_VARIABLES if name not in found]
    if several and missing:
        return fail("launcher", f"{text}, but no {' '.join(missing)}: a run would wait for processes that nobody starts", unset)
    if numbers.get("RANK", 0) >= numbers.get("WORLD_SIZE", 1) or numbers.get("LOCAL_RANK", 0) > numbers.get("RANK", 0):
        return fail("launcher", f"{text}: these ranks do not fit each other", unset)
    return ok("launcher", text)


def _interfaces(env: Mapping[str, str]) -> Iterator[Finding]:
    """Interfaces that gloo and NCCL are told to use have to exist: gloo wants names, NCCL beginnings of names, `=name`, or `^not`."""
    here = [name for _, name in socket.if_nameindex()]
    for variable in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
        value = env.get(variable, "")
        if not value or value.startswith("^"):
            continue
        wanted = [part.strip() for part in value.removeprefix("=").split(",")]
        exact = variable == "GLOO_SOCKET_IFNAME" or value.startswith("=")
        known = [part for part in wanted if any(name == part or (not exact and name.startswith(part)) for name in here)]
        if (exact and len(known) < len(wanted)) or not known:
            yield fail(
                "interface",
                f"{variable} is '{value}', but this machine has {', '.join(here)}",
                f"unset {variable}, or set one of these",
            )
        else:
            yield ok("interface", f"{variable} is '{value}', which is there")


def _slurm(env: Mapping[str, str]) -> Finding:
    from lora_dist.parallel.slurm import job_end_time_s, job_ids

    ids, end_s = job_ids(env), job_end_time_s(env)
    text = f"job {ids['SLURM_JOB_ID']}" + (f", partition {ids['SLURM_JOB_PARTITION']}" if "SLURM_JOB_PARTITION" in ids else "")
    if end_s is None:
        return ok("slurm", f"{text}; its end is not known (SLURM_JOB_END_TIME is not set)")
    left_s = end_s - time.time()
    if left_s < SHORT_JOB_S:
        state = f"ends in {time_text(left_s)}" if left_s > 0 else f"was to end {time_text(-left_s)} ago"
        return warn(
            "slurm", f"{text}, {state}", "ask for more time (#SBATCH --time=...), or unset SLURM_JOB_END_TIME if it is left over"
        )
    return ok("slurm", f"{text}, ends in {time_text(left_s)}")


def _proxies(env: Mapping[str, str], names: list[str]) -> Finding:
    """Hosts only: an address of a proxy may hold a password."""
    hosts = []
    for name in names:
        parts = urlsplit(env[name] if "//" in env[name] else f"//{env[name]}")
        hosts.append(f"{name} {parts.hostname}" + (f":{parts.port}" if parts.port else ""))
    excepted = env.get("no_proxy") or env.get("NO_PROXY") or ""
    return ok("proxies", ", ".join(hosts) + (f"; not for {excepted[:60]}" if excepted else ""))
