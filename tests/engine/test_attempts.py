"""The run folder's books: whose it is, how the run stands, one record a start; and a folder that is removed under its run. Ten seconds."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

from lora_dist.cli import train as train_verb
from lora_dist.cli.options import parse
from lora_dist.config import RunConfig
from lora_dist.engine.attempts import Attempt, code_revision, make_run_id, next_attempt
from lora_dist.engine.folder import check_folder, claim_folder
from lora_dist.engine.held import HeldFolder, lock_folder, read_run_id, write_whole
from lora_dist.log import UserError
from lora_dist.monitor.metrics import MetricsFile
from tests.engine.tracer import run_until
from tests.runs import options, run


def held(path: Path, run_id: str = "a" * 32) -> HeldFolder:
    path.mkdir(parents=True, exist_ok=True)
    folder = HeldFolder(path, lock_folder(path), run_id)
    folder.keep("run.json", json.dumps({"run_id": run_id, "created": "2026-01-01T00:00:00+00:00"}))
    return folder


def begin(folder: HeldFolder, number: int, *, first_step: int = 0) -> Attempt:
    return Attempt.begin(
        folder, number, {"train": {"seed": 1}}, processes=2, argv=["train", "--x=1"], first_step=first_step, total_steps=9,
        job={"SLURM_JOB_ID": "7"}, versions={"torch": "2"},
    )  # fmt: skip


def read(file: Path) -> dict:
    return json.loads(file.read_text())


def test_an_attempt_from_start_to_end(tmp_path):
    folder = held(tmp_path / "run")
    attempt = begin(folder, 1, first_step=4)
    status = read(tmp_path / "run/status.json")
    assert {k: status[k] for k in ("state", "reason", "step", "total_steps", "attempt", "exit_code")} == {
        "state": "running", "reason": "resumed", "step": 4, "total_steps": 9, "attempt": 1, "exit_code": None,
    }  # fmt: skip
    record = read(tmp_path / "run/attempts/attempt-1.json")
    assert record["state"] == "running" and record["ended"] is None and record["job"] == {"SLURM_JOB_ID": "7"}
    attempt.end("stopped", "SIGTERM", step=6, exit_code=75)
    attempt.end("failed", "a second word", step=7, exit_code=1)  # changes nothing
    record, status = read(tmp_path / "run/attempts/attempt-1.json"), read(tmp_path / "run/status.json")
    assert (record["state"], record["reason"], record["first_step"], record["last_step"]) == ("stopped", "SIGTERM", 4, 6)
    assert record["argv"] == ["train", "--x=1"] and record["processes"] == 2 and record["ended"] >= record["started"]
    assert (status["state"], status["step"], status["exit_code"]) == ("stopped", 6, 75)
    assert yaml.safe_load((tmp_path / "run/attempts/attempt-1.yaml").read_text()) == {"train": {"seed": 1}}
    assert next_attempt(tmp_path / "run") == 2


def test_an_attempt_that_was_killed_is_closed_by_the_next(tmp_path):
    folder = held(tmp_path / "run")
    begin(folder, 1)
    (tmp_path / "run/attempts/attempt-1.log").write_text("the last it said\n")
    begin(folder, 2)
    first = read(tmp_path / "run/attempts/attempt-1.json")
    assert first["state"] == "failed" and "ended without a word" in first["reason"] and first["ended"] is not None
    assert read(tmp_path / "run/attempts/attempt-2.json")["state"] == "running"


def test_a_damaged_record_of_an_earlier_attempt_is_no_obstacle(tmp_path):
    folder = held(tmp_path / "run")
    begin(folder, 1)
    for content in (b"", b"\xff", b"[]", b'{"state": 1'):
        (tmp_path / "run/attempts/attempt-1.json").write_bytes(content)
        begin(folder, 2)
        assert read(tmp_path / "run/attempts/attempt-2.json")["state"] == "running"


@pytest.mark.parametrize("content", [None, "", "{", "[]", '{"run_id": 3}', '{"run_id": "../x"}'])
def test_a_run_json_that_is_missing_or_damaged(tmp_path, content):
    if content is not None:
        (tmp_path / "run.json").write_text(content)
    notes: list[str] = []
    run_id, text = make_run_id(tmp_path, "c" * 32, notes.append)
    assert run_id == "c" * 32 == json.loads(text)["run_id"] and re.search("is (missing|damaged): written anew", notes[0])
    fresh, _ = make_run_id(tmp_path, None, notes.append)
    assert re.fullmatch("[0-9a-f]{32}", fresh) and len(notes) == (1 if content is None else 2)
    (tmp_path / "run.json").write_text(text)
    assert make_run_id(tmp_path, "d" * 32, notes.append) == (run_id, text)


@pytest.mark.parametrize("name", [".lock", "run.json", "run_config.yaml", "attempts"])
def test_a_thing_of_the_wrong_kind_in_the_way_is_to_be_moved(tmp_path, name):
    if name == "attempts":
        (tmp_path / name).write_text("")
    else:
        (tmp_path / name).mkdir()
    plan = check_folder(tmp_path, resume=None, overwrite=False)
    with pytest.raises(UserError, match=f"; move {re.escape(str(tmp_path / name))} away") as caught:
        claim_folder(plan, {}, lambda text: None)
    assert "free space" not in str(caught.value)


def test_a_metrics_file_that_is_a_folder_is_to_be_moved(tmp_path):
    with pytest.raises(UserError, match=f"; move {re.escape(str(tmp_path))} away"):
        MetricsFile(tmp_path).drop_after(1)


def test_a_small_file_killed_at_any_system_call_is_the_old_or_the_new(tmp_path):
    file, seen = tmp_path / "status.json", set()
    for k in range(1, 100):
        write_whole(file, "old")
        calls = run_until(lambda: write_whole(file, "new"), k)
        seen.add(file.read_text())
        if calls is not None:
            break
    assert seen == {"old", "new"} and k > 2


def test_code_revision_of_a_checkout(tmp_path):
    package = tmp_path / "checkout/package"
    package.mkdir(parents=True)
    (package / "a.py").write_text("")
    assert code_revision(package) == {"revision": None, "dirty": None}
    for argv in (["init", "-q"], ["add", "."], ["-c", "user.name=x", "-c", "user.email=x@x", "commit", "-qm", "x"]):
        subprocess.run(["git", "-C", str(package.parent), *argv], check=True)
    found = code_revision(package)
    assert re.fullmatch("[0-9a-f]{40}", found["revision"]) and found["dirty"] is False
    (package / "a.py").write_text("x = 1")
    assert code_revision(package) == {"revision": found["revision"], "dirty": True}


# The folder, removed or moved under its run


def test_a_removed_folder_is_made_anew_with_its_books_and_its_lock(tmp_path):
    folder = held(tmp_path / "deep/run")
    attempt = begin(folder, 1)
    assert folder.ensure() is None
    shutil.rmtree(tmp_path / "deep")
    attempt.write_status("running", "x", step=3)  # nowhere to write it: no error
    happened = folder.ensure()
    assert happened is not None and "was removed while the run was at work; made anew; earlier checkpoints are gone" in happened
    assert folder.ensure() is None
    path = tmp_path / "deep/run"
    assert read_run_id(path) == "a" * 32 and read(path / "status.json")["step"] == 3
    assert sorted(p.name for p in (path / "attempts").iterdir()) == ["attempt-1.json", "attempt-1.yaml"]
    with pytest.raises(UserError, match="another run is at work"):
        lock_folder(path)
    folder.close()
    lock_folder(path).close()


def test_a_moved_folder_is_named(tmp_path):
    folder = held(tmp_path / "run")
    (tmp_path / "run").rename(tmp_path / "elsewhere")
    happened = folder.ensure()
    assert (
        happened is not None
        and f"was moved to {tmp_path / 'elsewhere'}" in happened
        and "earlier checkpoints are there" in happened
    )
    assert read_run_id(tmp_path / "run") == "a" * 32 and folder.ensure() is None
    lock_folder(tmp_path / "elsewhere").close()  # let go


def test_a_lock_and_books_that_are_removed_come_back(tmp_path):
    folder = held(tmp_path / "run")
    for name in (".lock", "run.json"):
        (tmp_path / "run" / name).unlink()
    assert folder.ensure() is None
    assert read_run_id(tmp_path / "run") == "a" * 32
    with pytest.raises(UserError, match="another run is at work"):
        lock_folder(tmp_path / "run")


def test_a_place_that_another_run_has_taken_is_left_alone(tmp_path):
    folder = held(tmp_path / "run")
    shutil.rmtree(tmp_path / "run")
    other = held(tmp_path / "run", "b" * 32)
    with pytest.raises(UserError, match="another run is at work"):
        folder.ensure()
    other.close()
    with pytest.raises(UserError, match="was replaced by another run's folder"):
        folder.ensure()
    assert read_run_id(tmp_path / "run") == "b" * 32


def test_a_run_that_is_refused_leaves_no_books(tiny_base, tiny_text, tmp_path):
    """And one that ends well leaves all of them, through the command."""
    out = tmp_path / "out"
    quick = {"max_steps": 2, "eval_strategy": "no"}
    run(1, "train", *options(tiny_base, tiny_text, out, **quick))
    status, record = read(out / "status.json"), read(out / "attempts/attempt-1.json")
    assert (status["state"], status["reason"], status["step"], status["exit_code"]) == ("completed", "", 2, 0)
    assert record["argv"][0] == "train" and f"--train.output_dir={out}" in record["argv"]
    assert (out / "attempts/attempt-1.log").read_text() == (out / "train.log").read_text()
    manifest = read(out / "checkpoint-2/manifest.json")
    assert manifest["run_id"] == read(out / "run.json")["run_id"]
    before = {p: p.read_bytes() for p in out.rglob("*") if p.is_file()}
    with pytest.raises(UserError, match="already holds a run"):
        train_verb.run(parse(RunConfig, options(tiny_base, tiny_text, out, **quick), train_verb.VERB))
    assert {p: p.read_bytes() for p in out.rglob("*") if p.is_file()} == before
