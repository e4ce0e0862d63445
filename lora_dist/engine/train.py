"""A whole training run in a process that has joined the others: build, loop, and a tidy end whatever happens.

Out of memory ends in advice in terms of this run's options; everything else keeps its own error. Called by `cli/train.py`.
"""

from __future__ import annotations

import sys
from collections.abc import Callable

import torch

from lora_dist.config import RunConfig
from lora_dist.engine.loop import Loop, peak_memory_gib
from lora_dist.engine.setup import Parts, build
from lora_dist.monitor.advice import out_of_memory
from lora_dist.monitor.console import Console
from lora_dist.parallel import World


def train(config: RunConfig, world: World, *, look: Callable[[Parts], None] = lambda parts: None) -> int:
    """Collective. Train by a checked configuration; the exit code.

    Args:
        look: given the parts before the first step.

    Raises:
        UserError: on every process.
    """
    console = Console(enabled=world.is_main)
    where, parts, code = "while loading", None, 1
    try:
        parts = build(config, world, console)
        look(parts)
        where = "while training"
        Loop(parts).run()
        code = 0
        return 0
    except (RuntimeError, MemoryError) as error:
        if not _is_out_of_memory(error):
            raise
        advice = out_of_memory(
            block_size=config.data.block_size,
            gradient_checkpointing=config.train.gradient_checkpointing,
            micro_batch=config.train.per_device_train_batch_size,
            accumulation=config.train.gradient_accumulation_steps,
            rank=config.adapter.r,
            where=where,
            peak_gib=peak_memory_gib(torch.device(world.device)),
        )
        console.log_only(advice)
        print(advice if world.is_main else f"rank {world.rank}: {advice}", file=sys.stderr, flush=True)
        return 1
    finally:
        if parts is not None and parts.tracker is not None:
            parts.tracker.finish(code)
        if parts is not None and parts.lock is not None:
            parts.lock.close()
        console.close()


def _is_out_of_memory(error: BaseException) -> bool:
    """CUDA raises a class of its own; the CPU allocator a plain RuntimeError with these words."""
    text = str(error)
    return (
        isinstance(error, torch.OutOfMemoryError | MemoryError) or "can't allocate memory" in text or "not enough memory" in text
    )
