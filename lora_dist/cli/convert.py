"""`lora-dist convert PICKLE OUT`."""

from __future__ import annotations

from collections.abc import Sequence

from lora_dist.arguments import ConvertArgs
from lora_dist.cli.options import Verb, names, parse


def main(argv: Sequence[str]) -> int:
    args = parse(ConvertArgs, argv, Verb("lora-dist convert", ConvertArgs.__doc__ or "", positionals=("pickle", "out")))
    from lora_dist.engine.convert import convert

    with names(model_name_or_path="PICKLE", model_config_name="config_name"):
        convert(args)
    return 0
