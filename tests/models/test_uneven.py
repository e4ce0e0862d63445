"""Layers of different widths: every family built as Llama loads, whole and piece by piece, trains, saves and generates as it should."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import prune_structured
import pytest
import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from lora_dist.adapter import attach_adapter, merge_adapter
from lora_dist.log import UserError
from lora_dist.models.export import save_model
from lora_dist.models.loading import load_base, open_base
from lora_dist.models.loss import causal_loss_sum
from lora_dist.models.sources import read_facts
from lora_dist.models.streaming import TensorReader, load_empty
from lora_dist.models.uneven import LayerWidths, NotStructured, find_widths
from tests.tiny import tiny_model, tiny_tokenizer, tiny_windows

FAMILIES = (
    "llama", "mistral", "ministral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "olmo", "cohere", "cohere2", "granite", "helium",
    "smollm3", "seed_oss", "stablelm", "exaone4", "ernie4_5", "hunyuan_v1_dense", "vaultgemma",
)  # fmt: skip
HEADS, NEURONS = "1,2,1", "17,40,24"


def family(kind: str) -> PreTrainedModel:
    """Three layers of width 32 with random weights as large as in a trained model."""
    config = AutoConfig.for_model(
        kind, vocab_size=128, hidden_size=32, intermediate_size=40, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
        max_position_embeddings=64, head_dim=8, bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config).eval()
        for parameter in model.parameters():
            parameter.data = torch.randn_like(parameter) * 0.1 + (parameter.ndim == 1)
    assert isinstance(model, PreTrainedModel)
    return model


@torch.no_grad()
def logits(model: Any) -> Tensor:
    result = model(tiny_windows(2, 20), use_cache=False).logits
    assert isinstance(result, Tensor)
    return result


def save(model: PreTrainedModel, folder: Path) -> Path:
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def uneven_dir(tmp_path: Path) -> Path:
    model = family("llama")
    prune_structured.prune(model, kv_heads=HEADS, neurons=NEURONS)
    return save(model, tmp_path / "uneven")


@pytest.mark.parametrize("kind", FAMILIES)
def test_a_family(tmp_path: Path, kind: str) -> None:
    """Loads to the pruned model's logits; a step of LoRA lowers the loss; merged, saved and loaded it computes the same; the cache
    changes nothing."""
    pruned = family(kind)
    prune_structured.prune(pruned, kv_heads=HEADS, neurons=NEURONS)
    loaded: Any = load_base(str(save(pruned, tmp_path / "base")), progress=False)
    assert torch.equal(logits(loaded.model), logits(pruned))
    tuned = attach_adapter(loaded.model, None, r=4, lora_alpha=8)
    ids_BL = tiny_windows(2, 20)
    optimizer = torch.optim.SGD([p for p in tuned.parameters() if p.requires_grad], lr=1e-3)
    losses = []
    for _ in range(3):
        loss = causal_loss_sum(tuned, ids_BL, ids_BL)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[2] < losses[0]
    with_adapter = logits(tuned)
    merged = merge_adapter(tuned)
    save_model(merged, loaded.tokenizer, tmp_path / "merged", pattern=None)
    again = load_base(str(tmp_path / "merged"), progress=False).model
    torch.testing.assert_close(logits(again), with_adapter, rtol=1e-4, atol=1e-4)
    options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0, "attention_mask": torch.ones(2, 6, dtype=torch.long)}
    cached = again.generate(ids_BL[:, :6], use_cache=True, **options)
    assert torch.equal(cached, again.generate(ids_BL[:, :6], use_cache=False, **options))


def test_placeholders_and_pieces_are_those_of_the_whole_model(uneven_dir: Path) -> None:
    whole = load_base(str(uneven_dir), progress=False).model
    empty = load_empty(open_base(str(uneven_dir)), read_facts(uneven_dir, progress=False))
    reader = TensorReader(empty.model, uneven_dir)
    for name, parameter in whole.named_parameters():
        assert empty.model.get_parameter(name).shape == parameter.shape
        assert torch.equal(reader.rows(name, 0, parameter.shape[0]), parameter)
    assert [layer.self_attn.num_key_value_groups for layer in empty.model.model.layers] == [2, 2, 2]


@pytest.mark.parametrize("kind", ["llama", "qwen2", "gemma2"])
def test_plain_transformers_reads_what_is_written(tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the code beside the weights; without it, it says that the shapes do not fit."""
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    pruned = family(kind)
    prune_structured.prune(pruned, kv_heads=HEADS, neurons=NEURONS)
    base = load_base(str(save(pruned, tmp_path / "base")), progress=False)
    written = save_model(base.model, base.tokenizer, tmp_path / "written", pattern=None)
    plain = AutoModelForCausalLM.from_pretrained(written, trust_remote_code=True)
    assert type(plain).__name__ == "UnevenForCausalLM" and isinstance(plain, type(pruned))
    assert torch.equal(logits(plain), logits(pruned))
    assert "lora_dist" not in (written / "modeling_uneven.py").read_text()
    with pytest.raises(RuntimeError, match="mismatch"):
        AutoModelForCausalLM.from_pretrained(written, trust_remote_code=False)
    assert torch.equal(logits(load_base(str(written), progress=False, trust_remote_code=True).model), logits(pruned))


@pytest.mark.parametrize("layout", ["shards", "torch"])
def test_other_layouts_of_files(uneven_dir: Path, tmp_path: Path, layout: str) -> None:
    model = load_base(str(uneven_dir), progress=False).model
    folder = tmp_path / layout
    if layout == "shards":
        model.save_pretrained(folder, max_shard_size="20KB")
    else:
        model.config.save_pretrained(folder)
        torch.save(model.state_dict(), folder / "pytorch_model.bin")
    tiny_tokenizer().save_pretrained(folder)
    assert torch.equal(logits(load_base(str(folder), progress=False).model), logits(model))


def test_biases_that_make_up_for_what_was_pruned(tmp_path: Path) -> None:
    """FLAP adds one to o_proj and down_proj, which Llama's configuration cannot say of down_proj alone."""
    for pruned in (True, False):
        model = family("llama")
        if pruned:
            prune_structured.prune(model, kv_heads=HEADS, neurons=NEURONS)
        for layer in model.model.layers:
            for linear in (layer.self_attn.o_proj, layer.mlp.down_proj):
                linear.bias = nn.Parameter(torch.full((32,), 0.3))
        loaded = load_base(str(save(model, tmp_path / f"{pruned}")), progress=False).model
        assert torch.equal(logits(loaded), logits(model))
        assert loaded.config.layer_widths["bias"] == ["o_proj", "down_proj"]


def test_widths_recorded_for_other_weights_are_refused(uneven_dir: Path, tmp_path: Path) -> None:
    again = save(load_base(str(uneven_dir), progress=False).model, tmp_path / "again")
    config = json.loads((again / "config.json").read_text())
    assert config["layer_widths"]["intermediate_size"] == [17, 40, 24]
    config["layer_widths"]["intermediate_size"] = [17, 40, 40]
    (again / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="records other layer_widths"):
        load_base(str(again), progress=False)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"intermediate_size": 48}, r"all layers are alike, so config.json can say it: .*'intermediate_size': 40"),
        ({"num_hidden_layers": 3}, "the files hold 2 layers, config.json says 3"),
        ({"hidden_size": 64, "head_dim": 8}, r"layer 0 has q_proj \(32, 32\) for \(32, 64\)"),
    ],
)
def test_what_is_not_structured_pruning_keeps_its_error(tmp_path: Path, change: dict[str, int], reason: str) -> None:
    folder = save(tiny_model("llama"), tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(UserError, match=r"check that config.json belongs to these weights") as caught:
        load_base(str(folder), progress=False)
    assert "num_hidden_layers" in change or "tensors do not fit the configuration" in str(caught.value)
    with pytest.raises(NotStructured, match=reason):
        find_widths(
            {name: tuple(t.shape) for name, t in tiny_model("llama").state_dict().items()}, AutoConfig.from_pretrained(folder)
        )


@pytest.mark.parametrize(
    ("layer", "reason"),
    [
        ({"q_proj": (24, 32), "o_proj": (32, 24)}, "3 query heads for 2 key-value heads"),
        ({"q_proj": (12, 32), "o_proj": (32, 12)}, r"q_proj \(12, 32\) for \(8, 32\)"),
        ({"k_proj": (8, 32)}, r"v_proj \(16, 32\) for \(8, 32\)"),
        ({"gate_proj": (20, 32)}, r"up_proj \(40, 32\) for \(20, 32\)"),
        ({"gate_proj": (0, 32), "up_proj": (0, 32), "down_proj": (32, 0)}, "nothing left"),
    ],
)
def test_shapes_that_do_not_go_together(layer: dict[str, tuple[int, int]], reason: str) -> None:
    model = tiny_model("llama")
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    for linear, shape in layer.items():
        part = "self_attn" if linear[0] in "qkvo" else "mlp"
        shapes[f"model.layers.1.{part}.{linear}.weight"] = shape
    with pytest.raises(NotStructured, match=f"layer 1 .*{reason}"):
        find_widths(shapes, model.config)


@pytest.mark.parametrize("kind", ["olmo2", "granite_swa"])
def test_a_family_with_more_that_grows_with_its_heads_is_refused(tmp_path: Path, kind: str) -> None:
    model = family(kind)
    prune_structured.prune(model, kv_heads=HEADS, neurons=NEURONS)
    with pytest.raises(UserError, match="is not built as Llama is: found (q_norm.weight|sinks) of shape"):
        load_base(str(save(model, tmp_path / kind)), progress=False)


@pytest.mark.parametrize("kind", ["gpt2", "opt", "phi3"])
def test_other_architectures_have_no_widths(kind: str) -> None:
    model = family("phi3") if kind == "phi3" else tiny_model(kind)
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    assert find_widths(shapes, model.config) is None


def test_widths_of_a_whole_model_are_the_configurations() -> None:
    model = tiny_model("qwen2")
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    assert find_widths(shapes, model.config) is None
    assert LayerWidths((4, 4), (2, 2), (40, 40)).uniform and not LayerWidths((4, 2), (2, 1), (40, 40)).uniform
