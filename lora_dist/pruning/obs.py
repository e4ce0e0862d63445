"""The order in which a block row loses its tiles, each the one that costs least while all other kept weights make up for it.

    cost of tile q   tr(W_q (G_qq)^-1 W_q^T),   G = inverse of (H + c 1) over the columns still kept
    then             W -= W_q (G_qq)^-1 G_q:,   G -= G_:q (G_qq)^-1 G_q:

The optimal brain surgeon, by whole tiles: the cost is exactly what the best reconstruction (`solve.py`, same damping) loses more
without q, and both updates are exact, so the costs of a row add up to its least-squares error. Block rows do not touch each other: they
are done in batches, and each process does its part of them.

Costs about 2 M I^2 (O / b) (M tiles removed of each block row) multiply-adds times b, less as tiles go: for M = Q that is at most 2 O I^3,
and one I x I matrix of memory a block row in the batch. Called by `prune.py`.

Shapes: O/I out/in features, b block side, P/Q block rows and columns, B block rows in a batch, K tiles still kept, M tiles to remove.
"""

from __future__ import annotations

import heapq
from dataclasses import dataclass

import torch
from torch import Tensor

from lora_dist.pruning.gram import Alone, Peers
from lora_dist.pruning.solve import WORKSPACE_BYTES

COMPACT = 0.75
"""share of tiles still kept at which those that are gone are cut out of the matrices"""


@dataclass(frozen=True)
class Removals:
    """What each block row loses first, second, ... and what it costs.

    Attributes:
        order_PM: int64 (P, M), block columns.
        costs_PM: float64 (P, M), increase of ||(V - W) X||^2 + c ||V - W||^2.
    """

    order_PM: Tensor
    costs_PM: Tensor

    def mask(self, drops_P: Tensor, block_columns: int) -> Tensor:
        """Bool (P, Q), True = kept, without the first `drops_P` of each block row."""
        kept_PQ = torch.ones(len(self.order_PM), block_columns, dtype=torch.bool)
        gone_PM = torch.arange(self.order_PM.shape[1]) < drops_P[:, None]
        kept_PQ[gone_PM.nonzero()[:, 0], self.order_PM[gone_PM]] = False
        return kept_PQ

    def cheapest(self, count: int) -> Tensor:
        """int64 (P,): how many tiles each block row loses if `count` are taken one after another, the cheapest next one first."""
        drops = [0] * len(self.order_PM)
        costs = self.costs_PM.tolist()
        heads = [(row[0], p) for p, row in enumerate(costs) if row]
        heapq.heapify(heads)
        for _ in range(count):
            _, p = heapq.heappop(heads)
            drops[p] += 1
            if drops[p] < len(costs[p]):
                heapq.heappush(heads, (costs[p][drops[p]], p))
        return torch.tensor(drops)


@torch.no_grad()
def removals(
    weight_OI: Tensor,
    products_II: Tensor,
    block: int,
    *,
    most: int | None = None,
    damping: float = 0.01,
    dtype: torch.dtype | None = None,
    peers: Peers | None = None,
) -> Removals:
    """Collective: the first `most` removals of every block row.

    Args:
        weight_OI: (O, I), not pruned.
        products_II: H, float64 (I, I), on the device to compute on.
        block: tile side b.
        most: tiles to remove of each row; default: all.
        damping: share of the mean of H's diagonal that is added to it; more than 0 where inputs are linearly dependent.
        dtype: default: float32 on GPUs, float64 on CPUs.

    Returns:
        On CPU, alike on every process.
    """
    peers = peers or Alone()
    device = products_II.device
    dtype = dtype or (torch.float32 if device.type == "cuda" else torch.float64)
    O, I = weight_OI.shape
    P, Q = -(-O // block), -(-I // block)
    most = Q if most is None else most
    damped_II = products_II + damping * products_II.diagonal().mean() * torch.eye(I, dtype=torch.float64, device=device)
    # Columns that fill up the last tile are independent of all others and hold no weight, so they cost nothing.
    inverse_JJ = torch.eye(Q * block, dtype=dtype, device=device)
    inverse_JJ[:I, :I] = torch.linalg.inv(damped_II).to(dtype)
    padded_OJ = torch.nn.functional.pad(weight_OI.to(device, dtype), (0, Q * block - I, 0, P * block - O))
    rows_PbJ = padded_OJ.view(P, block, Q * block)
    order_PM = torch.zeros(P, most, dtype=torch.float64, device=device)
    costs_PM = torch.zeros(P, most, dtype=torch.float64, device=device)
    mine = torch.arange(peers.rank, P, peers.size, device=device)
    for part in mine.split(max(1, WORKSPACE_BYTES // (3 * inverse_JJ.numel() * dtype.itemsize))) if len(mine) else ():
        state = _Rows(rows_PbJ[part].clone(), inverse_JJ.expand(len(part), -1, -1).clone(), block)
        for m in range(most):
            tiles_B, costs_B = state.remove_cheapest()
            order_PM[part, m], costs_PM[part, m] = tiles_B.double(), costs_B.double()
    if peers.size > 1:
        peers.add(order_PM)
        peers.add(costs_PM)
    return Removals(order_PM.long().cpu(), costs_PM.cpu())


class _Rows:
    """A batch of block rows on their way down."""

    def __init__(self, weight_BbJ: Tensor, inverse_BJJ: Tensor, block: int):
        self.weight_BbJ, self.inverse_BJJ, self.block = weight_BbJ, inverse_BJJ, block
        B, tiles = len(weight_BbJ), weight_BbJ.shape[2] // block
        self.names_BK = torch.arange(tiles, device=weight_BbJ.device).expand(B, -1).clone()
        """block columns that the matrices still hold"""
        self.kept_BK = torch.ones_like(self.names_BK, dtype=torch.bool)
        self._left = tiles

    def remove_cheapest(self) -> tuple[Tensor, Tensor]:
        """Take each row's cheapest tile away: its block column (B,) and its cost (B,)."""
        self._compact()
        b, (B, K) = self.block, self.names_BK.shape
        batch = torch.arange(B, device=self.names_BK.device)
        within_BKbb = self.inverse_BJJ.view(B, K, b, K, b).diagonal(dim1=1, dim2=3).permute(0, 3, 1, 2)
        eye = torch.eye(b, dtype=within_BKbb.dtype, device=within_BKbb.device)
        precision_BKbb = torch.linalg.inv(torch.where(self.kept_BK[..., None, None], within_BKbb, eye))
        tiles_BKbb = self.weight_BbJ.view(B, b, K, b).transpose(1, 2)
        costs_BK = ((tiles_BKbb @ precision_BKbb) * tiles_BKbb).sum((2, 3)).masked_fill(~self.kept_BK, float("inf"))
        costs_B, chosen_B = costs_BK.min(1)
        columns_Bb = chosen_B[:, None] * b + torch.arange(b, device=chosen_B.device)
        from_tile_BJb = self.inverse_BJJ.gather(2, columns_Bb[:, None].expand(B, K * b, b))
        share_BJb = from_tile_BJb @ precision_BKbb[batch, chosen_B]
        tile_Bbb = self.weight_BbJ.gather(2, columns_Bb[:, None].expand(B, b, b))
        self.weight_BbJ.baddbmm_(tile_Bbb, share_BJb.mT, alpha=-1)
        self.inverse_BJJ.baddbmm_(share_BJb, from_tile_BJb.mT, alpha=-1)
        self.kept_BK[batch, chosen_B] = False
        self._left -= 1
        return self.names_BK[batch, chosen_B], costs_B.clamp_min(0)

    def _compact(self) -> None:
        """Cut out what is gone once it is a quarter: every row has lost equally many tiles."""
        b, (B, K) = self.block, self.names_BK.shape
        if self._left > COMPACT * K:
            return
        tiles_BL = self.kept_BK.nonzero()[:, 1].view(B, self._left)
        self.names_BK, self.kept_BK = self.names_BK.gather(1, tiles_BL), self.kept_BK.gather(1, tiles_BL)
        columns_BJ = (tiles_BL[:, :, None] * b + torch.arange(b, device=tiles_BL.device)).flatten(1)
        J = columns_BJ.shape[1]
        self.weight_BbJ = self.weight_BbJ.gather(2, columns_BJ[:, None].expand(B, b, J))
        rows_BJI = self.inverse_BJJ.gather(1, columns_BJ[:, :, None].expand(B, J, K * b))
        self.inverse_BJJ = rows_BJI.gather(2, columns_BJ[:, None].expand(B, J, J))
