"""Reconstruction against an independent dense least squares, row by row, and what it promises of the weights it writes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lora_dist.blocks import BlockMask, ElementMask, Mask, find_linears
from lora_dist.pruning import Gram, Pruned, PruneSettings, capture, prune_layers, reconstruct
from lora_dist.pruning import solve as solving
from tests.tiny import tiny_model, tiny_windows

BLOCK = 8
SHAPES = [(32, 48), (33, 43), (21, 20)]


def _problem(shape: tuple[int, int], *, tokens: int = 200, seed: int = 0) -> tuple[Tensor, Tensor, Gram]:
    """Weight (O, I), correlated inputs (tokens, I) that are not centred, and their sums; float64."""
    generator = torch.Generator().manual_seed(seed)
    O, I = shape
    mix_II = torch.randn(I, I, generator=generator, dtype=torch.float64)
    x_TI = torch.randn(tokens, I, generator=generator, dtype=torch.float64) @ mix_II + 1
    gram = Gram.empty(I, torch.device("cpu"))
    for part in x_TI.split(77):
        gram.add(part[None])
    return torch.randn(O, I, generator=generator, dtype=torch.float64), x_TI, gram


def _block_mask(shape: tuple[int, int], *, seed: int = 0) -> BlockMask:
    """About half of the tiles; the first block row keeps all, the last one none."""
    P, Q = -(-shape[0] // BLOCK), -(-shape[1] // BLOCK)
    kept_PQ = torch.rand(P, Q, generator=torch.Generator().manual_seed(seed)) < 0.5
    kept_PQ[-1] = False
    kept_PQ[0] = True
    return BlockMask(kept_PQ, shape, BLOCK)


def least_squares(weight_OI: Tensor, x_TI: Tensor, kept_OI: Tensor, damping: float, *, target_TO: Tensor | None = None) -> Tensor:
    """Rows that keep the same by `lstsq` on the inputs with the damping as further rows: sqrt(c) 1, whose target is sqrt(c) w."""
    c = damping * (x_TI.square().sum(0).mean())
    rows_NI = torch.cat([x_TI, c.sqrt() * torch.eye(x_TI.shape[1], dtype=x_TI.dtype)])
    found_OI = torch.zeros_like(weight_OI)
    for kept_I in kept_OI.unique(dim=0):
        alike = (kept_OI == kept_I).all(1)
        if kept_I.any():
            target_NR = rows_NI @ weight_OI[alike].T
            if target_TO is not None:
                target_NR[: len(x_TI)] = target_TO[:, alike]
            solution_SR = torch.linalg.lstsq(rows_NI[:, kept_I], target_NR, driver="gelsy").solution
            found_OI[alike.nonzero(), kept_I.nonzero()[:, 0]] = solution_SR.T
    return found_OI


@pytest.mark.parametrize("damping", [0.0, 0.01, 0.3])
@pytest.mark.parametrize("shape", SHAPES)
def test_the_kept_weights_are_a_dense_least_squares_solution(shape: tuple[int, int], damping: float) -> None:
    weight_OI, x_TI, gram = _problem(shape)
    mask = _block_mask(shape)
    solved = reconstruct(weight_OI, mask, gram, damping=damping)
    expected_OI = least_squares(weight_OI, x_TI, mask.expand(), damping)
    torch.testing.assert_close(solved.weight_OI, expected_OI, rtol=1e-8, atol=1e-8)
    assert not solved.weight_OI[~mask.expand()].view(torch.int64).any()  # +0.0

    total = (x_TI @ weight_OI.T).square().sum()
    before = (x_TI @ (weight_OI * mask.expand() - weight_OI).T).square().sum() / total
    after = (x_TI @ (expected_OI - weight_OI).T).square().sum() / total
    assert solved.error_before == pytest.approx(float(before), rel=1e-9)
    assert solved.error_after == pytest.approx(float(after), rel=1e-7)
    assert solved.error_after < solved.error_before


def test_single_elements_are_solved_row_by_row() -> None:
    weight_OI, x_TI, gram = _problem((12, 20))
    mask = ElementMask.detect(torch.rand(12, 20, generator=torch.Generator().manual_seed(1)) - 0.5 > 0)
    solved = reconstruct(weight_OI, mask, gram)
    torch.testing.assert_close(solved.weight_OI, least_squares(weight_OI, x_TI, mask.expand(), 0.01), rtol=1e-8, atol=1e-8)


def test_a_bias_takes_the_mean_over() -> None:
    """With a bias the reference has one more column, of ones, which is neither pruned nor damped."""
    weight_OI, x_TI, gram = _problem((32, 48))
    mask, bias_O = _block_mask((32, 48)), torch.arange(32.0, dtype=torch.float64)
    solved = reconstruct(weight_OI, mask, gram, bias_O=bias_O)
    centred_TI = x_TI - x_TI.mean(0)
    expected_OI = least_squares(weight_OI, centred_TI, mask.expand(), 0.01)
    torch.testing.assert_close(solved.weight_OI, expected_OI, rtol=1e-8, atol=1e-8)
    expected_O = bias_O + (weight_OI - expected_OI) @ x_TI.mean(0)
    torch.testing.assert_close(solved.bias_O, expected_O, rtol=1e-8, atol=1e-8)
    target_TO, found_TO = x_TI @ weight_OI.T + bias_O, x_TI @ solved.weight_OI.T + solved.bias_O
    total = (centred_TI @ weight_OI.T).square().sum()
    assert solved.error_after == pytest.approx(float((found_TO - target_TO).square().sum() / total), rel=1e-7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("damping", [0.01, 10.0])
def test_never_worse_than_leaving_the_weights_alone(dtype: torch.dtype, damping: float) -> None:
    """Block row by block row, for the weights as stored; rows that keep everything are not touched."""
    for seed in range(3):
        weight_OI, x_TI, gram = _problem((64, 48), seed=seed)
        mask = _block_mask((64, 48), seed=seed)
        stored_OI = weight_OI.to(dtype)
        solved = reconstruct(stored_OI, mask, gram, damping=damping)
        assert solved.weight_OI.dtype == dtype
        assert not solved.weight_OI[~mask.expand()].any()
        assert torch.equal(solved.weight_OI[:BLOCK], stored_OI[:BLOCK])
        dense_OI, alone_OI = stored_OI.double(), (stored_OI * mask.expand()).double()
        for rows in range(0, 64, BLOCK):
            errors = [
                (x_TI @ (trial_OI - dense_OI)[rows : rows + BLOCK].T).square().sum()
                for trial_OI in (solved.weight_OI.double(), alone_OI)
            ]
            assert errors[0] <= errors[1]


def test_rows_that_rounding_would_spoil_stay_as_they_were() -> None:
    """What is dropped hardly matters, so the solution differs from the weights by less than bfloat16 tells apart, if at all."""
    weight_OI, _, _ = _problem((16, 32))
    x_TI = torch.randn(400, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    x_TI[:, 16:] *= 1e-6
    gram = Gram.empty(32, torch.device("cpu"))
    gram.add(x_TI)
    mask = BlockMask(torch.tensor([[True, True, False, False]] * 2), (16, 32), BLOCK)
    stored_OI = weight_OI.bfloat16()
    solved = reconstruct(stored_OI, mask, gram)
    assert torch.equal(solved.weight_OI, stored_OI * mask.expand())
    assert solved.rows_kept_alone == 16
    assert solved.error_after == solved.error_before


def test_float32_falls_back_to_float64_where_it_cannot_solve() -> None:
    """Inputs of which some are copies but for one part in 1e6: float32 sees a singular matrix."""
    generator = torch.Generator().manual_seed(5)
    half_TI = torch.randn(300, 24, generator=generator, dtype=torch.float64)
    x_TI = torch.cat([half_TI, half_TI + 1e-6 * torch.randn(300, 24, generator=generator, dtype=torch.float64)], 1)
    weight_OI = torch.randn(32, 48, generator=generator, dtype=torch.float64)
    gram = Gram.empty(48, torch.device("cpu"))
    gram.add(x_TI)
    kept_PQ = torch.tensor([[True, True, False, True, True, True]] * 4)
    mask = BlockMask(kept_PQ, (32, 48), BLOCK)
    solved = reconstruct(weight_OI, mask, gram, damping=0.0, dtype=torch.float32)
    assert solved.solved_again == 4
    assert solved.error_after < 1e-10 * solved.error_before  # the copies make up for what goes
    easy = reconstruct(weight_OI, mask, gram, damping=0.01, dtype=torch.float32)
    assert easy.solved_again == 0
    exact = reconstruct(weight_OI, mask, gram, damping=0.01)
    torch.testing.assert_close(easy.weight_OI, exact.weight_OI, rtol=1e-3, atol=1e-3)


def test_fewer_tokens_than_features_and_no_damping() -> None:
    """Many solutions: the one nearest to the weights, which is what an infinitesimal damping gives."""
    weight_OI, _, gram = _problem((16, 48), tokens=10)
    solved = reconstruct(weight_OI, BlockMask(torch.ones(2, 6, dtype=torch.bool).tril(3), (16, 48), BLOCK), gram, damping=0.0)
    assert solved.error_after < 1e-12


def test_batches_do_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    weight_OI, _, gram = _problem((64, 48))
    mask = _block_mask((64, 48))
    whole = reconstruct(weight_OI, mask, gram)
    monkeypatch.setattr(solving, "WORKSPACE_BYTES", 1)  # one block row at a time
    torch.testing.assert_close(reconstruct(weight_OI, mask, gram).weight_OI, whole.weight_OI, rtol=1e-12, atol=1e-12)


# --- whole models --------------------------------------------------------------------------------------------------------------


def _prune(kind: str, model: Any, **settings: Any) -> tuple[Pruned, nn.ModuleList]:
    prefix = {"gpt2": "transformer.h", "opt": "model.decoder.layers"}.get(kind, "model.layers")
    layers = model.get_submodule(prefix)
    chosen = PruneSettings(**{"sparsity": 0.5, "block": BLOCK, "reconstruct": True, **settings})
    return prune_layers(layers, prefix, chosen, capture(model, layers, tiny_windows(count=12))), layers


def _inputs(layers: nn.ModuleList, prefix: str, model: Any) -> dict[str, Tensor]:
    seen: dict[str, Tensor] = {}
    linears = [linear for i, layer in enumerate(layers) for linear in find_linears(layer, f"{prefix}.{i}")]
    handles = [
        linear.module.register_forward_hook(lambda _m, args, _out, name=linear.name: seen.update({name: args[0].flatten(0, -2)}))
        for linear in linears
    ]
    with torch.no_grad():
        model(tiny_windows(count=12))
    for handle in handles:
        handle.remove()
    return {name: x.double() for name, x in seen.items()}


@pytest.mark.parametrize("kind", ["llama", "qwen2", "gpt2", "opt"])
def test_every_linear_is_solved_behind_the_layers_solved_before_it(kind: str) -> None:
    """Layer by layer against least squares on inputs from full forwards of a reference that is written as it goes."""
    model, reference = tiny_model(kind), tiny_model(kind)
    done, layers = _prune(kind, model, score="energy", select="row")
    prefix = next(iter(done.masks)).split(".0.")[0]
    others = reference.get_submodule(prefix)
    for index, layer in enumerate(others):
        inputs = _inputs(others, prefix, reference)
        for linear in find_linears(layer, f"{prefix}.{index}"):
            x_TI, mask = inputs[linear.name], done.masks[linear.name]
            bias = linear.module.bias if getattr(linear.module, "bias", None) is not None else None
            mean_I = x_TI.mean(0) if bias is not None else torch.zeros(x_TI.shape[1], dtype=torch.float64)
            dense_OI = linear.weight_OI.double()
            solved_OI = least_squares(dense_OI, x_TI - mean_I, mask.expand(), 0.01)
            linear.weight_OI.copy_(solved_OI)
            if bias is not None:
                bias.data += (dense_OI - solved_OI) @ mean_I
        for mine, theirs in zip(find_linears(layers[index]), find_linears(layer), strict=True):
            torch.testing.assert_close(mine.weight_OI, theirs.weight_OI, rtol=2e-3, atol=2e-4)
            assert not mine.weight_OI[~done.masks[f"{prefix}.{index}.{mine.name}"].expand()].any()
    for name, one in done.reconstructions.items():
        assert 0 <= one.error_after <= one.error_before, name
    assert sum(r.error_after for r in done.reconstructions.values()) < 0.9 * sum(
        r.error_before for r in done.reconstructions.values()
    )


@pytest.mark.parametrize("score", ["wanda", "energy", "obs"])
def test_reconstruction_leaves_the_rest_of_the_model_and_given_patterns_alone(score: str) -> None:
    model = tiny_model("llama")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    done, layers = _prune("llama", model, score=score)
    weights = {f"{name}.weight" for name in done.masks}
    for name, tensor in model.state_dict().items():
        assert name in weights or torch.equal(tensor, before[name]), name
    again = tiny_model("llama")
    given = dict(done.masks)
    layers = again.get_submodule("model.layers")
    captured = capture(again, layers, tiny_windows(count=12))
    repeated = prune_layers(layers, "model.layers", PruneSettings(0.1, BLOCK, reconstruct=True), captured, given=done.pattern)
    assert repeated.pattern.digest == done.pattern.digest
    mask: Mask
    for name, mask in given.items():
        assert not again.get_submodule(name).weight[~mask.expand()].any()
        torch.testing.assert_close(again.get_submodule(name).weight, model.get_submodule(name).weight, rtol=1e-6, atol=1e-7)
