"""`lora-dist eval MODEL [--adapter DIR]`: perplexity on text."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

from lora_dist.arguments import EvalArgs
from lora_dist.cli.options import Verb, parse


def main(argv: Sequence[str]) -> int:

    verb = Verb("lora-dist eval", EvalArgs.__doc__ or "", positionals=("model",))
    return run(parse(EvalArgs, argv, verb))


def run(args: EvalArgs) -> int:
    """Evaluate by checked arguments and print; used by `scripts/evaluate_ppl.py` too."""
    from lora_dist.engine.evaluate import evaluate
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
        report = evaluate(args, world, progress)
        bars[0].close()
        result = report.result
        console.line(
            f"{report.windows:,} windows of {report.context} tokens ({args.dataset_name}, split {report.split}), "
            f"{result.tokens:,} label tokens, token-weighted, {report.dtype}"
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
                "windows": report.windows,
                "block_size": report.context,
                "dtype": report.dtype,
                "split": report.split,
                "runtime_s": result.runtime_s,
                **{
                    key: getattr(args, key)
                    for key in ("model", "adapter", "strategy", "dataset_name", "dataset_config_name", "special_tokens")
                },
            }
            Path(args.output).write_text(json.dumps(figures, indent=1) + "\n")
        return 0
    finally:
        close_world()
