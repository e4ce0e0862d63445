"""Block pruning: tile scores, selection, calibration layer by layer."""

from lora_dist.pruning.calibration import Calibration, capture
from lora_dist.pruning.prune import PruneSettings, prune_layers, prune_linears
from lora_dist.pruning.scores import SCORES, Score, layer_scores, random_scores, tile_scores
from lora_dist.pruning.select import SELECTS, Select, select_matrix, select_row, select_tiles

__all__ = [
    "SCORES",
    "SELECTS",
    "Calibration",
    "PruneSettings",
    "Score",
    "Select",
    "capture",
    "layer_scores",
    "prune_layers",
    "prune_linears",
    "random_scores",
    "select_matrix",
    "select_row",
    "select_tiles",
    "tile_scores",
]
