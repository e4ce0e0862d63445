"""Decoder layers by torch.compile: the same figures, the same when resumed, and what it is refused with."""

from __future__ import annotations

import pytest

from lora_dist.cli import train as train_verb
from lora_dist.cli.options import parse
from lora_dist.config import RunConfig
from lora_dist.engine.train import train as engine_train
from lora_dist.log import UserError
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
