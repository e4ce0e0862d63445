"""Every adapter type through real runs: counted, trained, resumed bit for bit, merged with the zeros kept, under several strategies."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from lora_dist.adapter import attach_adapter
from lora_dist.arguments import InspectArgs, MergeArgs
from lora_dist.blocks import Pattern
from lora_dist.cli import train as train_verb
from lora_dist.cli.options import parse
from lora_dist.config import RunConfig
from lora_dist.engine.inspect import inspect
from lora_dist.engine.merge import merge
from lora_dist.engine.open_model import open_model
from lora_dist.log import UserError
from lora_dist.parallel import World
from tests.runs import adapter, assert_identical, largest_relative_difference, losses, options, run

ADALORA = {"adapter__init_r": 6, "adapter__target_r": 3, "adapter__tinit": 1, "adapter__tfinal": 2}
PISSA = {"adapter__type": "lora", "adapter__init_lora_weights": "pissa"}
TYPES = {"dora": {}, "adalora": ADALORA, "ia3": {}, "pissa": PISSA}


def arguments(base: Path, text: Path, out: Path, kind: str, **changes) -> list[str]:
    common = {"adapter__type": kind, "max_steps": 8, "eval_strategy": "no", "save_strategy": "no", "learning_rate": 1e-2}
    return options(base, text, out, **{**common, **TYPES.get(kind, {}), **changes})


def train(base: Path, text: Path, out: Path, kind: str, **changes) -> None:
    assert train_verb.run(parse(RunConfig, arguments(base, text, out, kind, **changes), train_verb.VERB)) == 0


@pytest.mark.parametrize("kind", TYPES)
def test_trained_counted_stopped_and_merged(tiny_base, tiny_text, tmp_path, kind, capsys):
    whole, parts, merged = tmp_path / "whole", tmp_path / "parts", tmp_path / "merged"
    train(tiny_base, tiny_text, whole, kind)
    assert losses(whole)[8] < losses(whole)[1]
    train(tiny_base, tiny_text, parts, kind, save_strategy="steps", save_steps=4)
    (parts / "checkpoint-8" / "manifest.json").write_text("{}")  # the run as it was killed behind step 4
    train(tiny_base, tiny_text, parts, kind, save_strategy="steps", save_steps=4, resume_from_checkpoint="auto")
    assert_identical(whole, parts)
    report = merge(MergeArgs(base=str(tiny_base), adapter=str(whole), out=str(merged)), World())
    pattern = Pattern.load(tiny_base)
    tensors = load_file(merged / "model.safetensors")
    pruned = torch.cat([tensors[f"{name}.weight"][~mask.expand()] for name, mask in pattern.items()])
    assert len(pruned) > 0 and not pruned.any()
    assert report.pattern_digest == pattern.digest and report.logits_error_fp32 < 1e-5
    assert not inspect(InspectArgs(path=str(whole))).findings
    count = open_model(str(tiny_base), str(whole), world=World()).model
    trained = sum(t.numel() for t in adapter(whole).values())
    fresh = attach_adapter(
        open_model(str(tiny_base), world=World()).model, pattern if kind != "ia3" else None, r=16 if kind == "pissa" else 8, lora_alpha=16,
        adapter_type="lora" if kind == "pissa" else kind, adalora={k.removeprefix("adapter__"): v for k, v in ADALORA.items()},
    )  # fmt: skip
    assert trained == fresh.get_nb_trainable_parameters()[0]
    told = trained // 2 if kind == "pissa" else trained  # half of its factors are frozen
    output = capsys.readouterr().out
    assert f"trainable params: {told:,} ||" in output and f"Number of trainable parameters = {told:,}" in output
    assert count is not None


def test_another_type_or_rank_on_resume_is_refused(tiny_base, tiny_text, tmp_path):
    train(tiny_base, tiny_text, tmp_path / "out", "adalora", save_strategy="steps", save_steps=4)
    again = {"resume_from_checkpoint": "auto", "max_steps": 10}
    with pytest.raises(UserError, match="adapter.type: was adalora when checkpoint-8 was written, found dora"):
        train(tiny_base, tiny_text, tmp_path / "out", "dora", **again)
    with pytest.raises(UserError, match="adapter.init_r: was 6 when checkpoint-8 was written, found 7"):
        train(tiny_base, tiny_text, tmp_path / "out", "adalora", **{**again, "adapter__init_r": 7})
    train(tiny_base, tiny_text, tmp_path / "pissa", "pissa", save_strategy="steps", save_steps=4)
    with pytest.raises(UserError, match="adapter.init_lora_weights: was pissa when checkpoint-8 was written, found True"):
        train(tiny_base, tiny_text, tmp_path / "pissa", "lora", **again, adapter__r=16, adapter__lora_alpha=32)
    with pytest.raises(UserError, match="adapter.r: was 8 when checkpoint-8 was written, found 16"):
        train(tiny_base, tiny_text, tmp_path / "pissa", "pissa", **again, adapter__r=16)


def test_unmasked_types_on_a_pruned_base_are_told_what_becomes_of_the_zeros(tiny_base, tiny_text, tmp_path, capsys):
    short = {"adapter__mask": "none", "max_steps": 2, "eval_strategy": "no", "save_strategy": "no"}
    train(tiny_base, tiny_text, tmp_path / "ia3", "ia3", **short)
    told = capsys.readouterr().out
    assert "keeps the base's zeros all the same" in told and "--densify" not in told and "would destroy" not in told
    merged = merge(MergeArgs(base=str(tiny_base), adapter=str(tmp_path / "ia3"), out=str(tmp_path / "m")), World())
    assert merged.zero_tiles > 0 and merged.pattern_digest == Pattern.load(tiny_base).digest
    train(tiny_base, tiny_text, tmp_path / "adalora", "adalora", **{**short, "max_steps": 8})
    assert "merging it would destroy the base's sparsity pattern" in capsys.readouterr().out
    with pytest.raises(UserError, match="found an unmasked update for a base with .* pruned weights.*--project .*--densify"):
        merge(MergeArgs(base=str(tiny_base), adapter=str(tmp_path / "adalora"), out=str(tmp_path / "no")), World())


@pytest.mark.parametrize(
    "changes,words",
    [
        ({"adapter__type": "ia3", "adapter__r": 4}, "adapter.r: found with adapter.type ia3, expected lora or dora"),
        ({"adapter__type": "lora", "adapter__target_r": 4}, "adapter.target_r: found with adapter.type lora, expected adalora"),
        ({"adapter__type": "adalora", "adapter__r": 4}, "adalora's rank is init_r and target_r"),
        ({"adapter__type": "adalora", "adapter__target_r": 12}, "expected a target below the rank to start with"),
        (
            {"adapter__type": "lora", "adapter__init_lora_weights": "olora"},
            "found olora, expected true, gaussian, pissa or pissa_niter_N",
        ),
        (
            {"adapter__type": "dora", "adapter__init_lora_weights": "pissa"},
            "found pissa with adapter.type dora, expected true or",
        ),
        (
            {"adapter__init_lora_weights": "pissa", "weight_decay": 0.1},
            "train.weight_decay: found 0.1 with adapter.init_lora_weights pissa",
        ),
        (
            {"adapter__type": "adalora", "parallel__strategy": "zero2"},
            "found adalora under parallel.strategy zero2, expected ddp",
        ),
        ({"adapter__type": "dora", "parallel__strategy": "zero3"}, "found dora under parallel.strategy zero3"),
        (
            {"adapter__type": "ia3", "loraplus_lr_ratio": 16},
            "train.loraplus_lr_ratio: found 16 with adapter.type ia3, which has no lora_B",
        ),
        (
            {"model__bnb_4bit_quant_type": "fp4"},
            "model.bnb_4bit_quant_type, model.bnb_4bit_use_double_quant: found without model.load_in_4bit",
        ),
        ({"adapter__type": "adalora", "adapter__tinit": 8}, "found 8 and 0 in a run of 8 steps"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_written(tiny_base, tiny_text, tmp_path, changes, words):
    values = options(tiny_base, tiny_text, tmp_path / "out", **{"max_steps": 8, "parallel__device": "cpu", **changes})
    with pytest.raises(UserError, match=words):
        train_verb.run(parse(RunConfig, values, train_verb.VERB))
    assert not (tmp_path / "out").exists()


@pytest.mark.long
@pytest.mark.distributed
@pytest.mark.parametrize(
    "kind,strategy",
    [
        ("adalora", "ddp"),
        ("dora", "fsdp2"),
        ("dora", "zero2"),
        ("ia3", "zero3"),
        ("pissa", "fsdp2"),
        ("pissa", "zero1"),
        ("pissa", "zero2"),
        ("pissa", "zero3"),
    ],
)
def test_two_processes_train_what_one_does(tiny_base, tiny_text, tmp_path, kind, strategy):
    same = {"adapter__lora_dropout": 0} if kind != "ia3" else {}
    batch = {"per_device_train_batch_size": 1, "save_strategy": "steps", "save_steps": 4}
    train(tiny_base, tiny_text, tmp_path / "one", kind, **same, **batch, gradient_accumulation_steps=4)
    two = {**same, **batch, "gradient_accumulation_steps": 2, "parallel__strategy": strategy, "parallel__device": "cpu"}
    run(2, "train", *arguments(tiny_base, tiny_text, tmp_path / "two", kind, **two))
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=1e-4)
    assert largest_relative_difference(adapter(tmp_path / "one"), adapter(tmp_path / "two")) < 1e-3
    if strategy == "fsdp2":
        run(2, "merge", str(tiny_base), str(tmp_path / "two"), str(tmp_path / "merged"), "--strategy=fsdp2")
        whole = merge(MergeArgs(base=str(tiny_base), adapter=str(tmp_path / "two"), out=str(tmp_path / "m1")), World())
        assert whole.pattern_digest == Pattern.load(tmp_path / "merged").digest
        a, b = (load_file(tmp_path / name / "model.safetensors") for name in ("merged", "m1"))
        assert a.keys() == b.keys() and all(torch.allclose(a[k], b[k], rtol=1e-4, atol=1e-6) for k in a)
