"""`lora-dist prune MODEL OUT`: zero the least important tiles, layer by layer."""

from __future__ import annotations

from collections.abc import Sequence

from lora_dist.arguments import PruneArgs
from lora_dist.cli.options import Verb, parse


def main(argv: Sequence[str]) -> int:
    args = parse(PruneArgs, argv, Verb("lora-dist prune", PruneArgs.__doc__ or "", positionals=("model", "out")))
    from lora_dist.engine.prune import prune_model

    prune_model(args)
    return 0
