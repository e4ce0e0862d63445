"""A quantised base over processes: it is really cut where it is to be, losses are one process's, and checkpoints are everyone's."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file

from lora_dist.arguments import MergeArgs
from lora_dist.engine.merge import merge
from lora_dist.parallel import World
from tests.distributed.test_strategies import check_norms
from tests.runs import adapter, largest_relative_difference, losses, options

pytest.importorskip("bitsandbytes")
pytestmark = pytest.mark.distributed


@pytest.fixture(scope="module")
def run(groups, tiny_base, tiny_text):
    """Trains four windows a step on so many processes."""

    def start(out, strategy, processes, **train):
        values = {
            "adapter__lora_dropout": 0, "per_device_train_batch_size": 1, "gradient_accumulation_steps": 4 // processes,
            "max_steps": 8, "eval_strategy": "no", "load_best_model_at_end": False, "save_strategy": "no", "guard__every": 3,
            "parallel__strategy": strategy, "model__load_in_4bit": True,
        }  # fmt: skip
        return groups[processes].run(*options(tiny_base, tiny_text, out, **{**values, **train}))

    return start


@pytest.fixture(scope="module")
def alone(run, tmp_path_factory):
    out = tmp_path_factory.mktemp("alone") / "run"
    return out, run(out, "ddp", 1)


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2", "zero2", pytest.param("zero1", marks=pytest.mark.long)])
def test_two_processes_train_what_one_does(strategy, run, alone, tmp_path):
    reference, single = alone
    done = run(tmp_path / "run", strategy, 2)
    a, b = losses(reference), losses(tmp_path / "run")
    assert list(a) == list(b) == list(range(1, 9))
    assert max(abs(b[step] - a[step]) / a[step] for step in a) < 1e-5
    assert largest_relative_difference(adapter(reference), adapter(tmp_path / "run")) < 1e-4
    check_norms(done.facts, adapter(tmp_path / "run"))
    total = single.facts[0]["base_bytes"]
    if strategy == "fsdp2":
        assert all(fact["placements"] == ["(Shard(dim=0),)"] and fact["units"] == 5 for fact in done.facts)
        # packed data, embedding, head and norms: half each, but for a row of 99 tokens
        assert all(fact["base_bytes"] <= 0.52 * total for fact in done.facts)
        assert total <= sum(fact["base_bytes"] for fact in done.facts) <= 1.02 * total
    else:
        assert all(fact["base_bytes"] == total for fact in done.facts)


@pytest.mark.long
@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_what_shards_trained_is_merged_whole_and_in_shards(kind, groups, run, tiny_base, tmp_path):
    """Into the de-quantised base, which the guard compares with the quantised one; DoRA reads the row norms of shards of codes."""
    out = tmp_path / "run"
    of_kind = {"adapter__type": kind, "learning_rate": 1e-2}
    run(tmp_path / "alone", "ddp", 1, **of_kind)
    run(out, "fsdp2", 2, **of_kind)
    a, b = losses(tmp_path / "alone"), losses(out)
    assert max(abs(b[step] - a[step]) / a[step] for step in a) < 1e-5
    assert largest_relative_difference(adapter(tmp_path / "alone"), adapter(out)) < 1e-3
    whole = merge(MergeArgs(str(tiny_base), str(out), str(tmp_path / "whole")), World())
    assert whole.quantised is not None and whole.quantised.logits_error < 1e-5 and whole.zero_tiles > 0
    groups[2].run(str(tiny_base), str(out), str(tmp_path / "shards"), "--strategy=fsdp2", verb="merge")
    shards = json.loads((tmp_path / "shards" / "merge.json").read_text())
    assert shards["quantised"]["logits_error"] < 1e-5 and shards["zero_tiles"] == whole.zero_tiles
    a, b = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "shards"))
    assert a.keys() == b.keys() and all(torch.allclose(a[name], b[name], rtol=1e-5, atol=1e-6) for name in a)


@pytest.mark.long
@pytest.mark.parametrize("strategy", ["fsdp2", "zero1"])
def test_in_half_precision_it_trains_what_one_process_does(strategy, run, alone, tmp_path):
    run(tmp_path / "half", strategy, 2, fp16=True)
    a, b = losses(alone[0]), losses(tmp_path / "half")
    assert list(a) == list(b) and max(abs(b[step] - a[step]) / a[step] for step in a) < 2e-3


@pytest.mark.parametrize(("strategy", "other"), [("fsdp2", "zero2"), pytest.param("zero2", "fsdp2", marks=pytest.mark.long)])
def test_resumed_is_uninterrupted_and_moves_to_another_strategy(strategy, other, run, tmp_path):
    saving = {"save_strategy": "steps", "save_steps": 4}
    run(tmp_path / "whole", strategy, 2, **saving)
    checkpoint = tmp_path / "whole" / "checkpoint-4"
    run(tmp_path / "resumed", strategy, 2, resume_from_checkpoint=checkpoint, **saving)
    whole, resumed = losses(tmp_path / "whole"), losses(tmp_path / "resumed")
    assert {step: whole[step] for step in resumed} == resumed and set(resumed) >= {5, 6, 7, 8}
    assert largest_relative_difference(adapter(tmp_path / "whole"), adapter(tmp_path / "resumed")) == 0
    run(tmp_path / "moved", other, 2, resume_from_checkpoint=checkpoint, **saving)
    moved = losses(tmp_path / "moved")
    assert all(moved[step] == pytest.approx(whole[step], rel=1e-5) for step in (5, 6, 7, 8))
