"""Pruning by two processes, each with its part of the windows and of the block rows: what one process writes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from lora_dist.arguments import PruneArgs
from lora_dist.blocks import Pattern
from lora_dist.cli.options import Verb, parse
from lora_dist.engine.prune import prune_model
from tests.tiny import tiny_model, tiny_tokenizer

pytestmark = pytest.mark.distributed


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """Enough for three micro-batches of 4,096 tokens: two for one process, one for the other."""
    file = tmp_path_factory.mktemp("text") / "text.txt"
    file.write_text("".join(f"{i} bottles of {'beer' if i % 3 else 'milk'} on the wall.\n" for i in range(400)))
    return file


def alone(argv: list[str]) -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as the workers
    prune_model(parse(PruneArgs, argv, Verb("prune", "", positionals=("model", "out"))), progress=False)
    torch.set_num_threads(threads)


@pytest.mark.parametrize(
    "kind, options",
    [
        ("llama", ["--reconstruct", "--score=obs"]),
        ("gpt2", ["--reconstruct", "--score=energy", "--select=row", "--target=same"]),
        ("opt", ["--score=wanda", "--select=global"]),
    ],
)
def test_two_processes_write_what_one_writes(pair, text, tmp_path: Path, kind: str, options: list[str]) -> None:
    tiny_model(kind).save_pretrained(tmp_path / "dense")
    tiny_tokenizer().save_pretrained(tmp_path / "dense")
    argv = [str(tmp_path / "dense"), f"--calibration={text}", "--block=8", "--nsamples=160", "--device=cpu", *options]
    argv += [f"--cache_dir={tmp_path / 'cache'}"]
    alone([argv[0], str(tmp_path / "one"), *argv[1:]])
    done = pair.run(argv[0], str(tmp_path / "two"), *argv[1:], verb="prune")
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "two"))
    pattern = Pattern.load(tmp_path / "one")
    assert [facts["digest"] for facts in done.facts] == [pattern.digest] * 2
    assert Pattern.load(tmp_path / "two").digest == pattern.digest
    assert one.keys() == two.keys()
    for name in one:
        # Sums are added up in another order, in float64; what is written is float32.
        torch.testing.assert_close(two[name], one[name], rtol=1e-6, atol=1e-7)
    reports = [json.loads((tmp_path / name / "pruning.json").read_text()) for name in ("one", "two")]
    assert reports[0]["calibration"] == reports[1]["calibration"]
    assert reports[0]["calibration"]["windows"] > 2 * 4096 // 64
    for name, linear in (reports[0]["reconstruction"] or {"linears": {}})["linears"].items():
        assert reports[1]["reconstruction"]["linears"][name] == pytest.approx(linear, rel=1e-6, abs=1e-9)
    assert "pruned tiles are exactly 0.0" in done.ranks[0]["output"] and done.ranks[1]["output"] == ""


def test_more_processes_than_micro_batches(pair, text, tmp_path: Path) -> None:
    """One has no window at all, and still solves its part of the block rows."""
    tiny_model().save_pretrained(tmp_path / "dense")
    tiny_tokenizer().save_pretrained(tmp_path / "dense")
    argv = [str(tmp_path / "dense"), f"--calibration={text}", "--block=8", "--nsamples=8", "--device=cpu", "--reconstruct"]
    alone([argv[0], str(tmp_path / "one"), *argv[1:]])
    pair.run(argv[0], str(tmp_path / "two"), *argv[1:], verb="prune")
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "two"))
    for name in one:
        torch.testing.assert_close(two[name], one[name], rtol=1e-6, atol=1e-7)


def test_bad_input_is_said_by_all(pair, text, tmp_path: Path) -> None:
    tiny_model().save_pretrained(tmp_path / "dense")
    tiny_tokenizer().save_pretrained(tmp_path / "dense")
    argv = [
        str(tmp_path / "dense"),
        str(tmp_path / "out"),
        f"--calibration={text}",
        "--seqlen=65",
        "--reconstruct",
        "--device=cpu",
    ]
    done = pair.run(*argv, verb="prune", code=2)
    assert {rank["error"] for rank in done.ranks} == {"seqlen: found 65, expected at most the model's context of 64"}
    assert not (tmp_path / "out").exists()
