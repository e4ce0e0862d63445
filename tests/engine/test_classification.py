"""Runs of classifiers inside the test process: losses against transformers' own, weights, splits of a batch, resuming, refusals."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from sklearn.metrics import accuracy_score, f1_score
from transformers import AutoModelForSequenceClassification

from lora_dist.arguments import ClassifyArgs, MergeArgs
from lora_dist.engine.classify import Classifier
from lora_dist.engine.merge import merge
from lora_dist.log import UserError
from lora_dist.parallel import World
from tests.classes import encoder_base, sentences, word_tokenizer, write_sentences
from tests.engine.test_train import refused, train
from tests.runs import assert_identical, losses, records

ROWS = sentences(48)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return encoder_base(tmp_path_factory.mktemp("encoder") / "bert", head=True)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("classes")
    write_sentences(folder / "train.tsv", ROWS)
    write_sentences(folder / "dev.tsv", sentences(30, 1))
    return folder


@pytest.fixture
def common() -> dict[str, object]:
    return {
        "model__task_type": "SEQ_CLS",
        "data__format": "classification",
        "data__block_size": 32,
        "adapter__lora_dropout": 0,
        "per_device_train_batch_size": 8,
        "learning_rate": 5e-3,
    }


def _logits(model, rows: list[dict]) -> torch.Tensor:
    encoded = word_tokenizer()([row["sentence"] for row in rows], padding=True, return_tensors="pt")
    with torch.no_grad():
        return model(input_ids=encoded["input_ids"], attention_mask=encoded["attention_mask"]).logits


@pytest.mark.parametrize("weights", ["none", "balanced", "1,3"])
def test_the_first_loss_and_evaluation_are_transformers_own(weights, base, data, common, tmp_path):
    train(base, data, tmp_path / "out", **common, max_steps=1, global_batch_size=48, class_weights=weights)
    model = AutoModelForSequenceClassification.from_pretrained(base)
    targets = torch.tensor([row["label"] for row in ROWS])
    counts = torch.bincount(targets)
    weight = {"none": None, "balanced": len(ROWS) / (2 * counts), "1,3": torch.tensor([1.0, 3.0])}[weights]
    expected = torch.nn.functional.cross_entropy(_logits(model, ROWS), targets, weight=weight)
    assert losses(tmp_path / "out")[1] == pytest.approx(float(expected), abs=1e-5)
    start = records(tmp_path / "out", "eval")[0]
    held = sentences(30, 1)
    logits, labels = _logits(model, held), [row["label"] for row in held]
    assert start["eval_loss"] == pytest.approx(float(torch.nn.functional.cross_entropy(logits, torch.tensor(labels))), abs=1e-5)
    assert start["accuracy"] == pytest.approx(accuracy_score(labels, logits.argmax(-1)))
    if "f1" in start:
        assert start["f1"] == pytest.approx(f1_score(labels, logits.argmax(-1), zero_division=0))


def test_how_a_batch_is_split_changes_nothing(base, data, common, tmp_path):
    found = []
    for name, (rows, accumulation) in {"whole": (8, 1), "split": (2, 4)}.items():
        split = {"per_device_train_batch_size": rows, "gradient_accumulation_steps": accumulation}
        train(base, data, tmp_path / name, **{**common, **split}, max_steps=4, class_weights="balanced")
        found.append(losses(tmp_path / name))
    assert found[0] == pytest.approx(found[1], abs=1e-5)


def test_a_resumed_run_is_the_uninterrupted_one(base, data, common, tmp_path):
    common |= {"adapter__lora_dropout": 0.1, "num_train_epochs": 2, "save_steps": 5, "eval_steps": 5, "group_by_length": True}
    train(base, data, tmp_path / "whole", **common)
    shutil.copytree(tmp_path / "whole", tmp_path / "cut")
    for folder in (tmp_path / "cut").glob("checkpoint-*"):
        if int(folder.name.split("-")[1]) > 5:
            shutil.rmtree(folder)
    train(base, data, tmp_path / "cut", **common, resume_from_checkpoint="auto")
    assert_identical(tmp_path / "whole", tmp_path / "cut")


def test_the_head_is_trained_and_saved_with_the_adapter_of_a_base_without_one(data, common, tmp_path):
    """A masked-language model has neither head nor pooler."""
    bare = encoder_base(tmp_path / "bare")
    train(bare, data, tmp_path / "out", **common, model__num_labels=2, max_steps=3, load_best_model_at_end=False)
    saved = load_file(tmp_path / "out" / "adapter_model.safetensors")
    heads = {name for name in saved if "lora_" not in name}
    assert {name.removeprefix("base_model.model.") for name in heads} == {
        "classifier.weight", "classifier.bias", "bert.pooler.dense.weight", "bert.pooler.dense.bias",
    }  # fmt: skip
    assert all(saved[name].dtype == torch.float32 and bool(saved[name].any()) for name in heads)
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["task_type"] == "SEQ_CLS"


def test_what_cannot_be_is_refused(base, data, common, tmp_path):
    said = refused(base, data, tmp_path / "a", **{**common, "data__format": "text"})
    assert "model.task_type, data.format: found SEQ_CLS and text" in said
    said = refused(base, data, tmp_path / "b", **common, class_weights="1,2,3")
    assert "train.class_weights: found 3 numbers, expected 2" in said
    said = refused(base, data, tmp_path / "c", **common, data__label_column="stars")
    assert "data.label_column: found no column stars in the train split" in said
    said = refused(base, data, tmp_path / "d", **{**common, "adapter__target_modules": "query,classifier"})
    assert "adapter.target_modules: classifier match no linear of this model, expected some of dense, key, query, value" in said
    assert "all-linear (trained whole anyway: classifier)" in said


def test_ia3_merges_beside_a_pooler_that_was_trained_whole(data, common, tmp_path):
    bare = encoder_base(tmp_path / "bare")
    ia3 = {**common, "adapter__type": "ia3", "model__num_labels": 2, "learning_rate": 0.1}
    ia3.pop("adapter__lora_dropout", None)
    train(bare, data, tmp_path / "out", **ia3, max_steps=3, load_best_model_at_end=False)
    report = merge(MergeArgs(str(bare), str(tmp_path / "out"), str(tmp_path / "merged")), World())
    assert report.zero_tiles > 0 and report.logits_error_fp32 < 1e-5
    saved, merged = (
        load_file(tmp_path / "out" / "adapter_model.safetensors"),
        load_file(tmp_path / "merged" / "model.safetensors"),
    )
    for name in ("classifier.weight", "bert.pooler.dense.weight"):
        assert torch.equal(saved[f"base_model.model.{name}"], merged[name])
    plain = AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged")
    answers = Classifier(ClassifyArgs(str(bare), str(tmp_path / "out")), World()).answer(
        [(r["sentence"], None) for r in sentences(8, 2)]
    )
    expected = _logits(plain, sentences(8, 2)).softmax(-1).max(-1).values.tolist()
    assert [a.confidence for a in answers] == pytest.approx(expected, abs=1e-5)


def test_a_classifier_neither_generates_nor_has_a_perplexity(base):
    from lora_dist.cli.eval import main as evaluate
    from lora_dist.cli.generate import main as generate

    for verb, options in ((generate, ["--prompt=film"]), (evaluate, ["--dataset_name=text.txt"])):
        with pytest.raises(UserError, match="is a classifier, expected a causal language model; lora-dist classify"):
            verb([str(base), *options])


def test_a_merged_classifier_keeps_its_zeros_and_answers_as_its_adapter(base, data, common, tmp_path):
    train(base, data, tmp_path / "run", **common, max_steps=6, load_best_model_at_end=False)
    report = merge(MergeArgs(str(base), str(tmp_path / "run"), str(tmp_path / "merged")), World())
    assert report.zero_tiles > 0 and report.logits_error_fp32 < 1e-5
    texts = [(row["sentence"], None) for row in sentences(20, 2)]
    with_adapter = Classifier(ClassifyArgs(str(base), str(tmp_path / "run")), World()).answer(texts)
    merged = Classifier(ClassifyArgs(str(tmp_path / "merged")), World()).answer(texts)
    plain = AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged")
    expected = _logits(plain, sentences(20, 2)).softmax(-1)
    assert [a.label for a in merged] == [a.label for a in with_adapter] == [f"LABEL_{i}" for i in expected.argmax(-1)]
    for found in (merged, with_adapter):
        assert [a.confidence for a in found] == pytest.approx(expected.max(-1).values.tolist(), abs=1e-5)
