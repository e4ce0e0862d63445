"""Runs that learn from the dense model as well, on one process: the loss is the plain one of whole logits, whatever the options."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoModelForCausalLM

from lora_dist.__main__ import main
from lora_dist.arguments import MergeArgs
from lora_dist.blocks import Pattern
from lora_dist.cli import train as train_verb
from lora_dist.cli.options import parse
from lora_dist.config import RunConfig
from lora_dist.data.loader import MicroBatch
from lora_dist.data.soft_labels import SoftLabels
from lora_dist.engine.merge import merge
from lora_dist.engine.setup import Parts
from lora_dist.engine.train import train
from lora_dist.log import UserError
from lora_dist.models import chunked
from lora_dist.parallel import World
from tests.instructions import write_instructions
from tests.runs import assert_identical, losses, options, records
from tests.tiny import save_dense, tiny_tokenizer

QUICK = {"max_steps": 2, "eval_strategy": "no", "save_strategy": "no", "adapter__lora_dropout": 0}


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_dense(tmp_path_factory.mktemp("dense") / "dense")


@pytest.fixture(scope="module")
def alpaca(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    file, template = write_instructions(tmp_path_factory.mktemp("instructions"))
    return file, {"data__format": "alpaca", "data__prompt_template": template, "data__block_size": 48, "data__holdout_windows": 9}


def config_of(base: Path, text: Path, out: Path, dense: Path | None, **changes: Any) -> RunConfig:
    teacher = {} if dense is None else {"distill_from": dense}
    return parse(RunConfig, options(base, text, out, **{**teacher, **changes}), train_verb.VERB)


def run(base: Path, text: Path, out: Path, dense: Path | None, **changes: Any) -> None:
    assert train_verb.run(config_of(base, text, out, dense, **changes)) == 0


def refused(base: Path, text: Path, out: Path, dense: Path, **changes: Any) -> str:
    with pytest.raises(UserError) as caught:
        run(base, text, out, dense, **{**QUICK, **changes})
    assert not out.exists() or not list(out.glob("*"))
    assert all("\n" not in problem for problem in caught.value.problems)
    return "\n".join(caught.value.problems)


def first(output: Any) -> Tensor:
    return output[0] if isinstance(output, tuple) else output


def reference(
    model: Any, teacher: Any, batch: MicroBatch, alpha: float, temperature: float, weight: float, hidden: str
) -> tuple[Tensor, dict[str, float]]:
    """The sum by whole logits and transformers' own hidden states."""
    inputs = {"input_ids": batch.input_ids_BL, "position_ids": batch.position_ids_BL, "output_hidden_states": True}
    with torch.no_grad():
        t = teacher(**inputs, use_cache=False)
    s = model(**inputs, use_cache=False)
    targets_T = batch.labels_BL[:, 1:].reshape(-1)
    kept = targets_T != -100
    s_NV, t_NV = (out.logits[:, :-1].flatten(0, 1)[kept] for out in (s, t))
    ce = F.cross_entropy(s_NV, targets_T[kept], reduction="sum")
    kl = F.kl_div(F.log_softmax(s_NV / temperature, -1), F.log_softmax(t_NV / temperature, -1), reduction="sum", log_target=True)
    # transformers gives the last layer's output behind the final norm only: layers are compared with one layer less
    pairs = list(zip(s.hidden_states, t.hidden_states, strict=True))[slice(1, -1) if hidden == "layers" else slice(-1, None)]
    distances = [
        ((a - b).square().sum(-1) / b.square().sum(-1))[:, :-1].flatten()[kept].sum() if weight else torch.zeros(())
        for a, b in pairs
    ]
    total = (1 - alpha) * ce + alpha * temperature**2 * kl + weight * torch.stack(distances).mean()
    return total, {"ce_loss": float(ce.detach()), "kl_loss": float(kl.detach())}


CASES: dict[str, dict[str, Any]] = {
    "mixed": {"distill_alpha": 0.3, "distill_temperature": 2},
    "kl alone": {"distill_alpha": 1},
    "whole logits": {"cross_entropy": "logits", "distill_temperature": 1.5},
    "last hidden states": {"distill_hidden_weight": 0.7},
    "hidden states, whole logits": {"distill_hidden_weight": 0.7, "cross_entropy": "logits"},
    "recomputed layers": {"gradient_checkpointing": True, "distill_hidden_weight": 0.5},
    "answers": {"data": "alpaca", "distill_hidden_weight": 0.5},
    "packed answers": {"data": "alpaca", "data__packing": True, "distill_hidden_weight": 0.5},
}

QUICK_CASES = ("mixed", "recomputed layers", "packed answers")


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing_enable:FutureWarning")
@pytest.mark.parametrize("name", [n if n in QUICK_CASES else pytest.param(n, marks=pytest.mark.long) for n in CASES])
def test_loss_and_gradients_are_those_of_a_plain_loop(
    name: str, tiny_base: Path, tiny_text: Path, alpaca: Any, dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a step's micro-batches, with an adapter that is not zero; and the run's own first losses."""
    monkeypatch.setitem(chunked.CHUNK_BYTES, "cpu", 8 * len(tiny_tokenizer()) * 10)  # several chunks
    case = dict(CASES[name])
    text, how = alpaca if case.pop("data", None) else (tiny_text, {})
    config = config_of(
        tiny_base,
        text,
        tmp_path / "out",
        dense,
        **QUICK,
        **how,
        **case,
        per_device_train_batch_size=3,
        gradient_accumulation_steps=2,
    )
    teacher = AutoModelForCausalLM.from_pretrained(dense)
    expected: dict[str, float] = {}

    def look(parts: Parts) -> None:
        parts.model.train()
        for parameter in parts.strategy.trainable.values():
            torch.nn.init.normal_(parameter, std=0.05, generator=torch.Generator().manual_seed(parameter.numel()))
        step = next(parts.loader.steps_from(0))
        args = config.train
        found, plain = [], []
        sums = {"loss": 0.0, "ce_loss": 0.0, "kl_loss": 0.0}
        for batch in step.micro_batches:
            loss, _ = parts.task.loss_sum(parts.strategy.module, batch, torch.device("cpu"))
            found.append(gradients(loss, parts))
            head = chunked.chunked_head(parts.model)
            assert (head is not None and head.chunked) == (args.cross_entropy != "logits")
            whole, pieces = reference(
                parts.model,
                teacher,
                batch,
                args.distill_alpha,
                args.distill_temperature,
                args.distill_hidden_weight,
                args.distill_hidden,
            )
            plain.append(gradients(whole, parts))
            assert float(loss.detach()) == pytest.approx(float(whole.detach()), rel=1e-6)
            for key, value in {"loss": float(whole.detach()), **pieces}.items():
                sums[key] += value
        for a, b in zip(found, plain, strict=True):
            assert len(b) > 20
            worst = max(float((a[key] - b[key]).norm() / b[key].norm().clamp_min(1e-4)) for key in b)
            assert worst < 3e-6, worst
        expected.update({key: value / step.label_tokens for key, value in sums.items()})
        parts.task.take_parts()
        parts.strategy.zero_grad()

    assert train(config, World(), look=look) == 0
    row = records(tmp_path / "out", "train")[0]
    assert {key: row[key] for key in expected} == pytest.approx(expected, rel=1e-5)
    assert ("hidden_loss" in row) == ("distill_hidden_weight" in CASES[name])


def gradients(loss: Tensor, parts: Parts) -> dict[str, Tensor]:
    found = torch.autograd.grad(loss, list(parts.strategy.trainable.values()))
    return dict(zip(parts.strategy.trainable, found, strict=True))


def test_layers_are_matched_one_by_one(tiny_base: Path, tiny_text: Path, dense: Path, tmp_path: Path) -> None:
    """The outputs of all layers, by hooks of the test's own on the stored models."""
    models = [AutoModelForCausalLM.from_pretrained(folder) for folder in (tiny_base, dense)]
    expected: list[float] = []

    def look(parts: Parts) -> None:
        for batch in next(parts.loader.steps_from(0)).micro_batches:
            states: list[list[Tensor]] = [[], []]
            for model, into in zip(models, states, strict=True):
                for layer in model.model.layers:
                    layer.register_forward_hook(lambda _m, _i, out, into=into: into.append(first(out)))
                with torch.no_grad():
                    model(batch.input_ids_BL)
            assert len(states[0]) == 2
            each = [((a - b).norm(dim=-1) / b.norm(dim=-1)).square()[:, :-1].sum() for a, b in zip(*states, strict=True)]
            expected.append(float(sum(each)) / 2)

    config = config_of(tiny_base, tiny_text, tmp_path / "out", dense, **QUICK, distill_hidden_weight=2, distill_hidden="layers")
    assert train(config, World(), look=look) == 0
    row = records(tmp_path / "out", "train")[0]
    assert row["hidden_loss"] * 31 == pytest.approx(sum(expected), rel=1e-5)  # one window of 32 tokens
    assert row["loss"] == pytest.approx(0.5 * row["ce_loss"] + 0.5 * row["kl_loss"] + 2 * row["hidden_loss"], rel=1e-6)


def test_evaluations_are_plain_and_the_teacher_helps(tiny_base: Path, tiny_text: Path, dense: Path, tmp_path: Path) -> None:
    shared = {"max_steps": 20, "eval_steps": 20, "per_device_train_batch_size": 4, "distill_alpha": 1, "save_strategy": "no"}
    run(tiny_base, tiny_text, tmp_path / "out", dense, **shared, load_best_model_at_end=False)
    run(tiny_base, tiny_text, tmp_path / "plain", None, max_steps=1, eval_steps=1)
    before = [records(tmp_path / name, "eval")[0]["eval_loss"] for name in ("out", "plain")]
    assert before[0] == before[1]
    lines = records(tmp_path / "out", "train")
    assert lines[-1]["kl_loss"] < 0.8 * lines[0]["kl_loss"]


def test_kept_weights_learn_from_the_dense_model(tiny_base: Path, tiny_text: Path, dense: Path, tmp_path: Path) -> None:
    """train.mode sparse_full: the same loss before the first update, none of it lost in the trained weights; merged tiles stay zero."""
    for name, mode in (("adapter", "lora"), ("weights", "sparse_full")):
        run(tiny_base, tiny_text, tmp_path / name, dense, **{**QUICK, "max_steps": 8}, distill_alpha=1, mode=mode)
    adapted, trained = (records(tmp_path / name, "train") for name in ("adapter", "weights"))
    for key in ("loss", "ce_loss", "kl_loss"):
        assert trained[0][key] == pytest.approx(adapted[0][key], rel=1e-6)
    assert trained[-1]["kl_loss"] < 0.8 * trained[0]["kl_loss"]
    report = merge(MergeArgs(base=str(tiny_base), adapter=str(tmp_path / "weights"), out=str(tmp_path / "merged")), World())
    assert report.zero_tiles == sum(int((~mask.kept_PQ).sum()) for mask in Pattern.load(tiny_base).values())


@pytest.mark.long
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision(precision: str, tiny_base: Path, tiny_text: Path, dense: Path, tmp_path: Path) -> None:
    for name, half in (("full", False), ("half", True)):
        run(tiny_base, tiny_text, tmp_path / name, dense, **QUICK, distill_hidden_weight=0.5, **{precision: half})
    full, half = losses(tmp_path / "full"), losses(tmp_path / "half")
    assert half == pytest.approx(full, rel=2e-2) and half != full


def test_a_stopped_run_goes_on_bit_for_bit(tiny_base: Path, tiny_text: Path, dense: Path, tmp_path: Path) -> None:
    shared = {"adapter__lora_dropout": 0.1, "save_steps": 3, "eval_strategy": "no", "lr_scheduler_type": "constant"}
    shared["distill_hidden_weight"] = 0.5
    run(tiny_base, tiny_text, tmp_path / "whole", dense, **shared, max_steps=6)
    run(tiny_base, tiny_text, tmp_path / "parts", dense, **shared, max_steps=3)
    run(tiny_base, tiny_text, tmp_path / "parts", dense, **shared, max_steps=6, resume_from_checkpoint="auto")
    assert_identical(tmp_path / "whole", tmp_path / "parts")
    keys = ("ce_loss", "kl_loss", "hidden_loss")
    whole, parts = ([[row[key] for key in keys] for row in records(tmp_path / name, "train")] for name in ("whole", "parts"))
    assert whole == parts and len(whole) == 6


@pytest.mark.long
def test_another_teacher_does_not_go_on(tiny_base: Path, tiny_text: Path, dense: Path, tmp_path: Path) -> None:
    shared = {"eval_strategy": "no", "save_steps": 1, "lr_scheduler_type": "constant"}
    run(tiny_base, tiny_text, tmp_path / "out", dense, **shared, max_steps=1)
    other = save_dense(tmp_path / "other", seed=1)
    with pytest.raises(
        UserError, match=r"train\.distill_from: found a model of fingerprint \w+, expected \w+ as when checkpoint-1"
    ):
        run(tiny_base, tiny_text, tmp_path / "out", other, **shared, max_steps=2, resume_from_checkpoint="auto")
    run(tiny_base, tiny_text, tmp_path / "out", None, **shared, max_steps=2, resume_from_checkpoint="auto")
    assert "kl_loss" not in records(tmp_path / "out", "train")[-1]


# What cannot be is said before weights are read


@pytest.fixture
def no_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    def read(*_args: Any, **_kwargs: Any) -> None:
        raise AssertionError("weights were read")

    monkeypatch.setattr("lora_dist.engine.base.read_facts", read)


def test_teachers_that_do_not_fit(no_weights: None, tiny_base: Path, tiny_text: Path, tmp_path: Path) -> None:
    wrong = save_dense(tmp_path / "vocabulary")
    model = AutoModelForCausalLM.from_pretrained(wrong)
    model.resize_token_embeddings(120)
    model.save_pretrained(wrong)
    text = refused(tiny_base, tiny_text, tmp_path / "out", wrong)
    assert "with a vocabulary of 120 tokens, expected 99 as the pruned model has" in text
    other = save_dense(tmp_path / "tokenizer")
    file = other / "tokenizer.json"
    file.write_text(file.read_text().replace('"a": 69', '"a": 70').replace('"b": 70', '"b": 69'))
    text = refused(tiny_base, tiny_text, tmp_path / "out", other)
    assert "another tokenizer, expected the pruned model's: token 'a' is 69 in the pruned model's, 70 in this one" in text
    deep = save_dense(tmp_path / "deep", layers=3)
    text = refused(tiny_base, tiny_text, tmp_path / "out", deep, distill_hidden_weight=1, distill_hidden="layers")
    assert "with num_hidden_layers 3, expected 2 as the pruned model has" in text
    short = save_dense(tmp_path / "short", max_position_embeddings=16)
    assert "with a context of 16, expected data.block_size (32)" in refused(tiny_base, tiny_text, tmp_path / "out", short)
    text = refused(tiny_base, tiny_text, tmp_path / "out", tmp_path / "nowhere")
    assert text.startswith("train.distill_from: ") and "model.name_or_path" not in text


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"distill_alpha": 1.5}, "train.distill_alpha: found 1.5, expected a number from 0 to 1"),
        ({"distill_temperature": 0}, "train.distill_temperature: found 0.0, expected a number above 0"),
        ({"distill_alpha": 0}, "found 0 and 0, which leave the teacher out"),
        ({"distill_cache": "c", "distill_hidden_weight": 1}, "which keeps no hidden states"),
        ({"distill_hidden": "layers"}, "train.distill_hidden: found layers with train.distill_hidden_weight 0"),
        ({"distill_top_k": 8}, "train.distill_top_k: found 8 without train.distill_cache"),
        (
            {"model__task_type": "SEQ_CLS", "data__format": "classification"},
            "train.distill_from: found with model.task_type SEQ_CLS",
        ),
    ],
)
def test_options_that_do_not_go_together(changes: Any, message: str, tiny_base: Path, tiny_text: Path, tmp_path: Path) -> None:
    assert message in refused(tiny_base, tiny_text, tmp_path / "out", tmp_path / "dense", **changes)


def test_options_of_a_teacher_need_one(tiny_base: Path, tiny_text: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"train\.distill_alpha: found 0\.9 without train\.distill_from"):
        config_of(tiny_base, tiny_text, tmp_path / "out", None, distill_alpha=0.9)


# The dense model's largest probabilities on disk


def shards(cache: Path) -> list[Path]:
    return sorted(cache.glob("*/shard-*.safetensors"))


@pytest.fixture
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lora_dist.data.soft_labels._SHARD_BYTES", 1 << 16)


CACHED = {
    "max_steps": 4, "eval_strategy": "no", "save_strategy": "no", "per_device_train_batch_size": 8, "data__max_train_samples": 150
}  # fmt: skip


@pytest.mark.parametrize("name", ["text", *(pytest.param(n, marks=pytest.mark.long) for n in ("whole logits", "packed answers"))])
def test_all_of_the_vocabulary_on_disk_is_the_live_teacher(
    name: str, small_shards: None, tiny_base: Path, tiny_text: Path, alpaca: Any, dense: Path, tmp_path: Path
) -> None:
    text, how = (tiny_text, {}) if name != "packed answers" else (alpaca[0], {**alpaca[1], "data__packing": True})
    shared = {**CACHED, **how, "distill_temperature": 1.5, "distill_alpha": 0.7}
    if name == "whole logits":
        shared["cross_entropy"] = "logits"
    run(tiny_base, text, tmp_path / "live", dense, **shared)
    run(tiny_base, text, tmp_path / "cached", dense, **shared, distill_cache=tmp_path / "cache", distill_top_k=99)
    for key in ("loss", "ce_loss", "kl_loss"):
        live, cached = ([row[key] for row in records(tmp_path / run, "train")] for run in ("live", "cached"))
        assert cached == pytest.approx(live, rel=1e-5) and len(live) == 4
    assert len(shards(tmp_path / "cache")) > 1 or name == "packed answers"


def test_what_is_cached_is_what_the_teacher_says(
    small_shards: None, tiny_base: Path, tiny_text: Path, dense: Path, tmp_path: Path
) -> None:
    """Of some rows, against transformers' own model; and the verb writes what a run would."""
    how = {**CACHED, "distill_cache": tmp_path / "cache", "distill_top_k": 5, "distill_temperature": 2}
    argv = options(tiny_base, tiny_text, tmp_path / "out", **{"distill_from": dense, **how})
    assert main(["distill-cache", *argv]) == 0
    before = {file: file.read_bytes() for file in shards(tmp_path / "cache")}
    teacher = AutoModelForCausalLM.from_pretrained(dense)

    def look(parts: Parts) -> None:
        labels = parts.task.lessons.labels  # type: ignore[attr-defined]
        rows = [0, labels.rows_a_shard, len(parts.train_rows) - 1, 7]
        top = labels.read(rows)
        log_p_NV = (teacher(parts.train_rows.batch(rows).input_ids_BL).logits[:, :-1].flatten(0, 1) / 2).log_softmax(-1)
        kept = log_p_NV.topk(5)
        assert torch.equal(torch.from_numpy(top.index_NK), kept.indices)
        assert torch.allclose(torch.from_numpy(top.log_p_NK), kept.values, atol=1e-5)
        assert torch.allclose(torch.from_numpy(top.log_rest_N).exp(), 1 - kept.values.exp().sum(-1), atol=1e-5)

    assert train(config_of(tiny_base, tiny_text, tmp_path / "out", dense, **how), World(), look=look) == 0
    assert {file: file.read_bytes() for file in shards(tmp_path / "cache")} == before


def test_a_whole_cache_needs_no_teacher_and_gaps_are_filled(
    small_shards: None,
    tiny_base: Path,
    tiny_text: Path,
    dense: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: Any,
) -> None:
    how = {**CACHED, "distill_cache": tmp_path / "cache", "distill_top_k": 8}
    run(tiny_base, tiny_text, tmp_path / "first", dense, **how)
    files = shards(tmp_path / "cache")
    assert len(files) >= 3
    whole = {file: file.read_bytes() for file in files}
    files[1].unlink()  # as if the caching had been killed
    damaged = bytearray(whole[files[2]])
    damaged[-5] ^= 1
    files[2].write_bytes(bytes(damaged))
    asked: list[int] = []
    write = SoftLabels.write
    monkeypatch.setattr(SoftLabels, "write", lambda self, shard, tops: (asked.append(shard), write(self, shard, tops)))
    run(tiny_base, tiny_text, tmp_path / "second", dense, **how)
    assert asked == [1, 2] and {file: file.read_bytes() for file in shards(tmp_path / "cache")} == whole
    assert f"2 of {len(files)} shards computed" in capsys.readouterr().out
    monkeypatch.setattr("lora_dist.engine.distill.load_teacher", None)
    run(tiny_base, tiny_text, tmp_path / "third", dense, **how)
    assert losses(tmp_path / "first") == losses(tmp_path / "second") == losses(tmp_path / "third")
    monkeypatch.undo()
    run(tiny_base, tiny_text, tmp_path / "fourth", dense, **how, bf16=True)  # other numbers are another cache
    assert len({file.parent for file in shards(tmp_path / "cache")}) == 2


def test_folders_that_cannot_be_used_and_too_many(tiny_base: Path, tiny_text: Path, dense: Path, tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("")
    text = refused(tiny_base, tiny_text, tmp_path / "out", dense, distill_cache=file / "cache")
    assert text.startswith(f"train.distill_cache: {file / 'cache'} cannot be used")
    text = refused(tiny_base, tiny_text, tmp_path / "out", dense, distill_cache=tmp_path / "cache", distill_top_k=100)
    assert "train.distill_top_k: found 100, expected the vocabulary's 99 at most" in text
