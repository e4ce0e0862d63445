"""Reconstruction towards the dense model: targets from whole forwards of two models, solved by dense least squares, stage by stage."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import BertConfig, BertForMaskedLM, Gemma2Config, Gemma2ForCausalLM

from lora_dist.blocks import find_linears
from lora_dist.log import UserError
from lora_dist.pruning import DenseModel, Pruned, PruneSettings, capture, prune_layers
from tests.pruning.test_reconstruct import least_squares
from tests.tiny import tiny_model, tiny_windows

BLOCK = 8
PREFIX = {"llama": "model.layers", "gpt2": "transformer.h", "opt": "model.decoder.layers"}
_QKV = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"]
STAGES = {
    "llama": [_QKV, ["self_attn.o_proj"], ["mlp.gate_proj", "mlp.up_proj"], ["mlp.down_proj"]],
    "gpt2": [["attn.c_attn"], ["attn.c_proj"], ["mlp.c_fc"], ["mlp.c_proj"]],
    "opt": [_QKV, ["self_attn.out_proj"], ["fc1"], ["fc2"]],
}
WINDOWS = tiny_windows(count=12)


def _prune(model: Any, kind: str, **settings: Any) -> Pruned:
    layers = model.get_submodule(PREFIX[kind])
    chosen = PruneSettings(
        **{"sparsity": 0.5, "block": BLOCK, "reconstruct": True, "target": "dense", "score": "energy", **settings}
    )
    return prune_layers(layers, PREFIX[kind], chosen, capture(model, layers, WINDOWS))


def _look(model: Any, layer: str, linears: list[str]) -> dict[str, Tensor]:
    """Of a whole forward, as (tokens, features) in float64: what the layer and its linears get (`in`) and put out (`out`)."""
    seen: dict[str, Tensor] = {}

    def note(key: str) -> Any:
        def hook(_module: nn.Module, args: Any, kwargs: Any, out: Any) -> None:
            hidden = args[0] if args else kwargs["hidden_states"]
            out = out if isinstance(out, Tensor) else out[0]
            seen[f"{key} in"], seen[f"{key} out"] = (t.double().flatten(0, -2) for t in (hidden, out))

        return hook

    names = {"": layer} | {name: f"{layer}.{name}" for name in linears}
    handles = [model.get_submodule(path).register_forward_hook(note(key), with_kwargs=True) for key, path in names.items()]
    with torch.no_grad():
        model(WINDOWS, use_cache=False)
    for handle in handles:
        handle.remove()
    return seen


@pytest.mark.parametrize("kind", ["llama", "gpt2", "opt"])
def test_each_stage_is_solved_for_what_is_lost_so_far(kind: str) -> None:
    dense, model = tiny_model(kind), tiny_model(kind)
    reference = copy.deepcopy(dense)
    done = _prune(model, kind)
    _, middle, _, last = STAGES[kind]
    for index in range(2):
        layer = f"{PREFIX[kind]}.{index}"
        linears = {linear.name: linear for linear in find_linears(reference.get_submodule(layer))}
        for stage in STAGES[kind]:
            wanted, found = _look(dense, layer, [*linears]), _look(reference, layer, [*linears])
            for name in stage:
                target = wanted[f"{name} out"]
                if [name] == middle:  # what the residual stream lacks when this output is added to it
                    target = target + wanted[" in"] - found[" in"]
                elif [name] == last:
                    target = found[f"{name} out"] + wanted[" out"] - found[" out"]
                x_TI, weight_OI = found[f"{name} in"], linears[name].weight_OI
                bias = getattr(linears[name].module, "bias", None)
                if bias is not None:
                    means = target.mean(0), x_TI.mean(0)
                    target, x_TI = target - means[0], x_TI - means[1]
                kept_OI = done.masks[f"{layer}.{name}"].expand()
                solved_OI = least_squares(weight_OI.double(), x_TI, kept_OI, 0.01, target_TO=target)
                weight_OI.copy_(solved_OI)
                if bias is not None:
                    bias.data.copy_(means[0] - solved_OI @ means[1])
        for name, linear in linears.items():
            mine = model.get_submodule(f"{layer}.{name}")
            torch.testing.assert_close(mine.weight, linear.module.weight, rtol=5e-3, atol=5e-4)
            if getattr(mine, "bias", None) is not None:
                torch.testing.assert_close(mine.bias, linear.module.bias, rtol=5e-3, atol=5e-4)
    assert all(0 <= one.error_after <= one.error_before for one in done.reconstructions.values())


def test_it_ends_nearer_to_the_dense_model_than_same_inputs_do() -> None:
    with torch.no_grad():
        logits = tiny_model("llama", layers=3)(WINDOWS).logits
    errors = {}
    for target in ("same", "dense"):
        model = tiny_model("llama", layers=3)
        _prune(model, "llama", target=target)
        with torch.no_grad():
            errors[target] = float((model(WINDOWS).logits - logits).square().mean())
    assert errors["dense"] < 0.9 * errors["same"]


def _adding(model: Any, layers: nn.ModuleList) -> list[str]:
    """Linears of the first layer whose output is added to the residual stream as it is."""
    dense = DenseModel(capture(model, layers, WINDOWS))
    linears = find_linears(layers[0], "layers.0")
    stages = dense.stages(0, layers[0], linears)
    assert sorted(linear.name for stage in stages for linear in stage) == sorted(linear.name for linear in linears)
    found = []
    for number, stage in enumerate(stages):
        later = [linear for rest in stages[number + 1 :] for linear in rest]
        if dense.adds_to_stream(0, layers[0], stage, later):
            found += [linear.name.removeprefix("layers.0.") for linear in stage]
    return found


@pytest.mark.parametrize("kind", [*STAGES])
def test_what_adds_to_the_residual_stream_is_found_by_trying(kind: str) -> None:
    model = tiny_model(kind)
    assert _adding(model, model.get_submodule(PREFIX[kind])) == [*STAGES[kind][1], *STAGES[kind][3]]
    half = tiny_model(kind, dtype=torch.bfloat16)
    assert _adding(half, half.get_submodule(PREFIX[kind])) == [*STAGES[kind][1], *STAGES[kind][3]]


def test_norms_behind_branches_or_sums_are_seen() -> None:
    sizes = {"vocab_size": 128, "hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 4}
    torch.manual_seed(0)
    gemma = Gemma2ForCausalLM(Gemma2Config(**sizes, num_key_value_heads=2, head_dim=8, sliding_window=8)).eval()
    assert _adding(gemma, gemma.model.layers) == []
    bert = BertForMaskedLM(BertConfig(**sizes)).eval()
    assert _adding(bert, bert.bert.encoder.layer) == []


class _Routed(nn.Module):
    """A layer that sends a token to a linear by the sign of its first feature, as routers do."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(16, 16, bias=False)
        self.expert = nn.Linear(16, 16, bias=False)

    def forward(self, hidden: Tensor) -> Tensor:
        hidden = hidden + self.first(hidden)
        chosen = hidden[..., 0] > 0
        return hidden.index_put((chosen,), hidden[chosen] + self.expert(hidden[chosen]))


class _RoutedModel(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(128, 16)
        self.layers = nn.ModuleList([_Routed(), _Routed()])

    def forward(self, input_ids: Tensor, use_cache: bool = False) -> Tensor:
        hidden = self.embed(input_ids)
        for layer in self.layers:
            hidden = layer(hidden)
        return hidden


def test_experts_that_see_other_tokens_have_no_dense_target() -> None:
    torch.manual_seed(0)
    model = _RoutedModel().eval()
    settings = PruneSettings(0.5, BLOCK, reconstruct=True, target="dense")
    with pytest.raises(
        UserError, match=r"layer layers.0.expert: sees \d+ tokens behind pruned layers and \d+ in the dense model"
    ):
        prune_layers(model.layers, "layers", settings, capture(model, model.layers, WINDOWS))
    same = PruneSettings(0.5, BLOCK, reconstruct=True, target="same")
    done = prune_layers(model.layers, "layers", same, capture(model, model.layers, WINDOWS))
    assert len(done.reconstructions) == 4
