#!/usr/bin/env python
"""Instruction-tune a pruned model, whole or structured, under the flags of the HGSP guide: a thin front end of `lora-dist train`,
`merge` and `eval`.

    python scripts/finetune_lora.py --pruned_model results/HGSP_2000/pruned_model.bin --data_path alpaca.json

Writes to --output_dir: lora_adapter/, pruned_model/ and pruned_model.bin (adapter merged), evaluation/evaluation_results.json and
checkpoint-*/. Run it with python, torchrun or accelerate launch. Any dotted option of `lora-dist train` may follow
(`--train.bf16 --train.warmup_ratio 0.06`). docs/instruct.md goes through it step by step.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import sys
import traceback
from pathlib import Path
from typing import TYPE_CHECKING

import run_evaluation
from flags import add_switch, make_parser
from flags import to_options as flags_to_options

from lora_dist.__main__ import run_reporting
from lora_dist.arguments import EvalArgs
from lora_dist.cli import train as train_verb
from lora_dist.cli.options import Verb, names, parse
from lora_dist.config import RunConfig
from lora_dist.log import UserError
from lora_dist.models.hub import PICKLES

if TYPE_CHECKING:
    from lora_dist.monitor.console import Console
    from lora_dist.parallel import World

# flag -> (key of lora-dist train, default of the guide, help)
VALUES = {
    "pruned_model": ("model.name_or_path", None, "pruned model: directory, or a pickled .bin holding {'model','tokenizer'}; required"),
    "data_path": ("data.dataset_name", "yahma/alpaca-cleaned", "hub name, or local files of examples (comma-separated)"),
    "cutoff_len": ("data.block_size", "256", "longest example in tokens"),
    "prompt_template_name": ("data.prompt_template", "alpaca", "templates/NAME.json here or in the package, or a path"),
    "micro_batch_size": ("train.per_device_train_batch_size", "4", "examples a device holds at once"),
    "num_epochs": ("train.num_train_epochs", "2", "passes over the data"),
    "learning_rate": ("train.learning_rate", "1e-4", "peak learning rate"),
    "lora_r": ("adapter.r", "8", "rank"),
    "lora_alpha": ("adapter.lora_alpha", "16", "scale"),
    "lora_dropout": ("adapter.lora_dropout", "0.05", "dropout on the adapter's input"),
    "lora_target_modules": (
        "adapter.target_modules", "q_proj,k_proj,v_proj,o_proj,gate_proj,down_proj,up_proj", "comma-separated names, or all-linear",
    ),
    "resume_from_checkpoint": ("train.resume_from_checkpoint", None, "checkpoint folder, or auto"),
    "packing_length": ("data.packing_length", None, "tokens of a row with --packing; none: --cutoff_len"),
    "eval_steps": ("train.eval_steps", "200", "evaluate on the held-out examples every so many steps"),
    "save_steps": ("train.save_steps", "200", "checkpoint every so many steps"),
}  # fmt: skip
SWITCHES = {
    "train_on_inputs": ("data.train_on_inputs", "loss on the prompt as well; off: on the answer only"),
    "add_eos_token": ("data.add_eos_token", "learn to end an answer"),
    "group_by_length": ("train.group_by_length", "examples of like length in a step: less padding"),
    "packing": ("data.packing", "several examples in a row, which do not attend to each other"),
    "overwrite_output_dir": ("train.overwrite_output_dir", "move an older run aside (never deleted)"),
}
EVALUATION = {
    "eval_wikitext2": "local file of WikiText-2's test text; default: the hub",
    "eval_ptb": "local file of PTB's test text; default: the hub",
    "eval_task_data": "folder of local files for the zero-shot tasks; default: the hub",
    "eval_limit": "questions of each zero-shot task at most",
}
FLAG_OF = {key.replace(".", "_", 1): flag for flag, (key, *_) in [*VALUES.items(), *SWITCHES.items()]} | {
    "data_holdout_windows": "val_set_size",
    "train_global_batch_size": "batch_size",
    "train_output_dir": "output_dir",
    "tracker_wandb_project": "wandb_project",
}
"""as `names` takes it"""
FIXED = ("--data.format=auto", "--train.adapter_subfolder=lora_adapter", "--train.save_total_limit=3")
RESULTS = Path("evaluation/evaluation_results.json")


def to_options(argv: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """The flags, and the same as options of `lora-dist train`.

    Raises:
        UserError: no model, or numbers that do not go together.
    """
    parser = make_parser(__doc__, VALUES, SWITCHES)
    parser.add_argument("--output_dir", help="run folder (default results/<model_name>_finetuned)")
    parser.add_argument("--val_set_size", default="2000", help="examples held out for evaluation, 0: none (default 2000)")
    parser.add_argument("--batch_size", default="64", help="examples in a step over all devices (default 64)")
    parser.add_argument("--wandb_project", default="", help="log to this wandb project (default: none)")
    add_switch(parser, "skip_evaluation", "do not evaluate the merged model at the end")
    add_switch(parser, "trust_pickle", "open a pickled model whatever classes it holds: it may run any code")
    for flag, text in EVALUATION.items():
        parser.add_argument(f"--{flag}", help=text)
    flags, extra = parser.parse_known_args(train_verb.without_launcher_flags(argv))
    if not flags.pruned_model:
        raise UserError("pruned_model: found nothing, expected --pruned_model with the directory of a model or a pickled .bin")
    flags.output_dir = flags.output_dir or default_output(flags.pruned_model)
    options = [*FIXED, *flags_to_options(flags, VALUES, SWITCHES), f"--train.output_dir={flags.output_dir}"]
    held_out = _whole(flags, "val_set_size", least=0)
    options.append(f"--data.holdout_windows={held_out}" if held_out else "--train.eval_strategy=no")
    if flags.eval_limit is not None:
        _whole(flags, "eval_limit")
    if flags.wandb_project:
        options += [f"--tracker.wandb_project={flags.wandb_project}", "--tracker.report_to=wandb"]
    return flags, [*options, *_batch(flags), *extra]


def default_output(pruned_model: str) -> str:
    """results/HGSP_2000/pruned_model.bin -> results/HGSP_2000_finetuned; out/pruned -> results/pruned_finetuned."""
    path = Path(pruned_model)
    if is_pickle(pruned_model):
        path = path.absolute().parent
    return str(Path("results", f"{path.name or path.absolute().name}_finetuned"))


def is_pickle(pruned_model: str) -> bool:
    return Path(pruned_model).suffix in PICKLES and not Path(pruned_model).is_dir()


def _whole(flags: argparse.Namespace, name: str, least: int = 1) -> int:
    text = getattr(flags, name)
    if not text.isdecimal() or int(text) < least:
        raise UserError(f"{name}: found {text}, expected a whole number from {least} up")
    return int(text)


def _batch(flags: argparse.Namespace) -> list[str]:
    """Accumulation from --batch_size. A run that goes on keeps its batch on any number of processes, whole rounds or not.

    Raises:
        UserError: a remainder.
    """
    total, micro = _whole(flags, "batch_size"), _whole(flags, "micro_batch_size")
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    at_once = micro * processes
    goes_on = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0 or (
        flags.resume_from_checkpoint == "auto" and any(Path(flags.output_dir).glob("checkpoint-*"))
    )
    goes_on = goes_on or flags.resume_from_checkpoint not in (None, "auto")
    if total % at_once and not goes_on:
        below = total // at_once * at_once
        raise UserError(
            f"batch_size: found {total} with micro_batch_size {micro} on {processes} process{'es' if processes > 1 else ''}, expected a "
            f"multiple of {at_once}, such as {f'{below} or ' if below else ''}{below + at_once}"
        )
    rounds = max(1, -(-total // at_once))
    return [f"--train.gradient_accumulation_steps={rounds}", f"--train.global_batch_size={total}"]


def run(argv: list[str]) -> int:
    """Train, merge, evaluate. The exit code: that of training where it did not end well, 1 where the evaluation failed.

    Raises:
        UserError: under the names of the flags.
    """
    with names(**FLAG_OF):
        return _run(argv)


def _run(argv: list[str]) -> int:
    flags, options = to_options(argv)
    config = parse(RunConfig, options, train_verb.VERB)
    from lora_dist.engine.data import data_kind
    from lora_dist.engine.train import train
    from lora_dist.monitor.console import Console

    with train_verb.joined(config) as world:
        console = Console(enabled=world.is_main)
        introduce(flags, config, world.size, console)
        if is_pickle(flags.pruned_model):
            data_kind(config, world)  # what is wrong with the data is found before the conversion
            config.model.name_or_path = str(world.on_main(lambda: convert(flags, config)))
            console.note(f"training on the directory it was converted to: {config.model.name_or_path}")
        elif not Path(flags.pruned_model).is_absolute() and not Path(flags.pruned_model).exists():
            console.note(f"{flags.pruned_model} is no directory here: taken as a name on the hub")
        else:
            console.line("✅ Pruned model found")
        console.line()
        console.line("🚀 Starting LoRA fine-tuning...")
        console.line()
        code = train(config, world, argv=sys.argv[1:])
        if code != 0 or not world.broadcast(completed(Path(config.train.output_dir))):
            return code
        console.open_log(Path(config.train.output_dir, "train.log"))
        try:
            return finish(flags, config, world, console)
        finally:
            console.close()


def convert(flags: argparse.Namespace, config: RunConfig) -> Path:
    """The directory of a pickled model, beside it where that place can be written, made once. Rank 0 only.

    Raises:
        UserError: no such file; a pickle with classes that are not known to be harmless.
    """
    from lora_dist.engine.convert import converted

    if not Path(flags.pruned_model).is_file():
        raise UserError(f"pruned_model: found no file {flags.pruned_model}, expected a pickled model or the directory of one")
    return converted(
        flags.pruned_model,
        fallback=f"{config.train.output_dir}_base",
        trust_pickle=flags.trust_pickle == "true",
        config_name=config.model.config_name,
    )


def introduce(flags: argparse.Namespace, config: RunConfig, processes: int, console: Console) -> None:
    """What is about to be done, as the first thing on the console."""
    train, adapter = config.train, config.adapter
    console.line("=" * 40)
    console.line("LoRA Fine-tuning Configuration")
    console.line("=" * 40)
    console.line(f"Pruned model: {flags.pruned_model}")
    console.line(f"Output directory: {train.output_dir}")
    console.line(f"Dataset: {config.data.dataset_name}")
    console.line(f"Validation samples: {0 if train.eval_strategy == 'no' else config.data.holdout_windows}")
    console.line(f"Prompt template: {config.data.prompt_template}")
    console.line(
        f"Batch size: {train.global_batch_size} = {train.per_device_train_batch_size} a device x {processes} "
        f"process{'es' if processes > 1 else ''} x {train.gradient_accumulation_steps} accumulated"
    )
    console.line(f"Learning rate: {train.learning_rate:g}")
    console.line(f"Cutoff length: {config.data.block_size}")
    console.line(f"Epochs: {train.num_train_epochs:g}")
    console.line(
        f"LoRA: r {adapter.r}, alpha {adapter.lora_alpha:g}, dropout {adapter.lora_dropout:g}, {', '.join(adapter.target_modules)}"
    )
    console.line("=" * 40)
    console.line()
    if not config.data.add_eos_token:
        console.note("--add_eos_token is off: the model does not learn to end its answers")


def completed(output_dir: Path) -> bool:
    """Whether the run there is at its end: the exit code is 0 as well for one that stops under a torchrun that would start it again."""
    try:
        return bool(json.loads((output_dir / "status.json").read_bytes())["state"] == "completed")
    except (OSError, ValueError):
        return False  # another node without this disk; rank 0 decides


def finish(flags: argparse.Namespace, config: RunConfig, world: World, console: Console) -> int:
    """Collective: the merged model in both forms, then its evaluation."""
    from lora_dist.engine.deliver import MODEL, PICKLE, deliver
    from lora_dist.engine.wrap import SHARDED_BASE
    from lora_dist.parallel.ds_config import resolve_strategy

    out = Path(config.train.output_dir)
    sharded = resolve_strategy(config.parallel.strategy, config.parallel.ds_config) in SHARDED_BASE
    console.line("Merging the adapter into the model...")
    report = deliver(
        config.model.name_or_path,
        out / config.train.adapter_subfolder,
        out,
        world,
        sharded=sharded,
        densify=config.adapter.mask == "none",
        config_name=config.model.config_name,
        trust_remote_code=config.model.trust_remote_code,
    )
    if report.pattern_digest:
        console.line(
            f"✅ Pattern kept: all {report.zero_tiles:,} pruned tiles are exactly 0.0 (digest {report.pattern_digest[:12]})"
        )
    console.line(f"✅ Fine-tuned model saved in {out / MODEL} and {out / PICKLE}")
    if flags.skip_evaluation == "true":
        return 0
    options = evaluation_options(flags, out, sharded, config)
    failed = evaluate(options, world, console)
    for line in failed:
        console.warning(line)
    if failed:
        console.line("❌ The evaluation failed, the fine-tuned model is kept. Evaluate it by hand:")
        console.line(f"   python scripts/run_evaluation.py {shlex.join(options)}")
    return 1 if failed else 0


def evaluation_options(flags: argparse.Namespace, out: Path, sharded: bool, config: RunConfig) -> list[str]:
    """For `run_evaluation.py`."""
    from lora_dist.engine.deliver import MODEL

    options = ["--model_path", str(out / MODEL), "--metrics", "all", "--output", str(out / RESULTS)]
    for flag in EVALUATION:
        value = getattr(flags, flag)
        options += [f"--{flag.removeprefix('eval_')}", value] if value is not None else []
    if config.parallel.device != "auto":
        options += ["--device", config.parallel.device]
    return [*options, "--strategy", "fsdp2"] if sharded else options


def evaluate(options: list[str], world: World, console: Console) -> list[str]:
    """Collective: what could not be measured, and why; empty where all went well."""
    console.line()
    console.line("***** Evaluating the fine-tuned model *****")
    try:
        from lora_dist.engine.report import evaluate_models

        args = parse(EvalArgs, run_evaluation.to_options(options), Verb("run_evaluation.py", "", positionals=("model",)))
        return evaluate_models(args, world, console).failed
    except Exception as error:  # whatever it is, the model is there, and how to go on is said
        console.log_only(traceback.format_exc())
        return [" ".join(str(error).split()) or type(error).__name__]


if __name__ == "__main__":
    sys.exit(run_reporting("finetune_lora.py", lambda: run(sys.argv[1:])))
