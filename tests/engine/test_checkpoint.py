"""Checkpoints: whole or not at all, verified file by file, old ones retired in the right order."""

from __future__ import annotations

import json
import shutil
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from lora_dist.engine import checkpoint as ck
from lora_dist.log import UserError
from lora_dist.state import TrainState
from tests.engine.tracer import run_until

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


# What is read back before a checkpoint is published


@pytest.mark.parametrize(
    "adapter,message",
    [
        ({"lora_A.weight": ADAPTER["lora_A.weight"]}, "lacks tensor lora_B.weight .1 tensors found, 2 expected"),
        ({**ADAPTER, "other": torch.ones(1)}, "holds an unknown tensor other"),
        (
            {**ADAPTER, "lora_A.weight": ADAPTER["lora_A.weight"] * (1 + 1e-5)},
            "lora_A.weight has norm 14.28299[0-9]*, expected 14.28285",
        ),
        ({**ADAPTER, "lora_A.weight": torch.zeros(2, 4)}, "lora_A.weight has norm 0, expected 14.28"),
        ({**ADAPTER, "lora_B.weight": torch.full((4, 2), float("nan"))}, "lora_B.weight has norm nan, expected 0 "),
        ({**ADAPTER, "lora_B.weight": torch.zeros(0, 2)}, r"lora_B.weight has shape .0, 2., expected elements"),
    ],
)
def test_an_adapter_file_that_is_not_the_live_adapter_is_a_failed_save(tmp_path, adapter, message):
    save(tmp_path, 5)

    def wrong(folder: Path) -> None:
        write_adapter(folder)
        save_file(adapter, str(folder / "adapter_model.safetensors"))

    with pytest.raises(UserError, match=f"adapter_model.safetensors.*{message}.*nothing was published"):
        save(tmp_path, 10, write_adapter=wrong)
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint-5"]


def test_rounding_of_a_norm_is_no_difference(tmp_path):
    save(tmp_path, 5, norms={name: norm * (1 + 5e-7) for name, norm in NORMS.items()})
    with pytest.raises(UserError, match="has norm"):
        save(tmp_path, 6, norms={name: norm * (1 + 5e-6) for name, norm in NORMS.items()})


def test_norms_are_summed_in_float64():
    big = torch.full((1 << 20,), 1e-4)
    assert ck.tensor_norms({"x": big})["x"] == pytest.approx(float(big[0].double()) * 1024, rel=1e-12)


def test_a_save_works_from_a_thread_beside_others(tmp_path):
    threads = [threading.Thread(target=save, args=(tmp_path, step)) for step in range(1, 9)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [step for step, path in ck.list_checkpoints(tmp_path) if ck.verify(path) is None] == list(range(1, 9))


# Killed at every system call that changes a file


def killed_at_every_call(work: Callable[[], object], prepare: Callable[[], None], check: Callable[[], None]) -> int:
    """Prepare, kill `work` at its k-th changing call, check: for every k. Returns how many there were."""
    for k in range(1, 1000):
        prepare()
        calls = run_until(work, k)
        check()
        if calls is not None:
            return calls
    raise AssertionError("the work never came to its end")


@pytest.mark.parametrize("before", [(), (5,), (5, 10)], ids=["first", "second", "same step again"])
def test_a_save_killed_at_any_system_call_leaves_the_old_or_the_new_whole(tmp_path, before):
    """Five seconds. `same step again` replaces a checkpoint: there is never a moment without it."""
    torch.set_num_threads(1)
    run, seen = tmp_path / "run", set()

    def prepare() -> None:
        shutil.rmtree(run, ignore_errors=True)
        run.mkdir()
        for step in before:
            save(run, step, tokens=1)

    def check() -> None:
        ck.put_back(run)
        found = ck.find_checkpoint(run, lambda path, why: pytest.fail(f"{path.name}: {why}"))
        state = ck.load_checkpoint(found).state if found is not None else TrainState()
        seen.add((state.step, state.tokens))
        ck.clear_staging(run)
        assert not list(run.glob(".*")) and {n for n, _ in ck.list_checkpoints(run)} >= set(before)
        save(run, 10, tokens=3)  # and the next attempt can save
        assert ck.load_checkpoint(run / "checkpoint-10").state.tokens == 3

    calls = killed_at_every_call(lambda: save(run, 10, tokens=2), prepare, check)
    assert calls > 12
    assert seen == {{(): (0, 0), (5,): (5, 1), (5, 10): (10, 1)}[before], (10, 2)}


def test_retention_killed_at_any_system_call_leaves_whole_checkpoints_only(tmp_path):
    run = tmp_path / "run"

    def prepare() -> None:
        shutil.rmtree(run, ignore_errors=True)
        run.mkdir()
        for step in (10, 20, 30, 40):
            save(run, step)

    def check() -> None:
        assert all(ck.verify(path) is None for _, path in ck.list_checkpoints(run))
        ck.clear_staging(run)
        assert {step for step, _ in ck.list_checkpoints(run)} >= {30, 40} and not list(run.glob(".*"))

    assert killed_at_every_call(lambda: ck.retain(run, 2, -1), prepare, check) > 5
