"""Training on a quantised base, and what becomes of its adapter: resumed, evaluated, merged both ways, refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from lora_dist.adapter import attach_adapter
from lora_dist.arguments import MergeArgs
from lora_dist.blocks import Pattern
from lora_dist.cli import train as train_verb
from lora_dist.cli.options import parse
from lora_dist.config import RunConfig
from lora_dist.engine.merge import merge
from lora_dist.engine.open_model import open_model
from lora_dist.log import GuardError, UserError
from lora_dist.models.quantised import Quantisation, quantised_layers
from lora_dist.parallel import World
from tests.runs import adapter, losses, options
from tests.tiny import tiny_model, tiny_tokenizer

pytest.importorskip("bitsandbytes")
SHORT = {"max_steps": 4, "eval_strategy": "no", "save_strategy": "no", "adapter__lora_dropout": 0.0}


def train(base: Path, text: Path, out: Path, **changes) -> None:
    assert train_verb.run(parse(RunConfig, options(base, text, out, **{**SHORT, **changes}), train_verb.VERB)) == 0


@pytest.fixture(scope="module")
def trained(tiny_base, tiny_text, tmp_path_factory) -> dict[str, Path]:
    """Runs of four steps on the same base, by how it was held."""
    out = tmp_path_factory.mktemp("runs")
    kinds = {"plain": {}, "4bit": {"model__load_in_4bit": True}, "8bit": {"model__load_in_8bit": True}}
    for kind, changes in kinds.items():
        train(tiny_base, tiny_text, out / kind, **changes)
    return {kind: out / kind for kind in kinds}


def test_losses_are_those_of_the_stored_base_to_the_error_of_quantising(trained):
    plain = losses(trained["plain"])
    for kind, most in (("4bit", 0.1), ("8bit", 0.02)):
        found = losses(trained[kind])
        assert found.keys() == plain.keys()
        difference = max(abs(found[step] - plain[step]) for step in plain)
        assert 1e-7 < difference < most


@pytest.mark.long
def test_gradient_checkpointing_changes_nothing(trained, tiny_base, tiny_text, tmp_path):
    train(tiny_base, tiny_text, tmp_path / "out", model__load_in_4bit=True, gradient_checkpointing=True)
    a, b = losses(trained["4bit"]), losses(tmp_path / "out")
    assert all(b[step] == pytest.approx(a[step], rel=1e-6) for step in a)


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({}, marks=pytest.mark.long, id="adamw"),
        pytest.param({"adapter__r": 160, "optim": "adamw_8bit", "loraplus_lr_ratio": 4}, id="8bit"),
    ],
)
def test_resumed_is_uninterrupted(tiny_base, tiny_text, tmp_path, changes):
    """Rank 160 gives matrices of the size from which state is in 8 bits."""
    same = {"model__load_in_4bit": True, "save_strategy": "steps", "save_steps": 2, **changes}
    train(tiny_base, tiny_text, tmp_path / "whole", **same)
    # The schedule is of all four steps: stopping at two and going on is a resume from the checkpoint of the whole run.
    train(
        tiny_base, tiny_text, tmp_path / "resumed", **same, resume_from_checkpoint=tmp_path / "whole" / "checkpoint-2"
    )  # fmt: skip
    whole, resumed = losses(tmp_path / "whole"), losses(tmp_path / "resumed")
    assert {step: whole[step] for step in resumed} == resumed and set(resumed) >= {3, 4}
    assert all(torch.equal(tensor, adapter(tmp_path / "resumed")[n]) for n, tensor in adapter(tmp_path / "whole").items())
    state = load_file(tmp_path / "whole" / "checkpoint-4" / "optimizer.safetensors")
    assert any(tensor.dtype == torch.uint8 for tensor in state.values()) == bool(changes)


def test_a_base_quantised_otherwise_is_refused_on_resume(tiny_base, tiny_text, tmp_path):
    same = {"save_strategy": "steps", "save_steps": 2}
    train(tiny_base, tiny_text, tmp_path / "out", model__load_in_4bit=True, **same)
    with pytest.raises(GuardError, match="model.load_in_4bit.*was NF4 with double quantisation when checkpoint-4.*found none"):
        train(tiny_base, tiny_text, tmp_path / "out", resume_from_checkpoint="auto", **same)


def test_the_adapter_remembers_its_base(trained, tiny_base):
    assert not (trained["plain"] / "base_quantization.json").exists()
    remembered = json.loads((trained["4bit"] / "base_quantization.json").read_text())
    assert Quantisation.from_dict(remembered) == Quantisation(4)
    opened = open_model(str(tiny_base), str(trained["4bit"]), world=World())
    assert opened.quantisation == Quantisation(4) and list(quantised_layers(opened.base.model))
    stored = open_model(str(tiny_base), str(trained["4bit"]), world=World(), as_stored=True)
    assert stored.quantisation is None and not list(quantised_layers(stored.base.model))


@pytest.mark.parametrize(
    ("kind", "into"), [("4bit", "dequantised"), ("4bit", "original"), pytest.param("8bit", "dequantised", marks=pytest.mark.long)]
)
def test_merged_keeps_zeros_and_computes_what_was_trained(trained, tiny_base, tmp_path, kind, into):
    report = merge(MergeArgs(str(tiny_base), str(trained[kind]), str(tmp_path / "m"), into=into), World())
    assert report.quantised is not None and report.quantised.into == into
    assert report.logits_error_fp32 < 1e-5  # against the adapter on the same weights
    assert report.quantised.other_logits_difference > 1e-3
    if (kind, into) == ("4bit", "dequantised"):
        assert report.quantised.logits_error < 1e-5  # what was trained, to rounding
    else:
        assert 1e-4 < report.quantised.logits_error < 0.5
    weights = load_file(tmp_path / "m" / "model.safetensors")
    for name, mask in Pattern.load(tiny_base).items():
        assert not weights[f"{name}.weight"][~mask.expand()].any()
    assert json.loads((tmp_path / "m" / "merge.json").read_text())["quantised"]["into"] == into
    config = json.loads((tmp_path / "m" / "config.json").read_text())
    assert "quantization_config" not in config
    ids_BL = torch.randint(3, 99, (2, 24), generator=torch.Generator().manual_seed(1))
    merged = open_model(str(tmp_path / "m"), world=World()).model(ids_BL).logits
    held = {"as_stored": True} if into == "original" else {"dequantise": True}
    reference = open_model(str(tiny_base), str(trained[kind]), world=World(), **held).model(ids_BL).logits
    assert torch.allclose(merged, reference, atol=1e-5)


@pytest.mark.parametrize("bits", [4, pytest.param(8, marks=pytest.mark.long)])
@pytest.mark.parametrize("kind", ["dora", "adalora", "ia3"])
def test_other_types_train_and_merge_on_rows_that_are_no_whole_blocks(tiny_base, tiny_text, tmp_path, kind, bits):
    """Widths 32 and 40 fill 4-bit blocks of 64 in part; DoRA needs the norms of the weights' own columns."""
    rate = {"learning_rate": 3e-2} if kind == "ia3" else {"adapter__lora_dropout": 0.1}
    held = {f"model__load_in_{bits}bit": True, "adapter__type": kind, "eval_strategy": "no", "save_strategy": "no"}
    parsed = parse(RunConfig, options(tiny_base, tiny_text, tmp_path / "out", max_steps=3, **held, **rate), train_verb.VERB)
    assert train_verb.run(parsed) == 0
    report = merge(MergeArgs(str(tiny_base), str(tmp_path / "out"), str(tmp_path / "m")), World())
    assert report.quantised is not None and report.quantised.logits_error < (1e-5 if bits == 4 else 0.1)
    assert report.logits_error_fp32 < 1e-5
    weights = load_file(tmp_path / "m" / "model.safetensors")
    stored = load_file(tiny_base / "model.safetensors")
    for name, mask in Pattern.load(tiny_base).items():
        assert not weights[f"{name}.weight"][~mask.expand()].any()
        assert not mask.expand().any() or not torch.equal(weights[f"{name}.weight"], stored[f"{name}.weight"])
    opened = open_model(str(tiny_base), world=World(), quantisation=Quantisation(bits))
    untrained = attach_adapter(opened.base.model, opened.found.pattern, r=4, lora_alpha=8, adapter_type=kind)
    ids_BL = torch.randint(3, 99, (2, 24), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        found = untrained.eval()(ids_BL).logits
        with untrained.disable_adapter():
            assert torch.allclose(found, untrained(ids_BL).logits, atol=1e-4)  # starts as the quantised base itself


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model__load_in_4bit": True, "parallel__strategy": "zero3"}, "model.load_in_4bit: found true with parallel.strategy zero3"),
        ({"model__load_in_8bit": True, "parallel__strategy": "fsdp2"}, "model.load_in_8bit: found true with parallel.strategy fsdp2"),
        ({"model__load_in_4bit": True, "model__load_in_8bit": True}, "found both true, expected one at most"),
        ({"optim": "paged_adamw_32bit", "parallel__device": "cpu"}, "found paged_adamw_32bit on cpu, expected a GPU"),
        ({"optim": "adamw_8bit", "parallel__strategy": "fsdp2"}, "found adamw_8bit with parallel.strategy fsdp2, expected adamw_torch"),
        ({"loraplus_lr_ratio": 4, "parallel__strategy": "zero2"}, "train.loraplus_lr_ratio: found 4 with parallel.strategy zero2"),
        ({"loraplus_lr_ratio": 0}, "train.loraplus_lr_ratio: found 0.0, expected a number above 0"),
    ],
)  # fmt: skip
def test_what_cannot_work_is_refused_before_anything_is_loaded(tiny_text, tmp_path, changes, message):
    with pytest.raises(UserError, match=message):
        train(tmp_path / "there-is-no-such-base", tiny_text, tmp_path / "out", **changes)
    assert not (tmp_path / "out").exists() or not list((tmp_path / "out").glob("[!.]*"))


@pytest.mark.parametrize("bits", [4, 8])
def test_plain_dora_trains_on_a_quantised_base(tiny_text, tmp_path, bits):
    """PEFT's own layer knows neither the filled-up rows of 4 bits nor where int8's scales have gone."""
    tiny_model(vocab_size=len(tiny_tokenizer())).save_pretrained(tmp_path / "base")
    tiny_tokenizer().save_pretrained(tmp_path / "base")
    held = {f"model__load_in_{bits}bit": True, "adapter__type": "dora", "adapter__mask": "none", "max_steps": 2}
    train(tmp_path / "base", tiny_text, tmp_path / "out", **held)
    assert json.loads((tmp_path / "out" / "adapter_config.json").read_text())["peft_type"] == "LORA"
    report = merge(MergeArgs(str(tmp_path / "base"), str(tmp_path / "out"), str(tmp_path / "m")), World())
    assert report.quantised is not None and report.quantised.logits_error < (1e-5 if bits == 4 else 0.1)
