"""Block pruning: tile scores, selection, reconstruction, calibration layer by layer."""

from lora_dist.pruning.budget import Sensitivity, budgets, sensitivities
from lora_dist.pruning.calibration import Calibration, capture
from lora_dist.pruning.choose import Choice, PruneSettings
from lora_dist.pruning.gram import Alone, Gram, Peers
from lora_dist.pruning.obs import Removals, removals
from lora_dist.pruning.prune import Pruned, Reconstruction, prune_layers, prune_linears
from lora_dist.pruning.scores import SCORES, Score, layer_scores, random_scores, tile_scores
from lora_dist.pruning.select import SELECTS, Select, drop_count, select_matrix, select_row, select_tiles
from lora_dist.pruning.solve import Solved, reconstruct
from lora_dist.pruning.target import DenseModel, Target

__all__ = [
    "SCORES",
    "SELECTS",
    "Alone",
    "Calibration",
    "Choice",
    "DenseModel",
    "Gram",
    "Peers",
    "PruneSettings",
    "Pruned",
    "Reconstruction",
    "Removals",
    "Score",
    "Select",
    "Sensitivity",
    "Solved",
    "Target",
    "budgets",
    "capture",
    "drop_count",
    "layer_scores",
    "prune_layers",
    "prune_linears",
    "random_scores",
    "reconstruct",
    "removals",
    "select_matrix",
    "select_row",
    "select_tiles",
    "sensitivities",
    "tile_scores",
]
