"""Reading run folders as they are found: whole, cut off, incomplete, copied, or nothing of the kind."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from lora_dist.log import UserError
from lora_dist.monitor.events import events_of
from lora_dist.monitor.log_records import records_of_log
from lora_dist.monitor.runs import read_run, read_runs


def _line(step: int, event: str, **values: object) -> str:
    return json.dumps({"step": step, "event": event, **values}) + "\n"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A run that was killed after step 20 and goes on from its checkpoint-10."""
    folder = tmp_path / "run"
    (folder / "attempts").mkdir(parents=True)
    (folder / "metrics.jsonl").write_text(
        _line(0, "eval", eval_loss=3.0, perplexity=20.1)
        + _line(10, "train", loss=2.5, grad_norm=None)
        + _line(11, "save", saved_step=10, save_time_s=0.25)
        + _line(20, "train", loss=2.25, grad_norm=0.5)
        + _line(20, "warning", sign="plateau", text="the loss does not fall: raise train.learning_rate")
        + _line(25, "skip", skipped_batches=1, cursor=9)
        + _line(26, "rollback", rollbacks=1, from_step=28, cursor=9)
    )
    first = {
        "attempt": 1,
        "started": "2026-01-01T10:00:00+00:00",
        "ended": None,
        "state": "failed",
        "first_step": 0,
        "last_step": None,
    }
    second = {
        "attempt": 2,
        "started": "2026-01-01T11:00:00+00:00",
        "state": "running",
        "first_step": 10,
        "processes": 2,
        "host": "b",
    }
    for number, attempt in ((1, first), (2, second)):
        (folder / "attempts" / f"attempt-{number}.json").write_text(json.dumps(attempt))
    (folder / "attempts" / "attempt-1.log").write_text("Step 1/30 [>]\nStep 10/30 [>]\n")
    (folder / "status.json").write_text(json.dumps({"state": "running", "step": 10, "total_steps": 30, "attempt": 2}))
    (folder / "run.json").write_text(json.dumps({"run_id": "0" * 32}))
    (folder / "run_config.yaml").write_text("train:\n  eval_steps: 10\n")
    (folder / "train.log").write_text("⚠️  the disk is nearly full\n⚠️  the loss does not fall: raise train.learning_rate\n")
    return folder


def test_a_run_at_work(folder: Path) -> None:
    run = read_run(folder)
    assert (run.name, run.state, run.step, run.total_steps) == ("run", "running", 26, 30)
    assert run.series("loss") == [(10, 2.5), (20, 2.25)]
    assert run.series("grad_norm") == [(20, 0.5)]  # null: it was not finite
    assert (run.figures, run.setting("train.eval_steps")) == (["perplexity"], 10)
    assert [gap.split()[0] for gap in run.gaps] == ["pattern.json"]


def test_events_in_order(folder: Path) -> None:
    events = [(event.step, event.kind) for event in events_of(read_run(folder))]
    assert events == [
        (0, "started"), (0, "warning"), (10, "saved"), (10, "failed"), (10, "resumed"), (20, "warning"), (25, "skip"), (26, "rollback"),
    ]  # fmt: skip


def test_a_killed_attempt_that_got_further_ends_before_the_next_begins(folder: Path) -> None:
    (folder / "attempts" / "attempt-1.log").write_text("Step 10/30 [>]\nStep 18/30 [>]\n")
    (folder / "post-mortem").mkdir()
    for step, hour in ((16, 10), (17, 11)):  # of the first attempt behind its checkpoint, and of the second
        content = {"step": step, "found": f"nan in {hour}", "time": f"2026-01-01T{hour}:30:00+00:00"}
        (folder / "post-mortem" / f"step-{step}.json").write_text(json.dumps(content))
    events = [(event.step, event.kind) for event in events_of(read_run(folder))]
    assert events == [
        (0, "started"), (0, "warning"), (10, "saved"), (15, "post-mortem"), (18, "failed"), (10, "resumed"), (16, "post-mortem"),
        (20, "warning"), (25, "skip"), (26, "rollback"),
    ]  # fmt: skip


def test_a_warning_of_a_record_is_not_told_again_from_the_log(folder: Path) -> None:
    warnings = [event.text for event in events_of(read_run(folder)) if event.kind == "warning"]
    assert warnings == ["the disk is nearly full", "the loss does not fall: raise train.learning_rate"]


def test_broken_lines_are_counted_and_a_half_written_last_one_is_not(folder: Path) -> None:
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 27, "ev\n[1]\n{"event": "train"}\n' + _line(30, "train", loss=2.0) + '{"step": 31, "event": "tr')
    run = read_run(folder)
    assert run.series("loss")[-1] == (30, 2.0)
    assert "metrics.jsonl: 3 of 12 lines are no records (first: line 8) and are left out" in run.gaps


@pytest.mark.parametrize("name", ["status.json", "run.json", "run_config.yaml", "metrics.jsonl", "attempts"])
def test_what_is_missing_or_damaged_is_told(folder: Path, name: str) -> None:
    target = folder / name
    shutil.rmtree(target) if target.is_dir() else target.unlink()
    assert any(gap.startswith(name) and "missing" in gap for gap in read_run(folder).gaps)
    if name.endswith(("json", "yaml")):
        for text in ("{", "[]"):
            target.write_text(text)
            assert any(gap.startswith(name) and ("damaged" in gap or "holds no" in gap) for gap in read_run(folder).gaps)


def test_values_of_the_wrong_kind_are_told_and_left_out(folder: Path) -> None:
    for name, key, value in (
        ("attempts/attempt-2.json", "first_step", "ten"), ("status.json", "step", [1]), ("status.json", "total_steps", "many"),
    ):  # fmt: skip
        content = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps({**content, key: value}))
    (folder / "pattern.json").write_text('{"linears": 5}')
    run = read_run(folder)
    assert run.gaps == [
        "status.json: step is [1], which is no number",
        "status.json: total_steps is 'many', which is no number",
        "pattern.json holds no list of linears: the pattern is not drawn",
        "attempts/attempt-2.json: first_step is 'ten', which is no number",
    ]
    assert (run.step, run.total_steps, run.pattern) == (26, None, None)
    assert [event.kind for event in events_of(run)].count("started") == 2


def test_no_runs_are_named_together(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "notes.txt").write_text("nothing of a run\n")
    with pytest.raises(UserError) as caught:
        read_runs([str(tmp_path / name) for name in ("gone", "empty", "notes.txt")])
    gone, empty, notes = caught.value.problems
    assert "found no" in gone
    assert "found neither metrics.jsonl nor status.json" in empty
    assert "found no line of a run" in notes


def test_runs_of_one_name_are_told_apart(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "other" / "run")
    assert [run.name for run in read_runs([str(folder), str(tmp_path / "other" / "run")])] == [
        f"{tmp_path.name}/run",
        "other/run",
    ]
    assert [run.name for run in read_runs([str(folder)] * 2)] == [f"{tmp_path.name}/run (1)", f"{tmp_path.name}/run (2)"]


def test_metrics_alone(folder: Path) -> None:
    run = read_run(folder / "metrics.jsonl")
    assert run.series("loss") == [(10, 2.5), (20, 2.25)]
    assert run.state == "unknown"
    assert len(run.gaps) == 1


def test_records_of_a_resumed_log_hold_no_step_twice() -> None:
    def step(number: int, loss: float, seconds: int) -> str:
        return f"Step {number}/30   [>  ] 1.0%  | Loss: {loss} | LR: 1e-04 | Time: 0:00:{seconds:02d}\n"

    text = step(10, 3.0, 10) + step(20, 2.5, 20) + "✅ Resuming\n" + step(20, 2.6, 18) + step(30, 2.0, 28)
    records, _ = records_of_log(text)
    assert [(record["step"], record["loss"]) for record in records] == [(10, 3.0), (20, 2.6), (30, 2.0)]
    assert [record.get("step_time_s") for record in records] == [None, None, 1.0]
