"""Classifiers over real processes: strategies against one process, and a killed run against the uninterrupted one."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.classes import encoder_base, sentences, write_sentences
from tests.runs import assert_identical, losses, options, records, run, run_killed

pytestmark = pytest.mark.long


def _options(folder: Path, out: str, **changes: object) -> list[str]:
    common = {
        "model__task_type": "SEQ_CLS", "model__num_labels": 2, "data__format": "classification", "adapter__lora_dropout": 0,
        "global_batch_size": 16, "max_steps": 8, "eval_steps": 4, "class_weights": "balanced",
    }  # fmt: skip
    return ["train", *options(folder / "base", folder / "data", folder / out, **{**common, **changes})]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("classes")
    encoder_base(made / "base")
    (made / "data").mkdir()
    write_sentences(made / "data" / "train.tsv", sentences(80))
    write_sentences(made / "data" / "dev.tsv", sentences(30, 1))
    run(1, *_options(made, "one"))
    return made


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_two_processes_train_as_one(strategy, folder):
    run(2, *_options(folder, strategy, parallel__strategy=strategy))
    assert losses(folder / strategy) == pytest.approx(losses(folder / "one"), abs=1e-5)
    for found, expected in zip(records(folder / strategy, "eval"), records(folder / "one", "eval"), strict=True):
        assert found["accuracy"] == expected["accuracy"]
        assert found["eval_loss"] == pytest.approx(expected["eval_loss"], abs=1e-5)


def test_killed_and_resumed_is_bit_identical(folder):
    again = {"adapter__lora_dropout": 0.1, "save_steps": 5, "max_steps": 40, "eval_steps": 20}
    run(1, *_options(folder, "whole", **again))
    run_killed(1, (folder / "cut" / "checkpoint-10" / "manifest.json").exists, *_options(folder, "cut", **again))
    assert not (folder / "cut" / "checkpoint-40").exists()
    run(1, *_options(folder, "cut", **again, resume_from_checkpoint="auto"))
    assert_identical(folder / "whole", folder / "cut")
