"""Tile scores against a loop over tiles, on matrices with edge tiles."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lora_dist.log import UserError
from lora_dist.pruning import layer_scores, tile_scores

SHAPES = [(32, 48), (33, 48), (40, 23), (5, 7)]


def _by_loop(elements_OI: Tensor, block: int) -> Tensor:
    """Sum of every tile, one at a time, in float64."""
    rows = elements_OI.double().split(block, 0)
    return torch.stack([torch.stack([tile.sum() for tile in row.split(block, 1)]) for row in rows])


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("block", [4, 16])
def test_scores_are_sums_over_tiles(shape: tuple[int, int], block: int) -> None:
    generator = torch.Generator().manual_seed(0)
    weight_OI, norm_I = torch.randn(shape, generator=generator), torch.rand(shape[1], generator=generator)
    torch.testing.assert_close(tile_scores(weight_OI, block).double(), _by_loop(weight_OI.abs(), block), rtol=1e-6, atol=0)
    wanda = _by_loop(weight_OI.abs() * norm_I, block)
    torch.testing.assert_close(tile_scores(weight_OI, block, norm_I).double(), wanda, rtol=1e-6, atol=0)
    energy = _by_loop((weight_OI * norm_I).square(), block)
    torch.testing.assert_close(tile_scores(weight_OI, block, norm_I, squared=True).double(), energy, rtol=1e-5, atol=0)
    transposed = weight_OI.T.contiguous().T  # as a Conv1D's weight comes
    torch.testing.assert_close(tile_scores(transposed, block, norm_I).double(), wanda, rtol=1e-6, atol=0)


def test_half_precision_is_summed_in_float32() -> None:
    weight_OI = torch.full((64, 64), 0.3, dtype=torch.bfloat16)
    scores_PQ = tile_scores(weight_OI, 64)
    assert scores_PQ.dtype == torch.float32
    torch.testing.assert_close(scores_PQ, weight_OI.float().sum().view(1, 1), rtol=1e-6, atol=0)


def test_random_depends_on_seed_and_name_only() -> None:
    def scores(seed: int, name: str) -> Tensor:
        return layer_scores("random", name, torch.zeros(64, 64), 16, norm_I=None, seed=seed)

    torch.manual_seed(1)
    first = scores(0, "a")
    torch.manual_seed(2)
    assert torch.equal(first, scores(0, "a"))
    assert not torch.equal(first, scores(1, "a"))
    assert not torch.equal(first, scores(0, "b"))
    assert first.shape == (4, 4) and first.unique().numel() == 16


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_score_that_is_not_finite_names_layer_and_tile(bad: float) -> None:
    weight_OI = torch.ones(32, 32)
    weight_OI[20, 3] = bad
    with pytest.raises(UserError, match=r"layer model.layers.0.q, tile \(1, 0\): found a score of (nan|inf)"):
        layer_scores("magnitude", "model.layers.0.q", weight_OI, 16, norm_I=None, seed=0)


def test_an_unknown_score_is_refused() -> None:
    with pytest.raises(ValueError, match="score: found 'best'"):
        layer_scores("best", "a", torch.ones(16, 16), 16, norm_I=None, seed=0)
