"""Classifiers over real processes: strategies against one process, and a killed run against the uninterrupted one."""

from __future__ import annotations

from pathlib import Path

import pytest

from lora_dist.cli import train as train_verb
from lora_dist.cli.options import parse
from lora_dist.config import RunConfig
from tests.classes import encoder_base, sentences, write_sentences
from tests.runs import assert_identical, losses, options, records, run_killed

pytestmark = pytest.mark.long


def _options(folder: Path, out: str, **changes: object) -> list[str]:
    common = {
        "model__task_type": "SEQ_CLS", "model__num_labels": 2, "data__format": "classification", "adapter__lora_dropout": 0,
        "global_batch_size": 16, "max_steps": 8, "eval_steps": 4, "class_weights": "balanced",
    }  # fmt: skip
    return options(folder / "base", folder / "data", folder / out, **{**common, **changes})


def _here(*argv: str) -> None:
    """In this process."""
    assert train_verb.run(parse(RunConfig, list(argv), train_verb.VERB)) == 0


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("classes")
    encoder_base(made / "base")
    (made / "data").mkdir()
    pairs = [
        {"sentence": row["sentence"], "other": other["sentence"], "label": row["label"]}
        for row, other in zip(sentences(80), sentences(80, 5), strict=True)
    ]
    write_sentences(made / "data" / "train.tsv", pairs[:60])
    write_sentences(made / "data" / "dev.tsv", pairs[60:])
    return made


def test_two_processes_train_as_one(folder, pair):
    """On pairs, whose token types have to travel along."""
    changes = {"data__text_pair_column": "other"}
    _here(*_options(folder, "one", **changes))
    for strategy in ("ddp", "fsdp2"):
        pair.run(*_options(folder, strategy, **changes, parallel__strategy=strategy))
    for strategy in ("ddp", "fsdp2"):
        assert losses(folder / strategy) == pytest.approx(losses(folder / "one"), abs=1e-5)
        for found, expected in zip(records(folder / strategy, "eval"), records(folder / "one", "eval"), strict=True):
            assert found["accuracy"] == pytest.approx(expected["accuracy"], abs=1 / 20)  # a row between the labels may be either
            assert found["eval_loss"] == pytest.approx(expected["eval_loss"], abs=1e-5)


def test_killed_and_resumed_is_bit_identical(folder):
    again = {"adapter__lora_dropout": 0.1, "save_steps": 5, "max_steps": 100, "eval_steps": 50}
    _here(*_options(folder, "whole", **again))
    killed = ["train", *_options(folder, "cut", **again)]
    run_killed(1, (folder / "cut" / "checkpoint-5" / "manifest.json").exists, *killed)
    assert not (folder / "cut" / "checkpoint-100").exists()
    _here(*_options(folder, "cut", **again, resume_from_checkpoint="auto"))
    assert_identical(folder / "whole", folder / "cut")
    assert records(folder / "whole", "epoch") == records(folder / "cut", "epoch")
