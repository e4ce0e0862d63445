"""Decoder layers by torch.compile: the same figures, the same when resumed, and what it is refused with."""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from lora_dist.adapter import attach_adapter
from lora_dist.blocks import BlockMask, Pattern, grid
from lora_dist.cli import train as train_verb
from lora_dist.cli.options import parse
from lora_dist.config import RunConfig
from lora_dist.engine.adapting import compile_layers
from lora_dist.engine.train import train as engine_train
from lora_dist.log import UserError
from lora_dist.models.architecture import prunable_linears
from tests.runs import adapter, largest_relative_difference, losses, options

QUICK = {"max_steps": 4, "eval_strategy": "no", "load_best_model_at_end": False, "adapter__lora_dropout": 0}


def run(values: list[str], look=None) -> None:
    config = parse(RunConfig, values, train_verb.VERB)
    with train_verb.joined(config) as world:
        assert engine_train(config, world, look=look) == 0


@pytest.mark.long
def test_compiled_layers_train_the_same(tiny_base, tiny_text, tmp_path):
    """With checkpointing, and gone on from a checkpoint; without dropout, whose numbers are inductor's own. That it is in force is read off
    the layers."""
    seen: list[bool] = []

    def look(parts):
        seen.extend(layer._compiled_call_impl is not None for layer in parts.base.model.model.layers)

    def train(name: str, **changes: object) -> None:
        run(options(tiny_base, tiny_text, tmp_path / name, **QUICK, **changes), look)

    compiled = {"torch_compile": True, "gradient_checkpointing": True}
    train("eager")
    train("compiled", **compiled, save_steps=2)
    assert seen == [False, False, True, True]
    assert losses(tmp_path / "compiled") == pytest.approx(losses(tmp_path / "eager"), rel=1e-5)
    assert largest_relative_difference(adapter(tmp_path / "eager"), adapter(tmp_path / "compiled")) < 1e-4
    train("resumed", **compiled, resume_from_checkpoint=tmp_path / "compiled" / "checkpoint-2")
    whole, resumed = losses(tmp_path / "compiled"), losses(tmp_path / "resumed")
    assert set(resumed) >= {3, 4} and {step: whole[step] for step in resumed} == resumed
    assert largest_relative_difference(adapter(tmp_path / "compiled"), adapter(tmp_path / "resumed")) == 0


@pytest.mark.long
def test_layers_that_all_differ_are_each_compiled(monkeypatch):
    """torch stops compiling a function after eight kinds of it; here it is one error, or as many kinds as there are layers. Traced only:
    inductor would take minutes."""
    compile_layer = torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile", lambda layer: compile_layer(layer, backend="aot_eager"))
    monkeypatch.setattr(torch._dynamo.config, "recompile_limit", 8)
    monkeypatch.setattr(torch._dynamo.config, "fail_on_recompile_limit_hit", False)
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=12, num_attention_heads=2, num_key_value_heads=2, vocab_size=64
    )
    base = LlamaForCausalLM(config).requires_grad_(False)
    masks = {}
    for number, linear in enumerate(prunable_linears(base)):
        kept_PQ = torch.ones(grid(linear.weight_OI.shape, 16), dtype=torch.bool)
        kept_PQ[0, 0] = number % 7 > number // 7 % 7  # another set of pruned linears in each of seven layers
        masks[linear.name] = BlockMask(kept_PQ, tuple(linear.weight_OI.shape), 16)
        linear.weight_OI.masked_fill_(~masks[linear.name].expand(), 0.0)
    model = attach_adapter(base, Pattern(masks), r=4, lora_alpha=8, lora_dropout=0.0)
    ids_BL = torch.randint(0, 64, (2, 16))

    def loss() -> float:
        out = model(input_ids=ids_BL, labels=ids_BL).loss
        out.backward()
        return float(out.detach())

    eager = loss()
    compile_layers(base)
    assert loss() == pytest.approx(eager, rel=1e-6)
    assert torch._dynamo.config.fail_on_recompile_limit_hit


@pytest.mark.parametrize(
    ("changes", "found"),
    [
        ({"model__storage": "blocks"}, "model.storage blocks"),
        ({"adapter__type": "dora"}, "the training of dora"),
        ({"mode": "sparse_full"}, "the training of sparse_full"),
        ({"parallel__strategy": "zero3"}, "parallel.strategy zero3"),
    ],
)
def test_what_it_is_refused_with(tiny_base, tiny_text, tmp_path, changes, found):
    with pytest.raises(UserError, match=f"train.torch_compile: found true with {found}"):
        run(options(tiny_base, tiny_text, tmp_path / "out", torch_compile=True, **changes))
    assert not (tmp_path / "out").exists()
