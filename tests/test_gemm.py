"""Products by whichever library is faster equal torch's own."""

from __future__ import annotations

import pytest
import torch

from lora_dist import gemm


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize("onednn", [True, False])
def test_products_equal_torchs(dtype, biased, onednn, monkeypatch):
    if onednn and not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        pytest.skip("this torch is built without oneDNN")
    monkeypatch.setattr(gemm, "ONEDNN_IS_FASTER", onednn)
    generator = torch.Generator().manual_seed(0)
    x, W = (torch.randn(*size, generator=generator).to(dtype) for size in ((33, 70), (50, 70)))
    bias = torch.randn(50, generator=generator).to(dtype) if biased else None
    exact = x.double() @ W.double().T + (0 if bias is None else bias.double())
    tolerance = {torch.float32: 1e-6, torch.float64: 1e-13, torch.bfloat16: 1e-2}[dtype]
    for mine, reference in (
        (gemm.linear(x, W, bias), exact),
        (gemm.product(x[:, :50], W), x[:, :50].double() @ W.double()),  # a view with gaps between its rows
    ):
        assert mine.dtype == dtype and mine.is_contiguous()
        assert float((mine.double() - reference).norm() / reference.norm()) < tolerance


@pytest.mark.parametrize(
    ("rows", "columns", "few"), [(64, 1024, True), (256, 4096, True), (63, 4096, False), (257, 8192, False), (64, 1023, False)]
)
def test_few_rows_by_a_wide_weight_take_onednn(rows, columns, few, monkeypatch):
    if not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        pytest.skip("this torch is built without oneDNN")
    monkeypatch.setattr(gemm, "ONEDNN_IS_FASTER", False)
    monkeypatch.setattr(gemm, "ONEDNN_IS_FASTER_FOR_FEW", True)
    generator = torch.Generator().manual_seed(0)
    x, W = (torch.randn(n, 24, generator=generator) for n in (rows, columns))
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        y = gemm.linear(x, W)
    assert any("_linear_pointwise" in event.key for event in profile.key_averages()) == few
    exact = x.double() @ W.double().T
    assert float((y.double() - exact).norm() / exact.norm()) < 1e-6


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("emulated", [True, False])
def test_16_bit_products_are_rounded_once_in_however_many_pieces(dtype, emulated, monkeypatch):
    monkeypatch.setattr(gemm, "EMULATED", (dtype,) if emulated else ())
    monkeypatch.setattr(gemm, "_PIECE_ROWS", 16)
    monkeypatch.setattr(gemm, "_PIECE_WEIGHTS", 1000)  # 20 columns of 50
    generator = torch.Generator().manual_seed(0)
    x, W = (torch.randn(*size, generator=generator).to(dtype) for size in ((33, 50), (50, 70)))
    exact = x.double() @ W.double()
    assert gemm.compute_dtype(x) == (torch.float32 if emulated else dtype)
    for found in (gemm.matmul(x, W), gemm.product(x, W), gemm.linear(x, W.T.contiguous()), gemm.matmul(x.T.contiguous().T, W)):
        assert found.dtype == dtype and found.shape == exact.shape
        assert torch.equal(found, exact.to(dtype)) or not emulated
        assert float((found.double() - exact).norm() / exact.norm()) < 1e-2


def test_a_layers_update_is_the_same_where_16_bits_are_emulated(monkeypatch):
    from lora_dist.adapter.product import masked_product

    generator = torch.Generator().manual_seed(0)
    x, g = (torch.randn(40, n, generator=generator).bfloat16() for n in (64, 96))
    kept = torch.rand(6, 4, generator=generator) < 0.5
    found = {}
    for emulated in (True, False):
        monkeypatch.setattr(gemm, "EMULATED", (torch.bfloat16,) if emulated else ())
        for factorised in (True, False):
            A, B = (torch.randn(*size, generator=generator.manual_seed(1)).requires_grad_() for size in ((8, 64), (96, 8)))
            leaf = x.clone().requires_grad_()
            y = masked_product(leaf, A, B, kept, 16, 0.5, factorised=factorised)
            y.backward(g)
            found[emulated, factorised] = [t.detach().float() for t in (y, leaf.grad, A.grad, B.grad)]
    first = found.pop((True, True))
    for tensors in found.values():
        for mine, other in zip(first, tensors, strict=True):
            assert float((mine - other).norm() / mine.norm()) < 2e-2
