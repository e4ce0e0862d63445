"""Training of the kept weights themselves, with norms, embedding and head beside them, on real processes: every strategy trains what one
process does, holds its share, and goes on from anyone's checkpoint. (`test_sharded.py` has the short form that every `make test` runs.)"""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file

from lora_dist.blocks import Pattern
from tests.runs import adapter, assert_identical, largest_relative_difference, losses, options

pytestmark = [pytest.mark.distributed, pytest.mark.long]

STRATEGIES = ["ddp", "fsdp2", "zero1", "zero2", "zero3"]
BESIDE = 2 * 99 * 32 + 5 * 32  # embedding, head and norms of the tiny base


@pytest.fixture(scope="module")
def arguments(tiny_base, tiny_text):
    def make(out: Path, strategy: str, processes: int, **train: object) -> list[str]:
        values: dict[str, object] = {
            "mode": "sparse_full",
            "adapter__modules_to_save": "[all-norm,embed_tokens,lm_head]",
            "per_device_train_batch_size": 1,
            "gradient_accumulation_steps": 4 // processes,
            "lr_scheduler_type": "constant",
            "eval_strategy": "no",
            "load_best_model_at_end": False,
            "save_strategy": "steps",
            "save_steps": 4,
            "guard__every": 4,
            "max_steps": 8,
            "parallel__strategy": strategy,
        }
        if strategy == "zero3":  # tiny parameters would all stay whole
            values["parallel__ds_config"] = str(Path(__file__).with_name("zero3_small.json"))
        return options(tiny_base, tiny_text, out, **{**values, **train})

    return make


@pytest.fixture(scope="module")
def one_process(groups, arguments, tmp_path_factory):
    out = tmp_path_factory.mktemp("reference") / "run"
    groups[1].run(*arguments(out, "ddp", 1))
    return out


def check_shares(strategy: str, facts: list[dict], trained: int) -> None:
    held = [fact["trainable_elements"] for fact in facts]
    if strategy in ("fsdp2", "zero3"):
        assert trained <= sum(held) <= trained * 1.1
        assert max(held) < trained * 0.65  # cut by whole tiles, of which these layers have a few
        assert all(fact["base_elements"] < 20_320 * 0.51 for fact in facts)
    else:
        assert held == [trained, trained]
    if strategy == "zero3":
        assert all(fact["whole_elements"] == 0 for fact in facts)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_two_processes_train_what_one_does_and_resume(strategy, groups, arguments, one_process, tiny_base, tmp_path):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    done = groups[2].run(*arguments(whole, strategy, 2))
    a, b = losses(one_process), losses(whole)
    assert a[8] < a[1] - 0.1
    assert b == pytest.approx(a, rel=1e-6)
    assert largest_relative_difference(adapter(one_process), adapter(whole)) < 1e-4
    tiles = sum(int(mask.kept_PQ.sum()) for mask in Pattern.load(tiny_base).values())
    check_shares(strategy, done.facts, tiles * 256 + BESIDE)
    state = load_file(whole / "checkpoint-8" / "optimizer.safetensors")
    for key in ("exp_avg", "exp_avg_sq"):
        assert sum(t.numel() for name, t in state.items() if name.endswith(f".{key}")) == tiles * 256 + BESIDE
    # As it was killed behind step 4, on the same strategy and on another, with another number of processes.
    shutil.copytree(whole, parts)
    for folder in (whole, parts):
        (folder / "checkpoint-8" / "manifest.json").write_text("{}")
    before = adapter(parts), losses(parts)
    groups[2].run(*arguments(whole, strategy, 2), "--resume=auto")
    assert losses(whole) == before[1] and all((adapter(whole)[k] == t).all() for k, t in before[0].items())
    groups[1].run(*arguments(parts, "ddp", 1), "--resume=auto")
    assert losses(parts) == pytest.approx(before[1], rel=1e-6)
    assert largest_relative_difference(before[0], adapter(parts)) < 1e-4


def test_a_checkpoint_of_one_process_is_gone_on_from_by_shards(groups, arguments, one_process, tmp_path):
    for strategy in ("fsdp2", "zero3"):
        shutil.copytree(one_process, tmp_path / strategy)
        (tmp_path / strategy / "checkpoint-8" / "manifest.json").write_text("{}")
        groups[2].run(*arguments(tmp_path / strategy, strategy, 2), "--resume=auto")
        assert losses(tmp_path / strategy) == pytest.approx(losses(one_process), rel=1e-6)
        assert largest_relative_difference(adapter(one_process), adapter(tmp_path / strategy)) < 1e-4


def test_two_runs_of_one_process_are_identical(groups, arguments, one_process, tmp_path):
    groups[1].run(*arguments(tmp_path / "again", "ddp", 1))
    assert_identical(one_process, tmp_path / "again")
