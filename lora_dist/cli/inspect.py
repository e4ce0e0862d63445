"""`lora-dist inspect PATH`: the pattern, layer by layer. Exit code 1 where something is wrong with it."""

from __future__ import annotations

from collections.abc import Sequence

from lora_dist.arguments import InspectArgs
from lora_dist.cli.options import Verb, names, parse


def main(argv: Sequence[str]) -> int:
    args = parse(InspectArgs, argv, Verb("lora-dist inspect", InspectArgs.__doc__ or "", positionals=("path",)))
    from lora_dist.engine.inspect import inspect

    with names(model_name_or_path="PATH", model_config_name="config_name"):
        found = inspect(args)
    print(f"{found.what}: {args.path}")
    for fact in found.facts:
        print(f"  {fact}")
    if found.pattern is not None:
        pattern = found.pattern
        unit = f"{pattern.block}x{pattern.block} tiles" if pattern.kind == "block" else "single elements"
        print(
            f"pattern: {unit}, {found.source}, {pattern.sparsity:.2%} of {len(pattern)} linears pruned, digest {pattern.digest[:12]}"
        )
        if not args.summary:
            width = max(len(row.name) for row in found.rows)
            print(f"  {'layer':<{width}}  {'shape':>13}  {'pruned / tiles':>16}  sparsity")
            for row in found.rows:
                tiles = f"{row.pruned_tiles} / {row.tiles}" if row.tiles else "-"
                print(f"  {row.name:<{width}}  {row.shape[0]:>6}x{row.shape[1]:<6}  {tiles:>16}  {row.sparsity:7.2%}")
    else:
        print("pattern: none")
    for finding in found.findings:
        print(f"⚠️  {finding}")
    if not found.findings:
        print("✅ nothing wrong with it")
    return 1 if found.findings else 0
