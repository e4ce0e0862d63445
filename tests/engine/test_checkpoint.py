"""Checkpoints: whole or not at all, verified file by file, old ones retired in the right order."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from lora_dist.engine import checkpoint as ck
from lora_dist.log import UserError
from lora_dist.state import TrainState

ADAPTER = {"lora_A.weight": torch.arange(1.0, 9.0).reshape(2, 4), "lora_B.weight": torch.zeros(4, 2)}
NORMS = ck.tensor_norms(ADAPTER)
RUN_ID = "a" * 32
IDENTITY = ck.Identity("f" * 64, "d" * 64)


def write_adapter(folder: Path) -> None:
    folder.mkdir()
    (folder / "adapter_config.json").write_text("{}")
    save_file(ADAPTER, str(folder / "adapter_model.safetensors"))
    (folder / "block_mask.safetensors").write_bytes(bytes(range(100)))


def save(run: Path, step: int, *, write_adapter=write_adapter, norms=NORMS, **state) -> Path:
    return ck.save_checkpoint(
        run,
        write_adapter=write_adapter,
        optimizer={"w.exp_avg": torch.arange(4.0), "w.step": torch.tensor(float(step))},
        state=TrainState(step=step, cursor=step * 3, **state),
        identity=IDENTITY,
        versions={"torch": "x"},
        norms=norms,
        run_id=RUN_ID,
    )


def test_what_was_saved_is_read_back(tmp_path):
    path = save(tmp_path, 5, tokens=77, best_metric=1.5)
    loaded = ck.load_checkpoint(path)
    assert loaded.state == TrainState(step=5, cursor=15, tokens=77, best_metric=1.5)
    assert loaded.identity == IDENTITY
    assert torch.equal(loaded.optimizer["w.exp_avg"], torch.arange(4.0))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["checkpoint-5"]


@pytest.mark.parametrize(
    "name",
    ["state.json", "optimizer.safetensors", "adapter/adapter_config.json", "adapter/adapter_model.safetensors", "manifest.json"],
)
@pytest.mark.parametrize("damage", ["truncate", "flip", "delete", "empty"])
def test_every_kind_of_damage_is_named_and_the_previous_checkpoint_used(tmp_path, name, damage):
    save(tmp_path, 5)
    file = save(tmp_path, 10) / name
    content = bytearray(file.read_bytes())
    if damage == "truncate":
        file.write_bytes(content[: len(content) // 2])
    elif damage == "flip":
        content[len(content) // 3] ^= 1
        file.write_bytes(content)
    elif damage == "empty":
        file.write_bytes(b"")
    else:
        file.unlink()
    skipped = []
    found = ck.find_checkpoint(tmp_path, lambda path, why: skipped.append((path.name, why)))
    assert found.name == "checkpoint-5"
    assert skipped[0][0] == "checkpoint-10" and Path(name).name in skipped[0][1]
    with pytest.raises(UserError, match="is not whole"):
        ck.load_checkpoint(tmp_path / "checkpoint-10")


def test_a_file_of_another_checkpoint_is_found_out(tmp_path):
    first, second = save(tmp_path, 5), save(tmp_path, 10)
    shutil.copy(first / "state.json", second / "state.json")
    assert "state.json" in ck.verify(second)


def test_a_killed_save_leaves_nothing_that_looks_like_a_checkpoint(tmp_path):
    save(tmp_path, 5)

    def killed(folder: Path) -> None:
        write_adapter(folder)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        save(tmp_path, 10, write_adapter=killed)
    assert [step for step, _ in ck.list_checkpoints(tmp_path)] == [5]
    ck.clear_staging(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint-5"]


def test_a_replace_that_was_killed_half_way_is_put_right(tmp_path):
    path = save(tmp_path, 5)
    path.rename(tmp_path / ".saving-old-checkpoint-5")  # killed between the two renames
    ck.clear_staging(tmp_path)
    assert ck.verify(tmp_path / "checkpoint-5") is None


def test_saving_the_same_step_again_replaces_it(tmp_path):
    save(tmp_path, 5, tokens=1)
    save(tmp_path, 5, tokens=2)
    assert ck.load_checkpoint(tmp_path / "checkpoint-5").state.tokens == 2


def test_a_disk_that_cannot_be_written_is_one_clear_line_and_keeps_what_was_there(tmp_path):
    save(tmp_path, 5)

    def full(folder: Path) -> None:
        raise OSError(28, "No space left on device")

    with pytest.raises(UserError, match="No space left.*earlier checkpoints are untouched"):
        save(tmp_path, 10, write_adapter=full)
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint-5"]


@pytest.mark.parametrize(
    "limit,best,kept",
    [
        (2, 10, [10, 40, 50]),
        (3, 10, [10, 40, 50]),
        (3, 50, [30, 40, 50]),
        (None, 10, [10, 20, 30, 40, 50]),
        (4, 20, [20, 30, 40, 50]),
        (2, -1, [40, 50]),
    ],
)
def test_retention_never_takes_the_two_newest_or_the_best(tmp_path, limit, best, kept):
    for step in (10, 20, 30, 40, 50):
        save(tmp_path, step)
    ck.retain(tmp_path, limit, best)
    assert [step for step, _ in ck.list_checkpoints(tmp_path)] == kept
    assert not list(tmp_path.glob(".saving-*"))


def test_a_later_version_says_so(tmp_path):
    path = save(tmp_path, 5)
    manifest = json.loads((path / "manifest.json").read_text())
    (path / "manifest.json").write_text(json.dumps({**manifest, "version": 99}))
    assert "version 99" in ck.verify(path)
    with pytest.raises(ValueError, match="version 99"):
        TrainState.from_dict({"version": 99})


def test_keys_that_this_version_does_not_know_are_kept():
    assert TrainState.from_dict({"version": 1, "step": 3, "new_thing": [1]}).extra == {"new_thing": [1]}
