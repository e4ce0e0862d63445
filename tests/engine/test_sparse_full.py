"""Training of the kept weights themselves through real runs: counted, stopped and resumed bit for bit, merged, used, refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from lora_dist.arguments import InspectArgs, MergeArgs
from lora_dist.blocks import ElementMask, Pattern
from lora_dist.blocks.tiles import places, scatter_tiles
from lora_dist.cli import train as train_verb
from lora_dist.cli.options import parse
from lora_dist.config import RunConfig
from lora_dist.engine.card import gather_facts, model_card
from lora_dist.engine.inspect import inspect
from lora_dist.engine.merge import merge, probe_logits
from lora_dist.engine.open_model import open_model
from lora_dist.log import UserError
from lora_dist.models.architecture import prunable_linears
from lora_dist.parallel import World
from tests.runs import adapter, assert_identical, losses, options
from tests.tiny import tiny_model, tiny_tokenizer


def arguments(base: Path, text: Path, out: Path, **changes) -> list[str]:
    common = {"mode": "sparse_full", "max_steps": 8, "eval_strategy": "no", "save_strategy": "no"}
    return options(base, text, out, **{**common, **changes})


def train(base: Path, text: Path, out: Path, **changes) -> None:
    assert train_verb.run(parse(RunConfig, arguments(base, text, out, **changes), train_verb.VERB)) == 0


@pytest.mark.parametrize("bf16", [False, pytest.param(True, marks=pytest.mark.long)])
def test_trained_counted_stopped_and_merged(tiny_base, tiny_text, tmp_path, bf16, capsys):
    whole, parts, merged = tmp_path / "whole", tmp_path / "parts", tmp_path / "merged"
    train(tiny_base, tiny_text, whole, bf16=bf16)
    assert losses(whole)[8] < losses(whole)[1] - 0.1
    train(tiny_base, tiny_text, parts, bf16=bf16, save_strategy="steps", save_steps=4)
    (parts / "checkpoint-8" / "manifest.json").write_text("{}")  # the run as it was killed behind step 4
    train(tiny_base, tiny_text, parts, bf16=bf16, save_strategy="steps", save_steps=4, resume_from_checkpoint="auto")
    assert_identical(whole, parts)
    report = merge(MergeArgs(base=str(tiny_base), adapter=str(whole), out=str(merged)), World())
    pattern, before = Pattern.load(tiny_base), load_file(tiny_base / "model.safetensors")
    after, trained = load_file(merged / "model.safetensors"), adapter(whole)
    assert report.pattern_digest == pattern.digest and report.logits_error_fp32 == 0.0
    moved = 0
    for name, mask in pattern.items():
        assert not after[f"{name}.weight"][~mask.expand()].any()
        delta = trained.pop(f"base_model.model.{name}.lora_delta", None)
        if delta is None:
            assert not mask.kept_PQ.any()  # all of it is pruned
            continue
        assert delta.dtype == torch.float32
        moved += bool(delta.any())
        if not mask.keeps_all:
            delta = scatter_tiles(delta, places(mask.kept_PQ), 16, mask.shape)
        expected = before[f"{name}.weight"] + delta
        assert torch.equal(after[f"{name}.weight"], expected)
    assert not trained and moved >= 8  # the others lead to what is pruned whole
    rest = [name for name in before if name.removesuffix(".weight") not in pattern]
    assert all(torch.equal(before[name], after[name]) for name in rest)
    kept = sum(mask.kept_elements() for mask in pattern.values())
    output = capsys.readouterr().out
    assert f"trainable params: {kept:,} || all params: {sum(t.numel() for t in before.values()):,} ||" in output
    assert f"Number of trainable parameters = {kept:,}" in output and "Sparse full fine-tuning applied" in output
    assert "Sparse full Fine-tuning Complete!" in output and "LoRA weights saved" not in output
    found = inspect(InspectArgs(path=str(whole)))
    assert not found.findings and "sparse full fine-tuning of the kept weights (block pattern)" in found.facts
    card = model_card(gather_facts(whole, None), "me/it")
    assert "A sparse full fine-tuning adapter" in card and "lora_alpha" not in card


def test_the_optimizer_in_a_checkpoint_is_the_kept_share(tiny_base, tiny_text, tmp_path):
    train(tiny_base, tiny_text, tmp_path / "run", save_strategy="steps", save_steps=8)
    state = load_file(tmp_path / "run" / "checkpoint-8" / "optimizer.safetensors")
    tiles = sum(int(mask.kept_PQ.sum()) for mask in Pattern.load(tiny_base).values())
    for key in ("exp_avg", "exp_avg_sq"):
        assert sum(t.numel() for name, t in state.items() if name.endswith(f".{key}")) == tiles * 256


def element_base(folder: Path) -> Path:
    """A tiny Llama pruned 2:4."""
    model = tiny_model("llama", vocab_size=len(tiny_tokenizer()))
    masks = {}
    for linear in prunable_linears(model):
        weight = linear.weight_OI
        keep = torch.zeros_like(weight.view(-1, 4), dtype=torch.bool)
        keep = keep.scatter_(1, weight.abs().view(-1, 4).topk(2, 1).indices, True).view(weight.shape)
        weight.masked_fill_(~keep, 0.0)
        masks[linear.name] = ElementMask.detect(weight)
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def test_a_pattern_of_elements_is_kept_and_targets_are_those_asked_for(tiny_text, tmp_path):
    base = element_base(tmp_path / "base")
    train(base, tiny_text, tmp_path / "run", adapter__target_modules="[up_proj,down_proj]", gradient_checkpointing=True)
    merge(MergeArgs(base=str(base), adapter=str(tmp_path / "run"), out=str(tmp_path / "merged")), World())
    before, after = (load_file(folder / "model.safetensors") for folder in (base, tmp_path / "merged"))
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert len(moved) == 4 and all("up_proj" in name or "down_proj" in name for name in moved)
    for name in moved:
        kept = before[name] != 0
        assert float(kept.float().mean()) == 0.5
        assert not after[name][~kept].any() and (after[name] != before[name])[kept].float().mean() > 0.9
    ids = torch.arange(20).view(1, 20)
    opened = open_model(str(base), str(tmp_path / "run"), world=World())
    merged = open_model(str(tmp_path / "merged"), world=World())
    assert torch.equal(probe_logits(opened.model, ids), probe_logits(merged.model, ids))


@pytest.mark.parametrize(
    "changes,words",
    [
        ({"adapter__type": "dora"}, "adapter.type: found dora with train.mode sparse_full, which trains weights and no adapter"),
        ({"adapter__init_lora_weights": "pissa"}, "adapter.init_lora_weights: found pissa with train.mode sparse_full"),
        ({"adapter__mask": "none"}, "adapter.mask: found none with train.mode sparse_full, expected auto, block or element"),
        ({"model__load_in_4bit": True}, "model.load_in_4bit: found true with train.mode sparse_full"),
        ({"loraplus_lr_ratio": 16}, "train.loraplus_lr_ratio: found 16 with train.mode sparse_full, which has no lora_B"),
    ],
)
def test_what_does_not_combine_is_refused_before_loading(tiny_base, tiny_text, tmp_path, changes, words):
    with pytest.raises(UserError, match=words):
        train_verb.run(parse(RunConfig, arguments(tiny_base, tiny_text, tmp_path / "out", **changes), train_verb.VERB))
    assert not (tmp_path / "out").exists()


def test_another_mode_on_resume_is_refused_and_idle_options_are_told(tiny_base, tiny_text, tmp_path, capsys):
    out = tmp_path / "run"
    train(tiny_base, tiny_text, out, max_steps=2, save_strategy="steps", save_steps=2, adapter__r=4, adapter__lora_dropout=0)
    assert "adapter.r, adapter.lora_dropout: without effect with train.mode sparse_full" in capsys.readouterr().out
    with pytest.raises(
        UserError, match="train.mode: was sparse_full when checkpoint-2 was written, found lora: set it as it was"
    ):
        train(tiny_base, tiny_text, out, mode="lora", max_steps=4, resume_from_checkpoint="auto")


BESIDE = ["model.embed_tokens.weight", "lm_head.weight", "model.norm.weight", "model.layers.0.input_layernorm.weight"]


@pytest.mark.parametrize("mode", ["lora", pytest.param("sparse_full", marks=pytest.mark.long)])
def test_what_is_trained_beside_is_resumed_evaluated_and_merged(tiny_base, tiny_text, tmp_path, mode, capsys):
    whole, parts, merged = tmp_path / "whole", tmp_path / "parts", tmp_path / "merged"
    more = {"mode": mode, "adapter__modules_to_save": "[all-norm,embed_tokens,lm_head]", "bf16": True}
    more |= {"save_strategy": "steps", "save_steps": 4, "eval_strategy": "steps", "eval_steps": 8}
    train(tiny_base, tiny_text, whole, **more)
    train(tiny_base, tiny_text, parts, **more)
    (parts / "checkpoint-8" / "manifest.json").write_text("{}")
    train(tiny_base, tiny_text, parts, resume_from_checkpoint="auto", **more)
    assert_identical(whole, parts)
    assert "its head is no plain linear, or is trained" in capsys.readouterr().out
    tensors = adapter(whole)
    assert all(tensors[f"base_model.model.{name.replace('.weight', '')}.lora_whole_weight"].any() for name in BESIDE)
    report = merge(MergeArgs(base=str(tiny_base), adapter=str(whole), out=str(merged), dtype="float32"), World())
    assert report.logits_error_fp32 < 1e-5 and report.zero_tiles > 0
    before, after = (load_file(folder / "model.safetensors") for folder in (tiny_base, merged))
    for name in BESIDE:
        delta = tensors[f"base_model.model.{name.replace('.weight', '')}.lora_whole_weight"]
        assert torch.equal(after[name], before[name] + delta) and not torch.equal(after[name], before[name])
    found = inspect(InspectArgs(path=str(whole)))
    assert not found.findings and any("7 tensors of the base trained whole" in fact for fact in found.facts)
    assert "trained whole | 7 tensors" in model_card(gather_facts(whole, None), "me/it")
