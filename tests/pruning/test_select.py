"""Selection against brute force, and its edges."""

from __future__ import annotations

import itertools

import pytest
import torch

from lora_dist.pruning import select_matrix, select_row, select_tiles


def _brute_force(scores: list[float], drop: int) -> set[int]:
    """The `drop` positions whose scores sum to the least; ties by position."""
    return set(min(itertools.combinations(range(len(scores)), drop), key=lambda picked: (sum(scores[i] for i in picked), picked)))


@pytest.mark.parametrize("sparsity, drop", [(0.0, 0), (0.25, 3), (0.5, 6), (0.99, 11)])
def test_matrix_drops_the_lowest_tiles_of_all(sparsity: float, drop: int) -> None:
    scores_PQ = torch.rand(3, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    dropped = set((~select_matrix(scores_PQ, sparsity)).flatten().nonzero().flatten().tolist())
    assert dropped == _brute_force(scores_PQ.flatten().tolist(), drop)


@pytest.mark.parametrize("sparsity, drop", [(0.0, 0), (0.2, 1), (0.5, 3), (0.95, 5)])
def test_row_drops_the_same_number_in_every_block_row(sparsity: float, drop: int) -> None:
    scores_PQ = torch.rand(5, 6, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    kept_PQ = select_row(scores_PQ, sparsity)
    for scores_Q, kept_Q in zip(scores_PQ, kept_PQ, strict=True):
        assert set((~kept_Q).nonzero().flatten().tolist()) == _brute_force(scores_Q.tolist(), drop)


def test_counts_are_rounded_down_but_not_by_floating_point() -> None:
    assert (~select_matrix(torch.rand(10, 10), 0.29)).sum() == 29  # 0.29 * 100 is 28.999999999999996
    assert (~select_row(torch.rand(7, 4), 0.2)).sum() == 0


def test_ties_go_by_position() -> None:
    assert select_matrix(torch.zeros(2, 4), 0.5).tolist() == [[False] * 4, [True] * 4]
    assert select_row(torch.zeros(2, 4), 0.5).tolist() == [[False, False, True, True]] * 2


def test_a_row_may_go_but_never_the_matrix() -> None:
    scores_PQ = torch.tensor([[0.0, 0.1], [2.0, 3.0]])
    assert select_matrix(scores_PQ, 0.5).tolist() == [[False, False], [True, True]]
    assert select_matrix(torch.rand(1, 1), 0.99).tolist() == [[True]]
    assert select_row(torch.rand(3, 1), 0.99).all()


def test_what_is_out_of_range_is_refused() -> None:
    with pytest.raises(ValueError, match="sparsity: found 1.0"):
        select_matrix(torch.rand(2, 2), 1.0)
    with pytest.raises(ValueError, match="select: found 'column'"):
        select_tiles("column", torch.rand(2, 2), 0.5)
