"""Bases whose kept tiles have patterns of their own: found, kept in training, merging and reconstruction, exactly."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from lora_dist.arguments import InspectArgs, MergeArgs, PruneArgs
from lora_dist.blocks import Pattern
from lora_dist.cli import train as train_verb
from lora_dist.cli.options import parse
from lora_dist.config import RunConfig
from lora_dist.engine.inspect import inspect
from lora_dist.engine.merge import merge
from lora_dist.engine.prune import prune_model
from lora_dist.log import UserError
from lora_dist.parallel import World
from tests.runs import options
from tests.tiny import tiny_model, tiny_tokenizer

BLOCK = 8


def _two_of_four(tile: Tensor) -> Tensor:
    """The two smaller of each four neighbours set to zero."""
    fours = tile.reshape(-1, 4)
    kept = fours.abs().topk(2, dim=1).indices
    return torch.zeros_like(fours).scatter(1, kept, fours.gather(1, kept)).view_as(tile)


def _top_k(tile: Tensor, k: int = 20) -> Tensor:
    flat = tile.flatten()
    kept = flat.abs().topk(k).indices
    return torch.zeros_like(flat).scatter(0, kept, flat[kept]).view_as(tile)


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("mixed") / "dense"
    tiny_model("llama").save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def mixed(dense: Path) -> Path:
    """q, k: tiles gone; v: tiles gone, others dense, 2:4 or top-k; o: 2:4 without a whole tile gone; the rest dense. No mask file."""
    folder = dense.parent / "mixed"
    shutil.copytree(dense, folder)
    tensors = load_file(folder / "model.safetensors")
    for name, tensor in tensors.items():
        for number, (p, q) in enumerate(
            (p, q) for p in range(0, tensor.shape[0], BLOCK) for q in range(0, tensor.shape[-1], BLOCK)
        ):
            if ".self_attn." not in name:
                continue
            tile = tensor[p : p + BLOCK, q : q + BLOCK]
            what = (number + p // BLOCK) % 4
            if what == 0 and "o_proj" not in name:
                tile.zero_()
            elif "o_proj" in name or (what == 1 and "v_proj" in name):
                tile.copy_(_two_of_four(tile))
            elif what == 2 and "v_proj" in name:
                tile.copy_(_top_k(tile))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


KINDS = {
    "q_proj": "block",
    "k_proj": "block",
    "v_proj": "element",
    "o_proj": "element",
    "gate_proj": "block",
    "down_proj": "block",
}


def _prunable(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in tensors.items() if "proj" in name}


def test_trained_and_merged_with_every_zero_kept(mixed: Path, tiny_text: Path, tmp_path: Path) -> None:
    quick = {"max_steps": 4, "eval_strategy": "no", "save_strategy": "no", "adapter__block": BLOCK}
    with pytest.raises(UserError, match="4 linears of .* have zeros inside of kept tiles too"):
        train_verb.run(
            parse(RunConfig, options(mixed, tiny_text, tmp_path / "no", **quick, adapter__mask="block"), train_verb.VERB)
        )
    assert train_verb.run(parse(RunConfig, options(mixed, tiny_text, tmp_path / "out", **quick), train_verb.VERB)) == 0
    pattern = Pattern.load(tmp_path / "out")
    for leaf, kind in KINDS.items():
        assert {mask.kind for name, mask in pattern.items() if name.endswith(leaf)} == {kind}
    report = merge(MergeArgs(base=str(mixed), adapter=str(tmp_path / "out"), out=str(tmp_path / "merged")), World())
    assert Pattern.load(tmp_path / "merged").digest == pattern.digest == report.pattern_digest
    assert report.logits_error < 1e-5
    before, after = (_prunable(load_file(folder / "model.safetensors")) for folder in (mixed, tmp_path / "merged"))
    zeros = 0
    for name, tensor in before.items():
        gone = tensor == 0
        assert not after[name][gone].view(torch.int32).any(), name
        assert (after[name][~gone] != tensor[~gone]).any(), name  # it was trained
        zeros += int(gone.sum())
    in_tiles = sum(int((~mask.kept_PQ).sum()) * (BLOCK**2 - 1) for mask in pattern.values() if mask.kind == "block")
    assert report.zero_tiles == zeros - in_tiles


def test_it_is_shown(mixed: Path) -> None:
    facts = inspect(InspectArgs(path=str(mixed), block=BLOCK)).facts
    assert any(fact.startswith("4 linears have zeros inside of kept tiles too and get a mask of elements") for fact in facts)


@pytest.mark.parametrize("target", ["same", "dense"])
def test_it_is_reconstructed_from_the_dense_model(dense: Path, mixed: Path, tiny_text: Path, tmp_path: Path, target: str) -> None:
    args = PruneArgs(
        model=str(dense), out=str(tmp_path / "out"), from_pruned=str(mixed), block=BLOCK, calibration=str(tiny_text), nsamples=10,
        device="cpu", cache_dir=str(tmp_path / "cache"), target=target,  # type: ignore[arg-type]
    )  # fmt: skip
    result = prune_model(args, progress=False)
    before, after = (_prunable(load_file(folder / "model.safetensors")) for folder in (mixed, result.out))
    for name, tensor in before.items():
        assert not after[name][tensor == 0].any()
    assert {mask.kind for mask in result.pattern.values()} == {"block", "element"}
    errors = json.loads((result.out / "pruning.json").read_text())["reconstruction"]["linears"]
    for name, one in errors.items():
        assert one["error_after"] <= one["error_before"]
        if name.endswith("v_proj"):
            assert one["error_after"] < 0.9 * one["error_before"]
