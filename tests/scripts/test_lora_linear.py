"""The named library functions against PEFT's own model, and the script that tries an installation."""

from __future__ import annotations

import copy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import BertConfig, BertForSequenceClassification

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "scripts"))

import lora_linear  # noqa: E402 (lies beside the scripts)

TARGETS = ["query", "value", "attention.output.dense"]


def bert():
    torch.manual_seed(0)
    config = BertConfig(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)
    return BertForSequenceClassification(config).eval()


def test_it_trains_merges_and_counts_as_peft_does():
    base = bert()
    torch.manual_seed(1)
    mine = lora_linear.apply_lora_to_model(copy.deepcopy(base), target_modules=TARGETS, rank=4, alpha=8)
    lora_linear.mark_only_lora_as_trainable(mine)
    torch.manual_seed(1)
    theirs = get_peft_model(copy.deepcopy(base), LoraConfig(r=4, lora_alpha=8, target_modules=TARGETS))
    counts = lora_linear.count_lora_parameters(mine)
    assert (counts["trainable"], counts["total"]) == theirs.get_nb_trainable_parameters()
    assert counts["frozen"] == sum(p.numel() for p in base.parameters())
    ids, labels = torch.randint(0, 64, (4, 9)), torch.tensor([0, 1, 1, 0])
    results = []
    for model in (mine, theirs):
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        for _ in range(3):
            optimizer.zero_grad()
            model(input_ids=ids, labels=labels).loss.backward()
            optimizer.step()
        results.append(model(input_ids=ids).logits)
    torch.testing.assert_close(*results)
    state = lora_linear.get_lora_state_dict(mine)
    again = lora_linear.apply_lora_to_model(copy.deepcopy(base), target_modules=TARGETS, rank=4, alpha=8)
    lora_linear.load_lora_state_dict(again, state)
    assert torch.equal(again(input_ids=ids).logits, results[0])
    with pytest.raises(ValueError, match="does not fit"):
        lora_linear.load_lora_state_dict(again, dict(list(state.items())[1:]))
    short = lora_linear.apply_lora_to_model(copy.deepcopy(base), target_modules=["query", "value", "dense"], rank=4, alpha=8)
    assert lora_linear.get_lora_state_dict(short).keys() == state.keys(), "dense is the attention's output"
    with pytest.raises(ValueError, match="match no linear"):
        lora_linear.apply_lora_to_model(bert(), target_modules=["nothing"])
    merged = lora_linear.merge_lora_weights(mine)
    torch.testing.assert_close(merged(input_ids=ids).logits, results[0], rtol=1e-4, atol=1e-5)
    assert merged.state_dict().keys() == base.state_dict().keys()


def test_layers_merge_and_unmerge():
    linear = torch.nn.Linear(8, 6)
    layer = lora_linear.LinearWithLoRA(linear, rank=2, alpha=4).eval()
    torch.nn.init.normal_(layer.lora_B["default"].weight)
    x, weight = torch.randn(3, 8), linear.weight.clone()
    before = layer(x)
    layer.merge_weights()
    assert not torch.allclose(linear.weight, weight)
    torch.testing.assert_close(linear(x), before)
    layer.unmerge_weights()
    torch.testing.assert_close(linear.weight, weight)
    alone = lora_linear.LoRALayer(8, 6, rank=2, alpha=4)
    assert not alone(x).any()  # B is zero


def test_the_installation_is_tried_and_a_broken_one_named(tmp_path):
    script = [sys.executable, str(ROOT / "scripts" / "test_installation.py")]
    done = subprocess.run(script, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0 and done.stdout.splitlines()[-1] == "🎉 All tests passed!", done.stdout + done.stderr
    (tmp_path / "peft.py").write_text("raise ImportError('peft is broken')")
    code = f"import sys, runpy; sys.path.insert(0, {str(tmp_path)!r}); sys.argv = ['x']; runpy.run_path({script[1]!r}, run_name='__main__')"
    broken = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert broken.returncode == 1 and "❌ Libraries: ImportError: peft is broken" in broken.stdout
