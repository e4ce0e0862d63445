"""How many tiles each matrix loses when the budget is the whole model's: those that cost the output least, wherever they are.

    damage_m = mean over tokens of ||h(m) - h||^2 / ||h||^2     h: hidden states behind the last layer of the dense model
                                                                h(m): the same with matrix m alone pruned as asked
    cost of tile q of m = damage_m * energy_q / (energies that m lost then)

The energy of a tile (`scores.py`) says what it is worth inside its matrix; the damage, measured, says what an error of that matrix
is worth to the model. Tiles go in ascending order of cost. Every matrix keeps at least a share of its tiles (`LEAST_KEPT` of what was
asked to be kept), since the measured point says little about the far end of the curve.

Costs one forward of the remaining layers a matrix, for `MICRO_BATCHES` of calibration text; layers are on the device one at a time.
Called by `prune.py` before anything is pruned.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lora_dist.blocks import NamedLinear, find_linears
from lora_dist.pruning.calibration import Calibration
from lora_dist.pruning.scores import layer_scores
from lora_dist.pruning.select import drop_count, select_matrix

MICRO_BATCHES = 2
"""of 4,096 tokens, that damages are measured on"""
LEAST_KEPT = 0.7
"""of the tiles that each matrix would keep if all lost the same share; 0.3 was much worse (docs/log.md)"""


@dataclass(frozen=True)
class Sensitivity:
    """One matrix of the dense model.

    Attributes:
        energies_N: of its tiles, on CPU.
        damage: of the model's output, when its lowest tiles go.
        lost: energies of these.
    """

    energies_N: Tensor
    damage: float
    lost: float

    @property
    def costs_N(self) -> Tensor:
        total = float(self.energies_N.double().sum())
        # Where what went weighed nothing, nothing was measured: an error as large as the output is taken to damage as much.
        return self.energies_N.double() * (self.damage / self.lost if self.lost > 0 else 1 / max(total, 1e-300))


@torch.no_grad()
def sensitivities(
    layers: nn.ModuleList, prefix: str, calibration: Calibration, *, sparsity: float, block: int
) -> dict[str, Sensitivity]:
    """Collective: of every linear of the decoder layers, by name in the model. The model is left as it was.

    Args:
        layers: dense.
        prefix: their name in the model.
        calibration: inputs of the first layer, from `capture`; not used up.
        sparsity: share of the tiles of one matrix that go when its damage is measured; at least one does.
        block: tile side.
    """
    peers = calibration.peers
    # One process's first micro-batches are rank 0's first, rank 1's first, ...
    mine = len(range(peers.rank, MICRO_BATCHES, peers.size))
    base = calibration.twin(mine)
    final = base.twin()
    for index, layer in enumerate(layers):
        with _at(layer, base.device):
            final.advance(index, layer)
    found = {}
    for index, layer in enumerate(layers):
        with _at(layer, base.device):
            linears = find_linears(layer, f"{prefix}.{index}")
            norms = base.norms(index, layer, linears)
            energies = {
                linear.name: layer_scores("energy", linear.name, linear.weight_OI, block, norm_I=norms[linear.name], seed=0)
                for linear in linears
            }
            kept = {name: select_matrix(e_PQ, max(sparsity, 1 / e_PQ.numel())) for name, e_PQ in energies.items()}
            variants = [_without(base, index, layer, linear, kept[linear.name], block) for linear in linears]
            base.advance(index, layer)
        for later in range(index + 1, len(layers)):
            with _at(layers[later], base.device):
                for variant in variants:
                    variant.advance(later, layers[later])
        for linear, variant in zip(linears, variants, strict=True):
            energies_PQ = energies[linear.name]
            lost = float(energies_PQ[~kept[linear.name]].double().sum())
            found[linear.name] = Sensitivity(energies_PQ.flatten(), _damage(variant, final), lost)
    return found


def _without(base: Calibration, index: int, layer: nn.Module, linear: NamedLinear, kept_PQ: Tensor, block: int) -> Calibration:
    """The hidden states behind a layer of which one linear lacks some tiles."""
    weight_OI = linear.weight_OI
    before_OI = weight_OI.clone()
    pruned_OI = ~kept_PQ.repeat_interleave(block, 0)[: len(weight_OI)].repeat_interleave(block, 1)[:, : weight_OI.shape[1]]
    weight_OI.masked_fill_(pruned_OI.to(weight_OI.device), 0.0)
    variant = base.twin()
    try:
        variant.advance(index, layer)
    finally:
        weight_OI.copy_(before_OI)
    return variant


def _damage(variant: Calibration, final: Calibration) -> float:
    """Collective: mean over tokens of the relative squared error."""
    sums = torch.zeros(2, dtype=torch.float64, device=final.device)
    for theirs, mine in zip(variant.hidden, final.hidden, strict=True):
        off, whole = (theirs.float() - mine.float()).square().sum(-1), mine.float().square().sum(-1)
        sums += torch.stack([(off / whole.clamp_min(1e-30)).double().sum(), torch.tensor(off.numel()).to(sums)])
    variant.peers.add(sums)
    return float(sums[0] / sums[1])


class _at:
    """A layer on a device for the length of a `with`."""

    def __init__(self, layer: nn.Module, device: torch.device):
        self._layer, self._device, self._home = layer, device, next(layer.parameters()).device

    def __enter__(self) -> None:
        self._layer.to(self._device)

    def __exit__(self, *_error: object) -> None:
        self._layer.to(self._home)


def budgets(found: dict[str, Sensitivity], sparsity: float) -> dict[str, int]:
    """How many tiles each matrix loses: floor(sparsity * tiles) of all of them together, the cheapest first."""
    most = {name: _most(len(one.energies_N), sparsity) for name, one in found.items()}
    names = [name for name, one in found.items() for _ in range(most[name])]
    costs_N = torch.cat([one.costs_N.sort().values[: most[name]] for name, one in found.items()])
    wanted = drop_count(sparsity, sum(len(one.energies_N) for one in found.values()))
    drops = dict.fromkeys(found, 0)
    for i in torch.sort(costs_N, stable=True).indices[:wanted].tolist():
        drops[names[i]] += 1
    return drops


def _most(tiles: int, sparsity: float) -> int:
    return min(math.floor(tiles * (1 - LEAST_KEPT * (1 - sparsity))), tiles - 1)
