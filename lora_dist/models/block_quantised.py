"""A frozen linear that holds the kept tiles of its weight in 4 bits (`model.load_in_4bit` with `model.storage: blocks`).

Tiles lie one behind the other, (N, b b), and every 64 weights of a tile share a scale: blocks never cross tiles, and what is pruned is not
there to be quantised. Zeros inside of kept tiles get the code of 0.0. For a product, tiles are de-quantised and put in their
places in the matrix that all layers share (`blocks/kept.py`). Called by `quantised.py`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lora_dist.blocks import BlockLinear, BlockMask, Scratch, pack, tile_count
from lora_dist.blocks.tiles import places, scatter_tiles
from lora_dist.log import UserError
from lora_dist.models.quantised import BLOCK, Quantisation, import_bitsandbytes, pack_4bit, prove


def require_whole_blocks(mask: BlockMask, name: str) -> None:
    """Raises UserError where a tile is no whole number of quantised blocks."""
    if mask.block**2 % BLOCK:
        raise UserError(
            f"model.storage: found blocks with 4 bits and tiles of {mask.block}x{mask.block} ({name}), expected tiles of a multiple of "
            f"{BLOCK} weights (8x8, 16x16, 32x32): set model.storage dense"
        )


class BlockLinear4bit(BlockLinear):
    """See the module docstring.

    Args:
        compute_dtype: of the product.
        storage: dtype that packed data is held in.
    """

    def __init__(
        self,
        mask: BlockMask,
        bias: nn.Parameter | None,
        scratch: Scratch,
        *,
        compute_dtype: torch.dtype,
        storage: torch.dtype,
        device: torch.device,
    ):
        nn.Module.__init__(self)
        self._set_up(mask, bias, scratch, device)
        packed = torch.zeros((), dtype=torch.uint8, device=device).expand(tile_count(mask) * mask.block**2 // 2, 1)
        self.values = nn.Parameter(packed, requires_grad=False)
        self.compute_dtype, self.quant_storage = compute_dtype, storage
        self.quant_state: Any = None

    def fill(self, tiles_Nbb: Tensor, quantisation: Quantisation, name: str) -> None:
        """Quantise the tiles, float32 on the layer's device. Waits for the device.

        Raises:
            GuardError: what comes back is not what was quantised.
        """
        flat = tiles_Nbb.reshape(len(tiles_Nbb), -1)
        packed, self.quant_state = pack_4bit(flat, quantisation, self.quant_storage, flat == 0)
        self.quant_state.dtype = self.compute_dtype
        self.values = nn.Parameter(packed, requires_grad=False)
        prove(name, flat, self._tiles(self.values, torch.float32).view_as(flat), None, quantisation)

    def _tiles(self, values: Tensor, dtype: torch.dtype) -> Tensor:
        """(N, b, b)."""
        packed = values.detach().contiguous().view(-1).view(torch.uint8).view(-1, 1)
        flat = import_bitsandbytes().functional.dequantize_4bit(packed, self.quant_state)
        return flat.view(-1, self.mask.block, self.mask.block).to(dtype)

    def unpacked_OI(self, values: Tensor, dtype: torch.dtype) -> Tensor:
        return super().unpacked_OI(self._tiles(values, dtype), dtype)

    def dense_OI(self) -> Tensor:
        return self.unpacked_OI(self.values, self.compute_dtype).clone()


def dequantised_tiles(weight_OI: Tensor, quantisation: Quantisation, mask: BlockMask) -> Tensor:
    """dequantise(quantise(tiles)) as a dense weight (O, I), float32: what a run on them computes with."""
    layer = BlockLinear4bit(mask, None, Scratch(), compute_dtype=torch.float32, storage=torch.uint8, device=weight_OI.device)
    layer.fill(pack(weight_OI.float(), mask), quantisation, "")
    kept = len(layer.first_rows)
    values_nbb = layer._tiles(layer.values, torch.float32)[:kept]
    return scatter_tiles(values_nbb, places(mask.kept_PQ.to(weight_OI.device)), mask.block, mask.shape)
