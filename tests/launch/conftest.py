"""One small run's YAML, and the same run on one process, which every launcher's has to equal."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from tests.runs import run


@pytest.fixture(scope="session")
def config(tiny_base: Path, tiny_text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six steps with one window a process, in a file whose name has a space."""
    folder = tmp_path_factory.mktemp("launch")
    file = folder / "small run.yaml"
    values = {
        "model": {"name_or_path": str(tiny_base)},
        "data": {
            "dataset_name": str(tiny_text),
            "block_size": 32,
            "holdout_windows": 16,
            "cache_dir": str(folder / "cache"),
        },
        "adapter": {"lora_dropout": 0},
        "parallel": {"strategy": "zero3"},  # the one with most to set up
        "train": {
            "max_steps": 6,
            "per_device_train_batch_size": 1,
            "learning_rate": 3e-3,
            "logging_steps": 1,
            "eval_strategy": "no",
            "save_strategy": "no",
        },
    }
    file.write_text(yaml.safe_dump(values))
    return file


@pytest.fixture(scope="session")
def one_process(config: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Run folder of the same batches on one process."""
    out = tmp_path_factory.mktemp("one") / "out"
    argv = [
        "--config",
        str(config),
        "--train.output_dir",
        str(out),
        "--train.per_device_train_batch_size",
        "2",
        "--strategy",
        "ddp",
    ]
    run(1, "train", *argv, env={"CUDA_VISIBLE_DEVICES": ""})
    return out
