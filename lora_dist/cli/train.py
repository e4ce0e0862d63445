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
from lora_dist.process import heavy_imports

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
        "profile": "train.profile",
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
    with heavy_imports():
        from lora_dist.engine.train import train

    with joined(config) as world:
        resolve_layers(config, world)
        return train(config, world, argv=sys.argv[1:], fits=what_fits)


_USABLE = 0.95
"""of the memory that there is"""


def resolve_layers(config: RunConfig, world: World) -> None:
    """Collective. Turn `train.gradient_checkpointing_layers` auto into a number by `lora-dist plan`, for the memory of a GPU, or a
    process's part of this machine's.

    Raises:
        UserError: on every process, where no number is enough.
    """
    if config.train.gradient_checkpointing_layers != "auto":
        return
    from lora_dist.engine.memory import memory_gib
    from lora_dist.operations.plan import layers_to_recompute

    cuda = world.device.type == "cuda"
    limit_gib = _USABLE * memory_gib(world.device) / (1 if cuda else world.local_size)
    least_gib = min(world.gather(limit_gib))
    found = world.on_main(lambda: layers_to_recompute(config, processes=world.size, cuda=cuda, limit_gib=least_gib))
    if found is None:
        raise UserError(
            f"train.gradient_checkpointing_layers: found auto, but by the plan all layers are too few for {least_gib:.1f} GiB a process, "
            "expected a run that fits: lora-dist plan says what does"
        )
    config.train.gradient_checkpointing_layers = str(found[0])


def what_fits(config: RunConfig, processes: int, cuda: bool, limit_gib: float) -> list[tuple[str, float]]:
    """By `lora-dist plan`; seconds to half a minute. Raises UserError where it cannot plan."""
    from lora_dist.operations.plan import what_fits as by_plan

    return by_plan(config, processes=processes, cuda=cuda, limit_gib=limit_gib)


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
