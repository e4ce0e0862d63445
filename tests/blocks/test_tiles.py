"""Kept tiles side by side, and back."""

import pytest
import torch

from lora_dist.blocks.tiles import gather_tiles, places, scatter_tiles

torch.manual_seed(0)


@pytest.mark.parametrize("shape", [(32, 48), (40, 24), (16, 7), (5, 5)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tiles_are_those_of_the_matrix_in_order(shape, dtype):
    b, (O, I) = 16, shape
    kept_PQ = torch.rand(-(-O // b), -(-I // b)) < 0.6
    kept_PQ[0, 0] = True
    weight_OI = torch.randn(shape).to(dtype)
    values = gather_tiles(weight_OI, places(kept_PQ), b)
    assert values.shape == (int(kept_PQ.sum()), b, b) and values.dtype == dtype
    for tile, (p, q) in zip(values, kept_PQ.nonzero().tolist(), strict=True):
        inside = weight_OI[p * b : (p + 1) * b, q * b : (q + 1) * b]
        assert torch.equal(tile[: inside.shape[0], : inside.shape[1]], inside)
        assert not tile[inside.shape[0] :].any() and not tile[:, inside.shape[1] :].any()
    mask_OI = kept_PQ.repeat_interleave(b, 0)[:O].repeat_interleave(b, 1)[:, :I]
    assert torch.equal(scatter_tiles(values, places(kept_PQ), b, shape), weight_OI * mask_OI)
