"""`lora-dist train`: block-masked LoRA on a pruned base, on one process or under torchrun."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Sequence

from lora_dist.cli.options import Verb, parse
from lora_dist.config import RunConfig

VERB = Verb(
    prog="lora-dist train",
    description="Recover a block-pruned model with a LoRA that keeps every pruned tile exactly zero.",
    sections=True,
    aliases={
        "resume": "train.resume_from_checkpoint",
        "output_dir": "train.output_dir",
        "strategy": "parallel.strategy",
        "ds_config": "parallel.ds_config",
        "deepspeed": "parallel.ds_config",
        "deepspeed_config": "parallel.ds_config",
    },
)


def main(argv: Sequence[str]) -> int:
    return run(parse(RunConfig, without_launcher_flags(argv), VERB))


def without_launcher_flags(argv: Sequence[str]) -> list[str]:
    """Leave out what launchers add to a command line and what says nothing here: `--local_rank=N`, which stands in LOCAL_RANK as
    well, and a `--deepspeed` with no file behind it, the switch of DeepSpeed's own examples."""
    tokens, kept = list(argv), []
    while tokens:
        token = tokens.pop(0)
        value_follows = bool(tokens) and not re.match(r"--|[A-Za-z_][\w.]*=", tokens[0])
        name, given, _ = token.replace("-", "_").partition("=")
        if name == "__local_rank" and "LOCAL_RANK" in os.environ:
            if value_follows and not given:
                tokens.pop(0)
        elif token != "--deepspeed" or value_follows:
            kept.append(token)
    return kept


def run(config: RunConfig) -> int:
    """Train by a checked configuration; the exit code. Used by the scripts' front ends too."""
    import torch

    from lora_dist.engine.loop import Loop, peak_memory_gib
    from lora_dist.engine.setup import build
    from lora_dist.log import UserError
    from lora_dist.monitor.advice import out_of_memory
    from lora_dist.monitor.console import Console
    from lora_dist.parallel import close_world, init_world

    problems = config.problems()
    if problems:
        raise UserError(problems)
    world = init_world(backend=config.parallel.backend, device=config.parallel.device, timeout_s=config.parallel.timeout_s)
    console = Console(enabled=world.is_main)
    where, parts, code = "while loading", None, 1
    try:
        parts = build(config, world, console)
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
        close_world()


def _is_out_of_memory(error: BaseException) -> bool:
    """CUDA raises a class of its own; the CPU allocator a plain RuntimeError with these words."""
    import torch

    text = str(error)
    return (
        isinstance(error, torch.OutOfMemoryError | MemoryError) or "can't allocate memory" in text or "not enough memory" in text
    )
