"""A base held as kept tiles, over processes: it is really cut, losses are the dense base's, and checkpoints are everyone's."""

from __future__ import annotations

import pytest

from lora_dist.blocks import Pattern, tile_count
from tests.distributed.test_strategies import check_norms
from tests.runs import adapter, assert_identical, largest_relative_difference, losses, options, run_killed
from tests.runs import run as command_run

pytestmark = pytest.mark.distributed


@pytest.fixture(scope="module")
def run(groups, tiny_base, tiny_text):
    """Trains four windows a step on so many processes, the base in kept tiles."""

    def start(out, strategy, processes, *, code=0, tamper=None, **train):
        values = {
            "adapter__lora_dropout": 0, "per_device_train_batch_size": 1, "gradient_accumulation_steps": 4 // processes,
            "max_steps": 8, "eval_strategy": "no", "load_best_model_at_end": False, "save_strategy": "no", "guard__every": 3,
            "parallel__strategy": strategy, "model__storage": "blocks",
        }  # fmt: skip
        return groups[processes].run(*options(tiny_base, tiny_text, out, **{**values, **train}), code=code, tamper=tamper)

    return start


@pytest.fixture(scope="module")
def dense(run, tmp_path_factory):
    """By strategy, the run on the dense base, made when it is first asked for."""
    made = {}

    def of(strategy):
        if strategy not in made:
            out = tmp_path_factory.mktemp("dense") / strategy
            made[strategy] = out, run(out, strategy, 2, model__storage="dense")
        return made[strategy]

    return of


@pytest.fixture(scope="module")
def saved_elements(tiny_base):
    """What the base takes less in all: pruned tiles, but not what edge tiles are filled up with."""
    masks = [mask for mask in Pattern.load(tiny_base).values() if not mask.keeps_all]
    return sum(mask.shape[0] * mask.shape[1] - tile_count(mask) * mask.block**2 for mask in masks)


@pytest.mark.parametrize(
    "strategy", ["fsdp2", "zero3", *(pytest.param(name, marks=pytest.mark.long) for name in ("ddp", "zero1", "zero2"))]
)  # fmt: skip
def test_two_processes_train_what_they_do_on_the_dense_base(strategy, run, dense, saved_elements, tmp_path):
    reference, before = dense(strategy)
    done = run(tmp_path / "run", strategy, 2)
    a, b = losses(reference), losses(tmp_path / "run")
    assert list(a) == list(b) == list(range(1, 9))
    assert max(abs(b[step] - a[step]) / a[step] for step in a) < 1e-6
    assert largest_relative_difference(adapter(reference), adapter(tmp_path / "run")) < 1e-4
    check_norms(done.facts, adapter(tmp_path / "run"))
    held, held_dense = (sum(fact["base_elements"] for fact in job.facts) for job in (done, before))
    copies = 1 if strategy in ("fsdp2", "zero3") else 2
    assert saved_elements > 0 and held_dense - held == pytest.approx(copies * saved_elements, abs=0 if copies == 2 else 32)
    if strategy == "fsdp2":
        assert all(fact["placements"] == ["(Shard(dim=0),)"] and fact["units"] == 5 for fact in done.facts)


@pytest.mark.long
@pytest.mark.parametrize(("strategy", "other"), [("fsdp2", "zero3"), ("zero3", "fsdp2")])
def test_resumed_is_uninterrupted_and_moves_to_another_strategy_and_storage(strategy, other, run, tmp_path):
    saving = {"save_strategy": "steps", "save_steps": 4}
    run(tmp_path / "whole", strategy, 2, **saving)
    checkpoint = tmp_path / "whole" / "checkpoint-4"
    run(tmp_path / "resumed", strategy, 2, resume_from_checkpoint=checkpoint, **saving)
    whole, resumed = losses(tmp_path / "whole"), losses(tmp_path / "resumed")
    assert {step: whole[step] for step in resumed} == resumed and set(resumed) >= {5, 6, 7, 8}
    assert largest_relative_difference(adapter(tmp_path / "whole"), adapter(tmp_path / "resumed")) == 0
    run(tmp_path / "moved", other, 2, resume_from_checkpoint=checkpoint, model__storage="dense", **saving)
    moved = losses(tmp_path / "moved")
    assert all(moved[step] == pytest.approx(whole[step], rel=1e-5) for step in (5, 6, 7, 8))


@pytest.mark.long
def test_killed_and_resumed_is_uninterrupted(tiny_base, tiny_text, tmp_path):
    same = {
        "adapter__lora_dropout": 0, "max_steps": 12, "eval_strategy": "no", "load_best_model_at_end": False, "save_strategy": "steps",
        "save_steps": 3, "parallel__strategy": "fsdp2", "model__storage": "blocks", "parallel__device": "cpu",
    }  # fmt: skip
    command_run(2, "train", *options(tiny_base, tiny_text, tmp_path / "whole", **same))
    argv = ["train", *options(tiny_base, tiny_text, tmp_path / "killed", **same)]
    run_killed(2, lambda: (tmp_path / "killed" / "checkpoint-6" / "manifest.json").exists(), *argv)
    command_run(2, *argv, "--train.resume_from_checkpoint=auto")
    assert_identical(tmp_path / "whole", tmp_path / "killed")


@pytest.mark.parametrize(
    "strategy", ["fsdp2", pytest.param("zero3", marks=pytest.mark.long), pytest.param("ddp", marks=pytest.mark.long)]
)
def test_a_value_that_flips_on_one_process_stops_all(strategy, run, tiny_base, tmp_path):
    """Of a tile that is kept: only its digest can tell."""
    layer = "model.layers.1.mlp.gate_proj"
    assert int(Pattern.load(tiny_base)[layer].kept_PQ.sum()) >= 2
    tamper = {"what": "value", "rank": 1, "layer": layer, "after": 9}  # in the third step
    done = run(tmp_path / "run", strategy, 2, code=2, tamper=tamper, guard__every=1, guard__sample_chunks=1000)
    assert all(f"frozen parameter {layer}.values changed" in rank["error"] + rank["output"] for rank in done.ranks)
    assert max(losses(tmp_path / "run"), default=0) < 8


@pytest.mark.long
def test_4_bits_of_kept_tiles_are_cut(run, tmp_path):
    pytest.importorskip("bitsandbytes")
    alone = run(tmp_path / "alone", "ddp", 1, model__load_in_4bit=True)
    done = run(tmp_path / "run", "fsdp2", 2, model__load_in_4bit=True)
    a, b = losses(tmp_path / "alone"), losses(tmp_path / "run")
    assert list(a) == list(b) and max(abs(b[step] - a[step]) / a[step] for step in a) < 1e-5
    assert all(fact["base_bytes"] < 0.6 * alone.facts[0]["base_bytes"] for fact in done.facts)
