"""`lora-dist distill-cache`: what the dense model predicts of a run's data, computed once; on one process or under torchrun."""

from __future__ import annotations

from collections.abc import Sequence

from lora_dist.cli import train
from lora_dist.cli.options import Verb, parse
from lora_dist.config import RunConfig

VERB = Verb(
    prog="lora-dist distill-cache",
    description="Write the dense model's largest probabilities of the data of a run by these options (those of lora-dist train) to "
    "train.distill_cache; the pruned model's weights are not loaded. Stopped, it goes on where it was.",
    sections=True,
    aliases=train.VERB.aliases,
)


def main(argv: Sequence[str]) -> int:
    config = parse(RunConfig, train.without_launcher_flags(argv), VERB)
    from lora_dist.engine.distill import cache_only
    from lora_dist.monitor.console import Console

    with train.joined(config) as world:
        console = Console(enabled=world.is_main)
        try:
            cache_only(config, world, console)
        finally:
            console.close()
    return 0
