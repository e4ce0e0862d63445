"""Greedy removal of tiles against the definition: each step solves every candidate's least squares from scratch."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lora_dist.blocks import BlockMask
from lora_dist.pruning import Gram, obs, reconstruct, removals

BLOCK = 4


def _problem(O: int, I: int) -> tuple[Tensor, Gram]:
    generator = torch.Generator().manual_seed(O)
    mix_II = torch.randn(I, I, generator=generator, dtype=torch.float64)
    gram = Gram.empty(I, torch.device("cpu"))
    gram.add(torch.randn(100, I, generator=generator, dtype=torch.float64) @ mix_II)
    return torch.randn(O, I, generator=generator, dtype=torch.float64), gram


def _damped(gram: Gram) -> Tensor:
    H = gram.products_II
    return H + 0.01 * H.diagonal().mean() * torch.eye(len(H), dtype=torch.float64)


def _loss(weight_bI: Tensor, H: Tensor, kept_Q: list[bool]) -> float:
    """Damped error of the best weights that live on the kept tiles only."""
    kept_I = torch.tensor(kept_Q).repeat_interleave(BLOCK)[: len(H)]
    best_bI = torch.zeros_like(weight_bI)
    if kept_I.any():
        best_bI[:, kept_I] = torch.linalg.solve(H[kept_I][:, kept_I], (weight_bI @ H)[:, kept_I].T).T
    off_bI = best_bI - weight_bI
    return float(((off_bI @ H) * off_bI).sum())


@pytest.mark.parametrize("shape", [(12, 24), (10, 23)])
def test_each_removal_is_the_one_that_loses_least(shape: tuple[int, int]) -> None:
    weight_OI, gram = _problem(*shape)
    found = removals(weight_OI, gram.products_II, BLOCK)
    H = _damped(gram)
    P, Q = found.order_PM.shape
    assert (P, Q) == (3, 6)
    for p in range(P):
        rows_bI, kept, before = weight_OI[p * BLOCK : (p + 1) * BLOCK], [True] * Q, 0.0
        for m in range(Q):
            losses = {q: _loss(rows_bI, H, [*kept[:q], False, *kept[q + 1 :]]) for q in range(Q) if kept[q]}
            best = min(losses, key=losses.__getitem__)
            assert int(found.order_PM[p, m]) == best
            assert float(found.costs_PM[p, m]) == pytest.approx(losses[best] - before, rel=1e-8)
            kept[best], before = False, losses[best]


def test_costs_add_up_to_what_reconstruction_loses() -> None:
    weight_OI, gram = _problem(12, 24)
    found = removals(weight_OI, gram.products_II, BLOCK)
    drops_P = torch.tensor([2, 0, 4])
    mask = BlockMask(found.mask(drops_P, 6), (12, 24), BLOCK)
    assert (~mask.kept_PQ).sum(1).tolist() == [2, 0, 4]
    off_OI = reconstruct(weight_OI, mask, gram).weight_OI - weight_OI
    lost_O = ((off_OI @ _damped(gram)) * off_OI).sum(1)
    for p, drop in enumerate(drops_P.tolist()):
        assert float(lost_O[p * BLOCK : (p + 1) * BLOCK].sum()) == pytest.approx(float(found.costs_PM[p, :drop].sum()), rel=1e-8)


def test_a_budget_for_the_matrix_takes_the_cheapest_next_tile_of_any_row() -> None:
    found = obs.Removals(
        torch.tensor([[1, 0, 2], [2, 1, 0]]), torch.tensor([[1.0, 5.0, 2.0], [3.0, 4.0, 9.0]], dtype=torch.float64)
    )
    # 1 (row 0), 3 (row 1), 4 (row 1), 5 (row 0), then 2, which had to wait for it
    assert [found.cheapest(n).tolist() for n in range(6)] == [[0, 0], [1, 0], [1, 1], [1, 2], [2, 2], [3, 2]]
    assert found.mask(found.cheapest(3), 3).tolist() == [[True, False, True], [True, False, False]]


def test_batches_compaction_and_limits_do_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    weight_OI, gram = _problem(20, 40)
    whole = removals(weight_OI, gram.products_II, BLOCK)
    monkeypatch.setattr(obs, "WORKSPACE_BYTES", 1)  # one block row at a time
    monkeypatch.setattr(obs, "COMPACT", 0.0)  # never
    plain = removals(weight_OI, gram.products_II, BLOCK, most=6)
    assert torch.equal(plain.order_PM, whole.order_PM[:, :6])
    torch.testing.assert_close(plain.costs_PM, whole.costs_PM[:, :6], rtol=1e-8, atol=1e-8)


def test_float32_chooses_nearly_the_same() -> None:
    weight_OI, gram = _problem(12, 24)
    exact, rough = (removals(weight_OI, gram.products_II, BLOCK, dtype=dtype) for dtype in (torch.float64, torch.float32))
    torch.testing.assert_close(rough.costs_PM.sum(1), exact.costs_PM.sum(1), rtol=1e-2, atol=0)
