"""`--adapter DIR` through eval, generate, merge and export, for every type of adapter: each computes what the merged model does."""

from __future__ import annotations

from pathlib import Path

import pytest

from lora_dist.arguments import EvalArgs, ExportArgs, GenerateArgs, MergeArgs
from lora_dist.blocks import Pattern
from lora_dist.cli import train as train_verb
from lora_dist.cli.options import Verb, parse
from lora_dist.config import RunConfig
from lora_dist.engine.answer import Answerer
from lora_dist.engine.export import export
from lora_dist.engine.merge import merge
from lora_dist.engine.report import evaluate_models
from lora_dist.parallel import World
from tests.runs import options

TYPES = {
    "pissa": {"adapter__init_lora_weights": "pissa"},
    "dora": {"adapter__type": "dora"},
    "adalora": {"adapter__type": "adalora", "adapter__init_r": 6, "adapter__target_r": 3},
    "ia3": {"adapter__type": "ia3", "learning_rate": 5e-2},
    "qlora": {"model__load_in_4bit": True},
}


def loss_of(model: Path, text: Path, *extra: str) -> float:
    argv = [str(model), f"--texts=stories={text}", "--block_size=32", "--max_samples=8", "--device=cpu", *extra]
    report = evaluate_models(parse(EvalArgs, argv, Verb("eval", "", positionals=("model",))), World()).report
    return report["perplexity"]["stories"]["loss"]


def answer_of(model: Path, adapter: Path | None = None) -> str:
    args = GenerateArgs(model=str(model), adapter=adapter and str(adapter), temperature=0.0, max_new_tokens=12, min_new_tokens=12)
    return Answerer(args, World()).one("The river", lambda _: None)[0]


@pytest.mark.parametrize(
    "kind", ["dora", "qlora", *(pytest.param(kind, marks=pytest.mark.long) for kind in ("pissa", "adalora", "ia3"))]
)
def test_every_verb_computes_what_the_merged_model_does(tiny_base, tiny_text, tmp_path, kind):
    out, merged = tmp_path / "out", tmp_path / "merged"
    changes = {"max_steps": 4, "eval_strategy": "no", "save_strategy": "no", "learning_rate": 2e-2, **TYPES[kind]}
    assert train_verb.run(parse(RunConfig, options(tiny_base, tiny_text, out, **changes), train_verb.VERB)) == 0
    merge(MergeArgs(base=str(tiny_base), adapter=str(out), out=str(merged)), World())
    found, expected = loss_of(tiny_base, tiny_text, f"--adapter={out}"), loss_of(merged, tiny_text)
    assert found == pytest.approx(expected, rel=1e-5) and abs(found - loss_of(tiny_base, tiny_text)) > 1e-3
    assert answer_of(tiny_base, out) == answer_of(merged)


@pytest.mark.long
def test_exported_qlora_is_merged_into_what_it_was_trained_on(tiny_base, tiny_text, tmp_path):
    for library in ("onnx", "onnxruntime", "onnxscript"):
        pytest.importorskip(library)
    changes = {"max_steps": 2, "eval_strategy": "no", "save_strategy": "no", **TYPES["qlora"]}
    assert train_verb.run(parse(RunConfig, options(tiny_base, tiny_text, tmp_path / "out", **changes), train_verb.VERB)) == 0
    report = export(ExportArgs(model=str(tiny_base), adapter=str(tmp_path / "out"), out=str(tmp_path / "onnx")))
    assert report.merged_error is not None and report.merged_error < 1e-5 and report.proof.logits_error < 1e-4
    assert report.pattern_digest == Pattern.load(tiny_base).digest and report.proof.zero_tiles > 0
