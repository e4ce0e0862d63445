"""Pruning of whole models, architecture by architecture, against an independent dense computation with hooks."""

from __future__ import annotations

import copy
import gc
import math
import weakref

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lora_dist.blocks import NamedLinear, Pattern, find_linears
from lora_dist.log import UserError
from lora_dist.pruning import PruneSettings, calibration, capture, prune_layers
from tests.tiny import KINDS, tiny_model, tiny_windows

PREFIX = {"gpt2": "transformer.h", "opt": "model.decoder.layers"}
BLOCK = 8


def _layers(model: PreTrainedModel, kind: str) -> tuple[str, nn.ModuleList]:
    prefix = PREFIX.get(kind, "model.layers")
    return prefix, model.get_submodule(prefix)  # type: ignore[return-value]


def _prune(model: PreTrainedModel, kind: str, windows_NL: Tensor, **settings: object) -> Pattern:
    prefix, layers = _layers(model, kind)
    chosen = PruneSettings(**{"sparsity": 0.5, "block": BLOCK, **settings})  # type: ignore[arg-type]
    return prune_layers(layers, prefix, chosen, capture(model, layers, windows_NL)).pattern


def _input_norms(model: PreTrainedModel, linears: list[NamedLinear], windows_NL: Tensor) -> dict[str, Tensor]:
    """||x||_2 a column of every linear's input, in float64, from one forward of the whole model."""
    seen: dict[str, Tensor] = {}
    handles = [
        linear.module.register_forward_hook(lambda _m, args, _out, name=linear.name: seen.update({name: args[0].flatten(0, -2)}))
        for linear in linears
    ]
    with torch.no_grad():
        model(windows_NL)
    for handle in handles:
        handle.remove()
    return {name: x.double().square().sum(0).sqrt() for name, x in seen.items()}


def _lowest(elements_OI: Tensor, sparsity: float) -> list[tuple[int, int]]:
    """Tiles that are to go, by a loop."""
    rows = elements_OI.split(BLOCK, 0)
    scores = {(p, q): float(tile.sum()) for p, row in enumerate(rows) for q, tile in enumerate(row.split(BLOCK, 1))}
    return sorted(sorted(scores, key=scores.__getitem__)[: math.floor(sparsity * len(scores))])


def _tile_flags(mask_PQ: Tensor, shape: tuple[int, int]) -> Tensor:
    """Element by element: whether its tile is kept."""
    rows, cols = torch.arange(shape[0]) // BLOCK, torch.arange(shape[1]) // BLOCK
    return mask_PQ[rows][:, cols]


@pytest.mark.parametrize("kind", KINDS)
def test_wanda_equals_a_dense_computation_behind_the_pruned_prefix(kind: str) -> None:
    """Layer by layer: prune a second copy by norms from full forwards of that copy, whose earlier layers are pruned by then."""
    windows_NL = tiny_windows(count=5)
    model = tiny_model(kind)
    reference = copy.deepcopy(model)
    pattern = _prune(model, kind, windows_NL)
    prefix, layers = _layers(reference, kind)
    for index, layer in enumerate(layers):
        linears = find_linears(layer, f"{prefix}.{index}")
        norms = _input_norms(reference, linears, windows_NL)
        for linear in linears:
            gone = _lowest(linear.weight_OI.double().abs() * norms[linear.name], 0.5)
            assert [tuple(tile) for tile in (~pattern[linear.name].kept_PQ).nonzero().tolist()] == gone, linear.name
            for p, q in gone:
                linear.weight_OI[p * BLOCK : (p + 1) * BLOCK, q * BLOCK : (q + 1) * BLOCK] = 0
    torch.testing.assert_close(model(windows_NL).logits, reference(windows_NL).logits, rtol=0, atol=0)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("score, select", [("wanda", "row"), ("magnitude", "matrix"), ("random", "row")])
def test_pruned_tiles_are_zero_and_the_rest_is_untouched(kind: str, score: str, select: str) -> None:
    model = tiny_model(kind)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    pattern = _prune(model, kind, tiny_windows(), score=score, select=select, sparsity=0.4)
    prefix, layers = _layers(model, kind)
    linears = {linear.name: linear for i, layer in enumerate(layers) for linear in find_linears(layer, f"{prefix}.{i}")}
    assert set(pattern) == set(linears)
    for name, linear in linears.items():
        kept_OI = _tile_flags(pattern[name].kept_PQ, tuple(linear.weight_OI.shape))
        old_OI = before[f"{name}.weight"].T if linear.transposed else before[f"{name}.weight"]
        assert torch.equal(linear.weight_OI[kept_OI], old_OI[kept_OI])
        assert not linear.weight_OI[~kept_OI].view(torch.int32).any()  # +0.0, not -0.0
        P, Q = pattern[name].kept_PQ.shape
        dropped = ~pattern[name].kept_PQ
        if select == "row":
            assert dropped.sum(1).tolist() == [math.floor(0.4 * Q)] * P
        else:
            assert dropped.sum() == math.floor(0.4 * P * Q)
    weights = {f"{name}.weight" for name in linears}
    for name, tensor in model.state_dict().items():
        assert name in weights or torch.equal(tensor, before[name]), name


def test_conv1d_is_pruned_as_out_by_in() -> None:
    """GPT-2's c_fc stores (I, O): its mask is (O, I), and input norms go with the columns of W."""
    model = tiny_model("gpt2", layers=1)
    c_fc = model.transformer.h[0].mlp.c_fc
    assert tuple(c_fc.weight.shape) == (32, 40)
    with torch.no_grad():
        c_fc.weight.fill_(1.0)
        model.transformer.h[0].ln_2.weight.copy_(torch.where(torch.arange(32) < 16, 0.01, 1.0))
        model.transformer.h[0].ln_2.bias.zero_()
    pattern = _prune(model, "gpt2", tiny_windows())
    mask = pattern["transformer.h.0.mlp.c_fc"]
    assert mask.shape == (40, 32)
    assert mask.kept_PQ.tolist() == [[False, False, True, True]] * 5  # the weak inputs go, in every block row


def test_results_do_not_depend_on_micro_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    windows_NL = tiny_windows(count=7)
    whole = _prune(tiny_model("llama"), "llama", windows_NL)
    monkeypatch.setattr(calibration, "MICRO_BATCH_TOKENS", 3 * windows_NL.shape[1])  # 3 + 3 + 1 windows
    assert _prune(tiny_model("llama"), "llama", windows_NL).digest == whole.digest


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("kind", KINDS)
def test_captured_inputs_run_through_the_layers_as_in_the_model(kind: str, attention: str) -> None:
    """Masks differ between layers (sliding or full) and attention kernels: layers alone equal the model."""
    model = tiny_model(kind)
    model.set_attn_implementation(attention)
    windows_NL = tiny_windows(count=3)
    _, layers = _layers(model, kind)
    outputs: list[Tensor] = []
    handle = layers[-1].register_forward_hook(lambda _m, _args, out: outputs.append(out if isinstance(out, Tensor) else out[0]))
    with torch.no_grad():
        model(windows_NL, use_cache=False)
    handle.remove()
    originals = list(layers)
    captured = capture(model, layers, windows_NL)
    assert list(layers) == originals
    for index, layer in enumerate(layers):
        captured.advance(index, layer)
    torch.testing.assert_close(torch.cat(captured.hidden), outputs[0], rtol=0, atol=0)


class _TupleLayer(nn.Module):
    """A decoder layer as before transformers 5: takes hidden_states by name, returns a tuple."""

    attention_type = "full"

    def __init__(self) -> None:
        super().__init__()
        self.proj = nn.Linear(16, 16)

    def forward(self, hidden_states: Tensor) -> tuple[Tensor]:
        return (hidden_states + self.proj(hidden_states),)


class _TupleModel(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(32, 16)
        self.layers = nn.ModuleList([_TupleLayer() for _ in range(3)])

    def forward(self, input_ids: Tensor, use_cache: bool = False) -> Tensor:
        hidden = self.embed(input_ids)
        for layer in self.layers:
            assert layer.attention_type == "full"
            hidden = layer(hidden_states=hidden)[0]
        return hidden


def test_model_code_that_returns_tuples() -> None:
    torch.manual_seed(0)
    model = _TupleModel().eval()
    ids = torch.randint(32, (4, 10))
    with torch.no_grad():
        expected = model(ids)
    captured = capture(model, model.layers, ids)
    for index, layer in enumerate(model.layers):
        captured.advance(index, layer)
    torch.testing.assert_close(torch.cat(captured.hidden), expected, rtol=0, atol=0)


def test_shared_inputs_are_squared_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """q, k and v share one input, gate and up another: 4 sums a layer and micro-batch instead of 7."""
    model = tiny_model("llama")
    _, layers = _layers(model, "llama")
    captured = capture(model, layers, tiny_windows())
    calls = []
    real = torch.linalg.vector_norm
    monkeypatch.setattr(torch.linalg, "vector_norm", lambda *args, **kwargs: calls.append(1) or real(*args, **kwargs))
    norms = captured.norms(0, layers[0], find_linears(layers[0], "layer"))
    assert len(calls) == 4 * len(captured.hidden)
    assert torch.equal(norms["layer.self_attn.q_proj"], norms["layer.self_attn.v_proj"])
    assert len(norms) == 7


def test_memory_is_one_layers() -> None:
    """Behind each pruned layer, nothing lives of its statistics or of the hidden states before it."""
    model = tiny_model("llama", layers=4)
    prefix, layers = _layers(model, "llama")
    captured = capture(model, layers, tiny_windows())
    alive: list[weakref.ref[Tensor]] = []
    real_norms = captured.norms

    def norms(index: int, layer: nn.Module, linears: list[NamedLinear]) -> dict[str, Tensor]:
        gc.collect()
        assert not any(ref() is not None for ref in alive), "an earlier layer's tensors are still held"
        found = real_norms(index, layer, linears)
        alive.extend(weakref.ref(tensor) for tensor in [*found.values(), *captured.hidden])
        return found

    captured.norms = norms  # type: ignore[method-assign]
    shape = captured.hidden[0].shape
    prune_layers(layers, prefix, PruneSettings(0.5, BLOCK), captured)
    assert len(alive) == 4 * 8  # the check above ran for every layer: 7 norms and 1 micro-batch of hidden states each
    assert [hidden.shape for hidden in captured.hidden] == [shape]


def test_a_linear_that_sees_no_token_is_an_error() -> None:
    model = tiny_model("llama")
    prefix, layers = _layers(model, "llama")
    layers[1].mlp.unused = nn.Linear(32, 32)
    with pytest.raises(UserError, match=r"layer model.layers.1.mlp.unused: no calibration token reached it"):
        prune_layers(layers, prefix, PruneSettings(0.5, BLOCK), capture(model, layers, tiny_windows()))


def test_wanda_without_calibration_is_refused() -> None:
    prefix, layers = _layers(tiny_model("llama"), "llama")
    with pytest.raises(ValueError, match="score wanda: found no calibration"):
        prune_layers(layers, prefix, PruneSettings(0.5, BLOCK), None)


def test_nothing_is_zeroed_where_a_score_is_not_finite() -> None:
    model = tiny_model("llama", layers=1)
    prefix, layers = _layers(model, "llama")
    layers[0].mlp.down_proj.weight.data[0, 0] = float("nan")  # the last linear to be scored
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(UserError, match="not finite"):
        prune_layers(layers, prefix, PruneSettings(0.5, BLOCK, score="magnitude"), None)
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(tensor, before[name], rtol=0, atol=0, equal_nan=True)
