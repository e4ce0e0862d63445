"""A plan for people and for programs: a table, a verdict with its commands, JSON. Called by `cli/plan.py`."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import asdict, fields
from typing import Any

from lora_dist.operations.plan.choice import Choice, Plan, Planner, flags
from lora_dist.operations.plan.memory import GIB, Memory

_PARTS = [f.name for f in fields(Memory) if f.name != "host"]
_CHOICE, _SUMS = (
    ("strategy", "precision", "checkp.", "batch x acc."),
    ("total GiB", "host GiB", "sent GiB/step", "tokens/s", "fits"),
)


def table(plans: Sequence[Plan]) -> str:
    """Rows of a Markdown table, its columns aligned; sizes in GiB a rank."""
    parts = [part for part in _PARTS if part != "teacher" or any(plan.memory.teacher for plan in plans)]
    heads = (*_CHOICE, *parts, *_SUMS)
    rows = [heads, *(_row(plan, parts) for plan in plans)]
    widths = [max(len(row[i]) for row in rows) for i in range(len(heads))]
    lines = ["| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |" for row in rows]
    lines.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    return "\n".join(lines)


def _row(plan: Plan, parts: Sequence[str]) -> tuple[str, ...]:
    choice, memory = plan.choice, plan.memory
    return (
        choice.layout.name,
        choice.precision,
        _checkpointing(choice, "yes"),
        f"{choice.micro_batch} x {choice.accumulation}",
        *(_gib(getattr(memory, part)) for part in parts),
        _gib(memory.total),
        _gib(memory.host),
        _gib(plan.sent.network),
        f"{plan.tokens_per_s:,.0f}",
        "yes" if plan.fits else "no",
    )


def _gib(size: int) -> str:
    return f"{size / GIB:.2f}" if size >= 0.005 * GIB or not size else f"{size / GIB:.4f}"


def shortened(plans: Sequence[Plan], mine: str) -> list[Plan]:
    """Of each strategy and precision the fastest that fits, or the one nearest to fitting; fastest first.

    Args:
        mine: the configured precision.
    """
    groups: dict[tuple[str, str], list[Plan]] = {}
    for plan in plans:
        if plan.choice.precision == "fp16" and mine != "fp16":
            continue  # what bf16 takes
        groups.setdefault((plan.choice.layout.name, plan.choice.precision), []).append(plan)
    kept = [
        max((p for p in group if p.fits), key=lambda p: p.tokens_per_s, default=min(group, key=lambda p: p.memory.total))
        for group in groups.values()
    ]
    return sorted(kept, key=lambda p: (not p.fits, -p.tokens_per_s if p.fits else p.memory.total))


def commands(plan: Plan, now: Choice, train_argv: Sequence[str]) -> dict[str, str]:
    """The command of each launcher, as docs/launching.md has them.

    Args:
        now: as the configuration has it.
        train_argv: options of `lora-dist train` that were given; the choice's own stand behind them, so they rule.
    """
    argv = " ".join(
        [shlex.join(train_argv), *dict.fromkeys([*flags(plan.choice, now), f"--parallel.strategy {plan.choice.layout.strategy}"])]
    )
    processes = plan.choice.layout.processes
    alone = {} if processes > 1 else {"lora-dist": f"lora-dist train {argv}"}
    return alone | {
        launcher: f"NPROC={processes} launch/{launcher}.sh {argv}" for launcher in ("torchrun", "accelerate", "deepspeed")
    }


def verdict(planner: Planner, plans: Sequence[Plan], best: Plan | None, train_argv: Sequence[str]) -> list[str]:
    """What to do, in lines."""
    limit = planner.hardware.memory
    now = planner.work_out(planner.configured())
    lines = [
        f"as configured ({_described(now)}): {now.memory.total / GIB:.2f} GiB a rank, "
        f"{'fits' if now.fits else 'does not fit'} in {limit / GIB:.2f} GiB"
    ]
    if best is not None:
        command = next(iter(commands(best, planner.configured(), train_argv).values()))
        return [
            *lines,
            f"cheapest that fits: {_described(best)}: {best.memory.total / GIB:.2f} GiB a rank, {best.tokens_per_s:,.0f} tokens/s",
            f"  {command}",
        ]
    nearest = min(plans, key=lambda p: p.memory.total)
    lines.append(
        f"nothing fits; nearest: {_described(nearest)}: {nearest.memory.total / GIB:.2f} GiB a rank, "
        f"{(nearest.memory.total - limit) / GIB:.2f} GiB too much"
    )
    found = _what_else(planner, nearest)
    return [*lines, *(f"  {text}" for text in found)]


def _what_else(planner: Planner, nearest: Plan) -> list[str]:
    """Changes outside of the choices that were tried."""
    part = max(_PARTS, key=lambda name: getattr(nearest.memory, name))
    lines = [f"largest part: {part}, {getattr(nearest.memory, part) / GIB:.2f} GiB"]
    if nearest.memory.activations + nearest.memory.logits > nearest.memory.total - planner.hardware.memory:
        lines.append("a shorter context would do: --data.block_size")
    if nearest.choice.layout.strategy != "ddp" and nearest.memory.base:
        lines.append("more GPUs would do: each holds a smaller part of the base")
    lines.append(f"GPUs of {-(-nearest.memory.total // GIB)} GiB or more would do")
    return lines


def _checkpointing(choice: Choice, yes: str) -> str:
    if not choice.checkpointing:
        return "no" if yes == "yes" else "off"
    return yes if choice.layers is None else f"{choice.layers} layers"


def _described(plan: Plan) -> str:
    choice = plan.choice
    return (
        f"{choice.layout.name}, {choice.precision}, checkpointing {_checkpointing(choice, 'on')}, "
        f"micro-batch {choice.micro_batch} x {choice.accumulation}"
    )


def as_json(planner: Planner, plans: Sequence[Plan], best: Plan | None, train_argv: Sequence[str]) -> dict[str, Any]:
    """Everything. Sizes in bytes; nothing fits: `best` is null."""
    return {
        "hardware": asdict(planner.hardware),
        "global_batch": planner.global_batch,
        "configured": _plan_json(planner.work_out(planner.configured())),
        "plans": [_plan_json(plan) for plan in plans],
        "best": None if best is None else _plan_json(best) | {"commands": commands(best, planner.configured(), train_argv)},
    }


def _plan_json(plan: Plan) -> dict[str, Any]:
    choice = plan.choice
    return {
        **asdict(choice),
        "layout": choice.layout.name,
        "strategy": choice.layout.strategy,
        "memory_bytes": {**asdict(plan.memory), "total": plan.memory.total},
        "sent_bytes": asdict(plan.sent),
        "step_time_s": plan.step_time_s,
        "tokens_per_s": plan.tokens_per_s,
        "fits": plan.fits,
        "flags": flags(choice),
    }
