"""Pairs, numbers to predict, GLUE's subsets and their files: tokens and metrics against transformers, scikit-learn and scipy."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from scipy.stats import pearsonr, spearmanr
from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef
from transformers import AutoModelForSequenceClassification

from lora_dist.adapter import merge_adapter
from lora_dist.arguments import ClassifyArgs, ExportArgs, MergeArgs
from lora_dist.cli import train as train_verb
from lora_dist.cli.options import parse
from lora_dist.cli.push import main as push
from lora_dist.config import RunConfig
from lora_dist.data.classification import ClassEncoder, find_labels
from lora_dist.data.glue import GLUE
from lora_dist.engine.classify import Classifier
from lora_dist.engine.data import data_kind, head_for, run_data
from lora_dist.engine.export import export
from lora_dist.engine.merge import merge
from lora_dist.engine.open_model import open_model
from lora_dist.log import UserError
from lora_dist.models.loading import load_base
from lora_dist.monitor.console import Console
from lora_dist.parallel import World
from tests.classes import encoder_base, sentences, word_tokenizer, write_sentences
from tests.engine.test_train import refused, train
from tests.runs import losses, options, records

COMMON: dict[str, Any] = {
    "model__task_type": "SEQ_CLS",
    "data__format": "classification",
    "data__block_size": 32,
    "adapter__lora_dropout": 0,
    "per_device_train_batch_size": 8,
    "learning_rate": 5e-3,
}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return encoder_base(tmp_path_factory.mktemp("encoder") / "bert", head=True)


def _pairs(count: int, seed: int, labels: int = 2) -> list[dict[str, Any]]:
    """Two sentences of unlike lengths and a label (of one label: a number)."""
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for first, second in zip(sentences(count, seed), sentences(count, seed + 100), strict=True):
        value = float(torch.rand((), generator=generator)) * 5
        label = round(value, 2) if labels == 1 else int(value / 5 * labels)
        rows.append({"sentence1": first["sentence"], "sentence2": second["sentence"], "label": label})
    return rows


def _write(folder: Path, labels: int = 2) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    folder.mkdir(exist_ok=True)
    splits = _pairs(24, 1, labels), _pairs(20, 2, labels)
    for name, rows in zip(("train", "dev"), splits, strict=True):
        write_sentences(folder / f"{name}.tsv", rows)
    return splits


def _logits(model: Any, rows: list[dict[str, Any]]) -> torch.Tensor:
    """Transformers' own encoding of pairs, and logits."""
    encoded = word_tokenizer()(
        [r["sentence1"] for r in rows],
        [r["sentence2"] for r in rows],
        padding=True,
        truncation=True,
        max_length=32,
        return_tensors="pt",
    )
    assert set(encoded["token_type_ids"].unique().tolist()) == {0, 1}
    with torch.no_grad():
        return model(**encoded).logits


def test_pairs_have_transformers_own_token_types_everywhere(base, tmp_path):
    """In training, evaluation, classify, and the merged and exported model."""
    training, held = _write(tmp_path / "data")
    run = tmp_path / "run"
    pair = {"data__text_column": "sentence1", "data__text_pair_column": "sentence2"}
    train(base, tmp_path / "data", run, **COMMON, **pair, max_steps=2, global_batch_size=24, load_best_model_at_end=False)
    model = AutoModelForSequenceClassification.from_pretrained(base)
    targets = torch.tensor([r["label"] for r in training])
    expected = float(torch.nn.functional.cross_entropy(_logits(model, training), targets))
    assert losses(run)[1] == pytest.approx(expected, abs=1e-5)
    start, labels = records(run, "eval")[0], [r["label"] for r in held]
    logits = _logits(model, held)
    assert start["eval_loss"] == pytest.approx(float(torch.nn.functional.cross_entropy(logits, torch.tensor(labels))), abs=1e-5)
    assert start["accuracy"] == accuracy_score(labels, logits.argmax(-1))
    without = model(**{k: v for k, v in word_tokenizer()(
        [r["sentence1"] for r in held], [r["sentence2"] for r in held], padding=True, return_tensors="pt"
    ).items() if k != "token_type_ids"}).logits  # fmt: skip
    assert (without - logits).abs().max() > 1e-3, "the test needs a model that tells them apart"

    merge(MergeArgs(str(base), str(run), str(tmp_path / "merged")), World())
    plain = AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged")
    probabilities = _logits(plain, held).softmax(-1)
    texts = [(r["sentence1"], r["sentence2"]) for r in held]
    for asked in (ClassifyArgs(str(base), str(run)), ClassifyArgs(str(tmp_path / "merged"))):
        answers = Classifier(asked, World()).answer(texts)
        assert [a.confidence for a in answers] == pytest.approx(probabilities.max(-1).values.tolist(), abs=1e-5)


def test_a_pair_is_encoded_and_cut_as_the_tokenizer_does():
    tokenizer, subset = word_tokenizer(), GLUE["mrpc"]
    rows = [{**row, "sentence2": row["sentence2"] + " river" * extra} for extra, row in enumerate(_pairs(12, 3))]
    encoded = ClassEncoder(tokenizer, 18, subset, False, token_types=True).encode_batch(
        {name: [row[name] for row in rows] for name in rows[0]}
    )
    for i, row in enumerate(rows):
        own = tokenizer(row["sentence1"], row["sentence2"], truncation=True, max_length=18)
        assert encoded["input_ids"][i].tolist() == own["input_ids"]
        assert encoded["labels"][i].tolist() == own["token_type_ids"]
        assert encoded["truncated"][i] == (len(tokenizer(row["sentence1"], row["sentence2"])["input_ids"]) > 18)
    assert any(encoded["truncated"]) and not all(encoded["truncated"])


@pytest.mark.parametrize("subset", ["stsb", "mrpc", "cola"])
def test_metrics_of_a_subset_are_scipys_and_scikit_learns(subset, tmp_path):
    """Of the adapter that the run ends with, from the logits that transformers makes of it."""
    base = encoder_base(tmp_path / "base")
    training, held = _write(tmp_path / "data", 1 if subset == "stsb" else 2)
    values = {**COMMON, "data__dataset_config_name": subset, "max_steps": 6, "load_best_model_at_end": False}
    if subset == "cola":  # as GLUE keeps it: no header, four columns
        for name, rows in (("train", training), ("dev", held)):
            lines = [f"gj04\t{r['label']}\t*\t{r['sentence1']}\n" for r in rows]
            (tmp_path / "data" / f"{name}.tsv").write_text("".join(lines))
    train(base, tmp_path / "data", tmp_path / "run", **values)
    final = records(tmp_path / "run", "final")[0]
    merged = merge_adapter(open_model(str(base), str(tmp_path / "run"), world=World()).model)
    if subset == "cola":
        encoded = word_tokenizer()([r["sentence1"] for r in held], padding=True, return_tensors="pt")
        with torch.no_grad():
            logits = merged(**encoded).logits
    else:
        logits = _logits(merged, held)
    labels = [r["label"] for r in held]
    if subset == "stsb":
        predicted = logits.squeeze(-1)
        expected = {"pearson": pearsonr(labels, predicted).statistic, "spearmanr": spearmanr(labels, predicted).statistic}
        expected["eval_loss"] = float(((predicted - torch.tensor(labels)) ** 2).mean())
    else:
        predicted = logits.argmax(-1)
        expected = {"accuracy": accuracy_score(labels, predicted)}
        expected |= (
            {"f1": f1_score(labels, predicted)}
            if subset == "mrpc"
            else {"matthews_correlation": matthews_corrcoef(labels, predicted)}
        )
        expected["eval_loss"] = float(torch.nn.functional.cross_entropy(logits, torch.tensor(labels)))
    assert {name: final[name] for name in expected} == pytest.approx(expected, abs=2e-4)
    names = json.loads((tmp_path / "run" / "labels.json").read_text())["id2label"].values()
    assert list(names) == list({"stsb": ["LABEL_0"], "mrpc": GLUE["mrpc"].labels, "cola": GLUE["cola"].labels}[subset])


def test_a_base_of_another_number_of_labels_gets_a_new_head_and_says_so(base, tmp_path):
    _write(tmp_path / "data", labels=3)
    three = {**COMMON, "data__text_column": "sentence1", "model__num_labels": 3, "max_steps": 1}
    train(base, tmp_path / "data", tmp_path / "run", **three)
    told = (tmp_path / "run" / "train.log").read_text()
    assert "⚠️  model.num_labels: the base has a head of 2 labels, 3 are asked for: it gets a new one" in told
    said = refused(base, tmp_path / "data", tmp_path / "two", **{**three, "model__num_labels": 2})
    assert "model.num_labels: found 2, but data.label_column label has the label 2, expected 3 classes or more" in said


OWN_FILES = {  # header (cola has none) and a row of each label, as GLUE's own archives have them
    "cola": ("", ["gj04\t1\t\tthe film was fine", "gj04\t0\t*\tfilm the was"]),
    "mrpc": ("Quality\t#1 ID\t#2 ID\t#1 String\t#2 String\n", ["1\t7\t8\tfine\twarm", "0\t7\t8\tfine\tdull"]),
    "qqp": ("id\tqid1\tqid2\tquestion1\tquestion2\tis_duplicate\n", ["1\t2\t3\tfine\twarm\t1", "1\t2\t3\tfine\tdull\t0"]),
    "stsb": ("index\tgenre\tsentence1\tsentence2\tscore\n", ["0\tx\tfine\twarm\t4.5", "1\tx\tfine\tdull\t0.2"]),
    "mnli": (
        "index\tsentence1\tsentence2\tlabel1\tgold_label\n",
        ["0\tfine\twarm\tneutral\tneutral", "1\tfine\tdull\tx\tcontradiction", "2\tfine\tfilm\tx\tentailment"],
    ),
    "sst2": ("sentence\tlabel\n", ["fine film\t1", "dull film\t0"]),
}


@pytest.mark.parametrize("subset", OWN_FILES)
def test_glues_own_files_need_no_columns_by_hand(subset, base, tmp_path):
    header, rows = OWN_FILES[subset]
    (tmp_path / "data").mkdir()
    for split in ("train", "dev"):
        (tmp_path / "data" / f"{split}.tsv").write_text(header + "\n".join(rows) + "\n")
    values = options(base, tmp_path / "data", tmp_path / "run", **COMMON, data__dataset_config_name=subset)
    config = parse(RunConfig, values, train_verb.VERB)
    console, world = Console(), World()
    assert data_kind(config, world) == "classification"
    loaded = load_base(str(base), head=head_for(config))
    found = run_data(config, world, console, loaded, "classification")
    assert len(found.train) == len(found.evaluation) == len(rows)
    targets = sorted(found.train.targets_N.tolist())
    assert targets == (pytest.approx([0.2, 4.5]) if subset == "stsb" else list(range(len(rows))))


def test_what_the_files_do_not_have_is_told_before_a_model_is_loaded(tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "train.tsv").write_text("text\ty\nfine film\tgood\ndull film\tbad\n")
    (tmp_path / "dev.tsv").write_text("text\ty\nfine film\tgood\ndull film\tgreat\n")
    columns = {"data__text_column": "text", "data__label_column": "y", "model__num_labels": 2}
    nowhere = tmp_path / "no-model"
    said = refused(nowhere, tmp_path / "data", tmp_path / "run", **COMMON, data__text_pair_column="other", model__num_labels=2)
    assert said.splitlines() == [
        f"{key}: found no column {name} in the train split of {tmp_path}/data, expected one of its columns: text, y (files without a "
        "header: data.column_names names their columns)"
        for key, name in (("data.text_column", "sentence"), ("data.text_pair_column", "other"), ("data.label_column", "label"))
    ]
    said = refused(nowhere, tmp_path / "data", tmp_path / "run", **COMMON, **columns, data__dataset_config_name="sst3")
    assert "data.dataset_config_name: found sst3 with" in said and "expected one of GLUE's subsets: cola, sst2" in said
    for labels, change, words in (
        (2, {"class_weights": "1,2,3"}, "train.class_weights: found 3 numbers, expected 2, one a label"),
        (1, {"class_weights": "balanced"}, "train.class_weights: found balanced, but a number is predicted, expected none"),
        (2, {"metric_for_best_model": "pearson"}, "found pearson with 2 labels, expected eval_loss or one of accuracy, f1"),
        (1, {"metric_for_best_model": "f1"}, "found f1 with 1 labels, expected eval_loss or one of pearson, spearmanr"),
    ):
        asked = {**columns, "model__num_labels": labels, **change}
        assert words in refused(nowhere, tmp_path / "data", tmp_path / "run", **COMMON, **asked)
    base = encoder_base(tmp_path / "base")
    said = refused(base, tmp_path / "data", tmp_path / "run", **COMMON, **columns, data__validation_file=tmp_path / "dev.tsv")
    assert "the validation split has a label that is none of bad, good (great), expected the labels of the train split" in said


def test_numbers_that_are_no_labels_are_told_how_to_predict_them():
    with pytest.raises(UserError, match=r"4 labels \(0.2, 1.5, 3, 4\), expected as many classes, or 1 to predict a number"):
        find_labels(["1.5", "0.2", "4", "3"], GLUE["sst2"], 2)
    with pytest.raises(UserError, match="expected as many classes$"):
        find_labels(["a", "b", "3"], GLUE["sst2"], 2)


def test_a_label_that_no_example_has_is_told(base, tmp_path):
    (tmp_path / "data.tsv").write_text("sentence\tlabel\n" + "fine film\t1\n" * 8)
    train(base, tmp_path / "data.tsv", tmp_path / "run", **COMMON, max_steps=1, eval_strategy="no", save_strategy="no")
    told = (tmp_path / "run" / "train.log").read_text()
    assert "⚠️  data.label_column: no example to train on has the label LABEL_0: the model will not learn it" in told


@pytest.mark.long
def test_precision_and_checkpointing_change_a_classifier_by_rounding_only(base, tmp_path):
    _write(tmp_path / "data")
    options = {**COMMON, "data__text_column": "sentence1", "max_steps": 3, "eval_strategy": "no", "save_strategy": "no"}
    found = {}
    for name, change in {"plain": {}, "again": {"gradient_checkpointing": True}, "half": {"bf16": True}}.items():
        train(base, tmp_path / "data", tmp_path / name, **options, **change)
        found[name] = losses(tmp_path / name)
    assert found["again"] == pytest.approx(found["plain"], abs=1e-6)
    assert found["half"] == pytest.approx(found["plain"], abs=0.02) and found["half"] != found["plain"]


def test_a_classifiers_card_says_its_accuracy(base, tmp_path, capsys):
    _write(tmp_path / "data")
    options = {**COMMON, "data__text_column": "sentence1", "max_steps": 2, "load_best_model_at_end": False}
    train(base, tmp_path / "data", tmp_path / "run", **options)
    capsys.readouterr()
    assert push([str(tmp_path / "run"), "--hub_model_id=lab/it", "--base_model=lab/base", "--dry_run"]) == 0
    shown, final = capsys.readouterr().out, records(tmp_path / "run", "final")[0]
    start = records(tmp_path / "run", "eval")[0]
    assert f"| accuracy | {start['accuracy']:.4g} | {final['accuracy']:.4g} |" in shown
    assert "text-classification" in shown and "labels.json" in shown and "AutoModelForSequenceClassification" in shown


@pytest.mark.long
def test_an_exported_classifier_of_pairs_answers_as_transformers(base, tmp_path):
    import onnxruntime

    export(ExportArgs(str(base), str(tmp_path / "onnx")))
    held = _pairs(8, 5)
    encoded = word_tokenizer()([r["sentence1"] for r in held], [r["sentence2"] for r in held], padding=True, return_tensors="np")
    session = onnxruntime.InferenceSession(str(tmp_path / "onnx" / "model.onnx"))
    given = {name: encoded[name] for name in ("input_ids", "attention_mask", "token_type_ids")}
    logits = torch.from_numpy(session.run(["logits"], given)[0])
    expected = _logits(AutoModelForSequenceClassification.from_pretrained(base), held)
    assert (logits - expected).abs().max() < 1e-5 * expected.abs().max().clamp_min(1.0)
