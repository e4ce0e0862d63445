"""Running out of memory for real: the system refuses this process any more while it loads, computes or updates. No traceback."""

from __future__ import annotations

import json
import re
import subprocess
import sys

import pytest

from tests.runs import ROOT, environment, options

DRIVER = """
import json, resource, sys, threading
import torch
from safetensors.torch import save_file
from lora_dist.cli.options import parse
from lora_dist.cli.train import VERB, joined, what_fits
from lora_dist.config import RunConfig
from lora_dist.engine.train import train

def refuse_more(*_, room=1 << 19):
    with open("/proc/self/statm") as file:
        held = int(file.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (held + room, resource.RLIM_INFINITY))

def before(owner, name):
    real = getattr(owner, name)
    def refused(*args, **kwargs):
        refuse_more()
        return real(*args, **kwargs)
    setattr(owner, name, refused)

def forward(parts):
    parts.strategy.module.register_forward_pre_hook(refuse_more)

def backward(parts):
    before(parts.strategy, "backward")

def optimizer(parts):
    before(parts.strategy, "update")

def evaluation(parts):
    before(parts.task, "evaluate")

def fits(*args):
    resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    return what_fits(*args)

cases = json.loads(sys.argv[1])
for name, argv in cases.items():
    config = parse(RunConfig, argv, VERB)
    print(f"== {name}", file=sys.stderr, flush=True)
    try:
        with joined(config) as world:
            if name == "loading":
                refuse_more(room=40 << 20)  # threads and model, and not the adapter
            code = train(config, world, look=globals().get(name, lambda parts: None), fits={"forward": fits, "backward": what_fits}.get(name))
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    print(f"code {code}", file=sys.stderr, flush=True)
"""


@pytest.mark.long
def test_out_of_memory_anywhere_ends_in_where_it_was_and_the_flags_that_help(tiny_base, tiny_text, tmp_path):
    common = {
        "max_steps": 2,
        "per_device_train_batch_size": 64,
        "adapter__r": 8192,
        "data__block_size": 64,
        "data__holdout_windows": 64,
    }
    cases = {}
    for name in ("optimizer", "forward", "backward", "evaluation", "loading"):
        more = {} if name == "evaluation" else {"eval_strategy": "no"}
        cases[name] = options(tiny_base, tiny_text, tmp_path / name, **{**common, **more}, per_device_eval_batch_size=64)
    separately = {"MALLOC_MMAP_THRESHOLD_": "65536"}  # else what was freed would do for the tensors that follow
    stderr = ""
    for names in (["optimizer", "forward", "backward", "evaluation"], ["loading"]):  # a fresh process has nothing to spare
        argv = [sys.executable, "-c", DRIVER, json.dumps({name: cases[name] for name in names})]
        stderr += subprocess.run(argv, capture_output=True, text=True, cwd=ROOT, env=environment(**separately)).stderr
    parts = dict(re.findall(r"^== (\w+)\n(.*?)^code 1$", stderr, re.M | re.S))
    assert parts.keys() == cases.keys(), stderr[-3000:]
    assert "Traceback" not in stderr
    where = {
        "loading": "while loading",
        "forward": "in the forward pass of step 1",
        "backward": "in the backward pass of step 1",
        "optimizer": "in the optimizer's part of step 1",
        "evaluation": "in the evaluation at step 0",
    }
    first = {
        "loading": "--train.bf16 true",
        "forward": "--train.gradient_checkpointing true",
        "backward": "--train.gradient_checkpointing true",
        "optimizer": "--adapter.r 4096",
        "evaluation": "--train.per_device_eval_batch_size 1",
    }
    for name, text in parts.items():
        head, advice = re.search(r"❌ Out of memory (.*?)\n(.*?)\n", text).groups()
        assert head.startswith(where[name]) and re.search(r"\(peak \d+\.\d of \d+\.\d GiB\)", head), (name, head)
        assert first[name] in advice, (name, advice)
        assert "--train.per_device_train_batch_size 32 --train.gradient_accumulation_steps 2" in text or name in (
            "loading",
            "evaluation",
        )
    assert re.search(r"By the plan this fits:  --\S+ .*\(\d+\.\d GiB\)", parts["forward"]), parts["forward"]
    assert "By the plan this fits:" in parts["backward"]  # or why it cannot be told, where planning runs out of memory too
