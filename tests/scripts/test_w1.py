"""Workflow W1: the shell script as a user calls it, its console line by line, and every flag of its front ends."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import evaluate_ppl
import finetune_lm
import pytest

from lora_dist.cli.options import parse
from lora_dist.cli.train import VERB
from lora_dist.config import RunConfig
from tests.runs import ROOT, environment

# Pieces of the console in their order, as regular expressions; the guide's words are the contract.
CONSOLE = [
    r"={40}", "LoRA Fine-tuning Configuration", r"={40}",
    "Pruned model: .*base", "Config: ", "Output directory: ", "Dataset: ", "Training samples: 40", "Learning rate: 3e-3", "Block size: 32",
    "Epochs: 1", r"={40}", "✅ Pruned model found", "🚀 Starting LoRA fine-tuning...",
    r"Loading checkpoint shards: 100%\|█+\| 1/1 ", "✅ Model loaded successfully", "Applying LoRA configuration...",
    r"trainable params: [\d,]+ \|\| all params: [\d,]+ \|\| trainable%: \d+\.\d{3}%",
    r"✅ LoRA applied: only \d+\.\d{3}% parameters are trainable", r"Loading dataset '.*text.txt'\.\.\.", "✅ Dataset loaded",
    "  - Train samples: 40 sequences", "  - Eval samples: 8 sequences",
    r"\*{5} Running training \*{5}", "  Num examples = 40", "  Num Epochs = 1", "  Instantaneous batch size per device = 2",
    r"  Total train batch size \(w\. parallel, distributed & accumulation\) = 4", "  Gradient Accumulation steps = 2",
    "  Total optimization steps = 10", r"  Number of trainable parameters = [\d,]+",
    r"\*{5} Running Evaluation \*{5}", "  Num examples = 8", "  Batch size = 8", r"Evaluating: 100%\|█+\| 1/1 ",
    r"\{'eval_loss': [\d.]+, 'eval_runtime': [\d.]+, 'eval_samples_per_second': [\d.]+, 'eval_steps_per_second': [\d.]+, 'epoch': 0\}",
    "Eval at step 0:", r"  - Eval Loss: [\d.]+", r"  - Perplexity: [\d.]+", r"  - Best so far: Yes ✅",
    r"\{'loss': [\d.]+, 'learning_rate': 3e-03, 'epoch': 0\.1\}",
    r"Step 1/10   \[=*> *\] 10\.0%  \| Loss: [\d.]+ \| LR: 3e-03 \| Time: 0:00:\d\d", r"Expected training time: ~0:0\d:\d\d",
    r"Step 10/10   \[=+>\] 100\.0%", "Eval at step 10:", r"  - Best so far: Yes ✅ \(improved from [\d.]+\)",
    "Saving model checkpoint to .*checkpoint-10", "Configuration saved in .*adapter_config.json",
    "Model weights saved in .*adapter_model.safetensors", "✅ Checkpoint saved at step 10",
    r"Training completed in 0:0\d:\d\d", r"\*{5} Running Final Evaluation \*{5}", r"\*{5} Final eval results \*{5}",
    r"  eval_loss = [\d.]+", r"  eval_runtime = [\d.]+", r"  eval_samples_per_second = [\d.]+", r"  eval_steps_per_second = [\d.]+",
    r"  perplexity = [\d.]+", r"  epoch = 1\.0", r"✅ Final Perplexity: [\d.]+", r"   \(Improved from [\d.]+ → [\d.]+, reduction: \d+\.\d\d%\)",
    "Saving model checkpoint to .*out$", "Configuration saved in .*/out/adapter_config.json",
    "Model weights saved in .*/out/adapter_model.safetensors", "Tokenizer saved in .*/out/tokenizer_config.json",
    r"\*{5} Training summary \*{5}", "  Total steps: 10", r"  Total time: 0:0\d:\d\d", r"  Final train loss: [\d.]+",
    r"  Final eval loss: [\d.]+",
    r"  Final perplexity: [\d.]+", "  Best checkpoint: checkpoint-10", r"={40}", "LoRA Fine-tuning Complete!", r"={40}",
    "LoRA weights saved to: .*/out$", "Next steps:", "1. Evaluate the fine-tuned model:", "./scripts/evaluate_lora_block.sh",
    "2. Merge it, pattern kept:  lora-dist merge ", r"={40}",
]  # fmt: skip


def shell(script: str, *argv: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """Output and errors as `tee` would see them, in one stream."""
    env = environment(PYTHON=sys.executable, **variables)
    return subprocess.run(
        ["bash", str(ROOT / "scripts" / script), *argv], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=env
    )


def variables(base: Path, text: Path, out: Path) -> dict[str, str]:
    return {
        "PRUNED_MODEL": str(base), "DATASET": str(text), "OUTPUT_DIR": str(out), "BLOCK_SIZE": "32", "MAX_TRAIN_SAMPLES": "40",
        "MAX_EVAL_SAMPLES": "8", "LEARNING_RATE": "3e-3", "BATCH_SIZE": "2", "GRADIENT_ACCUMULATION": "2", "LORA_DROPOUT": "0", "NPROC": "1",
    }  # fmt: skip


def assert_in_order(text: str, patterns: list[str]) -> None:
    lines = [part for line in text.splitlines() for part in line.split("\r")]
    position = 0
    for pattern in patterns:
        found = next((i for i in range(position, len(lines)) if re.search(pattern, lines[i])), None)
        assert found is not None, f"{pattern!r} does not follow {lines[max(0, position - 1)]!r} in\n{text}"
        position = found + 1


@pytest.fixture(scope="module")
def finished(tiny_base, tiny_text, tmp_path_factory):
    out = tmp_path_factory.mktemp("w1") / "out"
    done = shell(
        "run_lora_finetune_block.sh", "--data.cache_dir", str(out.parent / "cache"), **variables(tiny_base, tiny_text, out)
    )
    assert done.returncode == 0, done.stdout
    return out, done.stdout


def test_the_console_shows_the_guides_lines_in_its_order(finished):
    assert_in_order(finished[1], CONSOLE)


def test_the_log_holds_the_same_lines(finished):
    out, _ = finished
    log = (out / "train.log").read_text()
    start = next(i for i, pattern in enumerate(CONSOLE) if "Model loaded" in pattern)
    assert_in_order(log, CONSOLE[start:])
    assert "\r" not in log
    logged = [ast.literal_eval(line) for line in log.splitlines() if line.startswith("{'loss':")]
    assert len(logged) == 2 and all(set(row) == {"loss", "learning_rate", "epoch"} for row in logged)
    assert "\n\n\n" not in log


def test_a_second_run_moves_the_first_aside_and_uses_the_cached_text(finished, tiny_base, tiny_text):
    out, _ = finished
    first = (out / "adapter_model.safetensors").read_bytes()
    done = shell(
        "run_lora_finetune_block.sh", "--data.cache_dir", str(out.parent / "cache"), **variables(tiny_base, tiny_text, out)
    )
    assert done.returncode == 0, done.stdout
    assert "Found cached dataset" in done.stdout and "moved the older run aside" in done.stdout
    (aside,) = out.parent.glob("out.old-*")
    assert (aside / "adapter_model.safetensors").read_bytes() == first == (out / "adapter_model.safetensors").read_bytes()


def test_evaluation_prints_loss_and_perplexity_of_the_adapter(finished, tiny_base, tiny_text):
    out, console = finished
    evaluate = {"PRUNED_MODEL": str(tiny_base), "DATASET": str(tiny_text), "BLOCK_SIZE": "32", "NPROC": "1"}
    done = shell("evaluate_lora_block.sh", "--cache_dir", str(out.parent / "cache"), LORA_WEIGHTS=str(out), **evaluate)
    assert done.returncode == 0, done.stdout
    with_adapter = float(re.search(r"^Eval Perplexity: ([\d.]+)", done.stdout, re.M)[1])
    assert re.search(r"^Eval Loss: [\d.]+", done.stdout, re.M) and "Band: " in done.stdout
    pruned = float(re.search(r"Improved from ([\d.]+)", console)[1])
    assert with_adapter < pruned


def test_a_missing_model_is_refused_before_anything_runs(tmp_path):
    done = shell("run_lora_finetune_block.sh", PRUNED_MODEL=str(tmp_path / "nowhere"), OUTPUT_DIR=str(tmp_path / "out"))
    assert done.returncode == 2 and "found no model in" in done.stdout and not (tmp_path / "out").exists()


def test_bad_input_keeps_its_exit_code_through_the_shell(tiny_base, tmp_path):
    values = variables(tiny_base, tmp_path / "no.txt", tmp_path / "out")
    done = shell("run_lora_finetune_block.sh", **values)
    assert (
        done.returncode == 2 and "finetune_lm.py: " in done.stdout and "no.txt" in done.stdout and "Traceback" not in done.stdout
    )


NEEDED = ["--model_name_or_path", "m", "--output_dir", "o", "--do_train", "--do_eval"]
FLAGS = [
    ("--config_name c", "model.config_name", "c"),
    ("--dataset_name d", "data.dataset_name", "d"),
    ("--dataset_config_name c", "data.dataset_config_name", "c"),
    ("--num_train_epochs 3", "train.num_train_epochs", 3.0),
    ("--block_size 77", "data.block_size", 77),
    ("--per_device_train_batch_size 5", "train.per_device_train_batch_size", 5),
    ("--per_device_eval_batch_size 6", "train.per_device_eval_batch_size", 6),
    ("--gradient_accumulation_steps 7", "train.gradient_accumulation_steps", 7),
    ("--max_train_samples 11", "data.max_train_samples", 11),
    ("--max_eval_samples 12", "data.max_eval_samples", 12),
    ("--learning_rate 2e-5", "train.learning_rate", 2e-5),
    ("--overwrite_output_dir", "train.overwrite_output_dir", True),
    ("--logging_steps 13", "train.logging_steps", 13),
    ("--eval_steps 14", "train.eval_steps", 14),
    ("--save_steps 15", "train.save_steps", 15),
    ("--logging_first_step", "train.logging_first_step", True),
    ("--evaluation_strategy epoch", "train.eval_strategy", "epoch"),
    ("--save_strategy epoch", "train.save_strategy", "epoch"),
    ("--save_total_limit 4", "train.save_total_limit", 4),
    ("--load_best_model_at_end", "train.load_best_model_at_end", True),
    ("--load_best_model_at_end False", "train.load_best_model_at_end", False),
    ("--metric_for_best_model perplexity", "train.metric_for_best_model", "perplexity"),
    ("--gradient_checkpointing", "train.gradient_checkpointing", True),
    ("--resume_from_checkpoint r", "train.resume_from_checkpoint", "r"),
    ("--lora_r 3", "adapter.r", 3),
    ("--lora_alpha 5", "adapter.lora_alpha", 5.0),
    ("--lora_dropout 0.3", "adapter.lora_dropout", 0.3),
    ("--lora_target_modules k_proj,o_proj", "adapter.target_modules", ["k_proj", "o_proj"]),
    ("--wandb_project w", "tracker.wandb_project", "w"),
    ("--wandb_project w", "tracker.report_to", ["wandb"]),
    ("--train.warmup_ratio 0.1", "train.warmup_ratio", 0.1),
]


def read(config: RunConfig, key: str):
    section, name = key.split(".")
    return getattr(getattr(config, section), name)


@pytest.mark.parametrize("flag,key,value", FLAGS, ids=[f"{f[0]} {f[1]}" for f in FLAGS])
def test_every_flag_takes_effect(flag, key, value):
    config = parse(RunConfig, finetune_lm.to_options([*NEEDED, *flag.split()])[1], VERB)
    assert read(config, key) == value


def test_the_guides_defaults():
    config = parse(RunConfig, finetune_lm.to_options(NEEDED)[1], VERB)
    expected = {
        "data.dataset_name": "wikitext", "train.num_train_epochs": 1.0, "data.block_size": 1024, "data.max_train_samples": 30000,
        "data.max_eval_samples": 128, "train.learning_rate": 1e-4, "train.per_device_train_batch_size": 1, "train.per_device_eval_batch_size": 8,
        "train.gradient_accumulation_steps": 1, "train.gradient_checkpointing": False, "adapter.r": 8, "adapter.lora_alpha": 16.0,
        "adapter.lora_dropout": 0.05, "adapter.target_modules": ["q_proj", "v_proj"], "adapter.mask": "block", "train.eval_strategy": "steps",
        "tracker.report_to": [],
    }  # fmt: skip
    assert {key: read(config, key) for key in expected} == expected
    assert read(parse(RunConfig, finetune_lm.to_options(NEEDED[:-1])[1], VERB), "train.eval_strategy") == "no"


VARIABLES = {
    "NUM_EPOCHS": ("2", "--num_train_epochs 2"), "BLOCK_SIZE": ("99", "--block_size 99"), "MAX_TRAIN_SAMPLES": ("9", "--max_train_samples 9"),
    "MAX_EVAL_SAMPLES": ("8", "--max_eval_samples 8"), "LEARNING_RATE": ("7e-5", "--learning_rate 7e-5"),
    "BATCH_SIZE": ("3", "--per_device_train_batch_size 3"), "EVAL_BATCH_SIZE": ("4", "--per_device_eval_batch_size 4"),
    "GRADIENT_ACCUMULATION": ("5", "--gradient_accumulation_steps 5"), "GRADIENT_CHECKPOINTING": ("on", "--gradient_checkpointing true"),
    "LORA_R": ("6", "--lora_r 6"), "LORA_ALPHA": ("7", "--lora_alpha 7"), "LORA_DROPOUT": ("0.2", "--lora_dropout 0.2"),
    "LORA_TARGET_MODULES": ("k_proj", "--lora_target_modules k_proj"), "RESUME_CHECKPOINT": ("r", "--resume_from_checkpoint r"),
    "WANDB_PROJECT": ("w", "--wandb_project w"), "DATASET_CONFIG": ("cc", "--dataset_config_name cc"), "DATASET": ("c4", "--dataset_name c4"),
    "CONFIG_NAME": ("cfg", "--config_name cfg"), "OUTPUT_DIR": ("oo", "--output_dir oo"), "NPROC": ("3", "--nproc_per_node 3"),
}  # fmt: skip


def test_every_variable_of_the_script_reaches_the_command(tiny_base, tmp_path):
    """A stand-in for python that prints its arguments."""
    fake = tmp_path / "python"
    fake.write_text('#!/bin/sh\necho "ARGS $*"\n')
    fake.chmod(0o755)
    for name, (value, words) in VARIABLES.items():
        env = {**os.environ, "PYTHON": str(fake), "PRUNED_MODEL": str(tiny_base), "NPROC": "1", name: value}
        done = subprocess.run(
            ["bash", str(ROOT / "scripts" / "run_lora_finetune_block.sh")], capture_output=True, text=True, env=env
        )
        assert words in done.stdout.split("ARGS")[1], (name, done.stdout, done.stderr)
    assert "--dataset_config_name" not in subprocess.run(
        ["bash", str(ROOT / "scripts" / "run_lora_finetune_block.sh")], capture_output=True, text=True,
        env={**os.environ, "PYTHON": str(fake), "PRUNED_MODEL": str(tiny_base), "NPROC": "1", "DATASET": "c4"},
    ).stdout  # fmt: skip


def test_evaluation_flags():
    options = evaluate_ppl.to_options(["--model", "m", "--lora_weights", "l", "--max_samples", "3"])
    assert options == ["--model=m", "--adapter=l", "--dataset_name=wikitext", "--max_samples", "3"]


def test_without_do_train_the_pruned_model_is_only_evaluated(tiny_base, tiny_text, tmp_path):
    other = tmp_path / "validation.txt"
    other.write_text(tiny_text.read_text()[:6000])
    argv = [
        "--model_name_or_path",
        str(tiny_base),
        "--output_dir",
        str(tmp_path / "out"),
        "--dataset_name",
        str(tiny_text),
        "--do_eval",
    ]
    argv += ["--validation_file", str(other), "--block_size", "32", "--data.cache_dir", str(tmp_path / "cache")]
    script = [sys.executable, str(ROOT / "scripts" / "finetune_lm.py")]
    done = subprocess.run([*script, *argv], capture_output=True, text=True, env=environment())
    assert done.returncode == 0, done.stderr
    assert re.search(r"^\d+ windows of 32 tokens \(.*validation.txt", done.stdout, re.M)
    assert re.search(r"^Eval Perplexity: [\d.]+", done.stdout, re.M) and not (tmp_path / "out").exists()


def test_pruning_front_end(tiny_base, tmp_path):
    argv = [
        sys.executable,
        str(ROOT / "scripts" / "main_block.py"),
        "--model",
        str(tiny_base),
        "--sparsity_ratio",
        "0.25",
        "--block_size",
        "8",
    ]
    argv += [
        "--nsamples",
        "4",
        "--seed",
        "1",
        "--save",
        str(tmp_path / "log"),
        "--save_model",
        str(tmp_path / "pruned"),
        "--score",
        "magnitude",
    ]
    done = subprocess.run(argv, capture_output=True, text=True, env=environment())
    assert done.returncode == 0, done.stderr
    from lora_dist.blocks import Pattern

    pattern = Pattern.load(tmp_path / "pruned")
    assert pattern.block == 8 and 0.15 < pattern.sparsity <= 0.26
    assert "8x8" in (tmp_path / "log" / "log_magnitude.txt").read_text()
