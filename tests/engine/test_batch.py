"""How many windows a step takes and who takes them: the decision at a start and at a resume, and what DeepSpeed is told."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from lora_dist.engine.batch import BatchPlan, plan_batch
from lora_dist.log import UserError
from lora_dist.parallel.ds_config import RunFacts, zero_config
from lora_dist.state import TrainState
from tests.parallel.facts import FACTS as A_RUN


def decide(
    micro_batch: int, accumulation: int, world: int, wanted: int | None = None, before: TrainState | None = None
) -> BatchPlan:
    return plan_batch(micro_batch=micro_batch, accumulation=accumulation, world=world, wanted=wanted, before=before)


def saved(global_batch: int, micro_batch: int, accumulation: int, processes: int) -> TrainState:
    return TrainState(global_batch=global_batch, micro_batch=micro_batch, accumulation=accumulation, processes=processes)


def numbers(plan: BatchPlan) -> tuple[int, int, int]:
    return plan.global_batch, plan.micro_batch, plan.accumulation


def test_a_first_start_takes_what_is_configured():
    assert decide(4, 4, 2) == BatchPlan(32, 4, 4, follows=False)


@pytest.mark.parametrize(
    ("world", "expected"),
    [(1, (32, 4, 8)), (2, (32, 4, 4)), (3, (32, 4, 3)), (8, (32, 4, 1)), (16, (32, 2, 1)), (32, (32, 1, 1))],
)
def test_a_global_batch_is_the_same_on_any_number_of_processes(world: int, expected: tuple[int, int, int]):
    plan = decide(4, 1, world, wanted=32)
    assert numbers(plan) == expected
    assert plan.accumulation * plan.micro_batch * world >= 32


def test_the_micro_batch_shrinks_where_that_leaves_fewer_fillers():
    """32 windows on 3 processes: two rounds of 8 rows would be 48 rows, two of 6 are 36."""
    plan = decide(8, 1, 3, wanted=32)
    assert numbers(plan) == (32, 6, 2)
    assert "11% of the rows that a step computes are fillers" in plan.notes[-1]


def test_other_processes_keep_the_checkpoint_s_global_batch():
    plan = decide(4, 4, 1, before=saved(32, 4, 4, 2))
    assert numbers(plan) == (32, 4, 8)
    assert plan.notes == ("train.gradient_accumulation_steps 4 -> 8 on 1 process, so that a step has 32 samples",)
    # Resumed there once more, and back on two: still the same.
    assert numbers(decide(4, 4, 1, before=saved(32, 4, 4, 1))) == (32, 4, 8)
    assert decide(4, 4, 2, before=saved(32, 4, 4, 1)) == BatchPlan(32, 4, 4, follows=False)


def test_an_equal_product_is_no_change():
    assert decide(2, 16, 1, before=saved(32, 4, 4, 2)) == BatchPlan(32, 2, 16, follows=False)


def test_a_changed_micro_batch_or_accumulation_is_the_user_s():
    plan = decide(4, 2, 2, before=saved(32, 4, 4, 2))
    assert numbers(plan) == (16, 4, 2)
    assert "had 32 samples, a step has 16 from now on" in plan.notes[0]


def test_global_batch_size_rules_over_the_checkpoint():
    plan = decide(4, 4, 2, wanted=64, before=saved(32, 4, 4, 2))
    assert numbers(plan) == (64, 4, 8)
    assert "had 32 samples, a step has 64 from now on: train.global_batch_size is 64" in plan.notes[0]
    assert decide(4, 4, 2, wanted=32, before=saved(32, 4, 4, 2)).notes == ()


def test_an_older_checkpoint_says_nothing():
    assert decide(4, 4, 1, before=TrainState(step=7)) == BatchPlan(16, 4, 4, follows=False)


def test_fewer_windows_than_processes_are_refused():
    with pytest.raises(
        UserError, match=r"train\.global_batch_size: found 2 samples a step for 3 processes, expected one a process"
    ):
        decide(1, 1, 3, before=saved(2, 1, 1, 2))


# --- what DeepSpeed is told ------------------------------------------------------------------------------------------------------

FACTS = dataclasses.replace(
    A_RUN, micro_batch=4, accumulation=8, world_size=1, global_batch=32, batch_follows=True, configured_micro_batch=4
)


def deepspeed(folder: Path, facts: RunFacts, **values: int) -> tuple[dict, list[str]]:
    file = folder / "ds.json"
    file.write_text(json.dumps({"zero_optimization": {"stage": 2}, **values}))
    return zero_config(2, file, facts, offload_optimizer="auto", offload_param="auto", nvme_path=None)


def test_an_elastic_restart_is_not_refused_for_numbers_of_other_processes(tmp_path: Path):
    """Written for two processes, where a step was 2 x 4 x 4 windows; this one is 1 x 4 x 8."""
    written = {"train_batch_size": 32, "train_micro_batch_size_per_gpu": 4, "gradient_accumulation_steps": 4}
    tree, notes = deepspeed(tmp_path, FACTS, **written)
    assert (tree["train_batch_size"], tree["train_micro_batch_size_per_gpu"], tree["gradient_accumulation_steps"]) == (32, 4, 8)
    assert any("gradient_accumulation_steps 8" in note for note in notes)


def test_fillers_count_in_what_deepspeed_multiplies(tmp_path: Path):
    facts = dataclasses.replace(FACTS, micro_batch=6, accumulation=2, world_size=3, configured_micro_batch=8)
    tree, _ = deepspeed(tmp_path, facts, train_batch_size=32, train_micro_batch_size_per_gpu=8, gradient_accumulation_steps=2)
    assert (tree["train_batch_size"], tree["train_micro_batch_size_per_gpu"], tree["gradient_accumulation_steps"]) == (36, 6, 2)


@pytest.mark.parametrize(("key", "value"), [("train_batch_size", 16), ("train_micro_batch_size_per_gpu", 2)])
def test_a_file_that_asks_for_another_batch_is_refused(key: str, value: int, tmp_path: Path):
    with pytest.raises(UserError, match=rf"{key} is {value}"):
        deepspeed(tmp_path, FACTS, **{key: value})


def test_without_adaptation_the_accumulation_has_to_agree(tmp_path: Path):
    with pytest.raises(UserError, match="gradient_accumulation_steps is 4"):
        deepspeed(tmp_path, dataclasses.replace(FACTS, batch_follows=False), gradient_accumulation_steps=4)
