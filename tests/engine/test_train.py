"""Runs inside the test process (one rank): what each option does, and every kind of bad input."""

from __future__ import annotations

import json
import shutil
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import lora_dist.engine.train as engine
from lora_dist.cli import train as train_verb
from lora_dist.cli.options import parse
from lora_dist.config import RunConfig
from lora_dist.engine.checkpoint import list_checkpoints
from lora_dist.engine.train import train as engine_train
from lora_dist.log import GuardError, UserError
from tests.runs import adapter, assert_identical, largest_relative_difference, losses, options, records


def train(base: Path, text: Path, out: Path, **changes) -> None:
    assert train_verb.run(parse(RunConfig, options(base, text, out, **changes), train_verb.VERB)) == 0


def refused(base: Path, text: Path, out: Path, **changes) -> str:
    """The message; proves that the folder was left as it was."""
    before = sorted(out.rglob("*")) if out.exists() else None
    with pytest.raises(UserError) as caught:
        train(base, text, out, **changes)
    assert (sorted(out.rglob("*")) if out.exists() else None) == before
    assert all("\n" not in problem for problem in caught.value.problems)
    return "\n".join(caught.value.problems)


@pytest.fixture
def quick():
    """Options of the shortest useful run."""
    return {"max_steps": 4, "eval_strategy": "no", "save_strategy": "no"}


# What a run leaves, and in what order


def test_a_run_leaves_adapter_tokenizer_config_log_and_metrics(tiny_base, tiny_text, tmp_path):
    train(tiny_base, tiny_text, tmp_path / "out", max_steps=6, eval_steps=2, save_steps=3, save_total_limit=2)
    names = {p.name for p in (tmp_path / "out").iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors", "block_mask.safetensors", "tokenizer.json"} <= names
    assert {"train.log", "metrics.jsonl", "run_config.yaml"} <= names
    assert [n for n in names if n.startswith(".")] == [".lock"]
    evaluations = records(tmp_path / "out", "eval")
    assert [row["step"] for row in evaluations] == [0, 2, 4, 6]
    best = min(evaluations, key=lambda row: row["eval_loss"])["step"]
    final = records(tmp_path / "out", "final")[0]
    assert final["eval_loss"] == pytest.approx(min(row["eval_loss"] for row in evaluations), rel=1e-6)
    assert {step for step, _ in list_checkpoints(tmp_path / "out")} >= {best, 6}


def test_the_final_adapter_is_the_best_and_not_the_last(tiny_base, tiny_text, tmp_path):
    """A rate so high that the loss gets worse again."""
    train(
        tiny_base,
        tiny_text,
        tmp_path / "out",
        max_steps=8,
        eval_steps=1,
        learning_rate=0.3,
        lr_scheduler_type="constant",
        save_total_limit=2,
    )
    evaluations = {row["step"]: row["eval_loss"] for row in records(tmp_path / "out", "eval")}
    best = min(evaluations, key=evaluations.get)
    assert 0 < best < 8, f"the test needs a run that gets worse again: {evaluations}"
    kept = load_file(tmp_path / "out" / f"checkpoint-{best}" / "adapter" / "adapter_model.safetensors")
    final = adapter(tmp_path / "out")
    assert all(torch.equal(kept[k], final[k]) for k in final)


def test_a_stop_that_would_outlast_the_launchers_grace_is_told_once(tiny_base, tiny_text, tmp_path, monkeypatch):
    monkeypatch.setattr("lora_dist.engine.loop.LAUNCHER_GRACE_S", 0)
    train(tiny_base, tiny_text, tmp_path / "out", max_steps=8, eval_strategy="no", save_steps=2)
    assert (tmp_path / "out" / "train.log").read_text().count("stopping takes up to") == 1


def test_early_stopping_stops(tiny_base, tiny_text, tmp_path):
    changes = {
        "max_steps": 30,
        "eval_steps": 1,
        "learning_rate": 0.3,
        "lr_scheduler_type": "constant",
        "early_stopping_patience": 2,
    }
    train(tiny_base, tiny_text, tmp_path / "out", **changes)
    evaluations = {row["step"]: row["eval_loss"] for row in records(tmp_path / "out", "eval")}
    best = min(evaluations, key=evaluations.get)
    assert max(evaluations) == best + 2 < 30


def test_epochs_evaluate_and_save_at_their_ends(tiny_base, tiny_text, tmp_path):
    train(
        tiny_base, tiny_text, tmp_path / "out", num_train_epochs=2, data__max_train_samples=10, per_device_train_batch_size=4,
        eval_strategy="epoch", save_strategy="epoch", save_total_limit=5,
    )  # fmt: skip
    assert max(losses(tmp_path / "out")) == 6  # 10 windows in steps of 4, 4 and 2, twice
    assert [row["step"] for row in records(tmp_path / "out", "eval")] == [0, 3, 6]
    assert [step for step, _ in list_checkpoints(tmp_path / "out")] == [3, 6]
    assert records(tmp_path / "out", "train")[-1]["epoch"] == 2.0


def test_gradient_checkpointing_changes_nothing(tiny_base, tiny_text, tmp_path, quick):
    train(tiny_base, tiny_text, tmp_path / "a", **quick)
    train(tiny_base, tiny_text, tmp_path / "b", **quick, gradient_checkpointing=True)
    assert losses(tmp_path / "a") == pytest.approx(losses(tmp_path / "b"), rel=1e-6)
    assert largest_relative_difference(adapter(tmp_path / "a"), adapter(tmp_path / "b")) < 1e-5


def test_only_the_first_layers_are_recomputed(tiny_base, tiny_text, tmp_path, quick, monkeypatch, capfd):
    """As many as asked for; `auto`: none where all fits, refused where nothing does."""
    calls: list[int] = []

    def look(parts):
        for i, layer in enumerate(parts.base.model.model.layers):
            layer.mlp.register_forward_pre_hook(lambda module, inputs, i=i: calls.append(i) if module.training else None)

    changes = {**quick, "max_steps": 1, "eval_strategy": "no", "gradient_checkpointing": True}
    counts = []
    for layers in ("1", "auto"):
        values = options(tiny_base, tiny_text, tmp_path / layers, **changes, gradient_checkpointing_layers=layers)
        monkeypatch.setattr(engine, "train", partial(engine_train, look=look))
        calls.clear()
        train_verb.main(values)
        counts.append([calls.count(i) for i in range(2)])
        told = "the first 1 of 2 layers" if layers == "1" else "the first 0 of 2 layers"
        assert f"gradient checkpointing: {told} are computed again" in capfd.readouterr().out
    assert counts == [[2, 1], [1, 1]]
    monkeypatch.setattr("lora_dist.engine.memory.memory_gib", lambda device: 0.5)
    found = refused(tiny_base, tiny_text, tmp_path / "none", **changes, gradient_checkpointing_layers="auto")
    assert "train.gradient_checkpointing_layers: found auto, but by the plan all layers are too few for 0.5 GiB" in found
    found = refused(tiny_base, tiny_text, tmp_path / "none", **quick, gradient_checkpointing_layers="3")
    assert "expected all, auto or a number, with train.gradient_checkpointing true" in found


@pytest.mark.parametrize("form", ["factorised", "dense"])
def test_both_forms_train_alike(tiny_base, tiny_text, tmp_path, quick, form):
    train(tiny_base, tiny_text, tmp_path / "auto", **quick, adapter__lora_dropout=0)
    train(tiny_base, tiny_text, tmp_path / form, **quick, adapter__lora_dropout=0, adapter__form=form)
    assert losses(tmp_path / "auto") == pytest.approx(losses(tmp_path / form), rel=1e-5)


def test_losses_equal_a_plain_loop_of_transformers_and_peft(tiny_base, tiny_text, tmp_path, quick):
    """Plain LoRA, no dropout: transformers' own loss, PEFT's own layer, torch's own AdamW and clipping."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from lora_dist.data.sampler import epoch_order
    from lora_dist.data.text import TextSource, hold_out, load_windows

    changes = {
        **quick,
        "per_device_train_batch_size": 4,
        "adapter__mask": "none",
        "adapter__lora_dropout": 0,
        "lr_scheduler_type": "constant",
    }
    train(tiny_base, tiny_text, tmp_path / "out", **changes, weight_decay=0.1)
    model = AutoModelForCausalLM.from_pretrained(tiny_base)
    torch.manual_seed(42)
    model = get_peft_model(model, LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM"))
    windows = load_windows(
        TextSource(str(tiny_text)),
        AutoTokenizer.from_pretrained(tiny_base),
        context_length=32,
        cache_dir=str(tiny_text.parent / "cache"),
    ).splits["train"]
    order = epoch_order(len(windows), 42, 0).tolist()
    assert len(hold_out(windows, 16, 42)[0]) == len(windows) - 16
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-3, weight_decay=0.1)
    expected = {}
    for step in range(4):
        ids = torch.stack([windows[i] for i in order[step * 4 : step * 4 + 4]])
        optimizer.zero_grad()
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_([p for p in model.parameters() if p.requires_grad], 1.0)
        optimizer.step()
        expected[step + 1] = loss.item()
    assert losses(tmp_path / "out") == pytest.approx(expected, rel=1e-5)


def test_bfloat16_trains_a_float32_adapter_on_a_bfloat16_base(tiny_base, tiny_text, tmp_path, quick):
    train(tiny_base, tiny_text, tmp_path / "half", **quick, bf16=True)
    train(tiny_base, tiny_text, tmp_path / "full", **quick)
    assert all(t.dtype == torch.float32 for t in adapter(tmp_path / "half").values())
    assert losses(tmp_path / "half") == pytest.approx(losses(tmp_path / "full"), rel=0.02)


def test_fp16_scales_its_loss_and_skips_overflows(tiny_base, tiny_text, tmp_path):
    train(tiny_base, tiny_text, tmp_path / "out", max_steps=30, eval_strategy="no", save_steps=30, fp16=True)
    rows = records(tmp_path / "out", "train")
    assert rows[-1]["loss_scale"] <= 65536 and rows[-1]["loss"] < rows[0]["loss"]
    state = json.loads((tmp_path / "out" / "checkpoint-30" / "state.json").read_text())
    assert state["loss_scale"] == rows[-1]["loss_scale"] and state["skipped_steps"] == rows[-1]["skipped_steps"]


def test_fp16_resumes_with_its_scale_bit_for_bit(tiny_base, tiny_text, tmp_path):
    common = {"eval_strategy": "no", "save_steps": 3, "fp16": True, "lr_scheduler_type": "constant"}
    train(tiny_base, tiny_text, tmp_path / "whole", max_steps=8, **common)
    train(tiny_base, tiny_text, tmp_path / "parts", max_steps=3, **common)
    train(tiny_base, tiny_text, tmp_path / "parts", max_steps=8, **common, resume_from_checkpoint="auto")
    assert_identical(tmp_path / "whole", tmp_path / "parts")


def test_a_resumed_schedule_goes_on_where_it_was(tiny_base, tiny_text, tmp_path):
    common = {
        "max_steps": 12,
        "eval_steps": 4,
        "save_steps": 2,
        "lr_scheduler_type": "cosine",
        "warmup_ratio": 0.3,
        "save_total_limit": 10,
    }
    train(tiny_base, tiny_text, tmp_path / "whole", **common)
    shutil.copytree(tmp_path / "whole", tmp_path / "parts")
    train(tiny_base, tiny_text, tmp_path / "parts", **common, resume_from_checkpoint=tmp_path / "parts" / "checkpoint-6")
    assert_identical(tmp_path / "whole", tmp_path / "parts")
    assert (tmp_path / "parts" / "superseded-checkpoint-12").is_dir()  # set aside, not removed


def test_element_patterns_are_found_and_respected(tiny_base, tiny_text, tmp_path, quick):
    from lora_dist.arguments import MergeArgs
    from lora_dist.engine.merge import merge
    from lora_dist.parallel import World

    base = tmp_path / "unstructured"
    shutil.copytree(tiny_base, base)
    (base / "block_mask.safetensors").unlink()
    tensors = load_file(base / "model.safetensors")
    generator = torch.Generator().manual_seed(0)
    for name, tensor in tensors.items():
        if "proj" in name:
            tensor.normal_(std=0.1, generator=generator)
            tensor[torch.rand(tensor.shape, generator=generator) < 0.5] = 0
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    assert "has no 16x16 tiles of zeros" in refused(base, tiny_text, tmp_path / "no", **quick, adapter__mask="block")
    train(base, tiny_text, tmp_path / "out", **quick)
    report = merge(MergeArgs(base=str(base), adapter=str(tmp_path / "out"), out=str(tmp_path / "merged")), World())
    merged = load_file(tmp_path / "merged" / "model.safetensors")
    changed = 0
    for name, tensor in tensors.items():
        if "proj" in name:
            assert torch.equal(merged[name][tensor == 0], torch.zeros(int((tensor == 0).sum())))
            changed += int((merged[name] != tensor).sum())
    assert changed > 0 and report.zero_tiles > 0 and report.logits_error < 1e-5


# Bad input: one clear line, nothing written


def test_missing_things(tiny_base, tiny_text, tmp_path, quick):
    out = tmp_path / "out"
    assert "model.name_or_path" in refused(tmp_path / "nowhere", tiny_text, out, **quick)
    (tmp_path / "empty").mkdir()
    assert "empty" in refused(tmp_path / "empty", tiny_text, out, **quick)
    assert "data.dataset_name" in refused(tiny_base, tmp_path / "no.txt", out, **quick)
    assert "found no folder" in refused(tiny_base, tiny_text, out, **quick, resume_from_checkpoint=tmp_path / "checkpoint-9")
    assert not out.exists()


def test_a_base_without_block_sparsity(tiny_base, tiny_text, tmp_path, quick):
    from tests.tiny import tiny_model, tiny_tokenizer

    dense = tmp_path / "dense"
    tiny_model("llama", vocab_size=len(tiny_tokenizer())).save_pretrained(dense)
    tiny_tokenizer().save_pretrained(dense)
    message = refused(dense, tiny_text, tmp_path / "out", **quick, adapter__mask="block")
    assert "adapter.mask: found block" in message and "lora-dist prune" in message
    train(dense, tiny_text, tmp_path / "auto", **quick)  # auto: plain LoRA, a stock PEFT adapter
    assert json.loads((tmp_path / "auto" / "adapter_config.json").read_text())["peft_type"] == "LORA"


def test_sizes_and_names_that_do_not_fit(tiny_base, tiny_text, tmp_path, quick):
    out = tmp_path / "out"
    assert "data.block_size: found 65, expected at most the model's context of 64" in refused(
        tiny_base, tiny_text, out, **quick, data__block_size=65
    )
    short = tmp_path / "short.txt"
    short.write_text("too short")
    assert "data.block_size" in refused(tiny_base, short, out, **quick)
    message = refused(tiny_base, tiny_text, out, **quick, adapter__target_modules="query,q_proj")
    assert "query match no linear" in message and "q_proj" in message


def test_a_folder_that_holds_another_run(tiny_base, tiny_text, tmp_path, quick):
    out = tmp_path / "out"
    train(tiny_base, tiny_text, out, **quick)
    first = (out / "adapter_model.safetensors").read_bytes()
    message = refused(tiny_base, tiny_text, out, **quick)
    assert "already holds a run" in message and "--train.overwrite_output_dir" in message
    assert "already holds a run" in refused(
        tiny_base, tiny_text, out, **quick, resume_from_checkpoint="auto"
    )  # finished, no checkpoint
    train(tiny_base, tiny_text, out, **quick, overwrite_output_dir=True, learning_rate=1e-3)
    (aside,) = tmp_path.glob("out.old-*")
    assert (aside / "adapter_model.safetensors").read_bytes() == first  # never deleted
    assert (out / "adapter_model.safetensors").read_bytes() != first


def test_what_changed_since_the_checkpoint(tiny_base, tiny_text, tmp_path):
    out = tmp_path / "out"
    common = {"max_steps": 2, "eval_strategy": "no", "save_steps": 2}
    train(tiny_base, tiny_text, out, **common)
    again = {**common, "max_steps": 4, "resume_from_checkpoint": "auto"}
    assert "train.seed" in refused(tiny_base, tiny_text, out, **again, seed=1)
    assert "adapter.r: was 8" in refused(tiny_base, tiny_text, out, **again, adapter__r=4)
    assert "adapter.lora_alpha: was 16" in refused(tiny_base, tiny_text, out, **again, adapter__lora_alpha=160)
    assert "adapter.use_rslora" in refused(tiny_base, tiny_text, out, **again, adapter__use_rslora=True)
    assert "match no linear" not in refused(tiny_base, tiny_text, out, **again, adapter__target_modules="q_proj")
    message = refused(tiny_base, tiny_text, out, **again, data__max_train_samples=20)
    assert "data.max_train_samples: found 20 training windows, expected " in message and "when checkpoint-2 was" in message
    changed = tmp_path / "changed.txt"
    changed.write_text(tiny_text.read_text().replace("river", "stone", 1))
    message = refused(tiny_base, changed, out, **again)
    assert "data.dataset_name, " in message and "but not the same content" in message and "max_train_samples" not in message
    assert "the pattern changed since checkpoint-2" in refused(tiny_base, tiny_text, out, **again, adapter__mask="none")
    other = tmp_path / "other"
    shutil.copytree(tiny_base, other)
    tensors = load_file(other / "model.safetensors")
    tensors["model.norm.weight"][0] += 1e-3
    save_file(tensors, other / "model.safetensors", metadata={"format": "pt"})
    assert "the base changed since checkpoint-2" in refused(other, tiny_text, out, **again)


def test_a_broken_checkpoint_is_skipped_by_name_and_named_when_asked_for(tiny_base, tiny_text, tmp_path):
    out = tmp_path / "out"
    common = {"max_steps": 6, "eval_strategy": "no", "save_steps": 2}
    train(tiny_base, tiny_text, out, **common)
    damaged = out / "checkpoint-6" / "optimizer.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-1])
    message = refused(tiny_base, tiny_text, out, **common, resume_from_checkpoint=out / "checkpoint-6")
    assert "optimizer.safetensors has" in message
    train(tiny_base, tiny_text, out, **{**common, "max_steps": 8}, resume_from_checkpoint="auto")
    log = (out / "train.log").read_text()
    assert "skipping checkpoint-6: optimizer.safetensors" in log and "Resuming from" in log and "checkpoint-4" in log


def poison(base: Path, copy: Path, value: float) -> Path:
    shutil.copytree(base, copy)
    tensors = load_file(copy / "model.safetensors")
    tensors["model.norm.weight"][:] = value
    save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})
    return copy


def test_a_base_with_nan_is_named_before_anything_is_written(tiny_base, tiny_text, tmp_path, quick):
    poisoned = poison(tiny_base, tmp_path / "nan", float("nan"))
    assert "hold NaN or infinity, first model.norm.weight" in refused(poisoned, tiny_text, tmp_path / "out", **quick)


def test_a_loss_that_is_not_finite_stops_before_the_optimizer_moves(tiny_base, tiny_text, tmp_path):
    """Finite weights so large that the logits overflow."""
    poisoned = poison(tiny_base, tmp_path / "huge", 3e38)
    with pytest.raises(UserError, match="step 1: found a loss of (nan|inf)"):
        train(poisoned, tiny_text, tmp_path / "out", max_steps=2, eval_strategy="no")
    assert not list_checkpoints(tmp_path / "out")
    with pytest.raises(UserError, match="evaluation at step 0: found a loss of"):
        train(poisoned, tiny_text, tmp_path / "out", max_steps=2)
    train(tiny_base, tiny_text, tmp_path / "out", max_steps=2, eval_strategy="no")  # what saved nothing is in nobody's way


def test_two_runs_in_one_folder_are_refused(tiny_base, tiny_text, tmp_path, quick):
    from lora_dist.engine.folder import lock_folder

    (tmp_path / "out").mkdir()
    lock = lock_folder(tmp_path / "out")
    assert "another run is at work" in refused(tiny_base, tiny_text, tmp_path / "out", **quick)
    lock.close()
    train(tiny_base, tiny_text, tmp_path / "out", **quick)


def test_the_bases_own_folder_is_no_run_folder(tiny_base, tiny_text, quick):
    assert "holds a model" in refused(tiny_base, tiny_text, tiny_base, **quick)


def test_a_tied_head_is_no_target(tiny_text, tmp_path, quick):
    from tests.tiny import tiny_model, tiny_tokenizer

    model = tiny_model("llama", vocab_size=len(tiny_tokenizer()))
    model.config.tie_word_embeddings = True
    model.lm_head.weight = model.model.embed_tokens.weight
    model.save_pretrained(tmp_path / "tied")
    tiny_tokenizer().save_pretrained(tmp_path / "tied")
    message = refused(tmp_path / "tied", tiny_text, tmp_path / "out", **quick, adapter__target_modules="lm_head,q_proj")
    assert "lm_head shares its weight with the embedding" in message


def test_a_resumed_run_says_which_settings_changed(tiny_base, tiny_text, tmp_path):
    common = {"max_steps": 2, "eval_strategy": "no", "save_steps": 2}
    train(tiny_base, tiny_text, tmp_path / "out", **common)
    train(tiny_base, tiny_text, tmp_path / "out", **{**common, "max_steps": 3}, learning_rate=1e-5, resume_from_checkpoint="auto")
    log = (tmp_path / "out" / "train.log").read_text()
    assert "train.learning_rate was 0.003 before, is 1e-05 now" in log and "train.max_steps was 2 before, is 3 now" in log


def test_a_base_that_changes_during_the_run_stops_it(tiny_base, tiny_text, tmp_path, monkeypatch):
    """A real write into a frozen weight between two steps."""
    from lora_dist.engine.loop import Loop

    step = Loop._step

    def corrupting(self, *given):
        result = step(self, *given)
        if self.state.step == 3:
            self.parts.base.model.model.layers[1].mlp.up_proj.base_layer.weight.data[0, 0] += 1e-3
        return result

    monkeypatch.setattr(Loop, "_step", corrupting)
    with pytest.raises(GuardError, match="up_proj"):
        train(tiny_base, tiny_text, tmp_path / "out", max_steps=8, eval_strategy="no", guard__every=1, guard__sample_chunks=1000)
    assert not list_checkpoints(tmp_path / "out")


@pytest.mark.parametrize("kind", ["gpt2", "opt", "qwen3"])
def test_other_architectures_train_and_merge(kind, tiny_text, tmp_path, quick):
    from lora_dist.arguments import MergeArgs, PruneArgs
    from lora_dist.engine.merge import merge
    from lora_dist.engine.prune import prune_model
    from lora_dist.parallel import World
    from tests.tiny import tiny_model, tiny_tokenizer

    tiny_model(kind, vocab_size=len(tiny_tokenizer())).save_pretrained(tmp_path / "dense")
    tiny_tokenizer().save_pretrained(tmp_path / "dense")
    prune_model(
        PruneArgs(model=str(tmp_path / "dense"), out=str(tmp_path / "pruned"), score="magnitude", block=8), progress=False
    )
    train(tmp_path / "pruned", tiny_text, tmp_path / "out", **quick, adapter__mask="block", adapter__block=8)
    report = merge(MergeArgs(base=str(tmp_path / "pruned"), adapter=str(tmp_path / "out"), out=str(tmp_path / "merged")), World())
    assert report.zero_tiles > 0 and report.logits_error < 1e-5
