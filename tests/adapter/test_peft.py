"""The adapter as a PEFT method: equality with PEFT's own LoRA, files, merging, refusals."""

from __future__ import annotations

import copy
import json
import subprocess
import sys

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from lora_dist.adapter import (
    BlockLoraConfig,
    adapter_tensors,
    attach_adapter,
    compute_beside,
    layer_update,
    load_adapter,
    load_adapter_tensors,
    lora_layers,
    merge_adapter,
    save_adapter,
    update_outside_mask,
)
from lora_dist.adapter import layer as layer_module
from lora_dist.adapter.config import with_own_layers
from lora_dist.adapter.layer import BlockLoraLinear
from lora_dist.adapter.linear import adapted_linears
from lora_dist.blocks import BlockMask, ElementMask, Guard, Pattern, find_linears, grid
from lora_dist.log import GuardError, UserError


def llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=64, intermediate_size=104, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, vocab_size=96
    )
    return LlamaForCausalLM(config)


def gpt2() -> GPT2LMHeadModel:
    torch.manual_seed(0)
    return GPT2LMHeadModel(
        GPT2Config(n_embd=64, n_layer=2, n_head=4, vocab_size=96, n_positions=64, resid_pdrop=0, attn_pdrop=0, embd_pdrop=0)
    )


def prune(model, *, element=False, share=0.5) -> Pattern:
    generator = torch.Generator().manual_seed(1)
    stack, prefix = (model.model.layers, "model.layers") if hasattr(model, "model") else (model.transformer.h, "transformer.h")
    masks = {}
    for linear in find_linears(stack, prefix):
        shape = tuple(linear.weight_OI.shape)
        if element:
            linear.weight_OI.masked_fill_(torch.rand(shape, generator=generator) < share, 0)
            masks[linear.name] = ElementMask.detect(linear.weight_OI)
        else:
            masks[linear.name] = BlockMask(torch.rand(grid(shape, 16), generator=generator) >= share, shape, 16)
            linear.weight_OI.masked_fill_(~masks[linear.name].expand(), 0)
    return Pattern(masks)


def train_a_little(model, steps=3) -> list[float]:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.0)
    ids = torch.randint(0, 96, (4, 17), generator=torch.Generator().manual_seed(2))
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def logits(model):
    ids = torch.randint(0, 96, (2, 15), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        return model.eval()(input_ids=ids).logits


@pytest.mark.parametrize("make", [llama, gpt2])
@pytest.mark.parametrize("form", ["factorised", "dense"])
def test_with_every_tile_kept_it_equals_pefts_own_lora(make, form, tmp_path):
    """Outputs, losses, gradients' effect, merged weights and saved names."""
    base = make()
    pattern = Pattern({n: BlockMask.full(m.shape, 16) for n, m in prune(copy.deepcopy(base)).items()})
    torch.manual_seed(5)
    mine = attach_adapter(copy.deepcopy(base), pattern, r=4, lora_alpha=8, form=form)
    torch.manual_seed(5)
    theirs = get_peft_model(
        copy.deepcopy(base),
        LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM", fan_in_fan_out=make is gpt2),
    )
    assert train_a_little(mine) == pytest.approx(train_a_little(theirs), rel=1e-6)
    torch.testing.assert_close(logits(mine), logits(theirs), rtol=1e-4, atol=1e-5)
    mine.save_pretrained(tmp_path / "mine")
    theirs.save_pretrained(tmp_path / "theirs")
    a, b = (load_file(tmp_path / d / "adapter_model.safetensors") for d in ("mine", "theirs"))
    assert a.keys() == b.keys() and all(a[k].shape == b[k].shape for k in a)
    for (n, p), (m, q) in zip(merge_adapter(mine).named_parameters(), merge_adapter(theirs).named_parameters(), strict=True):
        assert n == m
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("form", ["factorised", "dense", "auto"])
def test_half_the_tiles_kept_with_a_masked_form_still_equals_masked_gradients(form):
    """Training the masked adapter equals training PEFT's LoRA whose product is masked by autograd."""
    base = llama()
    pattern = prune(base)
    torch.manual_seed(5)
    mine = attach_adapter(copy.deepcopy(base), pattern, r=4, lora_alpha=8, form=form)
    torch.manual_seed(5)
    theirs = get_peft_model(
        copy.deepcopy(base), LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM")
    )
    for name, module in theirs.named_modules():
        if hasattr(module, "lora_A"):
            kept = pattern[name.removeprefix("base_model.model.")].expand()

            def forward(x, module=module, kept=kept):
                delta = (module.lora_B["default"].weight @ module.lora_A["default"].weight) * kept * module.scaling["default"]
                return module.base_layer(x) + x @ delta.T

            module.forward = forward
    assert train_a_little(mine, 5) == pytest.approx(train_a_little(theirs, 5), rel=1e-5)


@pytest.mark.parametrize("r, dense", [(2, False), (16, False), (32, True), (64, True)])
def test_a_high_rank_on_a_narrow_layer_takes_the_weights_gradient(r, dense):
    base = LlamaForCausalLM(
        LlamaConfig(hidden_size=512, intermediate_size=512, num_hidden_layers=1, num_attention_heads=8, vocab_size=32)
    )
    model = attach_adapter(base, prune(base), r=r, lora_alpha=2 * r, lora_dropout=0.0)
    layer = next(m for m in model.modules() if isinstance(m, BlockLoraLinear))
    found = layer.prepared(torch.randn(512, layer.in_features))
    assert found is not None and (found.form, found.dense) == ("merged", dense)


def test_base_and_update_are_computed_together_where_they_can_be(monkeypatch):
    """Merged in 32 bits for many tokens without dropout; not together with a hook on the base, a trained base, or under autocast."""
    taken = []
    monkeypatch.setattr(
        layer_module,
        "adapted_linears",
        lambda x, layers, *rest: taken.append(layers[0].form == "merged") or adapted_linears(x, layers, *rest),
    )
    model = attach_adapter(llama(), prune(llama()), r=4, lora_alpha=8, lora_dropout=0.1)
    layer = next(m for m in model.modules() if isinstance(m, BlockLoraLinear))
    layer.siblings = None
    torch.nn.init.normal_(layer.lora_B["default"].weight, std=0.1)
    few, x = torch.randn(1, layer.in_features), torch.randn(64, layer.in_features)

    def how(x=x):
        """merged or not, as one step; None: apart"""
        taken.clear()
        layer(x)
        return taken[0] if taken else None

    model.eval()
    expected = layer.base_layer(x) + layer.update("default", x)
    torch.testing.assert_close(layer(x), expected, rtol=1e-5, atol=1e-5)
    assert how() is True and how(few) is False
    model.train()
    assert how() is False
    torch.manual_seed(0)
    together = layer(x)
    torch.manual_seed(0)
    apart = layer.base_layer(x) + layer.update("default", layer.lora_dropout["default"](x))
    torch.testing.assert_close(together, apart, rtol=1e-5, atol=1e-5)
    model.eval()
    handle = layer.base_layer.register_forward_pre_hook(lambda *args: None)
    assert how() is None
    handle.remove()
    layer.base_layer.weight.requires_grad_()
    assert how() is None
    layer.base_layer.weight.requires_grad_(False)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert how() is None
    assert how() is True
    model.to(torch.bfloat16)
    assert how(x.bfloat16()) is False
    model.float()
    assert how() is True
    compute_beside(model)
    torch.testing.assert_close(layer(x), expected, rtol=1e-2, atol=1e-2)  # its weights were in 16 bits for a while
    assert how() is False
    model.to(torch.bfloat16)
    layer.lora_form["default"] = "dense"
    assert how(x.bfloat16()) is None


@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_plain_lora_in_own_layers_equals_pefts(dropout):
    """Also with dropout: of the same random numbers, in the same order."""
    base = llama()
    config = LoraConfig(r=4, lora_alpha=8, lora_dropout=dropout, target_modules="all-linear", task_type="CAUSAL_LM")
    models = []
    for make in (
        lambda model: attach_adapter(model, None, r=4, lora_alpha=8, lora_dropout=dropout),
        lambda model: get_peft_model(model, config),
    ):
        torch.manual_seed(5)
        models.append(make(copy.deepcopy(base)))
    own = [sum(isinstance(m, BlockLoraLinear) for m in model.modules()) for model in models]
    assert own[0] > 0 and own[1] == 0
    found = []
    for model in models:
        torch.manual_seed(6)
        found.append(train_a_little(model, 3))
    assert found[0] == pytest.approx(found[1], rel=1e-5)


def test_plain_lora_of_a_variant_keeps_pefts_layers():
    for other in ({"lora_bias": True}, {"use_dora": True}, {"init_lora_weights": "olora"}):
        config = with_own_layers(LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM", **other), base := llama())
        assert not any(isinstance(m, BlockLoraLinear) for m in get_peft_model(base, config).modules()), other


@pytest.mark.parametrize("make", [llama, gpt2])
@pytest.mark.parametrize("element", [False, True])
def test_merged_weights_keep_every_zero_and_the_logits(make, element):
    base = make()
    pattern = prune(base, element=element)
    model = attach_adapter(base, pattern, r=4, lora_alpha=16, form="auto" if element else "factorised")
    train_a_little(model)
    before = logits(model)
    merged = merge_adapter(model)
    torch.testing.assert_close(logits(merged), before, rtol=1e-4, atol=1e-5)
    transposed = set(pattern) if make is gpt2 else set()
    Guard(dict(merged.named_parameters()), pattern, transposed=transposed).check_pattern("after merging")


def test_merging_in_bfloat16_keeps_every_zero():
    base = llama().bfloat16()
    pattern = prune(base)
    model = attach_adapter(base, pattern, r=4, lora_alpha=16)
    assert all(p.dtype == torch.float32 for n, p in model.named_parameters() if "lora_" in n)
    train_a_little(model)
    Guard(dict(merge_adapter(model).named_parameters()), pattern).check_pattern("after merging")


def test_unmerging_gives_the_base_back_with_its_zeros():
    base = llama()
    pattern = prune(base)
    model = attach_adapter(base, pattern, r=4, lora_alpha=16)
    train_a_little(model)
    before = logits(model)
    model.merge_adapter()
    torch.testing.assert_close(logits(model), before, rtol=1e-4, atol=1e-5)
    model.unmerge_adapter()
    torch.testing.assert_close(logits(model), before, rtol=1e-4, atol=1e-5)
    Guard(dict(model.get_base_model().named_parameters()), pattern).check_pattern("after unmerging")


def saved(tmp_path, **kwargs):
    base = llama()
    pattern = prune(base)
    model = attach_adapter(copy.deepcopy(base), pattern, r=4, lora_alpha=16, base_fingerprint="a" * 64, **kwargs)
    train_a_little(model)
    save_adapter(model, tmp_path / "adapter", adapter_tensors(model))
    return base, pattern, model


def test_files_load_through_peft_once_lora_dist_is_imported(tmp_path):
    base, _, model = saved(tmp_path)
    again = PeftModel.from_pretrained(copy.deepcopy(base), str(tmp_path / "adapter"))
    assert torch.equal(logits(again), logits(model))
    assert sorted(p.name for p in (tmp_path / "adapter").iterdir()) == [
        "adapter_config.json", "adapter_model.safetensors", "block_mask.safetensors",
    ]  # fmt: skip
    assert json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["peft_type"] == "BLOCK_LORA"


PLAIN_PEFT = """
import sys
from peft import PeftConfig
try:
    PeftConfig.from_pretrained(sys.argv[1])
except Exception as error:
    print("refused", type(error).__name__, "BLOCK_LORA" in str(error), "lora_dist" in sys.modules)
else:
    print("loaded")
"""
IMPORT_FIRST = (
    "import lora_dist\nfrom peft import PeftConfig\nimport sys\nprint(type(PeftConfig.from_pretrained(sys.argv[1])).__name__)"
)
IMPORT_LATER = (
    "from peft import PeftConfig\nimport lora_dist\nimport sys\nprint(type(PeftConfig.from_pretrained(sys.argv[1])).__name__)"
)


@pytest.mark.long
def test_plain_peft_refuses_a_masked_adapter_and_importing_lora_dist_is_enough(tmp_path):
    saved(tmp_path)
    outputs = [
        subprocess.run([sys.executable, "-c", code, str(tmp_path / "adapter")], capture_output=True, text=True).stdout.strip()
        for code in (PLAIN_PEFT, IMPORT_FIRST, IMPORT_LATER)
    ]
    assert outputs == ["refused KeyError True False", "BlockLoraConfig", "BlockLoraConfig"]


def test_an_unmasked_adapter_is_a_plain_peft_file(tmp_path):
    base = llama()
    model = attach_adapter(copy.deepcopy(base), None, r=4, lora_alpha=16)
    train_a_little(model)
    save_adapter(model, tmp_path, adapter_tensors(model))
    assert json.loads((tmp_path / "adapter_config.json").read_text())["peft_type"] == "LORA"
    torch.testing.assert_close(logits(PeftModel.from_pretrained(base, str(tmp_path))), logits(model), rtol=1e-5, atol=1e-6)


def test_an_adapter_of_another_base_or_pattern_is_refused(tmp_path):
    base, pattern, _ = saved(tmp_path)
    folder = tmp_path / "adapter"
    load_adapter(copy.deepcopy(base), folder, base_fingerprint="a" * 64, pattern=pattern)
    with pytest.raises(GuardError, match="trained on base aaaaaaaaaaaa, the base given is bbbbbbbbbbbb"):
        load_adapter(copy.deepcopy(base), folder, base_fingerprint="b" * 64, pattern=pattern)
    name = next(iter(pattern))
    kept = pattern[name].kept_PQ.clone()
    kept[0, 0] = ~kept[0, 0]
    other = Pattern({**pattern, name: BlockMask(kept, pattern[name].shape, 16)})
    with pytest.raises(GuardError, match=rf"another pattern than the base: layer {name}, tile \(0, 0\)"):
        load_adapter(copy.deepcopy(base), folder, base_fingerprint=None, pattern=other)
    other.save(folder)  # the mask file of another run
    with pytest.raises(GuardError, match="do not belong together"):
        load_adapter(copy.deepcopy(base), folder, base_fingerprint=None, pattern=None)


def test_tensors_that_do_not_fit_are_named(tmp_path):
    base, pattern, model = saved(tmp_path)
    smaller = attach_adapter(copy.deepcopy(base), pattern, r=2, lora_alpha=16)
    with pytest.raises(UserError, match="has shape .*expected"):
        load_adapter_tensors(smaller, tmp_path / "adapter")
    (tmp_path / "adapter" / "adapter_model.safetensors").write_bytes(b"junk")
    with pytest.raises(UserError, match="cannot be read"):
        load_adapter_tensors(model, tmp_path / "adapter")
    with pytest.raises(UserError, match=r"found no adapter_config.json"):
        load_adapter(base, tmp_path / "nowhere", base_fingerprint=None, pattern=None)


def test_target_modules_that_match_nothing_list_what_would():
    base = gpt2()
    with pytest.raises(UserError, match="q_proj, v_proj match no linear.*c_attn, c_fc, c_proj"):
        attach_adapter(base, prune(base), r=4, lora_alpha=8, target_modules=["q_proj", "v_proj", "c_attn"])


@pytest.mark.parametrize(
    "options,words",
    [({"lora_bias": True}, "lora_bias"), ({"init_lora_weights": "pissa"}, "pissa")],
)
def test_variants_that_would_break_the_mask_are_refused(options, words):
    with pytest.raises(ValueError, match=words):
        BlockLoraConfig(r=4, target_modules="all-linear", **options)


def test_mixed_batches_would_bypass_the_mask_and_are_refused():
    base = llama()
    model = attach_adapter(base, prune(base), r=4, lora_alpha=8).eval()
    with pytest.raises(ValueError, match="adapter_names"):
        model(input_ids=torch.zeros(2, 4, dtype=torch.long), adapter_names=["default", "__base__"])


def test_rslora_scales_by_the_root_of_the_rank():
    base = llama()
    model = attach_adapter(base, prune(base), r=4, lora_alpha=8, use_rslora=True)
    layer = model.get_base_model().model.layers[0].self_attn.q_proj
    assert layer.scaling["default"] == pytest.approx(4.0)


def test_two_masked_adapters_on_one_base_keep_their_own_masks():
    base = llama()
    first = prune(base, share=0.3)
    model = attach_adapter(base, first, r=4, lora_alpha=8)
    masks = {
        n: BlockMask(m.kept_PQ & (torch.rand(m.kept_PQ.shape, generator=torch.Generator().manual_seed(9)) > 0.5), m.shape, 16)
        for n, m in first.items()
    }
    second = Pattern(masks)
    model.add_adapter("second", BlockLoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM").with_pattern(second))
    layer = model.get_base_model().model.layers[0].self_attn.q_proj
    with torch.no_grad():
        for name in ("default", "second"):
            layer.lora_B[name].weight.normal_()
    kept = {name: layer.get_delta_weight(name) != 0 for name in ("default", "second")}
    assert torch.equal(kept["default"], first["model.layers.0.self_attn.q_proj"].expand())
    assert torch.equal(kept["second"], second["model.layers.0.self_attn.q_proj"].expand())
    model.delete_adapter("second")
    logits(model)


def test_autocast_computes_the_update_in_the_lower_precision():
    base = llama()
    model = attach_adapter(base, prune(base), r=4, lora_alpha=8, form="factorised")
    exact = logits(model)
    ids = torch.randint(0, 96, (2, 15), generator=torch.Generator().manual_seed(3))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = model(input_ids=ids, labels=ids)
    out.loss.backward()
    assert float((out.logits.float() - exact).norm() / exact.norm()) < 0.02
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for n, p in model.named_parameters() if "lora_" in n)


def test_share_of_a_plain_update_that_falls_on_pruned_tiles():
    base = llama()
    pattern = prune(base)
    plain = attach_adapter(copy.deepcopy(base), None, r=4, lora_alpha=8)
    train_a_little(plain)

    def layer_updates(model):
        return [(name, layer_update(layer)) for name, layer in lora_layers(model)]

    deltas = {
        n.removeprefix("base_model.model."): m.get_delta_weight("default")
        for n, m in plain.named_modules()
        if hasattr(m, "lora_A")
    }
    lost = sum(float(d[~pattern[n].expand()].square().sum()) for n, d in deltas.items())
    total = sum(float(d.square().sum()) for d in deltas.values())
    assert update_outside_mask(layer_updates(plain), pattern) == pytest.approx(lost / total, rel=1e-5)
    masked = attach_adapter(copy.deepcopy(base), pattern, r=4, lora_alpha=8)
    train_a_little(masked)
    assert update_outside_mask(layer_updates(masked), pattern) == 0.0
