"""GLUE's subsets by name from a hub in miniature, in a process of its own: columns, pairs, labels and the split to evaluate on."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from tests.classes import encoder_base, word_tokenizer
from tests.data.conftest import fake_hub

pytestmark = pytest.mark.long
REPO = Path(__file__).parents[2]
CARD = """---
configs:
- config_name: mnli
  data_files: [{split: train, path: mnli/train-*}, {split: validation_matched, path: mnli/validation_matched-*},
    {split: validation_mismatched, path: mnli/validation_mismatched-*}]
- config_name: sst2
  data_files: [{split: train, path: sst2/train-*}, {split: validation, path: sst2/validation-*}]
---
"""
PAIRS = {
    "train": [("the film was fine", "a river", 0), ("its end was dull", "the film", 1), ("warm", "cold", 2)] * 4,
    "validation_matched": [("the story was warm", "the end", 1), ("a river", "its end was grim", 2)],
    "validation_mismatched": [("a bright film", "the river was dull", 0)],
}
SINGLE = {split: [(text, label % 2) for text, _, label in PAIRS["train"]] for split in ("train", "validation")}
LOAD = """
import json, sys
from lora_dist.cli import train as train_verb
from lora_dist.cli.options import parse
from lora_dist.config import RunConfig
from lora_dist.engine.train import train
from lora_dist.log import UserError
found = []
def look(parts):
    rows = parts.eval_rows.batch(list(range(len(parts.eval_rows))))
    found.append({
        "ids": rows.input_ids_BL.tolist(), "mask": rows.attention_mask_BL.tolist(), "targets": rows.targets_B.tolist(),
        "types": None if rows.token_types_BL is None else rows.token_types_BL.tolist(), "train": len(parts.train_rows),
        "labels": list(parts.base.model.config.id2label.values()),
    })
for number, options in enumerate(json.loads(sys.argv[1])):
    config = parse(RunConfig, [*options, f"--train.output_dir=run-{number}"], train_verb.VERB)
    try:
        with train_verb.joined(config) as world:
            assert train(config, world, look=look) == 0
    except UserError as error:
        found.append({"error": str(error)})
print(json.dumps(found))
"""


def _parquet(rows: list[tuple], names: list[str]) -> bytes:
    buffer = io.BytesIO()
    columns = {name: [row[i] for row in rows] for i, name in enumerate(names)}
    pyarrow.parquet.write_table(pyarrow.table({**columns, "idx": list(range(len(rows)))}), buffer)
    return buffer.getvalue()


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    folder = tmp_path_factory.mktemp("glue")
    encoder_base(folder / "base", pruned=False)
    files = {"README.md": CARD.encode()}
    for split, rows in PAIRS.items():
        files[f"mnli/{split}-00000-of-00001.parquet"] = _parquet(rows, ["premise", "hypothesis", "label"])
    for split, rows in SINGLE.items():
        files[f"sst2/{split}-00000-of-00001.parquet"] = _parquet(rows, ["sentence", "label"])
    common = [
        f"--model.name_or_path={folder / 'base'}", "--model.task_type=SEQ_CLS", "--data.format=classification", "--train.max_steps=1",
        "--data.dataset_name=glue", "--data.block_size=32", "--train.eval_strategy=epoch", "--train.load_best_model_at_end=false",
        "--train.save_strategy=no",
    ]  # fmt: skip
    mnli = [*common, "--data.dataset_config_name=mnli"]
    asked = [
        mnli,
        [*mnli, "--data.validation_split=validation_mismatched"],
        [*common, "--data.dataset_config_name=sst2"],
        [*mnli, "--data.validation_split=dev"],
    ]
    with fake_hub({"nyu-mll/glue": files}) as endpoint:
        environment = {**os.environ, "HF_ENDPOINT": endpoint, "HF_HOME": str(folder / "home"), "PYTHONPATH": str(REPO)}
        for key in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "HF_DATASETS_CACHE", "HF_HUB_CACHE"):
            environment.pop(key, None)
        done = subprocess.run(
            [sys.executable, "-c", LOAD, json.dumps(asked)],
            env=environment,
            cwd=folder,
            capture_output=True,
            text=True,
            timeout=120,
        )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize(("place", "split"), [(0, "validation_matched"), (1, "validation_mismatched")])
def test_mnli_is_evaluated_on_the_split_that_is_asked_for(found, place, split):
    rows, own = found[place], word_tokenizer()
    longest_first = sorted(PAIRS[split], key=lambda row: -len(own(row[0], row[1])["input_ids"]))
    assert rows["train"] == len(PAIRS["train"]) and rows["targets"] == [row[2] for row in longest_first]
    expected = own([row[0] for row in longest_first], [row[1] for row in longest_first], padding=True)
    assert (rows["ids"], rows["mask"]) == (expected["input_ids"], expected["attention_mask"])
    assert rows["types"] == expected["token_type_ids"]
    assert rows["labels"] == ["entailment", "neutral", "contradiction"]


def test_sst2_has_single_sentences_and_two_labels(found):
    rows = found[2]
    assert rows["types"] is None and rows["labels"] == ["negative", "positive"]
    assert sorted(rows["targets"]) == sorted(label for _, label in SINGLE["validation"])


def test_a_split_that_is_not_there_is_named(found):
    assert found[3]["error"] == (
        "data.validation_split: found dev, expected one of glue: train, validation_matched, validation_mismatched"
    )
