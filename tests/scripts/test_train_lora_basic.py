"""The classification scripts of the LoRA guide: flags, config.yaml, the console while training goes on, files, and answers."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import inference_example
import pytest
import torch
import train_lora_basic
import yaml
from safetensors.torch import load_file

from lora_dist.adapter.collection import add_adapter
from lora_dist.log import UserError
from tests.classes import sentences, taught_base, write_sentences
from tests.runs import losses, records

BAR = re.compile(r"Training: +(\d+)%\|.*\| loss: (\d\.\d{4}), acc: (\d\.\d{4}) \[(\d+)/(\d+)")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("guide")
    taught_base(made / "base")
    write_sentences(made / "train.tsv", sentences(96))
    write_sentences(made / "dev.tsv", sentences(30, 1))
    config = {
        "model_name": str(made / "base"),
        "lora": {"target_modules": ["query", "dense"]},
        "training": {"batch_size": 8, "max_length": 32, "learning_rate": 1e-2},
        "data": {"dataset": str(made / "train.tsv"), "subset": ""},
    }
    (made / "config.yaml").write_text(yaml.safe_dump(config))
    return made


def _options(folder: Path, out: Path, *more: str) -> list[str]:
    return [
        "--config", str(folder / "config.yaml"), "--data.validation_file", str(folder / "dev.tsv"), "--train.output_dir", str(out),
        "--data.cache_dir", str(folder / "cache"), "--train.logging_steps", "1", *more,
    ]  # fmt: skip


def _told(text: str) -> list[str]:
    """The lines of W3 among all."""
    return [line for line in text.splitlines() if line.startswith(("📝", "  Train Loss", "  Eval Loss", "  💾"))]


def _epochs(out: Path, number: int) -> list[str]:
    """The lines that an epoch is to have, by what the run recorded."""
    train, evaluated = records(out, "epoch")[number - 1], records(out, "eval")
    now, before = evaluated[number], evaluated[:number]
    steps = [r for r in records(out, "train") if number - 1 < r["epoch"] <= number]
    assert train["train_loss"] == pytest.approx(sum(r["loss"] for r in steps) / len(steps))  # steps of 8 rows each
    assert train["train_accuracy"] == pytest.approx(sum(r["accuracy"] for r in steps) / len(steps))
    lines = [
        f"  Train Loss: {train['train_loss']:.4f} | Train Acc: {train['train_accuracy']:.4f}",
        f"  Eval Loss:  {now['eval_loss']:.4f} | Eval Acc:  {now['accuracy']:.4f} | Eval F1:  {now['f1']:.4f}",
    ]
    best = now["accuracy"] > max(r["accuracy"] for r in before)
    return [*lines, *([f"  💾 Best model saved! (eval_acc: {now['accuracy']:.4f})"] if best else [])]


def test_a_run_is_told_by_epochs_while_it_goes_on_and_resumed_ones_too(folder, tmp_path, capfd):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert train_lora_basic.run(_options(folder, whole)) == 0
    out, err = capfd.readouterr()
    told = _told(out)
    assert told[0].startswith("  Eval Loss")  # before training
    assert told[1:] == [line for n in (1, 2, 3) for line in (f"📝 Epoch {n}/3", *_epochs(whole, n))]
    assert any("💾" in line for line in told) and "📊 Parameter Statistics:" in out
    bars = [tuple(map(float, found)) for found in BAR.findall((whole / "training_log.txt").read_text())]
    assert [bar[3:] for bar in bars] == [(12, 12)] * 3
    for number, bar in enumerate(bars):  # the bar ends with what the line below it says
        assert bar[1:3] == pytest.approx(
            tuple(records(whole, "epoch")[number][k] for k in ("train_loss", "train_accuracy")), abs=6e-5
        )
    assert "loss:" in err

    shutil.copytree(whole, cut)
    for step in (24, 36):
        shutil.rmtree(cut / f"checkpoint-{step}")
    assert train_lora_basic.run(_options(folder, cut, "--train.resume_from_checkpoint", "auto")) == 0
    resumed = _told(capfd.readouterr().out)
    assert resumed == [line for n in (2, 3) for line in (f"📝 Epoch {n}/3", *_epochs(whole, n))]
    assert losses(cut) == losses(whole) and records(cut, "epoch") == records(whole, "epoch")


@pytest.mark.long
def test_a_run_stopped_within_an_epoch_tells_of_the_whole_epoch(folder, tmp_path, capfd):
    every = ("--train.save_strategy", "steps", "--train.save_steps", "4", "--num_epochs", "1")
    assert train_lora_basic.run(_options(folder, tmp_path / "whole", *every)) == 0
    shutil.copytree(tmp_path / "whole", tmp_path / "cut")
    shutil.rmtree(tmp_path / "cut" / "checkpoint-12")
    capfd.readouterr()
    assert train_lora_basic.run(_options(folder, tmp_path / "cut", *every, "--train.resume_from_checkpoint", "auto")) == 0
    assert _told(capfd.readouterr().out) == ["📝 Epoch 1/1", *_epochs(tmp_path / "whole", 1)]


def test_the_best_model_is_named_by_what_chooses_it(folder, tmp_path, capfd):
    assert (
        train_lora_basic.run(
            _options(folder, tmp_path / "out", "--train.metric_for_best_model", "eval_loss", "--num_epochs", "2")
        )
        == 0
    )
    best = min(records(tmp_path / "out", "eval"), key=lambda r: r["eval_loss"])
    told = [line for line in _told(capfd.readouterr().out) if "💾" in line]
    assert told[-1] == f"  💾 Best model saved! (eval_loss: {best['eval_loss']:.4f})"


def test_files_counts_and_answers(folder, tmp_path, capfd):
    out = tmp_path / "out"
    assert train_lora_basic.run(_options(folder, out, "--rank", "4", "--alpha", "8", "--dropout", "0", "--num_epochs", "3")) == 0
    kept, best = load_file(out / "adapter_model.safetensors"), torch.load(out / "best_lora_model.pt", weights_only=True)
    assert list(best) == ["lora_state_dict"] and best["lora_state_dict"].keys() == kept.keys()
    assert all(torch.equal(kept[name], best["lora_state_dict"][name]) for name in kept)
    last = load_file(out / "checkpoint-36" / "adapter" / "adapter_model.safetensors")
    final = torch.load(out / "final_lora_model.pt", weights_only=True)["lora_state_dict"]
    assert all(torch.equal(last[name], final[name]) for name in last)
    assert (out / "training_curves.png").read_bytes().startswith(b"\x89PNG")
    trained = sum(tensor.numel() for tensor in kept.values())
    total = sum(t.numel() for t in load_file(folder / "base" / "model.safetensors").values()) + trained
    head = sum(t.numel() for name, t in kept.items() if "lora_" not in name)
    text = capfd.readouterr().out
    assert f"  Total parameters:     {total - head:>17,}" in text and f"  Trainable parameters: {trained:>17,}" in text
    inference_example.run(["--mode", "text", "--text", "the film was lovely", "--adapter", str(out)])
    inference_example.run(["--mode", "demo", "--adapter", str(out)])
    add_adapter(tmp_path / "box", "first", out)
    inference_example.run(["--mode", "text", "--text", "the film was lovely", "--adapter", str(tmp_path / "box")])
    answers = re.findall(r"Prediction: (\S+) \(confidence: (\d+\.\d\d)%\)", capfd.readouterr().out)
    assert len(answers) == 2 + len(inference_example.EXAMPLES) and answers[0][0] == "LABEL_1" and answers[-1] == answers[0]
    assert all(50 <= float(confidence) <= 100 for _, confidence in answers)


def test_files_are_there_however_the_run_saves(folder, tmp_path):
    """Without checkpoints, with the adapter in a folder below, and where the run ends with the last adapter, not the best."""

    def tensors(file: Path) -> dict[str, torch.Tensor]:
        return load_file(file) if file.suffix == ".safetensors" else torch.load(file, weights_only=True)["lora_state_dict"]

    def equal(a: Path, b: Path) -> bool:
        first, second = tensors(a), tensors(b)
        return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)

    short = ("--num_epochs", "1", "--train.max_steps", "2", "--train.load_best_model_at_end", "false")
    out = tmp_path / "unsaved"
    assert train_lora_basic.run(_options(folder, out, *short, "--train.save_strategy", "no")) == 0
    assert all(equal(out / f"{name}_lora_model.pt", out / "adapter_model.safetensors") for name in ("best", "final"))
    out = tmp_path / "below"
    assert train_lora_basic.run(_options(folder, out, *short, "--train.adapter_subfolder", "adapter")) == 0
    assert equal(out / "final_lora_model.pt", out / "adapter" / "adapter_model.safetensors")
    out = tmp_path / "worse"  # what it learns is wrong of the rows it is evaluated on
    turned = write_sentences(tmp_path / "turned.tsv", [{**row, "label": 1 - row["label"]} for row in sentences(30, 1)])
    steps = (
        "--train.max_steps",
        "4",
        "--train.eval_strategy",
        "steps",
        "--train.eval_steps",
        "2",
        "--train.eval_on_start",
        "false",
    )
    chosen = ("--train.warmup_ratio", "0", "--train.metric_for_best_model", "eval_loss", "--data.validation_file", str(turned))
    assert train_lora_basic.run(_options(folder, out, *short, *steps, *chosen)) == 0
    assert records(out, "eval")[0]["eval_loss"] < records(out, "eval")[1]["eval_loss"], "the test needs a run that gets worse"
    assert equal(out / "final_lora_model.pt", out / "adapter_model.safetensors")
    assert equal(out / "best_lora_model.pt", out / "checkpoint-2" / "adapter" / "adapter_model.safetensors")
    assert not equal(out / "best_lora_model.pt", out / "final_lora_model.pt")


def test_flags_go_before_the_config_and_the_config_before_defaults(folder, monkeypatch):
    found = dict(option.removeprefix("--").split("=", 1) for option in train_lora_basic.to_options([
        "--config", str(folder / "config.yaml"), "--rank", "4", "--alpha", "9", "--dropout", "0.2", "--num_epochs", "5",
        "--batch_size", "4", "--learning_rate", "1e-3", "--push_to_hub", "--hub_model_id", "me/it", "--hub_private",
    ]))  # fmt: skip
    expected = {
        "adapter.r": "4", "adapter.lora_alpha": "9", "adapter.lora_dropout": "0.2", "train.num_train_epochs": "5",
        "train.per_device_train_batch_size": "4", "train.learning_rate": "1e-3", "data.block_size": "32", "train.warmup_ratio": "0.1",
        "adapter.target_modules": "query,dense", "train.push_to_hub": "true", "train.hub_model_id": "me/it",
        "train.hub_private": "true", "train.max_grad_norm": "1.0", "model.num_labels": "2",
    }  # fmt: skip
    assert {key: found[key] for key in expected} == expected
    monkeypatch.chdir(folder.parent)  # no config.yaml there
    defaults = dict(option.removeprefix("--").split("=", 1) for option in train_lora_basic.to_options([]))
    assert (defaults["model.name_or_path"], defaults["data.dataset_config_name"]) == ("bert-base-uncased", "sst2")
    assert (defaults["adapter.r"], defaults["train.learning_rate"]) == ("8", "0.0003")


def test_subset_and_splits_of_the_config_are_passed_on(tmp_path):
    data = {"subset": "mnli", "eval_split": "validation_mismatched", "train_split": "train_small"}
    (tmp_path / "c.yaml").write_text(yaml.safe_dump({"num_labels": 3, "data": data}))
    found = train_lora_basic.to_options(["--config", str(tmp_path / "c.yaml")])
    assert {
        "--data.dataset_name=glue", "--data.dataset_config_name=mnli", "--data.validation_split=validation_mismatched",
        "--data.train_split=train_small", "--model.num_labels=3",
    } <= set(found)  # fmt: skip


def test_unknown_keys_and_contradictions_are_named_together(folder, tmp_path):
    (tmp_path / "c.yaml").write_text("modle_name: x\nlora: {rnak: 3}\n")
    with pytest.raises(UserError) as caught:
        train_lora_basic.to_options(["--config", str(tmp_path / "c.yaml")])
    assert [p.split(" is unknown")[0] for p in caught.value.problems] == ["config: modle_name", "config: lora.rnak"]
    (tmp_path / "c.yaml").write_text("lora: 8\ntraining: {batch_size: }\n")
    with pytest.raises(UserError) as caught:
        train_lora_basic.to_options(["--config", str(tmp_path / "c.yaml")])
    assert caught.value.problems == [
        "config: lora holds 8, expected keys and values: rank, alpha, dropout, target_modules",
        "config: training.batch_size holds nothing, expected a value",
    ]
    (tmp_path / "c.yaml").write_text("lora: {target_modules: query}\ndata: {subset: stsb}\n")
    found = train_lora_basic.to_options(["--config", str(tmp_path / "c.yaml")])
    assert "--adapter.target_modules=query" in found
    assert not any("num_labels" in option for option in found), "a number is predicted: the subset says so"
    with pytest.raises(UserError, match='expected --mode text --text "..."'):
        inference_example.run(["--text", "a", "--adapter", str(tmp_path)])
