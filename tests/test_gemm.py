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
