"""`lora-dist prune MODEL OUT`: zero the least important tiles, layer by layer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from lora_dist.arguments import PruneArgs
from lora_dist.cli.options import Verb, names, parse
from lora_dist.process import heavy_imports

if TYPE_CHECKING:
    from lora_dist.engine.prune import PruneResult


def main(argv: Sequence[str]) -> int:
    run(parse(PruneArgs, argv, Verb("lora-dist prune", PruneArgs.__doc__ or "", positionals=("model", "out"))))
    return 0


def run(args: PruneArgs) -> PruneResult | None:
    """Prune, on all processes that a launcher started; the result, on rank 0."""
    with heavy_imports():
        from lora_dist.engine.prune import prune_model
    from lora_dist.parallel import close_world, init_world

    with names(parallel_device="device"):
        world = init_world(device=args.device)
    try:
        result = prune_model(args, world)
    finally:
        close_world()
    return result if world.is_main else None
