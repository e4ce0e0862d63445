"""Steps whose numbers are wrong, on two processes under every strategy: what is left behind, what is done, what is said of it.

One group of two workers runs all jobs (`group.py`); about a minute.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from tests.distributed.group import WorkerGroup
from tests.runs import adapter, assert_identical, losses, options, records

pytestmark = pytest.mark.distributed

STRATEGIES = {
    "ddp": {},
    "fsdp2": {},
    "zero1": {},
    "zero2": {},
    "zero3": {"parallel__ds_config": str(Path(__file__).with_name("zero3_small.json"))},
    "zero2-offload": {"parallel__offload_optimizer": "cpu"},
    "zero3-offload": {
        "parallel__offload_optimizer": "cpu",
        "parallel__ds_config": str(Path(__file__).with_name("zero3_small.json")),
    },
}
BATCH = 4  # windows an optimizer step


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    group = WorkerGroup(2, tmp_path_factory.mktemp("pair"))
    yield group
    group.close()


@pytest.fixture
def arguments(tiny_base, tiny_text):
    def make(out: Path, strategy: str = "ddp", **train: object) -> list[str]:
        values: dict[str, object] = {
            "adapter__lora_dropout": 0.1,
            "per_device_train_batch_size": 1,
            "gradient_accumulation_steps": 2,
            "lr_scheduler_type": "constant",
            "eval_strategy": "no",
            "load_best_model_at_end": False,
            "save_strategy": "no",
            "parallel__strategy": strategy.split("-")[0],
        }
        return options(tiny_base, tiny_text, out, **{**values, **STRATEGIES[strategy], **train})

    return make


def cursors(*steps: int) -> list[int]:
    """Of the batches that the uninterrupted run takes in these steps."""
    return [BATCH * step for step in steps]


def post_mortem(run_dir: Path, name: str) -> dict:
    return json.loads((run_dir / "post-mortem" / name).read_text())


def assert_same_adapter(a: Path, b: Path) -> None:
    x, y = adapter(a), adapter(b)
    assert x.keys() == y.keys() and all(torch.equal(x[k], y[k]) for k in x)


# --- skip ------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "strategy",
    [pytest.param(name, marks=pytest.mark.long) if name in ("zero1", "zero3-offload") else name for name in STRATEGIES],
)
def test_a_batch_that_is_left_out_leaves_nothing_behind(strategy, pair, arguments, tmp_path):
    """The steps after it are, bit for bit, those of a run whose data never had it: one with a non-finite loss over finite gradients
    in its first micro-batch, one with non-finite gradients in its last."""
    faults = [
        {"what": "loss only", "rank": 0, "cursors": cursors(2), "micro_batch": 0},
        {"what": "gradient", "rank": 1, "cursors": cursors(4), "micro_batch": 1},
    ]
    pair.run(*arguments(tmp_path / "skipped", strategy, max_steps=7, health__non_finite="skip"), faults=faults)
    pair.run(*arguments(tmp_path / "without", strategy, max_steps=5), faults=[{"what": "left_out", "cursors": cursors(2, 4)}])
    skipped, without = losses(tmp_path / "skipped"), losses(tmp_path / "without")
    assert list(skipped) == [1, 3, 5, 6, 7]
    assert list(skipped.values()) == list(without.values())
    assert_same_adapter(tmp_path / "skipped", tmp_path / "without")
    assert [row["step"] for row in records(tmp_path / "skipped", "skip")] == [2, 4]
    loss, gradient = (post_mortem(tmp_path / "skipped", f"step-{step}.json") for step in (2, 4))
    assert (loss["kind"], loss["ranks"], loss["value"], loss["parameters"]) == ("loss", [0], "nan", [])
    assert gradient["kind"] == "gradient" and len(gradient["parameters"]) > 20
    assert gradient["ranks"] == ([] if strategy == "fsdp2" else [1])


def test_no_more_batches_are_left_out_than_allowed(pair, arguments, tmp_path):
    faults = [{"what": "loss", "rank": 1, "cursors": cursors(2, 3)}]
    limits = {"max_steps": 6, "health__non_finite": "skip", "health__max_skips": 1}
    done = pair.run(*arguments(tmp_path / "run", save_strategy="steps", **limits), faults=faults, code=2)
    assert "step 3: found a loss of nan (rank 1, micro-batch 0, samples " in done.ranks[0]["error"]
    assert "1 batches are left out already (health.max_skips)" in done.ranks[0]["error"]
    assert post_mortem(tmp_path / "run", "step-3.json")["done"] == "stop"
    state = json.loads((tmp_path / "run" / "checkpoint-2" / "state.json").read_text())
    assert (state["step"], state["cursor"], state["skipped_batches"]) == (2, 8, 1)


# --- stop ------------------------------------------------------------------------------------------------------------------------


def test_stopping_saves_the_step_before_and_says_what_was_found(pair, arguments, tmp_path):
    out = tmp_path / "run"
    shared = {"max_steps": 8, "save_strategy": "steps", "save_steps": 3}
    faults = [{"what": "loss", "rank": 1, "cursors": cursors(6), "micro_batch": 1}]
    done = pair.run(*arguments(out, **shared), faults=faults, code=2)
    error = done.ranks[0]["error"]
    assert error == done.ranks[1]["error"] and "\n" not in error
    found = post_mortem(out, "step-6.json")
    bad = next(each for each in found["micro_batches"] if (each["rank"], each["micro_batch"]) == (1, 1))
    assert error.startswith(
        f"step 6: found a loss of nan (rank 1, micro-batch 1, samples {bad['windows'][0]}), expected a finite one"
    )
    assert "post-mortem/step-6.json" in error and "health.non_finite" in error
    assert (found["step"], found["cursor"], found["cursor_after"]) == (6, 20, 24)
    assert [each["loss"] == "nan" for each in found["micro_batches"]] == [False, False, False, True]
    assert len({window for each in found["micro_batches"] for window in each["windows"]}) == BATCH
    assert [each["loss"] for each in found["recent_steps"]] == list(losses(out).values())
    assert found["text"][0]["window"] == bad["windows"][0] and len(found["text"][0]["text"]) > 20
    assert (found["policy"], found["done"]) == ("stop", "stop") and len(found["parameters"]) > 20
    saved = done.output.split("stopped at step 5 of 8")[1]
    assert "checkpoint-5 is whole" in saved
    # What stands on the disk is the step before, and the rest can be trained without the batch.
    state = json.loads((out / "checkpoint-5" / "state.json").read_text())
    assert (state["step"], state["cursor"]) == (5, 20)
    assert found["adapter_norms"] == pytest.approx(norms_of(out / "checkpoint-5"), rel=1e-6)
    pair.run(*arguments(out, **shared, health__non_finite="skip"), "--resume=auto", faults=faults)
    pair.run(*arguments(tmp_path / "skipped", **shared, health__non_finite="skip"), faults=faults)
    assert_identical(out, tmp_path / "skipped")


def norms_of(checkpoint: Path) -> dict[str, float]:
    from safetensors.torch import load_file

    tensors = load_file(checkpoint / "adapter" / "adapter_model.safetensors")
    return {name.replace(".weight", ".default.weight"): float(tensor.double().norm()) for name, tensor in tensors.items()}


# --- rollback --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "strategy", ["ddp", *(pytest.param(name, marks=pytest.mark.matrix) for name in ("fsdp2", "zero2", "zero3"))]
)
def test_a_rollback_goes_on_behind_the_batch(strategy, pair, arguments, tmp_path):
    """As if the batches since the checkpoint had not been in the data; also where the run is killed in between."""
    shared = {"max_steps": 8, "save_strategy": "steps", "save_steps": 2, "save_total_limit": "null"}
    out, killed = tmp_path / "run", tmp_path / "killed"
    faults = [{"what": "gradient", "rank": 0, "cursors": cursors(6)}]
    rollback = {**shared, "health__non_finite": "rollback"}
    pair.run(*arguments(out, strategy, **rollback), faults=faults)
    pair.run(*arguments(tmp_path / "without", strategy, **shared), faults=[{"what": "left_out", "cursors": cursors(5, 6)}])
    assert_identical(out, tmp_path / "without")
    assert [(row["step"], row["from_step"], row["cursor"]) for row in records(out, "rollback")] == [(4, 5, 24)]
    assert post_mortem(out, "step-6.json")["done"] == "rollback to checkpoint-4"
    shutil.copytree(out, killed)
    for path in [*killed.glob("checkpoint-[!4]*"), *killed.glob("adapter_*")]:
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    pair.run(*arguments(killed, strategy, **rollback), "--resume=auto", faults=faults)
    assert_identical(out, killed)
    states = [json.loads((run / "checkpoint-8" / "state.json").read_text()) for run in (out, killed)]
    assert [(s["rollbacks"], s["cursor"], s["recent_losses"]) for s in states] == [
        (1, BATCH * 10, list(losses(out).values()))
    ] * 2


def test_rollbacks_are_bounded_and_need_a_checkpoint(pair, arguments, tmp_path):
    faults = [{"what": "loss", "rank": 0, "cursors": cursors(4, 6)}]
    shared = {"max_steps": 8, "save_strategy": "steps", "health__non_finite": "rollback", "health__max_rollbacks": 1}
    done = pair.run(*arguments(tmp_path / "run", save_steps=3, **shared), faults=faults, code=2)
    # Back from step 4 to 3, on with the fifth batch as step 4; the sixth is step 5.
    assert "step 5: found a loss of nan" in done.ranks[1]["error"]
    assert "rolled back 1 times already (health.max_rollbacks)" in done.ranks[1]["error"]
    none = pair.run(*arguments(tmp_path / "none", save_steps=50, **shared), faults=faults, code=2)
    assert "step 4: found a loss of nan" in none.ranks[0]["error"]
    assert "no checkpoint to go back to yet" in none.ranks[0]["error"]
    assert (tmp_path / "none" / "checkpoint-3" / "manifest.json").exists()


def test_a_loss_spike_is_rolled_back_once_there_is_a_history(pair, arguments, tmp_path):
    """One at step 5 has too short a history behind it; one at step 20 is noticed before the optimizer moves."""
    shared = {"max_steps": 22, "save_strategy": "steps", "save_steps": 18, "health__spike_nats": 2.0, "save_total_limit": "null"}
    early = {"what": "spike", "cursors": cursors(5)}
    pair.run(*arguments(tmp_path / "run", **shared), faults=[early, {"what": "spike", "rank": 1, "cursors": cursors(20)}])
    pair.run(*arguments(tmp_path / "without", **shared), faults=[early, {"what": "left_out", "cursors": cursors(19, 20)}])
    found = losses(tmp_path / "run")
    assert found[5] > found[4] + 2
    assert_identical(tmp_path / "run", tmp_path / "without")
    spike = post_mortem(tmp_path / "run", "step-20.json")
    worst = max(spike["micro_batches"], key=lambda each: each["loss"])
    assert (spike["kind"], worst["rank"], spike["done"]) == ("spike", 1, "rollback to checkpoint-18")
    assert spike["value"] > found[19] + 2 and spike["text"][0]["window"] == worst["windows"][0]
    assert len(spike["recent_steps"]) == 19 and not list((tmp_path / "run" / "post-mortem").glob("step-5*"))


# --- hangs -----------------------------------------------------------------------------------------------------------------------


def test_a_run_that_is_only_slow_is_not_ended(pair, arguments, tmp_path):
    """Each process's steps take longer than the limit, its micro-batches less; and the other one waits for it."""
    slow = [{"what": "slow", "rank": 1, "seconds": 1.2}]
    out = tmp_path / "run"
    pair.run(*arguments(out, gradient_accumulation_steps=3, max_steps=1, health__hang_timeout_s=2.5), faults=slow)
    assert list(losses(out)) == [1]
    assert not (out / "stacks").exists()
