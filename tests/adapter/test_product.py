"""The masked product against the dense formula and autograd."""

from __future__ import annotations

import pytest
import torch

from lora_dist import gemm
from lora_dist.adapter import linear, masked_delta, masked_product, tiles
from lora_dist.adapter.linear import Adapted, adapted_linears
from lora_dist.blocks import BlockMask, ElementMask, grid

SHAPES = [(64, 48, 16), (70, 50, 16), (40, 24, 8), (100, 36, 32), (16, 16, 16)]


def case(shape, block, dtype, seed=0, batch=(2, 11), rank=4):
    generator = torch.Generator().manual_seed(seed)
    O, I = shape
    x = torch.randn(*batch, I, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    A = torch.randn(rank, I, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    B = torch.randn(O, rank, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    mask = BlockMask(torch.rand(grid(shape, block), generator=generator) > 0.5, shape, block)
    g = torch.randn(*batch, O, generator=generator, dtype=torch.float64).to(dtype)
    return x, A, B, mask, g


def dense_formula(x, A, B, kept_OI, scale):
    return x @ ((B @ A) * kept_OI * scale).T


@pytest.mark.parametrize("O,I,block", SHAPES)
@pytest.mark.parametrize("factorised", [True, False])
def test_output_and_all_gradients_equal_autograd_on_the_dense_formula(O, I, block, factorised):
    x, A, B, mask, g = case((O, I), block, torch.float64)
    y = masked_product(x, A, B, mask.kept_PQ, block, 0.7, factorised=factorised)
    reference = dense_formula(x, A, B, mask.expand(), 0.7)
    torch.testing.assert_close(y, reference, rtol=1e-12, atol=1e-12)
    for mine, theirs in zip(torch.autograd.grad(y, (x, A, B), g), torch.autograd.grad(reference, (x, A, B), g), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("O,I,block", SHAPES)
@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize(
    "form",
    [
        "merged",
        "merged in pieces",
        "merged, dense",
        "merged, few tokens",
        "merged, dense, few tokens",
        "factorised",
        "dropped",
        "plain",
    ],
)
def test_base_and_update_in_one_step_equal_autograd_on_the_dense_formula(O, I, block, biased, form, monkeypatch):
    monkeypatch.setattr(gemm, "ONEDNN_IS_FASTER", False)
    if form == "merged in pieces":
        monkeypatch.setattr(linear, "_PIECE_WEIGHTS", 2 * block * I)  # two rows of tiles, of which the last piece has fewer
    batch = (2, 11) if form.endswith("few tokens") else (4, 37)  # whether the gradient of x adds the update to the weight again
    x, A, B, mask, g = case((O, I), block, torch.float64, batch=batch)
    generator = torch.Generator().manual_seed(1)
    W = torch.randn(O, I, generator=generator, dtype=torch.float64)  # also where the mask is zero
    bias = torch.randn(O, generator=generator, dtype=torch.float64) if biased else None
    dropped = torch.nn.functional.dropout(x, 0.3) if form == "dropped" else None
    kept_PQ, kept_OI = (None, torch.ones(O, I)) if form == "plain" else (mask.kept_PQ, mask.expand())
    layer = Adapted(
        W, bias, A, B, kept_PQ, block, 0.7, "merged" if form.startswith("merged") else "beside", dense="dense" in form
    )
    (y,) = adapted_linears(x, [layer], dropped)
    seen = x if dropped is None else dropped
    reference = torch.nn.functional.linear(x, W, bias) + dense_formula(seen, A, B, kept_OI, 0.7)
    torch.testing.assert_close(y, reference, rtol=1e-12, atol=1e-12)
    theirs = torch.autograd.grad(reference, (x, A, B), g, retain_graph=True)
    for mine, their in zip(torch.autograd.grad(y, (x, A, B), g), theirs, strict=True):
        torch.testing.assert_close(mine, their, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("tokens", [1, 31, 64, 300])
@pytest.mark.parametrize("threads", [1, 2, 4])
def test_chunks_of_tokens_change_nothing(tokens, threads, monkeypatch):
    """Also a last chunk that is shorter, fewer chunks than threads at the end, and none of them a whole number of tiles."""
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    x, A, B, mask, g = case((70, 50), 16, torch.float64, batch=(tokens,))
    found = []
    for chunk_bytes in (1, 2**30):  # 32 tokens, all tokens
        monkeypatch.setitem(tiles.CHUNK_BYTES, "cpu", chunk_bytes)
        y = masked_product(x, A, B, mask.kept_PQ, 16, 0.7, factorised=True)
        found.append((y, *torch.autograd.grad(y, (x, A, B), g)))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("factorised", [True, False])
def test_gradients_pass_gradcheck(factorised):
    x, A, B, mask, _ = case((12, 10), 4, torch.float64, batch=(3,), rank=2)
    assert torch.autograd.gradcheck(
        lambda x, A, B: masked_product(x, A, B, mask.kept_PQ, 4, 1.3, factorised=factorised), (x, A, B)
    )


def test_element_masks_take_the_general_path():
    x, A, B, _, g = case((24, 18), 8, torch.float64)
    mask = ElementMask.detect((torch.rand(24, 18, generator=torch.Generator().manual_seed(5)) > 0.5).double())
    y = masked_product(x, A, B, mask.bits, 1, 0.7, factorised=False)
    reference = dense_formula(x, A, B, mask.expand(), 0.7)
    torch.testing.assert_close(y, reference, rtol=1e-12, atol=1e-12)
    for mine, theirs in zip(torch.autograd.grad(y, (x, A, B), g), torch.autograd.grad(reference, (x, A, B), g), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-12)
    with pytest.raises(ValueError, match="factorised with an element mask"):
        masked_product(x, A, B, mask.bits, 1, 0.7, factorised=True)


def test_float32_error_is_rounding():
    x, A, B, mask, _ = case((512, 256), 16, torch.float32, batch=(64,), rank=8)
    exact = dense_formula(x.double(), A.double(), B.double(), mask.expand(), 2.0)
    y = masked_product(x, A, B, mask.kept_PQ, 16, 2.0, factorised=True)
    assert float((y - exact).norm() / exact.norm()) < 1e-6


@pytest.mark.parametrize("factorised", [True, False])
def test_nothing_of_the_size_of_the_weight_is_saved_for_the_backward_pass(factorised):
    x, A, B, mask, _ = case((512, 512), 16, torch.float32, batch=(8,), rank=2)
    sizes = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (sizes.append(t.numel()), t)[1], lambda t: t):
        masked_product(x, A, B, mask.kept_PQ, 16, 1.0, factorised=factorised)
    assert sizes and max(sizes) <= x.numel()


def test_the_delta_is_exactly_plus_zero_outside_the_mask_even_where_factors_are_not_finite():
    _x, A, B, mask, _ = case((64, 48), 16, torch.float32)
    with torch.no_grad():
        A[0, 0] = float("inf")
    delta = masked_delta(A, B, mask.kept_PQ, 16, 1.0).detach()
    outside = delta[~mask.expand()]
    assert torch.equal(outside, torch.zeros_like(outside)) and not torch.signbit(outside).any()


def test_frozen_inputs_get_no_gradient():
    x, A, B, mask, g = case((32, 32), 16, torch.float64)
    x = x.detach()
    y = masked_product(x, A, B, mask.kept_PQ, 16, 1.0, factorised=True)
    y.backward(g)
    assert x.grad is None and A.grad is not None and B.grad is not None


def test_factors_in_float32_with_half_precision_activations_give_float32_gradients():
    x, A, B, mask, g = case((64, 64), 16, torch.float32)
    y = masked_product(x.bfloat16(), A, B, mask.kept_PQ, 16, 1.0, factorised=True)
    assert y.dtype == torch.bfloat16
    dA, dB = torch.autograd.grad(y, (A, B), g.bfloat16())
    assert dA.dtype == dB.dtype == torch.float32
    reference = torch.autograd.grad(dense_formula(x, A, B, mask.expand(), 1.0), (A, B), g)
    for mine, theirs in zip((dA, dB), reference, strict=True):
        assert float((mine - theirs).norm() / theirs.norm()) < 0.02
