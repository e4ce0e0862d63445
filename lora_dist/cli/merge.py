"""`lora-dist merge BASE ADAPTER OUT`."""

from __future__ import annotations

from collections.abc import Sequence

from lora_dist.arguments import MergeArgs
from lora_dist.cli.options import Verb, names, parse
from lora_dist.process import heavy_imports


def main(argv: Sequence[str]) -> int:
    verb = Verb("lora-dist merge", MergeArgs.__doc__ or "", positionals=("base", "adapter", "out"))
    args = parse(MergeArgs, argv, verb)
    with heavy_imports():
        from lora_dist.engine.merge import merge
    from lora_dist.parallel import close_world, init_world

    world = init_world(device=args.device, always=args.strategy != "ddp")
    try:
        with names(model_name_or_path="BASE", model_config_name="config_name"):
            report = merge(args, world)
    finally:
        close_world()
    if not world.is_main:
        return 0
    if report.pattern_digest:
        print(
            f"✅ Pattern kept: all {report.zero_tiles:,} pruned tiles are exactly 0.0 in {report.out} (digest {report.pattern_digest[:12]})"
        )
    else:
        print("⚠️  The merged model has no sparsity pattern")
    if report.update_lost:
        print(
            f"⚠️  Projected: {report.update_lost:.1%} of the squared update fell on pruned tiles and was thrown away; evaluate the result"
        )
    mark = "⚠️ " if report.update_lost else "✅"
    print(
        f"{mark} Logits, merged against adapter: largest difference {report.logits_error_fp32:.1e} of the largest logit before "
        f"rounding, {report.logits_error:.1e} as written"
    )
    if report.quantised is not None:
        found = report.quantised
        print(
            f"ℹ️  Base in {found.quantisation} in training, merged into its {found.into} weights: logits differ from the quantised base's "
            f"with the adapter by {found.logits_error:.1e} of the largest; de-quantised and original weights by "
            f"{found.other_logits_difference:.1e} (--into)"
        )
    print(f"Merged model saved in {report.out}")
    return 0
