"""ONNX: onnxruntime's logits against the merged model's and the adapter's, the zeros in the graph, nothing left behind a failure."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel

from lora_dist.__main__ import main
from lora_dist.arguments import ExportArgs, MergeArgs
from lora_dist.blocks import BlockMask, Pattern
from lora_dist.cli import train as train_verb
from lora_dist.cli.options import parse
from lora_dist.config import RunConfig
from lora_dist.engine.export import export
from lora_dist.engine.merge import merge
from lora_dist.engine.open_model import open_model
from lora_dist.log import GuardError, UserError
from lora_dist.models import onnx_export
from lora_dist.parallel import World
from tests.data.conftest import build_tokenizer
from tests.runs import options

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")


def logits_of(folder, ids_BL):
    session = onnxruntime.InferenceSession(str(folder / "model.onnx"), providers=["CPUExecutionProvider"])
    feed = {"input_ids": ids_BL.numpy(), "attention_mask": np.ones(ids_BL.shape, np.int64)}
    return torch.from_numpy(session.run(["logits"], feed)[0])


@pytest.fixture(scope="module")
def adapters(tiny_base, tiny_text, tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapters")
    for name, mask in (("masked", "block"), ("plain", "none")):
        values = options(
            tiny_base, tiny_text, folder / name, max_steps=5, eval_strategy="no", save_strategy="no", adapter__mask=mask
        )
        train_verb.run(parse(RunConfig, values, train_verb.VERB))
    return folder


def test_the_graph_computes_what_adapter_and_merged_model_do_and_keeps_the_zeros(tiny_base, adapters, tmp_path):
    out = tmp_path / "onnx"
    report = export(ExportArgs(model=str(tiny_base), adapter=str(adapters / "masked"), out=str(out)))
    merge(MergeArgs(base=str(tiny_base), adapter=str(adapters / "masked"), out=str(tmp_path / "merged")), World())
    ids_BL = torch.randint(4, 90, (3, 23))  # a shape that was neither traced nor checked by the command
    with torch.no_grad():
        merged = open_model(str(tmp_path / "merged"), world=World()).model(input_ids=ids_BL).logits
        adapted = open_model(str(tiny_base), str(adapters / "masked"), world=World()).model(input_ids=ids_BL).logits
        bare = open_model(str(tiny_base), world=World()).model(input_ids=ids_BL).logits
    found = logits_of(out, ids_BL)
    largest = merged.abs().max()
    assert (found - merged).abs().max() < 1e-4 * largest and (found - adapted).abs().max() < 1e-4 * largest
    assert (found - bare).abs().max() > 1e-3 * largest
    assert report.proof.logits_error < 1e-4 and report.merged_error < 1e-4
    pattern = Pattern.load(tiny_base)
    assert report.pattern_digest == pattern.digest == Pattern.load(out).digest
    assert report.proof.zero_tiles == sum(int((~mask.kept_PQ).sum()) for mask in pattern.values())
    # an independent look: each of the merged model's pruned matrices is among the graph's, one way round or the other
    graph = onnx.load(str(out / "model.onnx")).graph
    held = {onnx.numpy_helper.to_array(i).tobytes() for i in graph.initializer}
    weights = load_file(tmp_path / "merged" / "model.safetensors")
    for name in pattern:
        weight = weights[f"{name}.weight"].numpy()
        assert weight.tobytes() in held or weight.T.tobytes() in held, name
    assert not any(p.value for n in graph.node for p in n.metadata_props), "paths of this machine"
    assert AutoTokenizer.from_pretrained(out)("a b").input_ids
    written = json.loads((out / "export.json").read_text())
    assert written["proof"]["logits_error"] == report.proof.logits_error and written["options"]["adapter"]


def test_plain_lora_on_a_pruned_base_is_refused_or_densified(tiny_base, adapters, tmp_path):
    arguments = {"model": str(tiny_base), "adapter": str(adapters / "plain")}
    with pytest.raises(UserError, match=r"unmasked update for a base with \d+% pruned weights.*--densify"):
        export(ExportArgs(**arguments, out=str(tmp_path / "no")))
    assert not (tmp_path / "no").exists()


def test_transposed_weights_are_found_in_the_graph(tmp_path):
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=64, n_positions=32, n_embd=32, n_layer=1, n_head=2)).eval()
    weights = dict(model.named_parameters())
    mask = torch.zeros(6, 2, dtype=torch.bool)
    mask[:, 1] = True
    kept = BlockMask(mask, (96, 32), 16)
    weight = weights["transformer.h.0.attn.c_attn.weight"]
    with torch.no_grad():
        weight.T.masked_fill_(~kept.expand(), 0.0)
    pattern = Pattern({"transformer.h.0.attn.c_attn": kept})
    proof = onnx_export.export_onnx(
        model,
        build_tokenizer(),
        tmp_path / "onnx",
        pattern=pattern,
        weights_OI={"transformer.h.0.attn.c_attn": weight.detach().T},
        opset=None,
        tolerance=1e-4,
        texts={},
    )
    assert proof.zero_tiles == 6 and proof.logits_error < 1e-4


def test_a_graph_that_computes_something_else_is_not_kept(tiny_base, tmp_path, capsys):
    with pytest.raises(GuardError, match="onnxruntime's logits differ"):
        export(ExportArgs(model=str(tiny_base), out=str(tmp_path / "onnx"), tolerance=1e-12))
    assert not list(tmp_path.iterdir())
    shutil.copytree(tiny_base, tmp_path / "taken")
    assert main(["export", str(tiny_base), str(tmp_path / "taken")]) == 2
    assert "already holds files" in capsys.readouterr().err
    assert main(["export", str(tiny_base), "--opset=7", "--tolerance=2"]) == 2
    err = capsys.readouterr().err
    assert "OUT: found nothing" in err and "opset: found 7" in err and "tolerance: found 2" in err
