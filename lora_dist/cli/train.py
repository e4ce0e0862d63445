"""`lora-dist train`: block-masked LoRA on a pruned base, on one process or under torchrun."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

from lora_dist.cli.options import Verb, parse
from lora_dist.config import RunConfig
from lora_dist.log import UserError

if TYPE_CHECKING:
    from lora_dist.parallel import World

VERB = Verb(
    prog="lora-dist train",
    description="Recover a block-pruned model with a LoRA that keeps every pruned tile exactly zero.",
    sections=True,
    aliases={
        "resume": "train.resume_from_checkpoint",
        "output_dir": "train.output_dir",
        "max_runtime": "train.max_runtime",
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
    from lora_dist.engine.train import train

    with joined(config) as world:
        return train(config, world, argv=sys.argv[1:])


@contextmanager
def joined(config: RunConfig) -> Iterator[World]:
    """Collective: this process among the others that a launcher started, for as long as the block lasts.

    Raises:
        UserError: what is wrong with the configuration, before anything else.
    """
    from lora_dist.parallel import close_world, init_world

    problems = config.problems()
    if problems:
        raise UserError(problems)
    args = config.parallel
    world = init_world(
        backend=args.backend, device=args.device, timeout_s=args.timeout_s, join_timeout_s=args.join_timeout_s, always=True
    )
    try:
        yield world
    finally:
        close_world()
