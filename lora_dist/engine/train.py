"""A whole training run in a process that has joined the others: build, loop, and a tidy end whatever happens.

Out of memory ends in advice in terms of this run's options, a lost process in one line; everything else keeps its own error. Called by
`cli/train.py`.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from functools import partial

import psutil
import torch

from lora_dist.config import RunConfig, seconds
from lora_dist.engine.attempts import State
from lora_dist.engine.loop import Loop
from lora_dist.engine.memory import peak_memory_gib
from lora_dist.engine.push import push_final, require_hub
from lora_dist.engine.setup import Parts, build
from lora_dist.engine.stop import Stop
from lora_dist.log import EXIT_STOPPED, UserError
from lora_dist.monitor.advice import out_of_memory
from lora_dist.monitor.console import Console
from lora_dist.parallel import World, launcher_restarts, lost_process, notice_lost_peers
from lora_dist.parallel.slurm import job_end_time_s


def train(
    config: RunConfig,
    world: World,
    *,
    look: Callable[[Parts], None] = lambda parts: None,
    argv: Sequence[str] = (),
    console: Console | None = None,
) -> int:
    """Collective. Train by a checked configuration; the exit code.

    Args:
        argv: command line, for the record of this attempt.
        look: given the parts before the first step.
        console: default: the lines of workflow W1, on rank 0.

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
    except (RuntimeError, MemoryError) as error:
        reason = _first_line(error)
        if _is_out_of_memory(error):
            _advise_on_memory(config, parts, world, console, where)
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
            parts.tracker.finish(code)
        console.close()
        if parts is not None and parts.folder is not None:
            parts.metrics.close()
            parts.folder.close()
        stop.close()  # last, so that a signal while the books are closed does not cut them off


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


def _advise_on_memory(config: RunConfig, parts: Parts | None, world: World, console: Console, where: str) -> None:
    advice = out_of_memory(
        block_size=config.data.block_size,
        gradient_checkpointing=config.train.gradient_checkpointing,
        micro_batch=parts.loader.micro_batch if parts else config.train.per_device_train_batch_size,
        accumulation=parts.loader.accumulation if parts else config.train.gradient_accumulation_steps,
        rank=config.adapter.r,
        where=where,
        peak_gib=peak_memory_gib(torch.device(world.device)),
    )
    console.log_only(advice)
    print(advice if world.is_main else f"rank {world.rank}: {advice}", file=sys.stderr, flush=True)


def _is_out_of_memory(error: BaseException) -> bool:
    """CUDA raises a class of its own; the CPU allocator a plain RuntimeError with these words."""
    text = str(error)
    return (
        isinstance(error, torch.OutOfMemoryError | MemoryError) or "can't allocate memory" in text or "not enough memory" in text
    )
