"""Starts that come to nothing, and what the run folder says of them; every one inside the test process."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest

from lora_dist.cli import train as train_verb
from lora_dist.cli.options import parse
from lora_dist.config import RunConfig
from lora_dist.log import UserError
from tests.runs import losses, options

QUICK = {"eval_strategy": "no", "save_steps": 2, "lr_scheduler_type": "constant"}


def train(base: Path, text: Path, out: Path, **changes: Any) -> int:
    return train_verb.run(parse(RunConfig, options(base, text, out, **{**QUICK, **changes}), train_verb.VERB))


def status(out: Path) -> dict[str, Any]:
    return json.loads((out / "status.json").read_text())


@pytest.fixture
def stopped(tiny_base, tiny_text, tmp_path) -> Path:
    """A run folder that says that the run was stopped at step 2."""
    out = tmp_path / "out"
    assert train(tiny_base, tiny_text, out, max_steps=2) == 0
    (out / "status.json").write_text(json.dumps({**status(out), "state": "stopped", "exit_code": 75}))
    return out


def test_a_refused_start_does_not_leave_stopped_behind(stopped, tiny_base, tiny_text):
    """A wrapper that starts the run again while it says `stopped` would do so for ever."""
    with pytest.raises(UserError, match="seed"):
        train(tiny_base, tiny_text, stopped, max_steps=4, seed=7, resume_from_checkpoint="auto")
    assert (status(stopped)["state"], status(stopped)["exit_code"]) == ("failed", 2) and "seed" in status(stopped)["reason"]
    assert train(tiny_base, tiny_text, stopped, max_steps=4, resume_from_checkpoint="auto") == 0
    assert status(stopped)["state"] == "completed"
    with pytest.raises(UserError, match="seed"):
        train(tiny_base, tiny_text, stopped, max_steps=4, seed=7, resume_from_checkpoint="auto")
    assert status(stopped)["state"] == "completed"


def test_no_whole_checkpoint_is_said_in_the_status_too(stopped, tiny_base, tiny_text):
    (stopped / "checkpoint-2" / "state.json").write_text("{}")
    with pytest.raises(UserError, match=r"no checkpoint in .* is whole"):
        train(tiny_base, tiny_text, stopped, max_steps=4, resume_from_checkpoint="auto")
    assert status(stopped)["state"] == "failed"


@pytest.mark.parametrize("damage", [b"train: 5", b"\xff\xfe\x00", b"[1, 2]", b"train: {a: [", b""])
def test_a_damaged_record_of_settings_is_no_obstacle(stopped, tiny_base, tiny_text, damage, capsys):
    (stopped / "run_config.yaml").write_bytes(damage)
    assert train(tiny_base, tiny_text, stopped, max_steps=3, resume_from_checkpoint="auto") == 0
    assert max(losses(stopped)) == 3
    assert "run_config.yaml of the earlier attempt cannot be read" in capsys.readouterr().out


def test_a_time_limit_that_leaves_no_step_is_an_error(tiny_base, tiny_text, tmp_path, monkeypatch):
    """Ended with 75, it would be started again and again."""
    with pytest.raises(UserError, match=r"train\.max_runtime: found 20, expected more than train\.stop_margin_s \(30 s\)"):
        train(tiny_base, tiny_text, tmp_path / "a", max_runtime="20")
    monkeypatch.setenv("SLURM_JOB_ID", "77")
    monkeypatch.setenv("SLURM_JOB_END_TIME", str(int(time.time()) + 10))
    with pytest.raises(UserError, match="found no time for one step at step 0 of 3"):
        train(tiny_base, tiny_text, tmp_path / "b", max_steps=3)
    assert (status(tmp_path / "b")["state"], status(tmp_path / "b")["exit_code"]) == ("failed", 2)


def test_going_back_needs_checkpoints(tiny_base, tiny_text, tmp_path):
    nothing_saved = {"save_strategy": "no", "load_best_model_at_end": False}
    for option, value in (("health__spike_nats", 1.0), ("health__non_finite", "rollback")):
        with pytest.raises(UserError, match=rf"{option.split('__')[1]}: found {value} with train\.save_strategy no"):
            train(tiny_base, tiny_text, tmp_path / "out", **nothing_saved, **{option: value})


def test_lost_checkpoints_and_steps_already_done_are_told(stopped, tiny_base, tiny_text, capsys):
    assert train(tiny_base, tiny_text, stopped, max_steps=1, resume_from_checkpoint="auto") == 0
    assert "it is past the 1 steps that are asked for" in capsys.readouterr().out
    for path in [*stopped.glob("checkpoint-*"), *stopped.glob("adapter_model.safetensors")]:
        path.rename(stopped.parent / path.name)
    assert train(tiny_base, tiny_text, stopped, max_steps=2, resume_from_checkpoint="auto") == 0
    assert "has no checkpoint: starting from step 0" in capsys.readouterr().out


@pytest.mark.parametrize("kind, key", [("text", "dataset_name"), ("alpaca", "dataset_name"), ("text", "validation_file")])
def test_files_that_are_not_there_are_missed_before_a_model_is_loaded(tiny_base, tiny_text, tmp_path, kind, key, capsys):
    changes = (
        {"data__dataset_name": str(tmp_path / "gone.jsonl")} if key == "dataset_name" else {"data__validation_file": "gone.txt"}
    )
    with pytest.raises(UserError, match=rf"data\.{key}.*gone"):
        train(tiny_base, tiny_text, tmp_path / "out", data__format=kind, **changes)
    assert "Model loaded" not in capsys.readouterr().out


def test_the_kernel_for_gpus_is_refused_before_anything_is_loaded(tiny_base, tiny_text, tmp_path):
    with pytest.raises(
        UserError, match=r"adapter.form: found triton, which needs a GPU \(this run computes on cpu\), .*rank of 64 or less"
    ):
        train(tiny_base, tiny_text, tmp_path / "out", adapter__form="triton", adapter__r=65, adapter__type="dora")


def test_ligers_kernels_are_refused_without_a_gpu_and_beside_torch_compile(tiny_base, tiny_text, tmp_path):
    expected = r"train.use_liger_kernel: found true, which needs a GPU \(this run computes on cpu\): leave it out"
    with pytest.raises(UserError, match=expected) as found:
        train(tiny_base, tiny_text, tmp_path / "out", use_liger_kernel=True, torch_compile=True)
    assert "train.torch_compile: found true with train.use_liger_kernel" in "\n".join(found.value.problems)
