#!/usr/bin/env python
"""Recover a block-pruned model on plain text, under the flags of the Wanda guide: a thin front end of `lora-dist train`.

Flags are the guide's own, several of them gone from current transformers; `--help` lists them. Any dotted option of
`lora-dist train` may follow (`--train.warmup_ratio 0.03`). Run it with python, torchrun or accelerate launch.
"""

from __future__ import annotations

import argparse
import sys

from flags import add_switch, make_parser
from flags import to_options as flags_to_options

from lora_dist.__main__ import run_reporting
from lora_dist.cli import eval as eval_verb
from lora_dist.cli import train as train_verb
from lora_dist.cli.options import parse
from lora_dist.config import RunConfig

# flag -> (key of lora-dist train, default of the guide, help)
VALUES = {
    "model_name_or_path": ("model.name_or_path", None, "pruned model directory"),
    "config_name": ("model.config_name", None, "config and tokenizer, if the model directory has none of its own"),
    "dataset_name": ("data.dataset_name", "wikitext", "hub name, local directory, or local files"),
    "dataset_config_name": ("data.dataset_config_name", None, "configuration of a hub data set"),
    "validation_file": ("data.validation_file", None, "local files to evaluate on"),
    "num_train_epochs": ("train.num_train_epochs", "1", "passes over the data"),
    "max_steps": ("train.max_steps", None, "optimizer steps, instead of epochs"),
    "block_size": ("data.block_size", "1024", "context length in tokens (not the pruning tile)"),
    "per_device_train_batch_size": ("train.per_device_train_batch_size", "1", "windows a device in training"),
    "per_device_eval_batch_size": ("train.per_device_eval_batch_size", "8", "windows a device in evaluation"),
    "gradient_accumulation_steps": ("train.gradient_accumulation_steps", "1", "micro-batches a step"),
    "max_train_samples": ("data.max_train_samples", "30000", "training windows at most"),
    "max_eval_samples": ("data.max_eval_samples", "128", "evaluation windows at most"),
    "learning_rate": ("train.learning_rate", "1e-4", "peak learning rate"),
    "output_dir": ("train.output_dir", None, "run folder"),
    "logging_steps": ("train.logging_steps", "10", "log every so many steps"),
    "eval_steps": ("train.eval_steps", "200", "evaluate every so many steps"),
    "save_steps": ("train.save_steps", "500", "checkpoint every so many steps"),
    "evaluation_strategy": ("train.eval_strategy", "steps", "steps, epoch or no"),
    "save_strategy": ("train.save_strategy", "steps", "steps, epoch or no"),
    "save_total_limit": ("train.save_total_limit", "3", "checkpoints kept; never the best or the newest removed"),
    "metric_for_best_model": ("train.metric_for_best_model", "eval_loss", "eval_loss or perplexity"),
    "resume_from_checkpoint": ("train.resume_from_checkpoint", None, "checkpoint folder, or auto"),
    "seed": ("train.seed", None, "seed"),
    "lora_r": ("adapter.r", "8", "rank"),
    "lora_alpha": ("adapter.lora_alpha", "16", "scale"),
    "lora_dropout": ("adapter.lora_dropout", "0.05", "dropout on the adapter's input"),
    "lora_target_modules": ("adapter.target_modules", "q_proj,v_proj", "comma-separated names, or all-linear"),
    "lora_mask": ("adapter.mask", "block", "block (refuses a base without tiles), auto, element, none"),
    "pruning_block": ("adapter.block", None, "side of the pruning tile, if the model has no stored mask (default 16)"),
    "wandb_project": ("tracker.wandb_project", None, "log to this wandb project"),
}
SWITCHES = {
    "overwrite_output_dir": ("train.overwrite_output_dir", "move an older run aside (never deleted)"),
    "logging_first_step": ("train.logging_first_step", "log step 1 as well"),
    "load_best_model_at_end": ("train.load_best_model_at_end", "end with the best evaluated adapter"),
    "gradient_checkpointing": ("train.gradient_checkpointing", "less memory, more time"),
    "bf16": ("train.bf16", "compute in bfloat16"),
    "fp16": ("train.fp16", "compute in float16"),
}


def to_options(argv: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """The flags, and the same as options of `lora-dist train`."""
    parser = make_parser(__doc__, VALUES, SWITCHES)
    add_switch(parser, "do_train", "train")
    add_switch(parser, "do_eval", "evaluate while training")
    flags, extra = parser.parse_known_args(argv)
    options = flags_to_options(flags, VALUES, SWITCHES)
    if flags.do_eval == "false":
        options.append("--train.eval_strategy=no")
    if flags.wandb_project:
        options.append("--tracker.report_to=wandb")
    return flags, options + extra


def run(argv: list[str]) -> int:
    """Train, or only evaluate where `--do_train` is not given."""
    flags, options = to_options(argv)
    config = parse(RunConfig, options, train_verb.VERB)
    if flags.do_train == "true":
        return train_verb.run(config)
    if flags.do_eval == "false":
        from lora_dist.log import UserError

        raise UserError("do_train, do_eval: found neither, expected --do_train, --do_eval or both")
    from lora_dist.arguments import EvalArgs

    return eval_verb.run(
        EvalArgs(
            model=config.model.name_or_path,
            config_name=config.model.config_name,
            dataset_name=config.data.validation_file or config.data.dataset_name,
            dataset_config_name=config.data.dataset_config_name,
            split="validation",
            text_column=config.data.text_column or "text",
            document_separator=config.data.document_separator,
            special_tokens=config.data.special_tokens,
            cache_dir=config.data.cache_dir,
            dtype="bfloat16" if config.train.bf16 else "float16" if config.train.fp16 else "float32",
            device=config.parallel.device,
            block_size=config.data.block_size,
            max_samples=config.data.max_eval_samples,
            batch_size=config.train.per_device_eval_batch_size,
        )
    )


if __name__ == "__main__":
    sys.exit(run_reporting("finetune_lm.py", lambda: run(sys.argv[1:])))
