"""Merging: zeros and logits proven, plain LoRA refused with its two ways out, nothing left behind."""

from __future__ import annotations

import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from lora_dist.arguments import InspectArgs, MergeArgs
from lora_dist.blocks import Pattern
from lora_dist.cli import train as train_verb
from lora_dist.cli.options import parse
from lora_dist.config import RunConfig
from lora_dist.engine.inspect import inspect
from lora_dist.engine.merge import merge
from lora_dist.engine.open_model import open_model
from lora_dist.log import GuardError, UserError
from lora_dist.parallel import World
from tests.runs import options


@pytest.fixture(scope="module")
def adapters(tiny_base, tiny_text, tmp_path_factory):
    """A masked and a plain adapter on the same base."""
    folder = tmp_path_factory.mktemp("adapters")
    for name, mask in (("masked", "block"), ("plain", "none")):
        values = options(
            tiny_base, tiny_text, folder / name, max_steps=5, eval_strategy="no", save_strategy="no", adapter__mask=mask
        )
        train_verb.run(parse(RunConfig, values, train_verb.VERB))
    return folder


def pruned_weights(folder, pattern):
    tensors = load_file(folder / "model.safetensors")
    return torch.cat([tensors[f"{name}.weight"][~mask.expand()] for name, mask in pattern.items()])


def test_the_merged_model_keeps_every_tile_and_the_logits(tiny_base, adapters, tmp_path):
    report = merge(MergeArgs(base=str(tiny_base), adapter=str(adapters / "masked"), out=str(tmp_path / "m")), World())
    pattern = Pattern.load(tiny_base)
    zeros = pruned_weights(tmp_path / "m", pattern)
    assert len(zeros) > 0 and not zeros.any()
    assert report.pattern_digest == pattern.digest == Pattern.load(tmp_path / "m").digest
    assert report.logits_error < 1e-5 and 0 < report.logits_error_fp32 < 1e-5  # 0: one sum would have been compared with itself
    ids = torch.randint(4, 90, (2, 20))
    with torch.no_grad():
        merged = open_model(str(tmp_path / "m"), world=World()).model(input_ids=ids).logits
        adapted = open_model(str(tiny_base), str(adapters / "masked"), world=World()).model(input_ids=ids).logits
    torch.testing.assert_close(merged, adapted, rtol=1e-4, atol=1e-5)
    before, after = load_file(tiny_base / "model.safetensors"), load_file(tmp_path / "m" / "model.safetensors")
    assert any(not torch.equal(before[k], after[k]) for k in before)


def test_half_precision_rounds_but_keeps_the_zeros(tiny_base, adapters, tmp_path):
    report = merge(
        MergeArgs(base=str(tiny_base), adapter=str(adapters / "masked"), out=str(tmp_path / "m"), dtype="bfloat16"), World()
    )
    assert report.logits_error_fp32 < 1e-5 < report.logits_error < 0.05
    assert not pruned_weights(tmp_path / "m", Pattern.load(tiny_base)).any()


def test_plain_lora_is_refused_with_its_two_ways_out(tiny_base, adapters, tmp_path):
    arguments = {"base": str(tiny_base), "adapter": str(adapters / "plain")}
    with pytest.raises(UserError, match=r"--project.*throws away \d+% of the squared update.*--densify"):
        merge(MergeArgs(**arguments, out=str(tmp_path / "no")), World())
    assert not (tmp_path / "no").exists()
    projected = merge(MergeArgs(**arguments, out=str(tmp_path / "p"), project=True), World())
    assert 0 < projected.update_lost < 1 and projected.pattern_digest
    assert not pruned_weights(tmp_path / "p", Pattern.load(tiny_base)).any()
    dense = merge(MergeArgs(**arguments, out=str(tmp_path / "d"), densify=True), World())
    assert dense.pattern_digest is None and dense.logits_error < 1e-5
    assert pruned_weights(tmp_path / "d", Pattern.load(tiny_base)).any()
    assert not (tmp_path / "d" / "block_mask.safetensors").exists()


def test_an_adapter_of_another_base_is_refused_and_nothing_written(tiny_base, adapters, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(tiny_base, other)
    tensors = load_file(other / "model.safetensors")
    tensors["model.embed_tokens.weight"][5, 5] += 1e-3
    save_file(tensors, other / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(GuardError, match="was trained on base"):
        merge(MergeArgs(base=str(other), adapter=str(adapters / "masked"), out=str(tmp_path / "m")), World())
    assert not (tmp_path / "m").exists()


def test_out_must_be_free(tiny_base, adapters, tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match="OUT: .* already holds files"):
        merge(MergeArgs(base=str(tiny_base), adapter=str(adapters / "masked"), out=str(tmp_path)), World())
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_inspect_says_what_is_there_and_what_is_wrong(tiny_base, adapters, tmp_path):
    sound = inspect(InspectArgs(path=str(tiny_base)))
    assert sound.source == "stored" and not sound.findings and sound.pattern.kind == "block"
    assert inspect(InspectArgs(path=str(adapters / "masked"))).findings == []
    bare = tmp_path / "bare"
    shutil.copytree(tiny_base, bare)
    (bare / "block_mask.safetensors").unlink()
    detected = inspect(InspectArgs(path=str(bare)))
    assert detected.source == "detected" and detected.pattern.digest == sound.pattern.digest
    assert "use --block 16" in "\n".join(inspect(InspectArgs(path=str(bare), block=32)).findings)
    tensors = load_file(tiny_base / "model.safetensors")
    name, mask = next((n, m) for n, m in sound.pattern.items() if not m.keeps_all)
    p, q = (~mask.kept_PQ).nonzero()[0].tolist()
    tensors[f"{name}.weight"][p * 16, q * 16] = 3
    broken = tmp_path / "broken"
    shutil.copytree(tiny_base, broken)
    save_file(tensors, broken / "model.safetensors", metadata={"format": "pt"})
    assert f"layer {name}, tile ({p}, {q}): found 3" in "\n".join(inspect(InspectArgs(path=str(broken))).findings)
    untrained = tmp_path / "untrained"
    shutil.copytree(adapters / "masked", untrained, ignore=shutil.ignore_patterns("checkpoint-*"))
    weights = load_file(untrained / "adapter_model.safetensors")
    save_file({k: v * ("lora_A" in k) for k, v in weights.items()}, untrained / "adapter_model.safetensors")
    assert "never trained" in "\n".join(inspect(InspectArgs(path=str(untrained))).findings)
    with pytest.raises(UserError):
        inspect(InspectArgs(path=str(tmp_path / "nowhere")))
