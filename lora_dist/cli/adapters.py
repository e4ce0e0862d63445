"""`lora-dist adapters list | add | switch | merge-weighted | delete`: several adapters of one base in a folder."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from lora_dist.arguments import AdaptersArgs
from lora_dist.cli.options import Verb, parse

_WEIGHT = re.compile(r"(?!--)[^=\s]+=[^=\s]+")


def main(argv: Sequence[str]) -> int:
    verb = Verb("lora-dist adapters", AdaptersArgs.__doc__ or "", positionals=("action", "folder", "name", "source"))
    weights = [token for token in argv if _WEIGHT.fullmatch(token) and not token.startswith("-")]
    rest = [token for token in argv if token not in weights]
    args = parse(AdaptersArgs, [*rest, *([f"--weights={','.join(weights)}"] if weights else [])], verb)
    from lora_dist.adapter import collection

    folder = Path(args.folder)
    if args.action == "list":
        for name, text, active in collection.list_adapters(folder):
            print(f"{'*' if active else ' '} {name}: {text}")
        return 0
    if args.action == "add":
        collection.add_adapter(folder, args.name, Path(args.source))
    elif args.action == "switch":
        collection.switch_adapter(folder, args.name)
    elif args.action == "delete":
        collection.delete_adapter(folder, args.name)
    else:
        sums = {name: float(number) for name, _, number in (weight.partition("=") for weight in args.weights)}
        collection.merge_weighted(folder, args.name, sums, args.combination_type)
    done = {"add": "added to", "switch": "active in", "delete": "deleted from", "merge-weighted": "made in"}[args.action]
    print(f"{args.name}: {done} {folder}")
    return 0
