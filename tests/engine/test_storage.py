"""A base stored as kept tiles, on disk and in memory: every verb reads it, and what comes out is the dense base's to the bit."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from lora_dist.arguments import ConvertArgs, EvalArgs, ExportArgs, GenerateArgs, MergeArgs
from lora_dist.blocks import BlockMask, Pattern, block_layers, grid
from lora_dist.cli import convert as convert_verb
from lora_dist.cli import train as train_verb
from lora_dist.cli.options import parse
from lora_dist.config import RunConfig
from lora_dist.engine.evaluate import evaluate
from lora_dist.engine.merge import merge
from lora_dist.engine.open_model import open_model
from lora_dist.engine.storage import convert_storage
from lora_dist.generation import generate
from lora_dist.log import GuardError, UserError
from lora_dist.models.architecture import prunable_linears
from lora_dist.models.block_quantised import require_whole_blocks
from lora_dist.models.loading import load_base
from lora_dist.models.quantised import Quantisation
from lora_dist.models.sources import fingerprint_model
from lora_dist.parallel import World
from tests.runs import adapter, losses, options
from tests.tiny import tiny_model, tiny_tokenizer, tiny_windows

SHORT = {"max_steps": 4, "eval_strategy": "no", "save_strategy": "no", "adapter__lora_dropout": 0.0}


def train(base: Path, text: Path, out: Path, **changes) -> None:
    assert train_verb.run(parse(RunConfig, options(base, text, out, **{**SHORT, **changes}), train_verb.VERB)) == 0


def same_files(a: Path, b: Path) -> None:
    """The same tensors, to the bit."""
    x, y = load_file(a / "model.safetensors"), load_file(b / "model.safetensors")
    assert x.keys() == y.keys() and all(torch.equal(x[name], y[name]) and x[name].dtype == y[name].dtype for name in x)


@pytest.fixture(scope="module")
def tiles(tiny_base, tmp_path_factory) -> Path:
    """The tiny base, converted."""
    out = tmp_path_factory.mktemp("tiles") / "base"
    assert convert_verb.main([str(tiny_base), str(out), "--storage", "blocks"]) == 0
    return out


@pytest.fixture(scope="module")
def trained(tiny_base, tiles, tiny_text, tmp_path_factory) -> dict[str, Path]:
    """The same run by how the base was stored and held."""
    out = tmp_path_factory.mktemp("runs")
    same = {"save_strategy": "steps", "save_steps": 2, "save_total_limit": 9}
    train(tiny_base, tiny_text, out / "dense", **same)
    train(tiny_base, tiny_text, out / "blocks", model__storage="blocks", **same)
    train(tiles, tiny_text, out / "tiles", model__storage="blocks", **same)
    return {kind: out / kind for kind in ("dense", "blocks", "tiles")}


def test_converted_it_is_smaller_and_the_same_base(tiny_base, tiles, tmp_path):
    assert fingerprint_model(tiles) == fingerprint_model(tiny_base)
    with safe_open(str(tiles / "model_blocks.safetensors"), "pt") as held:
        shapes = {name: held.get_slice(name).get_shape() for name in held.keys()}  # noqa: SIM118 -- not a dict
    for name, mask in Pattern.load(tiny_base).items():
        assert mask.keeps_all or shapes[f"{name}.values"] == [max(1, int(mask.kept_PQ.sum())), 16, 16]
    with pytest.raises(OSError, match=r"model\.safetensors"):  # and not a model of random weights
        AutoModelForCausalLM.from_pretrained(tiles)
    report = convert_storage(ConvertArgs(str(tiles), str(tmp_path / "back"), storage="dense"))
    assert report.same_fingerprint and report.bytes_before < report.bytes_after
    same_files(tiny_base, tmp_path / "back")
    kept = {file.name for file in tiny_base.iterdir()}
    assert {file.name for file in (tmp_path / "back").iterdir()} == kept
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "back")


@pytest.mark.parametrize("kind", ["gpt2", "opt"])
def test_other_layouts_convert_and_compute_the_same(kind, tmp_path):
    """GPT-2 stores its weights as (I, O); edge tiles, biases, several files, half precision."""
    model = tiny_model(kind, vocab_size=len(tiny_tokenizer()), dtype=torch.bfloat16)
    masks = {}
    for i, linear in enumerate(prunable_linears(model)):
        shape = tuple(linear.weight_OI.shape)
        masks[linear.name] = BlockMask(torch.rand(grid(shape, 8), generator=torch.Generator().manual_seed(i)) > 0.5, shape, 8)
        linear.weight_OI.masked_fill_(~masks[linear.name].expand(), 0.0)
    model.save_pretrained(tmp_path / "dense", max_shard_size="20kB")
    tiny_tokenizer().save_pretrained(tmp_path / "dense")
    report = convert_storage(ConvertArgs(str(tmp_path / "dense"), str(tmp_path / "tiles"), storage="blocks", block=8))
    assert report.same_fingerprint and len(list((tmp_path / "tiles").glob("model_blocks-*"))) > 1
    ids_BL = tiny_windows(2) % 24
    expected = load_base(str(tmp_path / "dense")).model(ids_BL).logits
    for name, storage in (("dense", "blocks"), ("tiles", "blocks"), ("tiles", "dense")):
        opened = open_model(str(tmp_path / name), world=World(), storage=storage, block=8)
        assert bool(block_layers(opened.model)) == (storage == "blocks")
        with torch.no_grad():
            found = opened.model(ids_BL).logits
        assert torch.allclose(found, expected, atol=1e-2 if kind == "gpt2" else 0)  # Conv1D adds its bias in the product
    convert_storage(ConvertArgs(str(tmp_path / "tiles"), str(tmp_path / "back")))
    for file in (tmp_path / "dense").glob("*.safetensors"):
        x, y = load_file(file), load_file(tmp_path / "back" / file.name)
        assert x.keys() == y.keys() and all(torch.equal(x[name], y[name]) for name in x)


def test_training_is_the_dense_base_s(trained):
    dense = losses(trained["dense"])
    for kind in ("blocks", "tiles"):
        found = losses(trained[kind])
        assert found.keys() == dense.keys() and all(found[step] == pytest.approx(dense[step], rel=1e-6) for step in dense)
        a, b = adapter(trained["dense"]), adapter(trained[kind])
        assert all(torch.allclose(a[name], b[name], rtol=1e-4, atol=1e-6) for name in a)


@pytest.mark.parametrize(("before", "after"), [("blocks", "dense"), ("dense", "blocks")])
def test_a_checkpoint_goes_on_under_the_other_storage(before, after, trained, tiny_base, tiny_text, tmp_path):
    checkpoint = trained[before] / "checkpoint-2"
    train(tiny_base, tiny_text, tmp_path / "out", model__storage=after, resume_from_checkpoint=checkpoint)
    whole, resumed = losses(trained[before]), losses(tmp_path / "out")
    assert set(resumed) >= {3, 4} and all(resumed[step] == pytest.approx(whole[step], rel=1e-6) for step in (3, 4))


def test_merged_it_is_the_dense_base_s_to_the_bit(trained, tiny_base, tiles, tmp_path):
    for name, base, storage in (("a", tiny_base, "dense"), ("b", tiles, "dense"), ("c", tiles, "blocks")):
        report = merge(MergeArgs(str(base), str(trained["blocks"]), str(tmp_path / name), storage=storage), World())
        assert report.zero_tiles > 0 and report.logits_error_fp32 < 1e-5
    same_files(tmp_path / "a", tmp_path / "b")
    assert fingerprint_model(tmp_path / "c") == fingerprint_model(tmp_path / "a")
    convert_storage(ConvertArgs(str(tmp_path / "c"), str(tmp_path / "d")))
    same_files(tmp_path / "a", tmp_path / "d")


def test_evaluated_and_continued_it_is_the_dense_base(trained, tiny_base, tiles, tiny_text):
    text = {"dataset_name": str(tiny_text), "block_size": 32, "max_samples": 16, "cache_dir": str(tiny_text.parent / "cache")}
    found, said = [], []
    for base, storage in ((tiny_base, "dense"), (tiny_base, "blocks"), (tiles, "blocks"), (tiles, "dense")):
        args = EvalArgs(str(base), adapter=str(trained["blocks"]), storage=storage, **text)
        found.append(evaluate(args, World(), lambda batches: lambda: None).result.loss)
        opened = open_model(str(base), str(trained["blocks"]), world=World(), storage=storage)
        wanted = GenerateArgs(str(base), prompt="the river", max_new_tokens=8, temperature=0)
        said.append(generate(opened.model, opened.base.tokenizer, ["the river"], wanted)[0].text)
    assert all(loss == pytest.approx(found[0], rel=1e-6) for loss in found) and len(set(said)) == 1


@pytest.mark.parametrize(
    "kind", ["dora", *(pytest.param(name, marks=pytest.mark.long) for name in ("adalora", "ia3")), "sparse_full"]
)
def test_other_types_train_the_same(kind, tiny_base, tiny_text, tmp_path):
    of_kind = {"adapter__type": kind, "learning_rate": 1e-2, "adapter__lora_dropout": 0.1}
    if kind in ("ia3", "sparse_full"):  # these have no dropout
        of_kind = {"adapter__type": "ia3"} if kind == "ia3" else {"mode": "sparse_full", "learning_rate": 1e-3}
        of_kind["adapter__lora_dropout"] = 0.05
    for storage in ("dense", "blocks"):
        train(tiny_base, tiny_text, tmp_path / storage, model__storage=storage, **of_kind)
    a, b = losses(tmp_path / "dense"), losses(tmp_path / "blocks")
    assert a.keys() == b.keys() and all(b[step] == pytest.approx(a[step], rel=1e-5) for step in a)
    assert merge(MergeArgs(str(tiny_base), str(tmp_path / "blocks"), str(tmp_path / "m")), World()).zero_tiles > 0


def test_what_is_no_tiles_is_refused(tiny_text, tiles, tiny_base, tmp_path):
    tiny_model(vocab_size=len(tiny_tokenizer())).save_pretrained(tmp_path / "whole")
    tiny_tokenizer().save_pretrained(tmp_path / "whole")
    with pytest.raises(UserError, match=r"model.storage: found blocks, but .* has no pruned tiles to leave out"):
        train(tmp_path / "whole", tiny_text, tmp_path / "out", model__storage="blocks", adapter__mask="none")
    with pytest.raises(UserError, match="storage: found blocks, but .* has no pruned tiles"):
        convert_storage(ConvertArgs(str(tmp_path / "whole"), str(tmp_path / "c"), storage="blocks"))
    with pytest.raises(UserError, match="storage: found blocks, but .* is stored so already"):
        convert_storage(ConvertArgs(str(tiles), str(tmp_path / "c"), storage="blocks"))
    with pytest.raises(UserError, match="model.storage: found blocks with model.load_in_8bit"):
        train(tiny_base, tiny_text, tmp_path / "out", model__storage="blocks", model__load_in_8bit=True)
    assert not (tmp_path / "c").exists()


def test_what_tiles_would_leave_out_has_to_be_zero(tiny_base, tiny_text, tmp_path):
    broken = Path(shutil.copytree(tiny_base, tmp_path / "broken"))
    tensors = load_file(broken / "model.safetensors")
    name, mask = next((n, m) for n, m in Pattern.load(broken).items() if not m.keeps_all)
    p, q = (~mask.kept_PQ).nonzero()[0].tolist()
    tensors[f"{name}.weight"][16 * p, 16 * q] = 3.0
    save_file(tensors, broken / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(GuardError, match=rf"guard at load: layer {name}, tile \({p}, {q}\): found 3, expected exactly 0"):
        train(broken, tiny_text, tmp_path / "out", model__storage="blocks")
    with pytest.raises(GuardError, match=rf"layer {name}, tile \({p}, {q}\): found 3"):
        convert_storage(ConvertArgs(str(broken), str(tmp_path / "c"), storage="blocks"))
    assert not (tmp_path / "c").exists()


def test_negative_zeros_make_another_base_and_are_told(tiny_base, tmp_path, capsys):
    other = Path(shutil.copytree(tiny_base, tmp_path / "other"))
    tensors = load_file(other / "model.safetensors")
    for name, mask in Pattern.load(other).items():
        tensors[f"{name}.weight"][~mask.expand()] = -0.0
    save_file(tensors, other / "model.safetensors", metadata={"format": "pt"})
    assert convert_verb.main([str(other), str(tmp_path / "tiles"), "--storage", "blocks"]) == 0
    assert "has pruned weights of -0.0, which are 0.0 in" in capsys.readouterr().out
    assert fingerprint_model(tmp_path / "tiles") == fingerprint_model(tiny_base) != fingerprint_model(other)


@pytest.mark.long
def test_it_is_exported(trained, tiles, tmp_path):
    pytest.importorskip("onnxruntime")
    from lora_dist.engine.export import export

    report = export(ExportArgs(str(tiles), str(tmp_path / "onnx"), adapter=str(trained["blocks"])))
    assert report.merged_error is not None and report.merged_error < 1e-5 and report.pattern_digest == Pattern.load(tiles).digest


def test_in_4_bits_only_kept_tiles_are_held_and_merged_as_trained(trained, tiny_base, tiny_text, tiles, tmp_path):
    """What a run computes with is dequantise(quantise(tiles)), zeros exact; a dense base in 4 bits has other blocks, so other numbers."""
    pytest.importorskip("bitsandbytes")
    held = {"model__load_in_4bit": True, "model__storage": "blocks", "save_strategy": "steps", "save_steps": 2}
    train(tiny_base, tiny_text, tmp_path / "run", **held)
    train(tiles, tiny_text, tmp_path / "again", **held, resume_from_checkpoint=tmp_path / "run" / "checkpoint-2")
    whole, resumed = losses(tmp_path / "run"), losses(tmp_path / "again")
    assert {step: whole[step] for step in resumed} == resumed and set(resumed) >= {3, 4}
    plain = losses(trained["dense"])
    assert 1e-7 < max(abs(whole[step] - plain[step]) for step in plain) < 0.1
    with pytest.raises(GuardError, match=r"was NF4 with double quantisation of kept tiles.*found NF4 with double quantisation:"):
        train(tiny_base, tiny_text, tmp_path / "run", **{**held, "model__storage": "dense"}, resume_from_checkpoint="auto")
    quantisation = Quantisation(4, tiles=True)
    packed, stands_for = (
        open_model(str(tiny_base), world=World(), quantisation=quantisation, dequantise=form) for form in (False, True)
    )
    ids_BL = tiny_windows(2) % 90
    with torch.no_grad():
        assert torch.allclose(packed.model(ids_BL).logits, stands_for.model(ids_BL).logits, atol=1e-5)
    dense = {linear.name: linear.weight_OI for linear in prunable_linears(stands_for.model)}
    for name, layer in block_layers(packed.model):
        assert layer.values.numel() * layer.values.element_size() == max(1, int(layer.mask.kept_PQ.sum())) * 128
        assert torch.allclose(layer.dense_OI(), dense[name]) and not dense[name][~layer.mask.expand()].any()
    opened = open_model(str(tiles), str(tmp_path / "run"), world=World())
    assert opened.quantisation == quantisation and block_layers(opened.base.model)
    report = merge(MergeArgs(str(tiny_base), str(tmp_path / "run"), str(tmp_path / "m")), World())
    assert report.quantised is not None and report.quantised.logits_error < 1e-5 and report.zero_tiles > 0


def test_4_bits_of_tiles_that_are_no_whole_blocks_are_refused(tiny_base):
    pytest.importorskip("bitsandbytes")
    mask = BlockMask(torch.tensor([[True, False]]), (4, 8), 4)
    with pytest.raises(UserError, match="tiles of 4x4 .* expected tiles of a multiple of 64 weights"):
        require_whole_blocks(mask, "m")


@pytest.mark.long
def test_an_adapter_of_a_dense_4_bit_base_is_not_put_on_tiles(tiny_base, tiny_text, tmp_path):
    pytest.importorskip("bitsandbytes")
    train(tiny_base, tiny_text, tmp_path / "run", model__load_in_4bit=True, max_steps=1)
    with pytest.raises(UserError, match="storage: found blocks, but .* was trained on a base in NF4"):
        open_model(str(tiny_base), str(tmp_path / "run"), world=World(), storage="blocks")
