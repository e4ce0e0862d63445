"""Examples on two processes: packed and grouped runs equal one process's, and a stopped one goes on bit for bit."""

from __future__ import annotations

from pathlib import Path

import pytest

from lora_dist.cli import train as train_verb
from lora_dist.cli.options import parse
from lora_dist.config import RunConfig
from tests.instructions import write_instructions
from tests.runs import adapter, assert_identical, largest_relative_difference, losses, options

pytestmark = pytest.mark.distributed

PACKED, GROUPED = "data.packing", "train.group_by_length"


@pytest.fixture(scope="module")
def arguments(tiny_base, tmp_path_factory):
    file, template = write_instructions(tmp_path_factory.mktemp("instructions"))

    def make(out: Path, **train: object) -> list[str]:
        values: dict[str, object] = {
            "data__format": "alpaca",
            "data__prompt_template": template,
            "data__block_size": 48,
            "data__holdout_windows": 9,
            "per_device_train_batch_size": 2,
            "global_batch_size": 8,
            "adapter__lora_dropout": 0,
            "lr_scheduler_type": "constant",
            "max_steps": 9,
            "eval_steps": 5,
            "save_steps": 4,
            "load_best_model_at_end": False,
        }
        return options(tiny_base, file, out, **{**values, **train})

    return make


@pytest.fixture(scope="module")
def one_process(arguments, tmp_path_factory):
    """Runs in this process, by mode."""
    done: dict[str, Path] = {}

    def run(mode: str) -> Path:
        if mode not in done:
            done[mode] = tmp_path_factory.mktemp("one") / "run"
            assert train_verb.run(parse(RunConfig, [*arguments(done[mode]), f"--{mode}"], train_verb.VERB)) == 0
        return done[mode]

    return run


@pytest.mark.parametrize(
    ("mode", "strategy"),
    [
        (PACKED, "ddp"),
        (GROUPED, "ddp"),
        pytest.param(PACKED, "fsdp2", marks=pytest.mark.long),
        pytest.param(PACKED, "zero3", marks=pytest.mark.long),
    ],
)
def test_two_processes_equal_one(mode, strategy, groups, arguments, one_process, tmp_path):
    groups[2].run(*arguments(tmp_path / "two", parallel__strategy=strategy), f"--{mode}")
    one, two = losses(one_process(mode)), losses(tmp_path / "two")
    assert list(one) == list(two) == list(range(1, 10))
    assert max(abs(two[step] - one[step]) / one[step] for step in one) < 1e-6
    assert largest_relative_difference(adapter(one_process(mode)), adapter(tmp_path / "two")) < 1e-4


def test_a_stopped_run_goes_on_bit_for_bit(groups, arguments, tmp_path):
    dropout = {"adapter__lora_dropout": 0.1, "eval_strategy": "no"}
    groups[2].run(*arguments(tmp_path / "whole", **dropout), f"--{PACKED}")
    groups[2].run(*arguments(tmp_path / "parts", **dropout, max_steps=6), f"--{PACKED}")
    groups[2].run(*arguments(tmp_path / "parts", **dropout), f"--{PACKED}", "--resume=auto")
    assert_identical(tmp_path / "whole", tmp_path / "parts")
