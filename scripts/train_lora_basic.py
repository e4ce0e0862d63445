#!/usr/bin/env python
"""Classify text with a LoRA on an encoder, under the flags and the config.yaml of the LoRA guide: a front end of `lora-dist train`.

Without a config.yaml the guide's defaults hold. Any dotted option of `lora-dist train` may follow (`--train.seed 7`). Beside the run's
own files, output/ gets best_lora_model.pt, final_lora_model.pt and lora_adapter.pt (key lora_state_dict, tensors only, read with
weights_only=True), training_curves.png and training_log.txt.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from pathlib import Path
from typing import Any

import yaml

from lora_dist.__main__ import run_reporting
from lora_dist.cli import train as train_verb
from lora_dist.cli.options import parse
from lora_dist.config import RunConfig
from lora_dist.log import UserError

DEFAULTS: dict[str, dict[str, Any]] = {
    "lora": {"rank": 8, "alpha": 16, "dropout": 0.05, "target_modules": ["query", "key", "value", "dense"]},
    "training": {"num_epochs": 3, "batch_size": 16, "learning_rate": 3e-4, "max_length": 128, "warmup_ratio": 0.1},
    "data": {"dataset": "glue", "subset": "sst2", "train_split": "train", "eval_split": "validation"},
}
TOP: dict[str, Any] = {"model_name": "bert-base-uncased", "num_labels": None, "output_dir": "output"}
"""num_labels: the GLUE subset's own, else 2"""
COLUMNS = ("text_column", "text_pair_column", "label_column", "column_names")
KEYS = {
    ("lora", "rank"): "adapter.r",
    ("lora", "alpha"): "adapter.lora_alpha",
    ("lora", "dropout"): "adapter.lora_dropout",
    ("training", "num_epochs"): "train.num_train_epochs",
    ("training", "batch_size"): "train.per_device_train_batch_size",
    ("training", "learning_rate"): "train.learning_rate",
    ("training", "max_length"): "data.block_size",
    ("training", "warmup_ratio"): "train.warmup_ratio",
}


def read_config(file: str | None) -> dict[str, Any]:
    """The guide's defaults with a file's values in their places.

    Raises:
        UserError: a file that cannot be read, or keys that are unknown.
    """
    config: dict[str, Any] = {**TOP, **{name: dict(values) for name, values in DEFAULTS.items()}}
    if file is None:
        return config
    try:
        found = yaml.safe_load(Path(file).read_text(encoding="utf-8")) or {}
    except (OSError, yaml.YAMLError) as error:
        raise UserError(f"config: {file} cannot be read ({' '.join(str(error).split())})") from error
    if not isinstance(found, dict):
        raise UserError(f"config: {file} holds {type(found).__name__}, expected keys and values")
    problems = []
    for name, value in found.items():
        if name in DEFAULTS and not isinstance(value, dict):
            problems.append(f"config: {name} holds {value!r}, expected keys and values: {', '.join(DEFAULTS[name])}")
        elif name in DEFAULTS:
            known = (*DEFAULTS[name], *(COLUMNS if name == "data" else ()))
            problems += [
                f"config: {name}.{key} is unknown, expected one of {', '.join(known)}" for key in value if key not in known
            ]
            config[name] |= value
            problems += [
                f"config: {name}.{key} holds nothing, expected a value" for key in value if value[key] is None and key != "subset"
            ]
        elif name in TOP:
            config[name] = value
        else:
            problems.append(f"config: {name} is unknown, expected one of {', '.join(config)}")
    targets = config["lora"]["target_modules"]
    if isinstance(targets, str):
        config["lora"]["target_modules"] = [targets]
    elif not isinstance(targets, list) or not all(isinstance(target, str) for target in targets):
        problems.append(f"config: lora.target_modules holds {targets!r}, expected a list of names")
    if problems:
        raise UserError(problems)
    return config


def to_options(argv: list[str]) -> list[str]:
    """The command line as options of `lora-dist train`."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--config", help="YAML file; default: config.yaml in the working directory, if there is one")
    for section, key in KEYS:
        if key not in ("max_length", "warmup_ratio"):
            parser.add_argument(f"--{key}", help=f"instead of {section}.{key} (default {DEFAULTS[section][key]})")
    parser.add_argument("--push_to_hub", action="store_true", help="upload the adapter (train.push_to_hub)")
    parser.add_argument("--hub_model_id", help="OWNER/NAME (train.hub_model_id)")
    parser.add_argument("--hub_private", action="store_true", help="private repository (train.hub_private)")
    flags, extra = parser.parse_known_args(argv)
    config = read_config(flags.config or ("config.yaml" if Path("config.yaml").is_file() else None))
    for section, key in KEYS:
        if getattr(flags, key, None) is not None:
            config[section][key] = getattr(flags, key)
    data, labels = config["data"], config["num_labels"]
    if labels is None and data["dataset"] != "glue":
        labels = 2
    options = {
        "model.name_or_path": config["model_name"],
        "model.task_type": "SEQ_CLS",
        "model.num_labels": labels,
        "adapter.target_modules": ",".join(config["lora"]["target_modules"]),
        "data.format": "classification",
        "data.dataset_name": data["dataset"],
        "train.output_dir": config["output_dir"],
        "train.eval_strategy": "epoch",
        "train.save_strategy": "epoch",
        "train.max_grad_norm": 1.0,
        **{option: config[section][key] for (section, key), option in KEYS.items()},
        **{f"data.{key}": data[key] for key in COLUMNS if key in data},
    }
    if data.get("subset") and (data["dataset"] == "glue" or data["subset"] != "sst2"):
        options["data.dataset_config_name"] = data["subset"]
    if data["train_split"] != "train":
        options["data.train_split"] = data["train_split"]
    if data["eval_split"] != "validation":
        options["data.validation_split"] = data["eval_split"]
    listed = [f"--{key}={value}" for key, value in options.items() if value is not None]
    if flags.push_to_hub:
        listed.append("--train.push_to_hub=true")
    if flags.hub_model_id:
        listed.append(f"--train.hub_model_id={flags.hub_model_id}")
    if flags.hub_private:
        listed.append("--train.hub_private=true")
    return listed + extra


def export_files(folder: Path, *, ends_with_best: bool) -> None:
    """The guide's .pt files: the best adapter and that of the last step; tensors only.

    Args:
        ends_with_best: the run's own adapter is the best one (train.load_best_model_at_end), not the last.
    """
    import torch
    from safetensors.torch import load_file

    from lora_dist.adapter import ADAPTER_FILE, adapter_folder
    from lora_dist.engine.checkpoint import list_checkpoints, load_checkpoint

    best = last = load_file(str(adapter_folder(folder) / ADAPTER_FILE))
    checkpoints = dict(list_checkpoints(folder))
    if checkpoints and ends_with_best:
        last = load_file(str(checkpoints[max(checkpoints)] / "adapter" / ADAPTER_FILE))
    elif checkpoints:
        step = load_checkpoint(checkpoints[max(checkpoints)]).state.best_step
        best = load_file(str(checkpoints[step] / "adapter" / ADAPTER_FILE)) if step in checkpoints else best
    for name, tensors in (("best_lora_model", best), ("final_lora_model", last), ("lora_adapter", best)):
        torch.save({"lora_state_dict": tensors}, folder / f"{name}.pt")


def run(argv: list[str]) -> int:
    """Train, then write what the guide's readers look for."""
    config = parse(RunConfig, to_options(argv), train_verb.VERB)
    from lora_dist.engine.train import train
    from lora_dist.monitor.curves import draw_curves
    from lora_dist.monitor.epochs import EpochConsole
    from lora_dist.state import METRICS

    tasks: list[Any] = []
    with train_verb.joined(config) as world:
        console = EpochConsole(enabled=world.is_main)
        code = train(config, world, look=lambda parts: tasks.append(parts.task), argv=argv, console=console)
        if code != 0 or not world.is_main:
            return code
    folder = Path(config.train.output_dir)
    data = " ".join(filter(None, (config.data.dataset_name, config.data.dataset_config_name)))
    best, metrics = tasks[0].best, tasks[0].metrics
    measure = best if best != "eval_loss" else "accuracy" if "accuracy" in metrics else metrics[0]
    draw_curves(folder / METRICS, folder / "training_curves.png", measure=measure, title=f"{config.model.name_or_path} on {data}")
    export_files(folder, ends_with_best=config.train.load_best_model_at_end)
    shutil.copyfile(folder / "train.log", folder / "training_log.txt")
    return 0


if __name__ == "__main__":
    sys.exit(run_reporting("train_lora_basic.py", lambda: run(sys.argv[1:])))
