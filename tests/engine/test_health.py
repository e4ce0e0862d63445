"""What is said of a step whose numbers are wrong, and when; no training. Runs with such steps: tests/distributed/test_health.py."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from lora_dist.config import HealthArgs, RunConfig
from lora_dist.engine.health import SPIKE_HISTORY, SPIKE_WINDOW, Health, _write
from lora_dist.engine.step import NonFiniteError, Problem, Seen, StepResult
from lora_dist.state import TrainState

GOOD, HIGH, BAD = Seen(2.0, 31, (4, -1)), Seen(9.0, 31, (5, 6)), Seen(math.nan, 31, (7, 8))
LOSS = Problem(12, "loss", math.nan, (), (1,), ((GOOD, HIGH), (GOOD, BAD)))


def health(state: TrainState, **args: Any) -> Health:
    """On parts that have a configuration and a state only."""
    parts: Any = SimpleNamespace(state=state, config=SimpleNamespace(health=HealthArgs(**args)))
    return Health(parts, None, lambda event, values: None)  # type: ignore[arg-type]


# --- what was found --------------------------------------------------------------------------------------------------------------


def test_a_loss_is_described_by_the_micro_batch_that_gave_it():
    assert LOSS.describe() == "step 12: found a loss of nan (rank 1, micro-batch 1, samples 7, 8), expected a finite one"
    infinite = replace(LOSS, seen=((GOOD, HIGH), (replace(BAD, loss=math.inf), BAD)))
    assert infinite.worst() == (1, 0)


def test_a_gradient_is_described_by_its_first_parameter_and_whose_it_was():
    names = ("layers.0.a", "layers.0.b")
    known = replace(LOSS, kind="gradient", value=math.inf, parameters=names, ranks=(0,))
    assert known.describe() == (
        "step 12: found a non-finite gradient in layers.0.a (2 parameters; rank 0, samples 4, 5, 6), expected finite ones"
    )
    many = replace(known, ranks=(0,), seen=((Seen(2.0, 31, tuple(range(20))),), ()))
    assert "samples 0, 1, 2, 3, 4, 5, 6, 7 and 12 more)" in many.describe()
    assert "(2 parameters; the sum over processes)" in replace(known, ranks=()).describe()
    assert "in their norm (0 parameters" in replace(known, parameters=()).describe()


def test_a_spike_is_described_by_the_highest_loss():
    spike = replace(LOSS, kind="spike", value=8.5, ranks=(0, 1), seen=((GOOD, HIGH), (GOOD, GOOD)))
    assert spike.describe() == (
        "step 12: found a loss of 8.5 (rank 0, micro-batch 1, samples 5, 6), expected one near those before it"
    )


# --- spikes ----------------------------------------------------------------------------------------------------------------------


def test_the_limit_is_the_median_of_the_last_steps_and_needs_a_history():
    state = TrainState()
    policy = health(state, spike_nats=1.5)
    for number in range(SPIKE_HISTORY):
        assert policy.loss_limit() == math.inf
        policy.took(StepResult(float(number), 1.0, 31, True, 0.1))
    assert policy.loss_limit() == pytest.approx(7.5 + 1.5)
    for _ in range(SPIKE_WINDOW):
        policy.took(StepResult(3.0, 0.5, 31, True, 0.1))
    assert policy.loss_limit() == pytest.approx(4.5)
    assert state.recent_losses == [3.0] * SPIKE_WINDOW and state.recent_grad_norms == [0.5] * SPIKE_WINDOW
    assert health(state).loss_limit() == math.inf


# --- decisions -------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("args", "state", "kind", "decision", "why"),
    [
        ({}, {}, "loss", "stop", "health.non_finite"),
        ({"non_finite": "skip"}, {"skipped_batches": 9}, "gradient", "skip", ""),
        ({"non_finite": "skip"}, {"skipped_batches": 10}, "gradient", "stop", "health.max_skips"),
        ({"non_finite": "rollback"}, {"rollbacks": 3}, "loss", "stop", "health.max_rollbacks"),
        ({"max_rollbacks": 0}, {}, "spike", "stop", "health.max_rollbacks"),
        ({"non_finite": "skip"}, {}, "overflow", "stop", "train.bf16"),  # the next step would overflow too
    ],
)
def test_what_is_decided(args, state, kind, decision, why):
    policy = health(TrainState(**state), **args)
    policy._parts.strategy = SimpleNamespace(loss_scale=None)
    found, checkpoint, reason = policy._decide(replace(LOSS, kind=kind))
    assert (found, checkpoint) == (decision, None) and why in reason


# --- files and options -----------------------------------------------------------------------------------------------------------


def test_post_mortems_are_json_and_never_overwritten(tmp_path: Path):
    first = _write(tmp_path, 3, {"value": math.nan, "list": [(math.inf, 1.5)]})
    second = _write(tmp_path, 3, {"value": 1})
    assert first == f"post-mortem/step-3.json in {tmp_path}" and second.startswith("post-mortem/step-3-2.json")
    text = (tmp_path / "post-mortem" / "step-3.json").read_text()
    assert json.loads(text, parse_constant=pytest.fail) == {"value": "nan", "list": [["inf", 1.5]]}
    assert {path.name for path in (tmp_path / "post-mortem").iterdir()} == {"step-3.json", "step-3-2.json"}


def test_a_post_mortem_that_cannot_be_written_is_no_second_failure(tmp_path: Path):
    (tmp_path / "post-mortem").write_text("in the way")
    assert _write(tmp_path, 3, {}).startswith("train.log (no post-mortem: ")


def test_states_of_earlier_versions_have_no_history():
    old = {key: value for key, value in TrainState(step=5).to_dict().items() if key not in ("recent_losses", "rollbacks")}
    state = TrainState.from_dict(old)
    assert (state.step, state.recent_losses, state.rollbacks, state.skipped_batches) == (5, [], 0, 0)


def test_options_out_of_range_and_a_watch_that_would_come_too_late():
    config = RunConfig()
    config.health = HealthArgs(max_skips=-1, spike_nats=0.0, hang_timeout_s=600)
    config.parallel.timeout_s = 300
    lines = [line for line in config.problems() if line.startswith("health.")]
    assert [line.split(":")[0] for line in lines] == ["health.spike_nats", "health.max_skips", "health.hang_timeout_s"]
    assert "found 600 with parallel.timeout_s 300, expected less (0: off)" in lines[2]
    config.health = HealthArgs(hang_timeout_s=0)
    assert not [line for line in config.problems() if line.startswith("health.")]


def test_the_error_is_one_line_that_travels_between_processes():
    error = NonFiniteError(LOSS.describe())
    assert error.problems == [str(error)] and "\n" not in str(error)
