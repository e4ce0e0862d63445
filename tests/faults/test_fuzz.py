"""The kill fuzzer (`make test-long` has a dozen kills, `make fuzz` 200), and that its judgements can fail."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import fuzz_checks
import kill_moments
import pytest
from fuzz_checks import Folder, damage, differences, moment, resumed_step, unfinished_save
from fuzz_plan import STOPS, Reference, draw_plan

from tests.runs import ROOT

pytestmark = [pytest.mark.distributed, pytest.mark.skipif(sys.platform != "linux", reason="reads /proc, inotify")]


def check_fuzz(out: Path, kills: int, inside_save: int) -> None:
    """Run the fuzzer and look at its report: so many kills, and each run as if it had never been killed."""
    options = ["--kills", kills, "--inside_save", inside_save, "--seed", 4, "--settings", 1, "--strategies", "ddp", "--steps", 30]
    argv = [sys.executable, ROOT / "scripts" / "fuzz_kills.py", *options, "--torchrun_every", 0, "--out", out]
    done = subprocess.run(list(map(str, argv)), capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-3000:]
    report = json.loads((out / "report.json").read_text())
    found = report["kills"]
    assert not report["failed"] and len(found) >= kills
    assert sum(kill["save"] is not None for kill in found) >= inside_save
    assert len({kill["moment"] for kill in found}) > 1
    assert "seed 4" in done.stdout and "identical to the uninterrupted run" in done.stdout
    assert not list(out.glob("life-*")), "the folders of good lives are removed"


@pytest.fixture(scope="module")
def fuzzed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of the fuzzer with as few kills as tell anything."""
    out = tmp_path_factory.mktemp("fuzz") / "out"
    check_fuzz(out, kills=4, inside_save=2)
    return out


@pytest.fixture
def completed(fuzzed: Path, tmp_path: Path) -> tuple[Path, Path]:
    """The uninterrupted run, and a copy of it to be spoilt."""
    reference = fuzzed / "reference-1" / "run"
    return reference, Path(shutil.copytree(reference, tmp_path / "run"))


@pytest.mark.long
def test_a_dozen_kills_lose_nothing(tmp_path):
    check_fuzz(tmp_path / "out", kills=12, inside_save=4)


@pytest.mark.long
def test_a_run_equals_itself(completed):
    assert differences(*completed) == []


def rewrite(file: Path, old: str, new: str) -> None:
    text = file.read_text()
    assert old in text
    file.write_text(text.replace(old, new, 1))


def flip(file: Path) -> None:
    """One bit of the last tensor."""
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)


@pytest.mark.long
@pytest.mark.parametrize(
    ("spoil", "complaint"),
    [
        (lambda run: flip(run / "adapter_model.safetensors"), "adapter_model.safetensors: 1 of"),
        (lambda run: (run / "adapter_config.json").unlink(), "adapter_config.json is missing"),
        (lambda run: rewrite(run / "tokenizer_config.json", "{", "{ "), "tokenizer_config.json differs"),
        (lambda run: rewrite(run / "metrics.jsonl", '"loss": ', '"loss": 1'), "train at step 1: loss is"),
        (lambda run: shutil.rmtree(run / "checkpoint-30"), "the last checkpoint is of step"),
        (lambda run: flip(run / "checkpoint-30" / "optimizer.safetensors"), "optimizer.safetensors: 1 of"),
        (lambda run: rewrite(run / "checkpoint-30" / "state.json", '"cursor": ', '"cursor": 1'), "state.json: cursor is"),
        (lambda run: (run / ".saving-checkpoint-9").mkdir(), "left behind: .saving-checkpoint-9"),
    ],
)  # fmt: skip
def test_a_difference_is_seen(completed, spoil, complaint):
    reference, run = completed
    spoil(run)
    found = differences(reference, run)
    assert len(found) == 1 and complaint in found[0], found


@pytest.mark.long
def test_steps_that_stand_twice_or_are_missing_are_seen(completed):
    reference, run = completed
    lines = (run / "metrics.jsonl").read_text().splitlines()
    trained = [line for line in lines if '"train"' in line]
    (run / "metrics.jsonl").write_text("\n".join(line for line in [*lines, trained[4]] if line != trained[6]))
    assert "[5] stand twice, [7] are missing" in differences(reference, run)[0]


@pytest.mark.long
def test_damage_by_a_kill_is_seen(completed):
    run = completed[1]
    before = Folder.look(run)
    assert damage(before, Folder.look(run), best_needed=True) == []
    best = before.state()["best_step"]
    if best not in sorted(before.checkpoints)[-2:]:
        shutil.rmtree(before.checkpoints[best])
        assert "best so far and gone" in damage(before, Folder.look(run), best_needed=True)[0]
    flip(run / f"checkpoint-{before.newest}" / "optimizer.safetensors")
    assert "optimizer.safetensors does not have" in damage(before, Folder.look(run), best_needed=True)[0]
    (run / f"checkpoint-{before.newest}").rename(run / f".saving-old-checkpoint-{before.newest}")
    assert Folder.look(run).newest == before.newest, "the next start puts it back"
    shutil.rmtree(run / f".saving-old-checkpoint-{before.newest}")
    assert f"was of step {before.newest}" in damage(before, Folder.look(run), best_needed=True)[0]


@pytest.mark.long
def test_how_far_a_save_had_come_is_read_off_the_folder(completed):
    run = completed[1]
    before = Folder.look(run)
    assert unfinished_save(before, before, 2) is None
    staging = run / ".saving-checkpoint-31"
    staging.mkdir()
    assert unfinished_save(before, Folder.look(run), 2) == "staging"
    (staging / "manifest.json").touch()
    assert unfinished_save(before, Folder.look(run), 2) == "staged, not yet renamed"
    staging.rename(run / ".saving-removing-checkpoint-5")
    assert unfinished_save(before, Folder.look(run), 2) == "removing old ones"
    shutil.rmtree(run / ".saving-removing-checkpoint-5")
    for step in (31, 32):
        shutil.copytree(before.checkpoints[before.newest], run / f"checkpoint-{step}")
    assert unfinished_save(before, Folder.look(run), 2) == "renamed, old ones not yet removed"


def test_moments_are_read_off_the_console():
    loading = "✅ Dataset loaded\n"
    training = (
        loading + "✅ Resuming from run/checkpoint-10 at step 10 (2 processes)\n***** Running training *****\n{'loss': 1}\n"
    )
    evaluating = training + "***** Running Evaluation *****\n"
    assert [moment(text, False) for text in (loading, training, evaluating)] == ["loading", "training", "evaluation"]
    assert moment(evaluating + "Eval at step 12:\n", False) == "training"
    assert moment(evaluating + "Eval at step 12:\nTraining completed in 0:00:01\n", False) == "the end"
    assert moment(training, True) == "inside a save"
    assert (resumed_step(loading), resumed_step(training)) == (0, 10)
    assert fuzz_checks.RUNNING in training


def test_file_operations_are_counted_and_the_process_killed_before_the_planned_one(tmp_path):
    """Flushing, and removals inside `shutil.rmtree`, which name files relative to an open folder, are operations as well."""
    record = tmp_path / "record.txt"
    code = f"""
import os, shutil, sys
from pathlib import Path
sys.path.insert(0, {str(ROOT / "scripts")!r})
import kill_moments
run = Path({str(tmp_path / "run")!r})
(run / ".saving-a").mkdir(parents=True)
kill_moments.arm(folder=str(run), only="", number=8, victims=[], itself=True, record={str(record)!r})
(run / ".saving-a" / "f").write_text("x")
os.close(os.open(run / ".saving-a", os.O_RDONLY))
(run / "metrics.jsonl").open("a").close()
(run / "metrics.jsonl").read_text()
(run / ".saving-a").rename(run / "a")
(run / ".saving-b").mkdir()
(run / ".saving-b" / "g").touch()
shutil.rmtree(run / ".saving-b")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert record.read_text().splitlines() == [
        "open .saving-a/f", "open .saving-a to flush", "open metrics.jsonl", "rename .saving-a to a", "mkdir .saving-b",
        "open .saving-b/g", "rmtree .saving-b", "open .saving-b to flush",
    ]  # fmt: skip
    assert (tmp_path / "run" / "a" / "f").exists() and (tmp_path / "run" / ".saving-b" / "g").exists()


def test_a_folder_is_watched(tmp_path):
    watch = kill_moments.FolderWatch(tmp_path)
    assert watch.read() == []
    (tmp_path / ".saving-checkpoint-1").mkdir()
    (tmp_path / ".saving-checkpoint-1").rename(tmp_path / "checkpoint-1")
    assert watch.read() == [("created", ".saving-checkpoint-1"), ("moved", "checkpoint-1")]
    watch.close()


def test_plans_are_repeated_by_their_key_and_reach_what_is_left():
    reference = Reference(Path(), 2.0, 0.1, 1.0, 0.05, tuple(range(3, 31, 3)), 400, 40)
    plans = [draw_plan(f"1:1:{n}", reference, 30, 24, torchrun_every=10, stop_share=0.1) for n in range(400)]
    assert plans == [draw_plan(f"1:1:{n}", reference, 30, 24, torchrun_every=10, stop_share=0.1) for n in range(400)]
    assert {plan.aim for plan in plans} == {"time", "save", "operation", "save operation"}
    assert {plan.victims for plan in plans} == {(0, 1), (0,), (1,)}
    assert all(24 < plan.after_step <= 30 for plan in plans if plan.after_step)
    assert max(plan.save for plan in plans) == 2, "two saves are left"
    assert {plan.signal for plan in plans if plan.stop} == set(STOPS)
    assert 20 < sum(plan.torchrun for plan in plans) < 65
    trained = [draw_plan(f"1:1:{n}", reference, 30, 30, torchrun_every=0, stop_share=0.5) for n in range(100)]
    assert {plan.aim for plan in trained} == {"time", "operation"} and not any(plan.stop for plan in trained)
