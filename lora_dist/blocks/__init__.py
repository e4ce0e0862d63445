"""Block masks, the pattern of a model, and the guard. Torch and safetensors only."""

from lora_dist.blocks.block_linear import BlockLinear, block_layers
from lora_dist.blocks.fingerprint import Fingerprint
from lora_dist.blocks.guard import Guard
from lora_dist.blocks.kept import Scratch, first_rows, pack, pack_range, rows_of_range, tile_count
from lora_dist.blocks.linear import NamedLinear, find_linears, is_transposed
from lora_dist.blocks.mask import BlockMask, ElementMask, Mask, grid, pack_bits, tiles_any, unpack_bits
from lora_dist.blocks.pattern import MASK_FILE, LayerStats, Pattern, detect_pattern
from lora_dist.blocks.piece import Piece

__all__ = [
    "MASK_FILE",
    "BlockLinear",
    "BlockMask",
    "ElementMask",
    "Fingerprint",
    "Guard",
    "LayerStats",
    "Mask",
    "NamedLinear",
    "Pattern",
    "Piece",
    "Scratch",
    "block_layers",
    "detect_pattern",
    "find_linears",
    "first_rows",
    "grid",
    "is_transposed",
    "pack",
    "pack_bits",
    "pack_range",
    "rows_of_range",
    "tile_count",
    "tiles_any",
    "unpack_bits",
]
