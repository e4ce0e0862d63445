#!/usr/bin/env python
"""Loss and perplexity of a pruned model with its LoRA weights: a thin front end of `lora-dist eval`.

Default text: the WikiText-2 test split. Any option of `lora-dist eval` may follow (`--max_samples 100`).
"""

from __future__ import annotations

import argparse
import sys

from lora_dist.__main__ import run_reporting
from lora_dist.cli import eval as eval_verb


def to_options(argv: list[str]) -> list[str]:
    """The guide's flags as options of `lora-dist eval`."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--model", required=True, help="model directory")
    parser.add_argument("--lora_weights", help="adapter folder that training wrote")
    parser.add_argument("--config_name", help="config and tokenizer, if the model directory has none of its own")
    parser.add_argument("--dataset_name", default="wikitext", help="hub name, local directory, or local files (default wikitext)")
    parser.add_argument("--dataset_config_name", help="configuration of a hub data set")
    parser.add_argument("--block_size", help="context length in tokens (default: the model's, 2048 at most)")
    flags, extra = parser.parse_known_args(argv)
    names = {"lora_weights": "adapter"}
    return [f"--{names.get(k, k)}={v}" for k, v in vars(flags).items() if v is not None] + extra


if __name__ == "__main__":
    sys.exit(run_reporting("evaluate_ppl.py", lambda: eval_verb.main(to_options(sys.argv[1:]))))
