"""A whole training run in a process that has joined the others: build, loop, and a tidy end whatever happens.

Out of memory ends in advice in terms of this run's options, a lost process in one line; everything else keeps its own error. Called by
`cli/train.py`.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import psutil
import torch

from lora_dist.arguments.evaluation import PERPLEXITY_BANDS
from lora_dist.config import RunConfig, seconds
from lora_dist.engine.attempts import State
from lora_dist.engine.final import final_folder
from lora_dist.engine.loop import Loop
from lora_dist.engine.memory import memory_gib, peak_memory_gib
from lora_dist.engine.push import push_final, require_hub
from lora_dist.engine.setup import Parts, build
from lora_dist.engine.stop import Stop
from lora_dist.log import EXIT_STOPPED, UserError
from lora_dist.monitor.advice import out_of_memory
from lora_dist.monitor.console import Console
from lora_dist.monitor.report import write_report
from lora_dist.monitor.runs import read_run
from lora_dist.parallel import World, launcher_restarts, lost_process, notice_lost_peers
from lora_dist.parallel.slurm import job_end_time_s
from lora_dist.state import METRICS

Fits = Callable[[RunConfig, int, bool, float], list[tuple[str, float]]]
"""given a configuration, processes, whether on GPUs, GiB a process may use: (flags, GiB) that would fit, the smallest change first"""


def train(
    config: RunConfig,
    world: World,
    *,
    look: Callable[[Parts], None] = lambda parts: None,
    argv: Sequence[str] = (),
    console: Console | None = None,
    fits: Fits | None = None,
) -> int:
    """Collective. Train by a checked configuration; the exit code.

    Args:
        argv: command line, for the record of this attempt.
        look: given the parts before the first step.
        console: default: the lines of workflow W1, on rank 0.
        fits: what would fit where memory ran out; None: not to be told.

    Raises:
        UserError: on every process.
    """
    console = console or Console(enabled=world.is_main)
    where, parts, code = "while loading", None, 1
    state: State = "failed"
    reason = "ended by an error, see the console"
    stop = Stop(deadline=_deadline(config), margin_s=config.train.stop_margin_s, exit_code=_exit_code)
    stop.install()
    try:
        notice_lost_peers(config.parallel.peer_timeout_s)  # while loading, and again with the groups that the strategy has made
        if config.train.push_to_hub:
            world.on_main(lambda: require_hub(config))
        parts = build(config, world, console, argv=argv)
        notice_lost_peers(config.parallel.peer_timeout_s)
        look(parts)
        stop.on_abort = partial(_note_abort, parts)
        where = "while training"
        ended = Loop(parts, stop).run()
        code = 0 if ended.stopped is None else _exit_code(ended.stopped)
        state, reason = ("completed", "") if ended.stopped is None else ("stopped", ended.stopped)
        # One process alone: the others have ended their part, and wait for no collective however long an upload takes.
        if config.train.push_to_hub and state == "completed" and world.is_main and not push_final(config, console.note):
            code = 1
        return code
    except UserError as error:
        code, reason = 2, _first_line(error)
        raise
    except Exception as error:
        reason = _first_line(error)
        if _is_out_of_memory(error):
            _advise_on_memory(config, parts, world, console, _place(parts, where), reason, fits)
        elif lost_process(error):
            step = "" if parts is None else f" at step {parts.state.step}"
            reason = (
                f"rank {world.rank}: lost another process{step} ({_first_line(error)})"  # launch/slurm.sbatch goes by these words
            )
            text = f"{reason}; go on with --resume auto"
            console.log_only(text)
            print(f"lora-dist train: {text}", file=sys.stderr, flush=True)
        else:
            raise
        return 1
    finally:
        if parts is not None and parts.attempt is not None:
            parts.attempt.end(state, reason, step=parts.state.step, exit_code=code)
        if parts is not None and parts.tracker is not None:
            parts.tracker.finish(completed=state == "completed", exit_code=code, artifacts=_artifacts(parts, state))
        console.close()
        if parts is not None and parts.folder is not None:
            parts.metrics.close()
            parts.folder.close()
        stop.close()  # last, so that a signal while the books are closed does not cut them off


def _artifacts(parts: Parts, state: State) -> list[Path]:
    """Files of a completed run that trackers are to keep: the final adapter, the report, which is written for it, and metrics."""
    if state != "completed" or not parts.config.tracker.log_artifacts:
        return []
    folder = final_folder(parts)
    found = [*sorted(folder.glob("adapter_*")), *folder.glob("block_mask.safetensors"), parts.output_dir / METRICS]
    try:
        page, *_pictures = write_report([read_run(parts.output_dir)], parts.output_dir / "report.html", bands=PERPLEXITY_BANDS)
        found.append(page)
    except Exception as error:  # whatever it is, the run is complete
        parts.console.warning(f"the report is not among the artifacts ({type(error).__name__}: {_first_line(error)})")
    return found


def _note_abort(parts: Parts) -> None:
    if parts.attempt is not None:
        parts.attempt.end("stopped", "second SIGINT, not saved", step=parts.state.step, exit_code=130)


def _deadline(config: RunConfig) -> float | None:
    """When the run has to have ended, seconds since the epoch: `train.max_runtime` after this process started, or with its Slurm job."""
    limits = [job_end_time_s()]
    if config.train.max_runtime is not None:
        limits.append(psutil.Process().create_time() + (seconds(config.train.max_runtime) or 0.0))
    return min((limit for limit in limits if limit is not None), default=None)


def _exit_code(reason: str) -> int:
    """75, so that whoever started the run starts it again. A launcher that starts failed workers again by itself must not do so at a time
    limit or a request to end: for it the run ends well. SIGTERM says that this machine goes away; the others are to go on."""
    return 0 if reason != "SIGTERM" and launcher_restarts() else EXIT_STOPPED


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:200]


def _place(parts: Parts | None, where: str) -> str:
    """Which part of which step the run was in."""
    phase = parts.stepper.clock.now if parts is not None else ""
    if parts is None or not phase:
        return where
    if phase == "evaluation":
        return f"in the evaluation at step {parts.state.step}"
    part = {"forward": "in the forward pass", "backward": "in the backward pass", "optimizer": "in the optimizer's part"}[phase]
    return f"{part} of step {parts.state.step + 1}"


def _advise_on_memory(
    config: RunConfig, parts: Parts | None, world: World, console: Console, where: str, request: str, fits: Fits | None
) -> None:
    device = torch.device(world.device)
    peak_gib, all_gib = peak_memory_gib(device), memory_gib(device)
    limit_gib = all_gib if device.type == "cuda" and all_gib else peak_gib  # a CPU's memory is others' as well
    advice = out_of_memory(
        block_size=config.data.block_size,
        gradient_checkpointing=config.train.gradient_checkpointing,
        checkpointing_layers=config.train.gradient_checkpointing_layers,
        micro_batch=parts.loader.micro_batch if parts else config.train.per_device_train_batch_size,
        accumulation=parts.loader.accumulation if parts else config.train.gradient_accumulation_steps,
        rank=config.adapter.r,
        where=where,
        peak_gib=peak_gib,
        memory_gib=all_gib,
        request=request,
        half=config.train.bf16 or config.train.fp16 or config.model.dtype in ("bfloat16", "float16"),
        quantised=config.model.load_in_4bit,
        sharded_base=parts.strategy.sharded_base if parts else config.parallel.strategy in ("fsdp2", "zero3"),
        adamw_8bit="8bit" in config.train.optim,
        eval_batch=config.train.per_device_eval_batch_size,
        fits=_what_fits(config, world, limit_gib, fits) if fits is not None and world.is_main else None,
    )
    console.log_only(advice)
    print(advice if world.is_main else f"rank {world.rank}: {advice}", file=sys.stderr, flush=True)


def _what_fits(config: RunConfig, world: World, limit_gib: float, fits: Fits) -> str:
    """By the plan, the smallest changes first; or why there is none to be told."""
    try:
        found = fits(config, world.size, world.device.type == "cuda", limit_gib)
    except (UserError, MemoryError, RuntimeError) as error:  # planning wants memory as well
        return f"not to be told here ({_first_line(error)}); lora-dist plan says it elsewhere"
    return (
        ";  or  ".join(f"{flags} ({gib:.1f} GiB)" for flags, gib in found[:3]) or f"no change alone fits into {limit_gib:.1f} GiB"
    )


_OUT_OF_MEMORY = (
    "can't allocate memory", "not enough memory", "cannot allocate memory", "std::bad_alloc", "out of memory",
    "could not create a primitive", "could not create a memory",  # oneDNN's words where it is refused memory
)  # fmt: skip


def _is_out_of_memory(error: BaseException) -> bool:
    """CUDA raises a class of its own; the CPU allocator, C++ and mapped files plain errors with these words."""
    kinds = (torch.OutOfMemoryError, MemoryError)
    return isinstance(error, kinds) or any(words in str(error).lower() for words in _OUT_OF_MEMORY)
