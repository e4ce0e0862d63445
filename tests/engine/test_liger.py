"""Liger's kernels in a run: the same loss and gradients as without, and when they are refused."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from transformers import GPT2Config, GPT2LMHeadModel

from lora_dist.engine.adapting import use_liger_kernel
from lora_dist.log import UserError
from tests.runs import ROOT, environment

pytest.importorskip("triton", reason="needs triton, which torch brings with CUDA only: pip install triton")
pytest.importorskip("liger_kernel", reason="needs liger-kernel: pip install 'lora-dist[liger]'")

KINDS = ["llama", "mistral", "qwen2", "qwen3"]


def test_loss_and_gradients_are_the_models_own():
    """By Triton's interpreter, in a process of its own: Liger replaces functions of transformers' modules."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.engine.liger_worker", *KINDS],
        capture_output=True, text=True, cwd=ROOT, env=environment(TRITON_INTERPRET="1"),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    for kind, figures in found.items():
        assert figures["kernels"] == ["LigerRMSNorm.forward", "LigerSwiGLUMLP.forward", "liger_rotary_pos_emb"], (kind, figures)
        assert figures["loss"] < 1e-6 and figures["gradient"] < 1e-5, (kind, figures)
    assert list(found) == KINDS


def test_a_family_that_liger_has_no_kernels_for_is_refused():
    model = GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=1, n_head=2, vocab_size=64))
    with pytest.raises(UserError, match=r"train.use_liger_kernel: found true with a model of type gpt2, .*llama.*: leave it out"):
        use_liger_kernel(model)
