"""The same global batch on any number of processes: 2, 1, 3, 2 of them against the uninterrupted run (about a minute)."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.runs import adapter, largest_relative_difference, losses, options

pytestmark = pytest.mark.distributed

STEPS, SEGMENT = 12, 3


@pytest.fixture(scope="module")
def arguments(tiny_base, tiny_text):
    """Options of a run whose micro-batch and accumulation stay as they are, whatever the number of processes."""

    def make(out: Path, **train: object) -> list[str]:
        values: dict[str, object] = {
            "adapter__lora_dropout": 0,
            "per_device_train_batch_size": 2,
            "gradient_accumulation_steps": 2,
            "max_steps": STEPS,
            "warmup_ratio": 0.2,
            "lr_scheduler_type": "cosine",
            "eval_strategy": "no",
            "load_best_model_at_end": False,
            "save_strategy": "no",
        }
        return options(tiny_base, tiny_text, out, **{**values, **train})

    return make


@pytest.fixture(scope="module")
def uninterrupted(groups, arguments, tmp_path_factory):
    """Eight windows a step on one process."""
    out = tmp_path_factory.mktemp("uninterrupted") / "run"
    groups[1].run(*arguments(out, gradient_accumulation_steps=4))
    return out


def assert_equal(reference: Path, other: Path) -> None:
    a, b = losses(reference), losses(other)
    assert list(a) == list(b) == list(range(1, STEPS + 1))
    worst = max(abs(b[step] - a[step]) / a[step] for step in a)
    print(f"losses differ by {worst:.1e} relative at most")
    assert worst < 1e-6


@pytest.mark.parametrize(
    "strategy", [pytest.param("ddp", marks=pytest.mark.long), pytest.param("zero2", marks=pytest.mark.matrix)]
)
def test_going_on_with_other_processes_keeps_the_global_batch(strategy, groups, arguments, uninterrupted, tmp_path):
    """Nothing but the number of processes changes: 2, 1, 3 (which eight windows do not fill), 2 of them, each from an earlier one's
    checkpoint to the end, so that the schedule is the whole run's."""
    extra: dict[str, object] = {"parallel__strategy": strategy}
    if strategy == "zero2":  # numbers of two processes, which an elastic restart is not refused for
        batch = {"train_batch_size": 8, "train_micro_batch_size_per_gpu": 2, "gradient_accumulation_steps": 2}
        (tmp_path / "ds.json").write_text(json.dumps({"zero_optimization": {"stage": 2}, **batch}))
        extra["parallel__ds_config"] = str(tmp_path / "ds.json")
    out, outputs = tmp_path / "run", []
    for number, processes in enumerate([2, 1, 3, 2]):
        saving = {"save_strategy": "steps", "save_steps": SEGMENT, "save_total_limit": 9}
        resume = [f"--resume={out}/checkpoint-{SEGMENT * number}"] if number else []
        outputs.append(groups[processes].run(*arguments(out, **saving, **extra), *resume).output)
        assert_equal(uninterrupted, out)
    assert "gradient_accumulation_steps 2 -> 4 on 1 process, so that a step has 8 samples" in outputs[1]
    assert "33% of the rows that a step computes are fillers" in outputs[2]
    assert "so that a step has" not in outputs[0] + outputs[3]
    assert all("Total train batch size (w. parallel, distributed & accumulation) = 8" in output for output in outputs)
    saved = json.loads((out / f"checkpoint-{STEPS}" / "state.json").read_text())
    assert (saved["global_batch"], saved["micro_batch"], saved["accumulation"], saved["processes"]) == (8, 2, 2, 2)
    assert largest_relative_difference(adapter(uninterrupted), adapter(out)) < 1e-4


@pytest.mark.parametrize(
    "strategy", ["ddp", pytest.param("zero3", marks=pytest.mark.long), pytest.param("fsdp2", marks=pytest.mark.matrix)]
)
def test_global_batch_size_is_exact_where_it_fills_no_whole_rounds(strategy, groups, arguments, uninterrupted, tmp_path):
    """Eight windows on three processes of one row each: three rounds, the last with a filler."""
    own = {"global_batch_size": 8, "per_device_train_batch_size": 1, "gradient_accumulation_steps": 1}
    groups[3].run(*arguments(tmp_path / "run", **own, parallel__strategy=strategy))
    assert_equal(uninterrupted, tmp_path / "run")


def test_fewer_windows_than_processes_are_refused(groups, arguments, tmp_path):
    done = groups[3].run(*arguments(tmp_path / "run", global_batch_size=2), code=2)
    assert all("found 2 samples a step for 3 processes" in rank["error"] for rank in done.ranks)
    assert not (tmp_path / "run").exists()
