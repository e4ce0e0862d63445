"""Several adapters of one base: identity, the active one, sums against PEFT's own, the command and its exit codes."""

from __future__ import annotations

import copy
import json
import shutil

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file

from lora_dist.__main__ import main
from lora_dist.adapter import (
    adapter_folder,
    adapter_tensors,
    attach_adapter,
    layer_update,
    load_adapter,
    lora_layers,
    read_quantisation,
    save_adapter,
)
from tests.adapter.test_peft import llama, logits, prune, train_a_little


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A pruned base, its pattern, and the folders of adapters a and b (masked), c and d (plain), other (of another base)."""
    folder = tmp_path_factory.mktemp("adapters")
    base = llama()
    pattern = prune(base)
    for seed, (name, kept, fingerprint) in enumerate(
        [("a", pattern, "1"), ("b", pattern, "1"), ("c", None, ""), ("d", None, ""), ("other", pattern, "2")]
    ):
        torch.manual_seed(seed)
        model = attach_adapter(copy.deepcopy(base), kept, r=4, lora_alpha=8, base_fingerprint=fingerprint * 64)
        train_a_little(model, 3 + seed)
        save_adapter(model, folder / name, adapter_tensors(model))
    return base, pattern, folder


def updates(base, folder, pattern=None):
    model = load_adapter(copy.deepcopy(base), folder, base_fingerprint=None, pattern=pattern)
    return {name: layer_update(layer) for name, layer in lora_layers(model)}


def test_add_list_switch_delete(made, tmp_path, capsys):
    _, _, source = made
    box = str(tmp_path / "box")
    assert main(["adapters", "add", box, "first", str(source / "a")]) == 0
    assert main(["adapters", "add", box, "second", str(source / "b")]) == 0
    assert adapter_folder(box).name == "first"
    assert main(["adapters", "switch", box, "second"]) == 0
    assert adapter_folder(box).name == "second"
    capsys.readouterr()
    assert main(["adapters", "list", box]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "  first: rank 4, alpha 8, block-masked LoRA", "* second: rank 4, alpha 8, block-masked LoRA",
    ]  # fmt: skip
    before = sorted(path.relative_to(box) for path in (tmp_path / "box").rglob("*"))
    for argv, words in (
        (["add", box, "first", str(source / "b")], "is there already"),
        (["add", box, "third", str(source / "other")], "is of base 222222222222, expected 111111111111"),
        (["add", box, "../x", str(source / "b")], "expected letters, digits"),
        (["switch", box, "nothing"], "found no adapter nothing"),
        (["delete", box, "second"], "is the active adapter"),
        (["merge-weighted", box, "sum", "first=x"], "expected NAME=NUMBER"),
        (["merge-weighted", box, "sum", "first=1", "first=2"], "found first twice, expected each name once"),
        (["list", str(source)], "found no adapters.json"),
        (["turn", box], "expected one of list, add"),
    ):
        assert main(["adapters", *argv]) == 2
        error = capsys.readouterr().err
        assert words in error and len(error.splitlines()) == 1
    assert sorted(path.relative_to(box) for path in (tmp_path / "box").rglob("*")) == before
    assert main(["adapters", "delete", box, "first"]) == 0
    assert not (tmp_path / "box" / "first").exists()


@pytest.mark.parametrize("how", ["cat", "linear", "svd"])
def test_sums_of_plain_adapters_equal_pefts_own(made, tmp_path, how):
    base, _, source = made
    box = str(tmp_path / "box")
    for name in ("c", "d"):
        assert main(["adapters", "add", box, name, str(source / name)]) == 0
    assert main(["adapters", "merge-weighted", box, "sum", "c=0.7", "d=0.3", f"--combination_type={how}"]) == 0
    theirs = PeftModel.from_pretrained(copy.deepcopy(base), str(source / "c"), adapter_name="c")
    theirs.load_adapter(str(source / "d"), adapter_name="d")
    theirs.add_weighted_adapter(["c", "d"], [0.7, 0.3], "sum", combination_type=how)
    theirs.set_adapter("sum")
    mine = load_adapter(copy.deepcopy(base), tmp_path / "box" / "sum", base_fingerprint=None, pattern=None)
    torch.testing.assert_close(logits(mine), logits(theirs), rtol=1e-4, atol=1e-4)


def test_a_masked_sum_by_cat_is_exact_and_keeps_the_mask(made, tmp_path):
    base, pattern, source = made
    box = str(tmp_path / "box")
    for name in ("a", "b"):
        assert main(["adapters", "add", box, name, str(source / name)]) == 0
    for how in ("cat", "svd", "linear"):
        assert main(["adapters", "merge-weighted", box, how, "a=0.7", "b=-0.3", f"--combination_type={how}"]) == 0
    a, b, cat = (updates(base, tmp_path / "box" / name, pattern) for name in ("a", "b", "cat"))
    for name in a:
        torch.testing.assert_close(cat[name], 0.7 * a[name] - 0.3 * b[name], rtol=1e-4, atol=1e-6)
    for how in ("cat", "svd", "linear"):
        for name, update in updates(base, tmp_path / "box" / how, pattern).items():
            assert update.any() and not update[~pattern[name].expand()].any()
    assert load_file(tmp_path / "box" / "cat" / "adapter_model.safetensors")[
        "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
    ].shape == (8, 64)


def test_a_sum_is_of_adapters_whose_base_was_held_alike(made, tmp_path, capsys):
    _, _, source = made
    box, held = str(tmp_path / "box"), json.dumps({"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"})
    for name in ("a", "b"):
        shutil.copytree(source / name, tmp_path / name)
        assert main(["adapters", "add", box, name, str(tmp_path / name)]) == 0
    (tmp_path / "box" / "a" / "base_quantization.json").write_text(held)
    assert main(["adapters", "merge-weighted", box, "sum", "a=1", "b=1"]) == 2
    assert "NAME: found a trained on a quantised base, and others" in capsys.readouterr().err
    (tmp_path / "box" / "b" / "base_quantization.json").write_text(held)
    assert main(["adapters", "merge-weighted", box, "sum", "a=1", "b=1"]) == 0
    assert read_quantisation(tmp_path / "box" / "sum") == json.loads(held)
