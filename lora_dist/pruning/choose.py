"""How the tiles of one linear are chosen: by a score of each tile, by removal one after another, or as given. Called by `prune.py`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from lora_dist.blocks import BlockMask, Mask, NamedLinear
from lora_dist.pruning.gram import Peers
from lora_dist.pruning.obs import removals
from lora_dist.pruning.scores import layer_scores
from lora_dist.pruning.select import drop_count, select_lowest, select_tiles
from lora_dist.pruning.solve import Fit


@dataclass(frozen=True)
class PruneSettings:
    """How tiles are scored and dropped."""

    sparsity: float
    """share of the tiles of each matrix (or block row) to drop, in [0, 1)"""
    block: int = 16
    """tile side"""
    score: str = "wanda"
    """wanda, energy, obs, magnitude or random"""
    select: str = "matrix"
    """matrix, row or global"""
    seed: int = 0
    """of the random score"""
    reconstruct: bool = False
    """solve for the kept weights"""
    damping: float = 0.01
    """share of the mean of H's diagonal that is added to it"""
    target: str = "same"
    """same: outputs of the unpruned linear on the same inputs; dense: what makes the layer most like that of the dense model"""

    @property
    def sees_text(self) -> bool:
        """Whether calibration is needed."""
        return self.reconstruct or self.select == "global" or self.score in ("wanda", "energy", "obs")


@dataclass(frozen=True)
class Choice:
    """What decides about tiles.

    Attributes:
        settings: score, selection, sparsity.
        drops: tiles that each linear loses, by name, for `select global`.
        given: masks by name, to be taken as they are.
    """

    settings: PruneSettings
    drops: Mapping[str, int] | None = None
    given: Mapping[str, Mask] | None = None

    def by_score(self, linear: NamedLinear, norm_I: Tensor | None) -> Mask:
        """By a score that looks at each tile alone, from ||x_I||_2 of its inputs where it needs them.

        Raises:
            UserError: if a score is not finite.
        """
        if self.given is not None:
            return self.given[linear.name]
        settings, weight_OI = self.settings, linear.weight_OI
        scores_PQ = layer_scores(settings.score, linear.name, weight_OI, settings.block, norm_I=norm_I, seed=settings.seed)
        if self.drops is not None:
            kept_PQ = select_lowest(scores_PQ, self.drops[linear.name])
        else:
            kept_PQ = select_tiles(settings.select, scores_PQ, settings.sparsity)
        return BlockMask(kept_PQ, (weight_OI.shape[0], weight_OI.shape[1]), settings.block)

    def by_removal(self, linear: NamedLinear, fit: Fit, peers: Peers) -> Mask:
        """Collective: tiles taken away one by one, each the one whose loss the others make up for best."""
        settings = self.settings
        O, I = fit.weight_OI.shape
        P, Q = -(-O // settings.block), -(-I // settings.block)
        by_row = settings.select == "row"
        most = drop_count(settings.sparsity, Q) if by_row else Q
        found = removals(fit.unmasked(), fit.products_II, settings.block, most=most, damping=settings.damping, peers=peers)
        count = drop_count(settings.sparsity, P * Q) if self.drops is None else self.drops[linear.name]
        drops_P = torch.full((P,), most) if by_row else found.cheapest(count)
        return BlockMask(found.mask(drops_P, Q), (O, I), settings.block)
