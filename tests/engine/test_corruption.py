"""Every file of a checkpoint truncated, flipped, deleted or replaced: found out, named, and the checkpoint before it used.

All combinations on written checkpoints of a tiny adapter, a few through the real command, whose resumed run ends like the uninterrupted
one. About 20 s.
"""

from __future__ import annotations

import itertools
import json
import os
import shutil
import threading
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from lora_dist.cli import train as train_verb
from lora_dist.cli.options import parse
from lora_dist.config import RunConfig
from lora_dist.engine import checkpoint as ck
from lora_dist.engine.folder import check_folder, wait_for_folder
from lora_dist.engine.held import lock_folder
from lora_dist.engine.manifest import content_digest
from lora_dist.log import UserError
from lora_dist.state import TrainState
from tests.runs import assert_identical, options, run

FILES = [
    "manifest.json",
    "state.json",
    "optimizer.safetensors",
    "adapter/adapter_config.json",
    "adapter/adapter_model.safetensors",
    "adapter/block_mask.safetensors",
]
OWN, OTHER = "a" * 32, "b" * 32


def save(run_dir: Path, step: int, *, run_id: str | None = OWN, seed: int = 0, best_step: int = -1) -> Path:
    """A checkpoint of a run whose numbers follow from `seed`: two seeds are two runs of the same shape."""
    adapter = {
        "lora_A.weight": torch.arange(1.0, 9.0).reshape(2, 4) + seed + step,
        "lora_B.weight": torch.ones(4, 2) * (seed + 1),
    }

    def write_adapter(folder: Path) -> None:
        folder.mkdir()
        (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "seed": seed}))
        save_file(adapter, str(folder / "adapter_model.safetensors"))
        save_file({"mask": torch.tensor([seed, 1])}, str(folder / "block_mask.safetensors"))

    return ck.save_checkpoint(
        run_dir,
        write_adapter=write_adapter,
        optimizer={"lora_A.exp_avg": torch.arange(4.0) + seed},
        state=TrainState(step=step, seed=seed, best_step=best_step),
        identity=ck.Identity("f" * 64, "d" * 64),
        versions={},
        norms=ck.tensor_norms(adapter),
        run_id=run_id,
    )


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A run folder with checkpoints 5 and 10."""
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    (run_dir / "run.json").write_text(json.dumps({"run_id": OWN, "created": "2026-01-01T00:00:00+00:00"}))
    save(run_dir, 5)
    save(run_dir, 10)
    return run_dir


def assert_previous_used(folder: Path, *named: str) -> str:
    """checkpoint-10 is skipped, with a reason that names one of these; checkpoint-5 is taken. Returns the line."""
    plan = check_folder(folder, resume="auto", overwrite=False)
    assert plan.checkpoint is not None and plan.checkpoint.name == "checkpoint-5"
    (line,) = plan.skipped
    assert line.startswith("skipping checkpoint-10: ") and any(name in line for name in named), line
    return line


def rewrite_manifest(path: Path, **changes: object) -> None:
    """Change what a manifest says and let its own digest follow, as a program with a mistake would."""
    manifest = json.loads((path / "manifest.json").read_text())
    manifest.pop("sha256")
    manifest.update(changes)
    (path / "manifest.json").write_text(json.dumps({**manifest, "sha256": content_digest(manifest)}))


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("keep", ["nothing", "half", "all but a byte"])
def test_a_truncated_file(folder, name, keep):
    file = folder / "checkpoint-10" / name
    content = file.read_bytes()
    file.write_bytes(content[: {"nothing": 0, "half": len(content) // 2, "all but a byte": len(content) - 1}[keep]])
    assert_previous_used(folder, name)


@pytest.mark.parametrize("name", FILES)
def test_one_flipped_bit(folder, name):
    """At the first and the last byte and at many between, any of the eight bits."""
    file = folder / "checkpoint-10" / name
    content = file.read_bytes()
    positions = sorted({0, len(content) - 1, *range(0, len(content), max(1, len(content) // 40))})
    for n, position in enumerate(positions):
        broken = bytearray(content)
        broken[position] ^= 1 << n % 8
        file.write_bytes(broken)
        assert_previous_used(folder, name)
    file.write_bytes(content)
    assert ck.verify(folder / "checkpoint-10", run_id=OWN) is None


@pytest.mark.parametrize("name", FILES)
def test_a_deleted_file(folder, name):
    (folder / "checkpoint-10" / name).unlink()
    assert_previous_used(folder, f"{name} is missing")


def test_files_of_another_run_of_the_same_shape(folder, tmp_path):
    """All 63 sets of files: only the whole folder verifies by itself, and that names another run."""
    foreign = save(tmp_path, 10, run_id=OTHER, seed=3)
    own = shutil.copytree(folder / "checkpoint-10", tmp_path / "own")
    for count in range(1, len(FILES) + 1):
        for names in itertools.combinations(FILES, count):
            shutil.rmtree(folder / "checkpoint-10")
            shutil.copytree(own, folder / "checkpoint-10")
            for name in names:
                shutil.copy(foreign / name, folder / "checkpoint-10" / name)
            line = assert_previous_used(folder, *FILES)
            if count == len(FILES):
                assert line.endswith(f"manifest.json is of another run (run_id {OTHER[:12]}, expected {OWN[:12]})")


def test_files_of_another_step_of_the_same_run(folder):
    shutil.rmtree(folder / "checkpoint-10")
    shutil.copytree(folder / "checkpoint-5", folder / "checkpoint-10")
    assert_previous_used(folder, "manifest.json is of step 5, expected 10 by the folder's name")
    rewrite_manifest(folder / "checkpoint-10", step=10)
    assert_previous_used(folder, "state.json is of step 5, manifest.json of step 10")


def test_things_in_a_checkpoints_place(folder):
    """A file, links that lead nowhere or in circles, an empty folder: named, not followed, not fallen over."""
    path = folder / "checkpoint-10"
    shutil.rmtree(path)
    path.write_text("what")
    assert_previous_used(folder, "is no folder")
    path.unlink()
    path.symlink_to(folder / "nowhere")
    assert_previous_used(folder, "is a link that leads nowhere")
    path.unlink()
    path.symlink_to(path)
    assert_previous_used(folder, "is a link that leads nowhere")
    path.unlink()
    path.mkdir()
    assert_previous_used(folder, "manifest.json is missing")
    (path / "manifest.json").symlink_to(path / "manifest.json")
    assert_previous_used(folder, "manifest.json is missing")


def test_folders_in_a_files_place(folder):
    for name in FILES:
        file = folder / "checkpoint-10" / name
        content = file.read_bytes()
        file.unlink()
        file.mkdir()
        assert_previous_used(folder, f"{name} is missing")
        file.rmdir()
        file.write_bytes(content)


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_files_that_may_not_be_read(folder):
    for name in FILES:
        file = folder / "checkpoint-10" / name
        file.chmod(0)
        assert_previous_used(folder, f"{name} cannot be read")
        file.chmod(0o600)


def test_manifests_that_leave_something_out_or_point_elsewhere(folder):
    path = folder / "checkpoint-10"
    files = json.loads((path / "manifest.json").read_text())["files"]
    for name in FILES[1:]:
        rewrite_manifest(path, files={k: v for k, v in files.items() if k != name})
        assert_previous_used(folder, f"manifest.json does not list {name}")
    for name in ("../checkpoint-5/state.json", "/etc/hostname"):
        rewrite_manifest(path, files={**files, name: files["state.json"]})
        assert_previous_used(folder, f"manifest.json lists {name}, which is not below the checkpoint")
    for files in (None, [], {"state.json": None}, {name: {"bytes": "x"} for name in FILES[1:]}):
        rewrite_manifest(path, files=files)
        assert_previous_used(folder, "manifest.json", "state.json")


def test_no_whole_checkpoint_is_an_error_that_names_each_and_moves_nothing(folder):
    for step in (5, 10):
        (folder / f"checkpoint-{step}" / "state.json").unlink()
    with pytest.raises(UserError, match="checkpoint-10: state.json is missing.*checkpoint-5: state.json.*overwrite_output_dir"):
        check_folder(folder, resume="auto", overwrite=False)
    assert check_folder(folder, resume="auto", overwrite=True).move_aside


def test_a_named_checkpoint_of_another_run_in_this_folder_is_refused(folder):
    shutil.rmtree(folder / "checkpoint-10")
    save(folder, 10, run_id=OTHER)
    with pytest.raises(UserError, match="checkpoint-10 is not whole: manifest.json is of another run"):
        check_folder(folder, resume=str(folder / "checkpoint-10"), overwrite=False)


def test_a_run_without_its_run_json_is_that_of_its_newest_whole_checkpoint(folder):
    (folder / "run.json").write_text("{")
    save(folder, 12, run_id=OTHER)
    (folder / "checkpoint-12" / "state.json").unlink()
    plan = check_folder(folder, resume="auto", overwrite=False)
    assert plan.checkpoint is not None and plan.checkpoint.name == "checkpoint-10"


def test_a_checkpoint_whose_best_is_broken_is_passed_over_where_an_earlier_one_makes_the_best_again(folder):
    """5 (best), 10, 15 (best), 20: with 15 broken, 10 is the newest whose own best is whole."""
    for step, best in ((10, 5), (15, 15), (20, 15)):
        save(folder, step, best_step=best)
    (folder / "checkpoint-15" / "adapter" / "adapter_model.safetensors").write_bytes(b"")
    plan = check_folder(folder, resume="auto", overwrite=False)
    assert plan.checkpoint is not None and plan.checkpoint.name == "checkpoint-10" and not plan.best_lost
    assert (
        "checkpoint-20: its best checkpoint-15 cannot be used (adapter/adapter_model.safetensors has 0 bytes" in plan.skipped[0]
    )
    plan = check_folder(folder, resume="auto", overwrite=False, needs_best=False)
    assert plan.checkpoint is not None and plan.checkpoint.name == "checkpoint-20"
    for step in (5, 10):
        shutil.rmtree(folder / f"checkpoint-{step}")
    plan = check_folder(folder, resume="auto", overwrite=False)
    assert plan.checkpoint is not None and plan.checkpoint.name == "checkpoint-20" and plan.best_lost
    assert "the best adapter is chosen among later evaluations" in plan.skipped[-1]


def test_a_checkpoint_of_format_1_loads(folder):
    """As the first version wrote it: no run_id."""
    path = folder / "checkpoint-10"
    manifest = json.loads((path / "manifest.json").read_text())
    del manifest["run_id"], manifest["sha256"]
    manifest["version"] = 1
    (path / "manifest.json").write_text(json.dumps({**manifest, "sha256": content_digest(manifest)}))
    plan = check_folder(folder, resume="auto", overwrite=False)
    assert plan.checkpoint == path and not plan.skipped
    assert ck.load_checkpoint(path).state.step == 10
    (path / "optimizer.safetensors").write_bytes(b"")
    assert_previous_used(folder, "optimizer.safetensors")


# Through the command


DAMAGE = {
    "a file cut off": lambda path, other: (path / "adapter/adapter_model.safetensors").write_bytes(b"x" * 100),
    "the whole folder of another run": lambda path, other: (shutil.rmtree(path), shutil.copytree(other, path)),
}


@pytest.fixture(scope="module")
def finished(tiny_base, tiny_text, tmp_path_factory) -> tuple[Path, Path]:
    """Two runs of the same shape: the uninterrupted one, and another."""
    runs = tmp_path_factory.mktemp("finished")
    for name, seed in (("one", 1), ("other", 2)):
        values = options(tiny_base, tiny_text, runs / name, **STEPS, seed=seed)
        assert train_verb.run(parse(RunConfig, values, train_verb.VERB)) == 0
    return runs / "one", runs / "other"


STEPS = {"max_steps": 6, "save_steps": 2, "eval_steps": 2, "eval_on_start": False, "save_total_limit": 10}


@pytest.mark.parametrize("damage", DAMAGE, ids=lambda name: name.replace(" ", "-"))
def test_a_damaged_newest_checkpoint_is_skipped_and_the_run_ends_as_ever(damage, finished, tiny_base, tiny_text, tmp_path):
    one, other = finished
    out = Path(shutil.copytree(one, tmp_path / "out"))
    for file in (*out.glob("adapter*"), *out.glob("block_mask*")):
        file.unlink()  # as if killed before the end
    DAMAGE[damage](out / "checkpoint-6", other / "checkpoint-6")
    done = run(1, "train", *options(tiny_base, tiny_text, out, **STEPS, seed=1, resume_from_checkpoint="auto"))
    assert "skipping checkpoint-6: " in done.stdout and "at step 4" in done.stdout
    assert "skipping checkpoint-6: " in (out / "train.log").read_text()
    assert_identical(out, one)
    assert (out / "superseded-checkpoint-6").exists()
    records = [json.loads((out / "attempts" / f"attempt-{n}.json").read_text()) for n in (1, 2)]
    assert [record["state"] for record in records] == ["completed", "completed"]
    assert [record["first_step"] for record in records] == [0, 4]


def test_a_resuming_start_waits_for_the_one_before_to_let_go(folder):
    lock, notes = lock_folder(folder), []
    assert lock is not None
    with pytest.raises(UserError, match=r"another run is at work in .* \(waited 0.3 s\)"):
        wait_for_folder(folder, resume="auto", timeout_s=0.3, note=notes.append)
    assert len(notes) == 1 and "waiting up to 0.3 s" in notes[0]
    assert (
        wait_for_folder(folder, resume=None, timeout_s=60, note=notes.append) is None
    )  # a fresh start is refused by claim_folder
    threading.Timer(0.5, lock.close).start()
    held = wait_for_folder(folder, resume="auto", timeout_s=60, note=notes.append)
    assert held is not None and len(notes) == 2
    with pytest.raises(UserError, match="another run is at work"):
        lock_folder(folder)
    held.close()
