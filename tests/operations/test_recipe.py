"""Recipes: what is wrong with one is said before anything runs; stages that are done are skipped, a broken one is gone on with."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from lora_dist.blocks import Pattern
from lora_dist.cli import recipe as verb
from lora_dist.log import UserError
from lora_dist.operations.recipe import STAGE, read_recipe
from tests.runs import losses, run, run_killed
from tests.tiny import tiny_model, tiny_tokenizer


def write(folder: Path, **keys: object) -> Path:
    recipe = {"output_dir": str(folder / "out"), "model": "dense", "stages": ["prune", "train", "merge"], **keys}
    file = folder / "recipe.yaml"
    file.write_text(yaml.safe_dump(recipe, sort_keys=False))
    return file


def test_each_stage_begins_with_what_the_one_before_left(tmp_path):
    (tmp_path / "run.yaml").write_text("train: {learning_rate: 1.0e-3}\n")
    defaults = {"train": {"config": str(tmp_path / "run.yaml"), "train": {"max_steps": 5}}}
    stages = [
        {"prune": {"sparsity": 0.2, "reconstruct": True}},
        {"name": "recover", "train": {"train": {"distill_from": "${dense}"}, "adapter.target_modules": ["q_proj", "v_proj"]}},
        "merge",
        {"prune": {"sparsity": 0.4, "from_pruned": None}},
        {"train": {"train.max_steps": 9}},
        "merge",
        {"eval": {"dataset_name": "text.txt"}},
    ]
    found = read_recipe(write(tmp_path, stages=stages, defaults=defaults, processes=2))
    out = tmp_path / "out"
    assert [s.name for s in found] == ["01-prune", "02-recover", "03-merge", "04-prune", "05-train", "06-merge", "07-eval"]
    argvs = [list(s.argv) for s in found]
    assert argvs[0] == ["prune", "dense", f"{out}/01-prune/model", "--sparsity=0.2", "--reconstruct=true"]
    assert argvs[1] == [
        "train", "--config", str(tmp_path / "run.yaml"), f"--model.name_or_path={out}/01-prune/model",
        f"--train.output_dir={out}/02-recover/run", "--train.resume_from_checkpoint=auto", "--train.max_steps=5",
        "--train.distill_from=dense", '--adapter.target_modules=["q_proj", "v_proj"]',
    ]  # fmt: skip
    assert argvs[2] == ["merge", f"{out}/01-prune/model", f"{out}/02-recover/run", f"{out}/03-merge/model"]
    assert argvs[3] == ["prune", f"{out}/03-merge/model", f"{out}/04-prune/model", "--sparsity=0.4"]
    assert "--train.max_steps=9" in argvs[4] and "--train.max_steps=5" not in argvs[4]
    assert argvs[6] == ["eval", f"{out}/06-merge/model", f"--output={out}/07-eval/figures.json", "--dataset_name=text.txt"]
    assert [s.processes for s in found] == [2, 2, 1, 2, 2, 1, 1] and "torch.distributed.run" in found[1].command
    # Whatever decides what a stage makes is in its digest, and in those behind it, and nothing else.
    (tmp_path / "run.yaml").write_text("train: {learning_rate: 2.0e-3}\n")
    again = read_recipe(write(tmp_path, stages=stages, defaults=defaults))
    assert [a.digest == b.digest for a, b in zip(found, again, strict=True)] == [True] + [False] * 6


@pytest.mark.parametrize(
    "keys,words",
    [
        ({"stage": []}, "stage: is no key of a recipe"),
        ({"stages": ["prune", "trian"]}, "stages: number 2 is 'trian', expected one of prune, train, merge, eval"),
        ({"stages": ["train", "train"]}, "02-train: train follows a train whose adapter is not merged"),
        ({"stages": ["merge"]}, "01-merge: merge follows no train"),
        ({"stages": [{"prune": {"out": "x"}}]}, "01-prune: out is set by the recipe: leave it out"),
        ({"defaults": {"train": {"config": "none.yaml"}}}, "02-train: config: none.yaml cannot be read"),
        ({"defaults": {"inspect": {}}}, "expected options by verb: prune, train, merge, eval"),
        ({"processes": 0}, "processes: found 0, expected a number from 1"),
        ({"stages": [{"prune": {"sparsty": 0.2}}]}, "01-prune: sparsty: unknown"),
        ({"stages": [{"prune": {"sparsity": 2}}, {"train": {"train.max_step": 1}}]}, "02-train: train.max_step: unknown"),
    ],
)
def test_what_is_wrong_is_said_before_anything_runs(tmp_path, keys, words):
    with pytest.raises(UserError, match=words.replace("(", r"\(")):
        verb.main([str(write(tmp_path, **keys))])
    assert not (tmp_path / "out").exists()


def test_a_dry_run_shows_the_commands(tmp_path, capsys):
    stages = ["prune", {"train": {"data.dataset_name": "text.txt"}}, "merge"]
    assert verb.main([str(write(tmp_path, stages=stages)), "--dry_run"]) == 0
    assert f"Stage 3/3, 03-merge: lora-dist merge {tmp_path}/out/01-prune/model" in capsys.readouterr().out
    assert not (tmp_path / "out").exists()


@pytest.mark.long
def test_killed_at_any_stage_it_goes_on_to_the_same_model(tiny_text, tmp_path):
    tokenizer = tiny_tokenizer()
    tiny_model("llama", vocab_size=len(tokenizer)).save_pretrained(tmp_path / "dense")
    tokenizer.save_pretrained(tmp_path / "dense")
    data = {"dataset_name": str(tiny_text), "block_size": 32, "holdout_windows": 16, "cache_dir": str(tiny_text.parent / "cache")}
    train = {"max_steps": 40, "logging_steps": 1, "eval_strategy": "no", "load_best_model_at_end": False, "save_steps": 2}
    defaults = {"prune": {"score": "magnitude"}, "train": {"data": data, "train": {**train, "learning_rate": 3e-3}}}
    stages = [
        {"prune": {"sparsity": 0.25}}, "train", "merge", {"prune": {"sparsity": 0.5}}, {"train": {"train.mode": "sparse_full"}}, "merge",
        {"eval": {**data, "max_samples": 8}},
    ]  # fmt: skip
    common = {"model": str(tmp_path / "dense"), "defaults": defaults}
    whole = run(1, "recipe", str(write(tmp_path, **common, stages=stages[:3])))
    assert "Recipe complete" in whole.stdout
    out, parts, file = tmp_path / "out", tmp_path / "parts", tmp_path / "recipe.yaml"
    write(tmp_path, **common, stages=stages, output_dir=str(parts))
    killed_at = parts / "02-train" / "run" / "checkpoint-4"
    run_killed(1, killed_at.exists, "recipe", str(file), timeout_s=600)
    assert (parts / "01-prune" / STAGE).exists() and not (parts / "02-train" / STAGE).exists()
    first = (parts / "01-prune" / STAGE).stat().st_mtime_ns
    again = run(1, "recipe", str(file)).stdout
    assert again.count("done before") == 1 and "Resuming from" in again and "perplexity" in again.splitlines()[-1]
    assert first == (parts / "01-prune" / STAGE).stat().st_mtime_ns
    assert losses(out / "02-train" / "run") == losses(parts / "02-train" / "run")
    a, b = (load_file(folder / "03-merge" / "model" / "model.safetensors") for folder in (out, parts))
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
    few, more = (Pattern.load(parts / stage / "model") for stage in ("03-merge", "06-merge"))
    assert all(not (more[name].kept_PQ & ~few[name].kept_PQ).any() for name in few)
    assert more.sparsity > few.sparsity > 0.1
    text = file.read_text()
    file.write_text(text.replace("sparsity: 0.25", "sparsity: 0.3"))
    refused = run(1, "recipe", str(file), check=False)
    assert refused.returncode == 2 and "01-prune: was done with other options than the recipe has now" in refused.stderr
    file.write_text(text)
    (parts / "06-merge" / "model" / "config.json").unlink()
    refused = run(1, "recipe", str(file), check=False)
    assert refused.returncode == 2 and "config.json is not as it left it" in refused.stderr
