#!/usr/bin/env python
"""Prune a model by whole tiles, under the flags of the Wanda guide: a thin front end of `lora-dist prune`.

`--block_size` is the side of the pruning tile here. Any option of `lora-dist prune` may follow (`--calibration FILE`).
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from lora_dist.__main__ import run_reporting
from lora_dist.arguments import PruneArgs
from lora_dist.cli.options import Verb, parse
from lora_dist.cli.prune import run as prune
from lora_dist.log import UserError


def make_parser() -> argparse.ArgumentParser:
    """The guide's flags."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--model", required=True, help="model directory or hub name")
    parser.add_argument("--sparsity_ratio", default="0.5", help="share of the tiles to drop (default 0.5)")
    parser.add_argument("--block_size", default="16", help="side of a tile: 8, 16, 32, ... (default 16)")
    parser.add_argument("--nsamples", default="128", help="calibration windows (default 128)")
    parser.add_argument("--seed", default="0", help="seed of their choice (default 0)")
    parser.add_argument("--save", help="folder for log_wanda.txt: method, tile and sparsity reached")
    parser.add_argument("--save_model", required=True, help="directory to write the pruned model to")
    return parser


def run(argv: list[str]) -> int:
    """Prune, and write the guide's log beside it where asked."""
    flags, extra = make_parser().parse_known_args(argv)
    options = [
        flags.model,
        flags.save_model,
        f"--sparsity={flags.sparsity_ratio}",
        f"--block={flags.block_size}",
        f"--nsamples={flags.nsamples}",
        f"--seed={flags.seed}",
        *extra,
    ]
    args = parse(PruneArgs, options, Verb("main_block.py", PruneArgs.__doc__ or "", positionals=("model", "out")))
    result = prune(args)
    if flags.save and result is not None:
        folder = Path(flags.save)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            line = f"block_{args.score}\t{args.block}x{args.block}\t{result.sparsity:.6f}\n"
            (folder / f"log_{args.score}.txt").write_text("method\ttile\tactual_sparsity\n" + line)
        except OSError as error:
            raise UserError(f"save: {folder} cannot be written ({error.strerror}); the model is in {flags.save_model}") from error
    return 0


if __name__ == "__main__":
    sys.exit(run_reporting("main_block.py", lambda: run(sys.argv[1:])))
