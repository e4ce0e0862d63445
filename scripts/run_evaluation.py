#!/usr/bin/env python
"""Evaluate a model as the guide for structured pruning does: perplexity on WikiText-2 and PTB, zero-shot accuracy of seven tasks, speed
and latency of generation, memory. A thin front end of `lora-dist eval --metrics`; any option of that verb may follow (`--limit 200`).

    python scripts/run_evaluation.py --model_path results/HGSP_2000_finetuned --metrics all --output evaluation.json

Also under torchrun, which spreads perplexity and zero-shot over the processes. Data come from the hub, or from the local files given.
"""

from __future__ import annotations

import argparse
import sys

from lora_dist.__main__ import run_reporting
from lora_dist.arguments import EvalArgs
from lora_dist.cli import eval as eval_verb
from lora_dist.cli.options import Verb, parse


def to_options(argv: list[str]) -> list[str]:
    """The guide's flags as options of `lora-dist eval`."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--model_path", required=True, help="model directory, pickle, or the output folder of finetune_lora.py")
    parser.add_argument("--metrics", default="all", help="all, or some of ppl,zeroshot,speed,memory (default all)")
    parser.add_argument("--output", help="JSON file for the figures; a Markdown table is written beside it")
    parser.add_argument("--wikitext2", metavar="FILE", help="local text of WikiText-2's test split (default: the hub)")
    parser.add_argument("--ptb", metavar="FILE", help="local text of Penn Treebank's test split (default: the hub)")
    parser.add_argument("--task_data", metavar="DIR", help="local files of the zero-shot tasks, one each (default: the hub)")
    flags, extra = parser.parse_known_args(argv)
    texts = [f"{name}={file}" if file else name for name, file in (("wikitext2", flags.wikitext2), ("ptb", flags.ptb))]
    options = {"model": flags.model_path, "metrics": flags.metrics, "texts": ",".join(texts)}
    options |= {key: value for key, value in (("output", flags.output), ("task_data", flags.task_data)) if value is not None}
    return [f"--{key}={value}" for key, value in options.items()] + extra


def run(argv: list[str]) -> int:
    """Check all options together, and evaluate."""
    return eval_verb.run(
        parse(EvalArgs, to_options(argv), Verb("run_evaluation.py", EvalArgs.__doc__ or "", positionals=("model",)))
    )


if __name__ == "__main__":
    sys.exit(run_reporting("run_evaluation.py", lambda: run(sys.argv[1:])))
