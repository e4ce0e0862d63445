#!/usr/bin/env python
"""Classify text with a LoRA on an encoder, under the flags and the config.yaml of the LoRA guide: a front end of `lora-dist train`.

Without a config.yaml the guide's defaults hold. Any dotted option of `lora-dist train` may follow (`--train.seed 7`). Beside the run's
own files, output/ gets best_lora_model.pt, final_lora_model.pt and lora_adapter.pt (key lora_state_dict, tensors only, read with
weights_only=True), training_curves.png and training_log.txt.
"""

from __future__ import annotations

import argparse
import json
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
TOP: dict[str, Any] = {"model_name": "bert-base-uncased", "num_labels": 2, "output_dir": "output"}
COLUMNS = {"text_column": "text_column", "text_pair_column": "text_pair_column", "label_column": "label_column"}
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
        if name in DEFAULTS and isinstance(value, dict):
            known = {*DEFAULTS[name], *(COLUMNS if name == "data" else ())}
            problems += [
                f"config: {name}.{key} is unknown, expected one of {', '.join(known)}" for key in value if key not in known
            ]
            config[name] |= value
        elif name in TOP:
            config[name] = value
        else:
            problems.append(f"config: {name} is unknown, expected one of {', '.join(config)}")
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
    data = config["data"]
    if data["train_split"] != "train" or data["eval_split"] not in ("validation", "validation_matched"):
        raise UserError(
            f"data.train_split, data.eval_split: found {data['train_split']} and {data['eval_split']}, expected train and validation"
        )
    options = {
        "model.name_or_path": config["model_name"],
        "model.task_type": "SEQ_CLS",
        "model.num_labels": config["num_labels"],
        "adapter.target_modules": ",".join(config["lora"]["target_modules"]),
        "data.format": "classification",
        "data.dataset_name": data["dataset"],
        "train.output_dir": config["output_dir"],
        "train.eval_strategy": "epoch",
        "train.save_strategy": "epoch",
        "train.max_grad_norm": 1.0,
        **{option: config[section][key] for (section, key), option in KEYS.items()},
        **{f"data.{name}": data[key] for key, name in COLUMNS.items() if key in data},
    }
    if data.get("subset") and data["dataset"] == "glue":
        options["data.dataset_config_name"] = data["subset"]
    listed = [f"--{key}={value}" for key, value in options.items()]
    if flags.push_to_hub:
        listed.append("--train.push_to_hub=true")
    if flags.hub_model_id:
        listed.append(f"--train.hub_model_id={flags.hub_model_id}")
    if flags.hub_private:
        listed.append("--train.hub_private=true")
    return listed + extra


def epochs(records: list[dict[str, Any]], total: int) -> list[dict[str, float]]:
    """Mean training loss and accuracy of each epoch, and what it was evaluated to."""
    found = []
    for number in range(1, total + 1):
        steps = [r for r in records if r["event"] == "train" and number - 1 < r["epoch"] <= number]
        evaluated = [r for r in records if r["event"] == "eval" and r["step"] > 0 and number - 1 < r["epoch"] <= number]
        if steps and evaluated:
            means = {key: sum(r[key] for r in steps) / len(steps) for key in ("loss", "accuracy") if key in steps[0]}
            last = {key: evaluated[-1][key] for key in ("eval_loss", "accuracy", "pearson") if key in evaluated[-1]}
            found.append(
                {
                    **{f"train_{key}": value for key, value in means.items()},
                    **{f"eval_{k.removeprefix('eval_')}": v for k, v in last.items()},
                }
            )
    return found


def tell(rows: list[dict[str, float]]) -> None:
    """The guide's lines, an epoch after the other."""
    best = None
    for number, row in enumerate(rows, start=1):
        print(f"📝 Epoch {number}/{len(rows)}")
        print(
            f"  Train Loss: {row['train_loss']:.4f}"
            + (f" | Train Acc: {row['train_accuracy']:.4f}" if "train_accuracy" in row else "")
        )
        score = row.get("eval_accuracy", row.get("eval_pearson"))
        print(
            f"  Eval Loss:  {row['eval_loss']:.4f}"
            + (f" | Eval Acc:  {row['eval_accuracy']:.4f}" if "eval_accuracy" in row else "")
        )
        if score is not None and (best is None or score > best):
            best = score
            print(f"  💾 Best model saved! (eval_acc: {score:.4f})")


def draw(rows: list[dict[str, float]], file: Path) -> None:
    """Loss left, accuracy right (of a number to predict: Pearson's correlation)."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    score = "accuracy" if "eval_accuracy" in rows[0] else "pearson"
    figure, axes = pyplot.subplots(1, 2, figsize=(11, 4))
    for axis, key, title in zip(axes, ("loss", score), ("Loss", score.capitalize()), strict=True):
        for kind, mark in (("train", "o-"), ("eval", "s-")):
            if f"{kind}_{key}" in rows[0]:
                axis.plot(range(1, len(rows) + 1), [row[f"{kind}_{key}"] for row in rows], mark, label=kind)
        axis.set_title(title)
        axis.set_xlabel("Epoch")
        axis.set_xticks(range(1, len(rows) + 1))
        axis.grid(alpha=0.3)
        axis.legend()
    figure.tight_layout()
    figure.savefig(file, dpi=120)
    pyplot.close(figure)


def export_files(folder: Path) -> None:
    """The guide's .pt files: the best adapter (which a run ends with) and that of the last step; tensors only."""
    import torch
    from safetensors.torch import load_file

    from lora_dist.engine.checkpoint import list_checkpoints

    best = load_file(str(folder / "adapter_model.safetensors"))
    last = max(list_checkpoints(folder))[1] / "adapter" / "adapter_model.safetensors"
    for name, tensors in (("best_lora_model", best), ("final_lora_model", load_file(str(last))), ("lora_adapter", best)):
        torch.save({"lora_state_dict": tensors}, folder / f"{name}.pt")


def statistics(parts: Any) -> None:
    """The true counts: a head that is trained counts once, its frozen original not at all."""
    if not parts.world.is_main:
        return
    shapes = parts.strategy.shapes
    trainable = sum(shape.numel() for shape in shapes.values())
    base = sum(p.numel() for name, p in parts.model.named_parameters() if name not in shapes and ".original_module." not in name)
    print("📊 Parameter Statistics:")
    print(f"  Total parameters:     {base + trainable:>17,}")
    print(f"  Trainable parameters: {trainable:>17,}")
    print(f"  Frozen parameters:    {base:>17,}")
    print(f"  Trainable percentage: {100 * trainable / (base + trainable):>16.2f}%")


def run(argv: list[str]) -> int:
    """Train, then write what the guide's readers look for."""
    config = parse(RunConfig, to_options(argv), train_verb.VERB)
    from lora_dist.engine.train import train

    with train_verb.joined(config) as world:
        code = train(config, world, look=statistics, argv=argv)
        if code != 0 or not world.is_main:
            return code
    folder = Path(config.train.output_dir)
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    rows = epochs(records, max(1, round(config.train.num_train_epochs)))
    if rows:
        tell(rows)
        draw(rows, folder / "training_curves.png")
    export_files(folder)
    shutil.copyfile(folder / "train.log", folder / "training_log.txt")
    return 0


if __name__ == "__main__":
    sys.exit(run_reporting("train_lora_basic.py", lambda: run(sys.argv[1:])))
