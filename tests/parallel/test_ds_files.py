"""The package's own DeepSpeed files, under all who read them: lora-dist, accelerate, and DeepSpeed by itself."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from lora_dist.log import UserError
from lora_dist.parallel.ds_config import OWN_FILES, stage_of, zero_config
from tests.parallel.facts import FACTS

OWN = sorted(path.name for path in OWN_FILES.glob("*.json"))
STAGES = {
    "zero1.json": 1, "zero2.json": 2, "zero3.json": 3,
    "zero1_offload.json": 1, "zero2_offload.json": 2, "zero3_offload.json": 3,
    "zero3_offload_optimizer.json": 3, "zero3_nvme.json": 3,
}  # fmt: skip


def complete(path, stage, *, facts=FACTS, optimizer="auto", nvme=None):
    return zero_config(stage, path, facts, offload_optimizer=optimizer, offload_param="auto", nvme_path=nvme)


def test_users_find_the_files_under_configs():
    assert sorted(STAGES) == OWN
    assert sorted(path.name for path in (Path(__file__).parents[2] / "configs" / "ds").glob("*.json")) == OWN


@pytest.mark.parametrize("name", OWN)
def test_an_own_file_is_completed_for_any_run(name):
    stage = STAGES[name]
    assert stage_of(OWN_FILES / name) == stage
    config, notes = complete(OWN_FILES / name, stage, nvme="/local")
    section = config["zero_optimization"]
    numbers = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping")
    assert [config[key] for key in numbers] == [24, 2, 4, 0.5]
    assert section["reduce_bucket_size"] == 4096
    if stage == 3:
        assert (section["stage3_prefetch_bucket_size"], section["stage3_param_persistence_threshold"]) == (3686, 640)
    device = "nvme" if "nvme" in name else "cpu"
    places = {key: section.get(key, {}).get("device") for key in ("offload_optimizer", "offload_param")}
    assert places["offload_optimizer"] == (device if "offload" in name or "nvme" in name else None)
    assert places["offload_param"] == ("cpu" if name in ("zero3_offload.json", "zero3_nvme.json") else None)
    assert "auto" not in json.dumps(config)
    assert not {"bf16", "fp16", "optimizer", "scheduler", "lora_dist"} & config.keys()
    assert (config["zero_allow_untested_optimizer"], config["zero_force_ds_cpu_optimizer"]) == (True, False)
    assert config["steps_per_print"] >= 10**9
    assert "train_micro_batch_size_per_gpu 2" in notes[0]
    assert "zero_optimization.reduce_bucket_size 4096" in notes[0]


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_without_a_file_the_own_one_of_that_stage_is_taken(stage):
    config, notes = complete(None, stage)
    assert config == complete(OWN_FILES / f"zero{stage}.json", stage)[0]
    assert notes == []
    config, _ = complete(None, stage, optimizer="cpu")
    assert config["zero_optimization"]["offload_optimizer"] == {"device": "cpu"}


def test_a_stand_in_that_the_user_has_changed_is_the_users(tmp_path):
    tree = json.loads((OWN_FILES / "zero2.json").read_text())
    tree["gradient_accumulation_steps"] = 8
    path = tmp_path / "ds.json"
    path.write_text(json.dumps(tree))
    with pytest.raises(UserError) as caught:
        complete(path, 2)
    assert caught.value.problems == [
        f'parallel.ds_config: {path}: gradient_accumulation_steps is 8, train.gradient_accumulation_steps 4: set one as the other, or "auto"'
    ]
    assert complete(path, 2, facts=dataclasses.replace(FACTS, accumulation=8))[0]["gradient_accumulation_steps"] == 8
    tree["lora_dist"] = {"read_as_auto": ["gradient_accumulation_steps"]}
    path.write_text(json.dumps(tree))
    with pytest.raises(UserError, match=re.escape('expected {"read_as_auto": {KEY: NUMBER}}')):
        complete(path, 2)


@pytest.mark.parametrize("name", OWN)
def test_accelerates_plugin_takes_an_own_file(name, monkeypatch):
    from accelerate import DeepSpeedPlugin

    for variable in [key for key in os.environ if key.startswith("ACCELERATE_")]:
        monkeypatch.delenv(variable)
    plugin = DeepSpeedPlugin(hf_ds_config=str(OWN_FILES / name))
    plugin.set_mixed_precision("bf16")
    assert plugin.zero_stage == STAGES[name]
    assert plugin.deepspeed_config["bf16"] == {"enabled": True}
    assert plugin.deepspeed_config["fp16"] == {"enabled": False}
    assert (plugin.gradient_accumulation_steps, plugin.gradient_clipping) == (1, 1.0)


@pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="deepspeed is not installed")
def test_deepspeed_itself_takes_every_file_as_it_is_and_completed(tmp_path):
    """In another process: importing deepspeed patches torch, and picks a device for good."""
    program = """
import json, sys
from deepspeed.runtime.config import DeepSpeedConfig
names = "train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping"
def read(config):
    read = DeepSpeedConfig(config)
    zero = read.zero_config
    places = [section and str(section.device).split(".")[-1] for section in (zero.offload_optimizer, zero.offload_param)]
    off = not (read.bfloat16_config.enabled or read.float16_config.enabled or read.optimizer_name)
    return [[getattr(read, name) for name in names], int(zero.stage), places, zero.reduce_bucket_size, off]
print("READ", json.dumps({path: read(path) for path in sys.argv[1:]}))
"""
    one_process = dataclasses.replace(FACTS, world_size=1)
    paths = {str(OWN_FILES / name): None for name in OWN}
    for name in OWN:
        config, _ = complete(OWN_FILES / name, STAGES[name], facts=one_process, nvme="/local")
        paths[str(tmp_path / name)] = config
        (tmp_path / name).write_text(json.dumps(config))
    environ = {**os.environ, "DS_ACCELERATOR": "cpu"}
    done = subprocess.run(
        [sys.executable, "-c", program, *paths], env=environ, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    read = json.loads(next(line for line in done.stdout.splitlines() if line.startswith("READ"))[5:])
    for path, config in paths.items():
        name = Path(path).name
        numbers, stage, places, bucket, float32_and_no_optimizer = read[path]
        assert numbers == ([1, 1, 1, 1.0] if config is None else [8, 2, 4, 0.5]), name
        assert stage == STAGES[name]
        device = "nvme" if "nvme" in name else "cpu"
        assert places[0] == (device if "offload" in name or "nvme" in name else None), name
        assert places[1] == ("cpu" if name in ("zero3_offload.json", "zero3_nvme.json") else None), name
        assert bucket == (500_000_000 if config is None else 4096)  # "auto" is DeepSpeed's default where nobody fills it in
        assert float32_and_no_optimizer
