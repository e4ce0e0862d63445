"""Learning from the dense model on real processes: every strategy trains what one process trains, and a stopped run goes on bit for bit."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.runs import adapter, assert_identical, largest_relative_difference, losses, options, records, run, run_killed
from tests.tiny import save_dense

pytestmark = [pytest.mark.distributed, pytest.mark.long]  # a first look: test_strategies.py

STRATEGIES = ["ddp", "fsdp2", "zero1", "zero2", "zero3"]


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    return save_dense(tmp_path_factory.mktemp("dense") / "dense")


@pytest.fixture(scope="module")
def arguments(tiny_base, tiny_text, dense):
    """`train` options of a run; the global batch is 4 windows however many processes there are."""

    def make(out: Path, strategy: str, processes: int, **train: object) -> list[str]:
        values: dict[str, object] = {
            "distill_from": dense,
            "distill_temperature": 2,
            "distill_hidden_weight": 0.5,
            "distill_hidden": "layers",
            "adapter__lora_dropout": 0,
            "global_batch_size": 4,
            "lr_scheduler_type": "constant",
            "eval_strategy": "no",
            "save_strategy": "no",
            "max_steps": 8,
            "parallel__strategy": strategy,
        }
        if strategy == "zero3":  # tiny parameters would all stay whole
            values["parallel__ds_config"] = str(Path(__file__).with_name("zero3_small.json"))
        return options(tiny_base, tiny_text, out, **{**values, **train})

    return make


@pytest.fixture(scope="module")
def one_process(groups, arguments, tmp_path_factory):
    out = tmp_path_factory.mktemp("reference") / "run"
    groups[1].run(*arguments(out, "ddp", 1))
    return out


def parts(run: Path) -> dict[str, list[float]]:
    return {key: [row[key] for row in records(run, "train")] for key in ("ce_loss", "kl_loss", "hidden_loss")}


@pytest.mark.parametrize("name", STRATEGIES)
def test_two_processes_learn_what_one_does(name, groups, arguments, one_process, tmp_path):
    done = groups[2].run(*arguments(tmp_path / "run", name, 2))
    a, b = losses(one_process), losses(tmp_path / "run")
    assert list(a) == list(b) == list(range(1, 9))
    assert b == pytest.approx(a, rel=1e-5)
    for key, values in parts(one_process).items():
        assert parts(tmp_path / "run")[key] == pytest.approx(values, rel=1e-5)
    assert largest_relative_difference(adapter(one_process), adapter(tmp_path / "run")) < 2e-5
    cut = name in ("fsdp2", "zero3")
    assert f"({'float32'}, {'cut over 2 processes' if cut else 'whole on each process'})" in done.output
    assert [rank["teacher_elements"] for rank in done.facts] == [held(done, rank, cut) for rank in range(2)]


def held(done, rank: int, cut: bool) -> int:
    """Elements of the teacher on a rank: all of them, or what the ranks hold together is a little more than all."""
    found, whole = [fact["teacher_elements"] for fact in done.facts], 20_320
    if cut:
        assert whole <= sum(found) <= 1.02 * whole and max(found) < 0.52 * whole
        return found[rank]
    return whole


@pytest.mark.parametrize("name", ["fsdp2", "zero3"])
def test_a_stopped_run_goes_on_bit_for_bit(name, groups, arguments, tmp_path):
    shared = {"save_strategy": "steps", "save_steps": 3, "adapter__lora_dropout": 0.1}
    groups[2].run(*arguments(tmp_path / "whole", name, 2, **shared, max_steps=6))
    groups[2].run(*arguments(tmp_path / "parts", name, 2, **shared, max_steps=3))
    groups[2].run(*arguments(tmp_path / "parts", name, 2, **shared, max_steps=6), "--resume=auto")
    assert_identical(tmp_path / "whole", tmp_path / "parts")
    assert parts(tmp_path / "whole") == parts(tmp_path / "parts")


@pytest.mark.parametrize("name", ["fsdp2", "zero3"])
def test_a_teacher_in_4_bits_is_cut_as_well(name, groups, arguments, tmp_path):
    pytest.importorskip("bitsandbytes")
    shared = {"distill_load_in_4bit": True, "distill_hidden_weight": 0, "distill_hidden": "last", "max_steps": 2}
    groups[1].run(*arguments(tmp_path / "whole", "ddp", 1, **shared))
    done = groups[2].run(*arguments(tmp_path / "cut", name, 2, **shared))
    assert losses(tmp_path / "cut") == pytest.approx(losses(tmp_path / "whole"), rel=1e-5)
    assert "(NF4, cut over 2 processes)" in done.output


@pytest.mark.parametrize("name", ["ddp", "fsdp2", "zero2", "zero3"])
def test_two_processes_cache_what_one_does(name, groups, arguments, tmp_path):
    """Shards are dealt over processes, an odd number of them, and the teacher of fsdp2 and zero3 is cut meanwhile."""
    shared = {
        "distill_hidden_weight": 0,
        "distill_hidden": "last",
        "distill_top_k": 16,
        "max_steps": 4,
        "data__max_train_samples": 203,
    }
    groups[1].run(*arguments(tmp_path / "one", "ddp", 1, **shared, distill_cache=tmp_path / "a"))
    (meta,) = (tmp_path / "a").glob("*/meta.json")
    described = json.loads(meta.read_text())
    folder = tmp_path / "b" / meta.parent.name
    folder.mkdir(parents=True)
    (folder / "meta.json").write_text(json.dumps({**described, "rows_a_shard": -(-described["count"] // 5)}))
    done = groups[2].run(*arguments(tmp_path / "two", name, 2, **shared, distill_cache=tmp_path / "b"))
    assert len(list(folder.glob("shard-*"))) == 5 and "5 of 5 shards computed" in done.output
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=1e-5)
    again = groups[2].run(*arguments(tmp_path / "again", name, 2, **shared, distill_cache=tmp_path / "b"))
    assert "found, all 5 shards whole" in again.output and "learning from" not in again.output
    assert_identical(tmp_path / "two", tmp_path / "again")


def test_a_killed_caching_goes_on_with_what_is_missing(arguments, tmp_path):
    """`lora-dist distill-cache` on two processes, killed by SIGKILL: whole shards stay as they are, and all become those of one that was not."""
    shared = {"distill_hidden_weight": 0, "distill_hidden": "last", "distill_top_k": 16, "data__max_train_samples": 600}
    verb = ["distill-cache", *arguments(tmp_path / "out", "fsdp2", 2, **shared)]
    run(1, *verb, f"--train.distill_cache={tmp_path / 'whole'}")
    (meta,) = (tmp_path / "whole").glob("*/meta.json")
    described = json.dumps({**json.loads(meta.read_text()), "rows_a_shard": 6})
    folders = [tmp_path / name / meta.parent.name for name in ("killed", "uninterrupted")]
    for folder in folders:
        folder.mkdir(parents=True)
        (folder / "meta.json").write_text(described)
    where = f"--train.distill_cache={tmp_path / 'killed'}"
    run_killed(2, lambda: len(shards(folders[0])) >= 10, *verb, where)
    before = {file.name: file.read_bytes() for file in shards(folders[0])}
    assert 10 <= len(before) < 100
    done = run(2, *verb, where)
    assert f"{100 - len(before)} of 100 shards computed" in done.stdout
    run(2, *verb, f"--train.distill_cache={tmp_path / 'uninterrupted'}")
    found, expected = ({file.name: file.read_bytes() for file in shards(folder)} for folder in folders)
    assert found == expected and len(found) == 100
    assert all(found[name] == content for name, content in before.items())


def shards(folder: Path) -> list[Path]:
    return sorted(folder.glob("shard-*.safetensors"))
