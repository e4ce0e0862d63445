"""`lora-dist eval MODEL [--adapter DIR]`: loss and perplexity on text; with `--metrics`, `--texts` or `--compare` a report."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

from lora_dist.arguments import EvalArgs
from lora_dist.cli.options import Verb, parse
from lora_dist.process import heavy_imports


def main(argv: Sequence[str]) -> int:
    verb = Verb("lora-dist eval", EvalArgs.__doc__ or "", positionals=("model",))
    return run(parse(EvalArgs, argv, verb))


def run(args: EvalArgs) -> int:
    """Evaluate by checked arguments and print; used by scripts too."""
    return report(args) if args.makes_report else loss(args)


def report(args: EvalArgs) -> int:
    """A report of one model or several; 1 where some of it failed."""
    with heavy_imports():
        from lora_dist.engine.report import evaluate_models
    from lora_dist.monitor.console import Console
    from lora_dist.parallel import close_world, init_world

    world = init_world(device=args.device, always=args.strategy != "ddp")
    try:
        return 1 if evaluate_models(args, world, Console(enabled=world.is_main)).failed else 0
    finally:
        close_world()


def loss(args: EvalArgs) -> int:
    """Loss and perplexity over packed windows."""
    with heavy_imports():
        from lora_dist.engine.evaluate import evaluate
    from lora_dist.evaluation.table import finite
    from lora_dist.log import UserError
    from lora_dist.monitor.advice import perplexity_band
    from lora_dist.monitor.console import Console, perplexity_text
    from lora_dist.parallel import close_world, init_world

    if args.output:
        try:
            Path(args.output).open("a").close()  # found out before the evaluation, not after it
        except OSError as error:
            raise UserError(f"output: {args.output} cannot be written ({error.strerror})") from error
    world = init_world(device=args.device, always=args.strategy != "ddp")
    console = Console(enabled=world.is_main)
    bars = []

    def progress(batches: int) -> Callable[[], None]:
        bars.append(console.bar(batches, "Evaluating"))
        return bars[0].update

    try:
        found = evaluate(args, world, progress)
        bars[0].close()
        result = found.result
        console.line(
            f"{found.windows:,} windows of {found.context} tokens ({args.dataset_name}, split {found.split}), "
            f"{result.tokens:,} label tokens, token-weighted, {found.dtype}"
        )
        console.line(f"Eval Loss: {result.loss:.4f}")
        console.line(f"Eval Perplexity: {perplexity_text(result.perplexity)}")
        ideal, good, fair = args.bands
        band = perplexity_band(result.perplexity, args.bands)
        console.line(f"Band: {band} (ideal up to {ideal:g}, good {good:g}, fair {fair:g}, poor above)")
        if args.output and world.is_main:
            figures = {
                "eval_loss": result.loss,
                "perplexity": result.perplexity,
                "tokens": result.tokens,
                "windows": found.windows,
                "block_size": found.context,
                "dtype": found.dtype,
                "split": found.split,
                "runtime_s": result.runtime_s,
                **{
                    key: getattr(args, key)
                    for key in ("model", "adapter", "strategy", "dataset_name", "dataset_config_name", "special_tokens")
                },
            }
            Path(args.output).write_text(json.dumps(finite(figures), indent=1) + "\n")
        return 0
    finally:
        close_world()
