"""Life with a sharded base: every architecture, evaluation, generation, merging, and what happens when something breaks on one rank."""

from __future__ import annotations

import itertools
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from lora_dist.blocks import BlockMask, Pattern, grid
from lora_dist.models.architecture import prunable_linears
from tests.distributed.group import WorkerGroup
from tests.runs import adapter, largest_relative_difference, losses, options, records
from tests.tiny import KINDS, tiny_model, tiny_tokenizer

pytestmark = pytest.mark.distributed

SMALL = str(Path(__file__).with_name("zero3_small.json"))
NVME = str(Path(__file__).with_name("zero3_param_nvme.json"))
SHARDED = {"fsdp2": {}, "zero3": {"parallel__ds_config": SMALL}}


@pytest.fixture(scope="module")
def arguments(tiny_text):
    def make(base: Path, out: Path, strategy: str, **train: object) -> list[str]:
        values: dict[str, object] = {
            "adapter__lora_dropout": 0,
            "per_device_train_batch_size": 2,
            "eval_strategy": "no",
            "load_best_model_at_end": False,
            "save_strategy": "no",
            "parallel__strategy": strategy,
            **SHARDED.get(strategy, {}),
        }
        return options(base, tiny_text, out, **{**values, **train})

    return make


def pruned(kind: str, folder: Path) -> Path:
    """A tiny model of one architecture with half of its tiles pruned at random, the mask stored beside it."""
    tokenizer, model = tiny_tokenizer(), tiny_model(kind)
    generator, masks = torch.Generator().manual_seed(3), {}
    for linear in prunable_linears(model):
        shape = (linear.weight_OI.shape[0], linear.weight_OI.shape[1])
        mask = BlockMask(torch.rand(grid(shape, 16), generator=generator) > 0.5, shape, 16)
        linear.weight_OI.masked_fill_(~mask.expand(), 0.0)
        masks[linear.name] = mask
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    Pattern(masks).save(folder)
    return folder


@pytest.fixture(scope="module")
def trained(pair, arguments, tiny_base, tmp_path_factory):
    """A run under fsdp2 with an adapter that has learnt something."""
    out = tmp_path_factory.mktemp("trained") / "run"
    pair.run(*arguments(tiny_base, out, "fsdp2", max_steps=30, save_strategy="steps", save_steps=30))
    return out


# --- architectures ---------------------------------------------------------------------------------------------------------------


# Biases, tied heads, transposed weights, learned positions; the others are like one of them.
ODD = {"llama": (), "qwen2": (), "gpt2": pytest.mark.long, "opt": pytest.mark.long}


@pytest.mark.parametrize("kind", [pytest.param(k, marks=ODD.get(k, pytest.mark.matrix)) for k in KINDS])
def test_every_architecture_trains_and_merges_alike(kind, pair, arguments, tmp_path):
    """Tied heads, weights stored as (I, O), learned positions, biases: all cut and read right."""
    base = pruned(kind, tmp_path / "base")
    found = {}
    for strategy in ("ddp", "fsdp2", "zero3"):
        pair.run(*arguments(base, tmp_path / strategy, strategy, max_steps=4))
        found[strategy] = losses(tmp_path / strategy), adapter(tmp_path / strategy)
    for strategy in SHARDED:
        assert found[strategy][0] == pytest.approx(found["ddp"][0], rel=1e-6), strategy
        # Where everything before or behind a factor is pruned, its gradient is rounding, and AdamW makes steps of it.
        norms = {name: float(tensor.norm()) for name, tensor in found["ddp"][1].items()}
        trained = [name for name, norm in norms.items() if norm > 1e-3 * max(norms.values()) or norm == 0]
        assert len(trained) >= len(norms) - 2
        a, b = ({name: tensors[name] for name in trained} for tensors in (found["ddp"][1], found[strategy][1]))
        assert largest_relative_difference(a, b) < 1e-5, strategy
    for strategy in ("ddp", "fsdp2"):
        done = pair.run(
            str(base), str(tmp_path / "ddp"), str(tmp_path / f"merged-{strategy}"), f"--strategy={strategy}", verb="merge"
        )
        assert done.facts[0]["zero_tiles"] > 0 and max(done.facts[0]["errors"]) < 1e-5
    whole, cut = (load_file(tmp_path / f"merged-{s}" / "model.safetensors") for s in ("ddp", "fsdp2"))
    assert whole.keys() == cut.keys() and all(torch.equal(whole[k], cut[k]) for k in whole)
    configs = [json.loads((tmp_path / f"merged-{s}" / "config.json").read_text()) for s in ("ddp", "fsdp2")]
    assert configs[0] == configs[1]


def test_kept_weights_and_what_is_trained_whole_are_alike_and_merge_alike(pair, arguments, tiny_base, tmp_path):
    found, more = {}, {"mode": "sparse_full", "adapter__modules_to_save": "[all-norm,embed_tokens,lm_head]", "max_steps": 4}
    for strategy in ("ddp", "fsdp2", "zero3"):
        done = pair.run(*arguments(tiny_base, tmp_path / strategy, strategy, **more))
        found[strategy] = losses(tmp_path / strategy), adapter(tmp_path / strategy)
        assert strategy == "ddp" or max(fact["trainable_elements"] for fact in done.facts) < 0.65 * 14_944
    for strategy in SHARDED:
        assert found[strategy][0] == pytest.approx(found["ddp"][0], rel=1e-6), strategy
        assert largest_relative_difference(found["ddp"][1], found[strategy][1]) < 1e-4, strategy
    for strategy in ("ddp", "fsdp2"):
        done = pair.run(
            str(tiny_base), str(tmp_path / "ddp"), str(tmp_path / f"merged-{strategy}"), f"--strategy={strategy}", verb="merge"
        )
        assert done.facts[0]["zero_tiles"] > 0 and max(done.facts[0]["errors"]) < 1e-5
    whole, cut = (load_file(tmp_path / f"merged-{s}" / "model.safetensors") for s in ("ddp", "fsdp2"))
    assert whole.keys() == cut.keys() and all(torch.equal(whole[k], cut[k]) for k in whole)
    before = load_file(tiny_base / "model.safetensors")
    moved = {k for k in whole if not torch.equal(whole[k], before[k])}
    assert moved >= {"lm_head.weight", "model.embed_tokens.weight", "model.norm.weight", "model.layers.1.mlp.down_proj.weight"}


def test_a_pattern_without_a_mask_file_is_found_in_the_files(pair, arguments, tiny_base, tmp_path):
    base = tmp_path / "base"
    shutil.copytree(tiny_base, base)
    (base / "block_mask.safetensors").unlink()
    outputs = [pair.run(*arguments(base, tmp_path / s, s, max_steps=1)).output for s in ("ddp", "fsdp2")]
    lines = [next(line for line in output.splitlines() if "Sparsity pattern" in line) for output in outputs]
    assert lines[0] == lines[1]


# --- two levels ------------------------------------------------------------------------------------------------------------------


@pytest.mark.long
def test_hybrid_sharding_cuts_inside_a_machine_and_copies_across(pair, arguments, tiny_base, tmp_path):
    """Two machines of two processes: the base is cut in two on each, and four processes train what two do."""
    group = WorkerGroup(4, tmp_path / "groups", machines=2)
    try:
        hybrid = {"parallel__hybrid_shard": "true", "per_device_train_batch_size": 1, "max_steps": 6, "save_strategy": "steps"}
        hybrid["lr_scheduler_type"] = "constant"
        done = group.run(*arguments(tiny_base, tmp_path / "hybrid", "fsdp2", **hybrid))
        resumed = group.run(*arguments(tiny_base, tmp_path / "hybrid", "fsdp2", **{**hybrid, "max_steps": 9}), "--resume=auto")
    finally:
        group.close()
    pair.run(*arguments(tiny_base, tmp_path / "plain", "ddp", max_steps=9, lr_scheduler_type="constant"))
    total = 20_320
    assert [fact["placements"] for fact in done.facts] == [["(Replicate(), Shard(dim=0))"]] * 4
    assert all(total * 0.49 < fact["base_elements"] < total * 0.51 for fact in done.facts)
    assert "Resuming from" in resumed.output
    a, b = losses(tmp_path / "plain"), losses(tmp_path / "hybrid")
    assert b == pytest.approx(a, rel=1e-5)
    # What two machines hold twice counts once.
    written = {name: float(tensor.double().norm()) for name, tensor in adapter(tmp_path / "hybrid").items()}
    live = {name.replace(".default.", "."): norm for name, norm in resumed.facts[3]["norms"].items()}
    assert live == pytest.approx(written, rel=1e-6, abs=0)


# --- evaluation, generation, merging ---------------------------------------------------------------------------------------------


def test_evaluation_of_a_sharded_model(pair, trained, tiny_base, tiny_text):
    text = [
        "--adapter",
        str(trained),
        "--dataset_name",
        str(tiny_text),
        "--block_size=32",
        f"--cache_dir={tiny_text.parent / 'cache'}",
    ]
    whole, cut = (pair.run(str(tiny_base), *text, f"--strategy={s}", verb="eval").facts for s in ("ddp", "fsdp2"))
    assert cut[0] == cut[1]
    assert cut[0]["tokens"] == whole[0]["tokens"] > 1000
    assert cut[0]["loss"] == pytest.approx(whole[0]["loss"], rel=1e-7)


def test_generation_from_a_sharded_model(pair, trained, tiny_base):
    asked = [str(tiny_base), "--adapter", str(trained), "--prompt=the old bird", "--max_new_tokens=12"]
    whole, cut = (pair.run(*asked, f"--strategy={s}", verb="generate").facts for s in ("ddp", "fsdp2"))
    assert cut[0]["placements"] == ["(Shard(dim=0),)"] and whole[0]["placements"] == ["whole"]
    assert cut[0]["text"] == cut[1]["text"] == whole[0]["text"] != ""


def test_a_merge_that_cannot_be_written_leaves_nothing(pair, trained, tiny_base, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("kept")
    done = pair.run(str(tiny_base), str(trained), str(tmp_path / "out"), "--strategy=fsdp2", verb="merge", code=2)
    assert all("already holds files" in rank["error"] for rank in done.ranks)
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["mine.txt"]


def test_plain_lora_is_not_merged_shard_by_shard_either(pair, arguments, tiny_base, tmp_path):
    pair.run(*arguments(tiny_base, tmp_path / "plain", "fsdp2", max_steps=3, adapter__mask="none"))
    asked = [str(tiny_base), str(tmp_path / "plain")]
    messages = {}
    for strategy in ("ddp", "fsdp2"):
        done = pair.run(*asked, str(tmp_path / "no"), f"--strategy={strategy}", verb="merge", code=2)
        messages[strategy] = done.ranks[0]["error"]
        assert "--project" in messages[strategy] and done.ranks[1]["error"] == messages[strategy]
    assert messages["ddp"] == messages["fsdp2"]
    for way in ("--project=true", "--densify=true"):
        for strategy in ("ddp", "fsdp2"):
            pair.run(*asked, str(tmp_path / f"{way}-{strategy}"), way, f"--strategy={strategy}", verb="merge")
        whole, cut = (load_file(tmp_path / f"{way}-{s}" / "model.safetensors") for s in ("ddp", "fsdp2"))
        assert all(torch.equal(whole[k], cut[k]) for k in whole), way


# --- what breaks on one rank is everyone's ---------------------------------------------------------------------------------------

LAYER = "model.layers.1.mlp.up_proj"


def first_pruned(base: Path, name: str) -> tuple[int, int, BlockMask]:
    mask = Pattern.load(base)[name]
    assert isinstance(mask, BlockMask)
    p, q = (~mask.kept_PQ).nonzero()[-1].tolist()
    return p, q, mask


@pytest.mark.parametrize("strategy", SHARDED)
def test_a_base_broken_in_one_ranks_part_is_refused_by_all(strategy, pair, arguments, tiny_base, tmp_path):
    base = tmp_path / "base"
    shutil.copytree(tiny_base, base)
    p, q, mask = first_pruned(base, LAYER)
    tensors = load_file(base / "model.safetensors")
    row, column = min(p * 16 + 9, mask.shape[0] - 1), q * 16 + 3
    assert row >= mask.shape[0] / 2, "this is to lie in the second process's part"
    tensors[f"{LAYER}.weight"][row, column] = 1e-30
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    done = pair.run(*arguments(base, tmp_path / "run", strategy, max_steps=2), code=2)
    assert done.ranks[0]["error"] == done.ranks[1]["error"]
    assert f"layer {LAYER}, tile ({p}, {q})" in done.ranks[0]["error"]
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("strategy", "rank"), [*itertools.product(SHARDED, (0, 1)), ("zero2", 1)])
def test_a_weight_that_changes_during_training_stops_all(strategy, rank, pair, arguments, tiny_base, tmp_path):
    arguments_ = arguments(
        tiny_base, tmp_path / "run", strategy, max_steps=20, guard__every=5, save_strategy="steps", save_steps=3
    )
    done = pair.run(*arguments_, code=2, tamper={"what": "weight", "rank": rank, "layer": LAYER, "after": 7})
    assert done.ranks[0]["error"] == done.ranks[1]["error"]
    assert f"layer {LAYER}, tile (" in done.ranks[0]["error"] and "found 3, expected exactly 0" in done.ranks[0]["error"]
    assert max(losses(tmp_path / "run")) < 10
    assert not (tmp_path / "run" / "checkpoint-9").exists()


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2", "zero1", "zero2", "zero3"])
def test_a_gradient_that_is_not_finite_stops_all_before_the_optimizer_moves(strategy, pair, arguments, tiny_base, tmp_path):
    arguments_ = arguments(tiny_base, tmp_path / "run", strategy, max_steps=10, save_strategy="steps", save_steps=2)
    done = pair.run(*arguments_, code=2, tamper={"what": "gradient", "rank": 1, "layer": LAYER, "after": 5})
    assert done.ranks[0]["error"] == done.ranks[1]["error"]
    assert done.ranks[0]["error"].startswith("step 5: found a non-finite gradient in base_model.model.model.layers.")
    assert list(losses(tmp_path / "run")) == [1, 2, 3, 4]
    again = pair.run(*arguments(tiny_base, tmp_path / "run", strategy, max_steps=6), "--resume=auto")
    assert "Resuming from" in again.output and list(losses(tmp_path / "run")) == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize("strategy", ["fsdp2", "zero2", pytest.param("zero3", marks=pytest.mark.long)])
def test_an_overflow_of_fp16_is_skipped_by_all(strategy, pair, arguments, tiny_base, tmp_path):
    """The gradients of one rank are not finite from a step on: the scale halves at every step, and nothing moves."""
    arguments_ = arguments(tiny_base, tmp_path / "run", strategy, max_steps=8, fp16=True)
    pair.run(*arguments_, tamper={"what": "gradient", "rank": 0, "layer": LAYER, "after": 5})
    rows = records(tmp_path / "run", "train")
    assert [row["skipped_steps"] for row in rows] == [0, 0, 0, 0, 1, 2, 3, 4]
    assert [row["loss_scale"] for row in rows[3:]] == [2**16, 2**15, 2**14, 2**13, 2**12]
    quiet = arguments(tiny_base, tmp_path / "four", strategy, max_steps=4, fp16=True, lr_scheduler_type="constant")
    loud = arguments(tiny_base, tmp_path / "eight", strategy, max_steps=8, fp16=True, lr_scheduler_type="constant")
    pair.run(*quiet)
    pair.run(*loud, tamper={"what": "gradient", "rank": 0, "layer": LAYER, "after": 5})
    a, b = adapter(tmp_path / "four"), adapter(tmp_path / "eight")
    assert all(torch.equal(a[k], b[k]) for k in a)


# --- what cannot be had is said before anything is loaded ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"parallel__strategy": "zero2", "parallel__offload_param": "cpu"}, "parallel.offload_param: found cpu with strategy zero2"),
        ({"parallel__strategy": "fsdp2", "parallel__offload_optimizer": "cpu"}, "parallel.offload_optimizer: found cpu with strategy fsdp2"),
        ({"parallel__strategy": "ddp", "parallel__ds_config": SMALL}, "parallel.ds_config"),
        ({"parallel__strategy": "zero2", "parallel__ds_config": SMALL}, "zero3"),
        ({"parallel__strategy": "ddp", "parallel__hybrid_shard": "true"}, "parallel.hybrid_shard"),
        ({"parallel__strategy": "fsdp2", "parallel__hybrid_shard": "true"}, "parallel.hybrid_shard: found 2 processes with 2 on this machine"),
        ({"parallel__strategy": "zero3", "parallel__offload_optimizer": "nvme"}, "parallel.nvme_path"),
        ({"parallel__strategy": "zero3", "parallel__ds_config": NVME}, "parallel.offload_param: found nvme, expected none or cpu"),
    ],
)  # fmt: skip
def test_what_a_strategy_cannot_do(changes, complaint, pair, arguments, tiny_base, tmp_path):
    done = pair.run(*arguments(tiny_base, tmp_path / "run", "fsdp2", **changes), code=2)
    assert complaint in done.ranks[0]["error"]
    assert "Model loaded" not in done.output
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("zero", "word"),
    [
        ({"stage": 3, "stage3_parm_persistence_threshold": 0}, "stage3_parm"),
        ({"stage": 2, "reduce_bucket_size": -1}, "reduce_bucket"),
    ],
)
def test_what_deepspeed_itself_refuses_is_one_line(zero, word, pair, arguments, tiny_base, tmp_path):
    (tmp_path / "mine.json").write_text(json.dumps({"zero_optimization": zero}))
    changes = {"parallel__strategy": "auto", "parallel__ds_config": str(tmp_path / "mine.json")}
    done = pair.run(*arguments(tiny_base, tmp_path / "run", "auto", **changes), code=2)
    assert done.ranks[0]["error"] == done.ranks[1]["error"]
    assert "mine.json" in done.ranks[0]["error"] and word in done.ranks[0]["error"] and "\n" not in done.ranks[0]["error"]
    assert "Model loaded" not in done.output


def test_weights_that_are_no_safetensors_are_not_streamed(pair, arguments, tiny_base, tmp_path):
    base = tmp_path / "base"
    shutil.copytree(tiny_base, base)
    torch.save(load_file(base / "model.safetensors"), base / "pytorch_model.bin")
    (base / "model.safetensors").unlink()
    done = pair.run(*arguments(base, tmp_path / "run", "fsdp2", max_steps=1), code=2)
    assert "expected safetensors" in done.ranks[0]["error"]
    pair.run(*arguments(base, tmp_path / "run", "ddp", max_steps=1))
