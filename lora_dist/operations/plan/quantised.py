"""What stands for bitsandbytes' layers on the meta device, which these cannot be on. Called by `rehearse.py`."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lora_dist.blocks import BlockMask, Mask, NamedLinear, tile_count


class _Product(torch.autograd.Function):
    """A quantised linear's product: its weight is made anew in each pass, and kept in neither. That of int8 keeps its input, though
    nothing of the backward pass needs it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight_OI: Tensor, bits: int) -> Tensor:
        ctx.bits = bits
        ctx.save_for_backward(weight_OI, x if bits == 8 else None)
        if bits == 8:
            whole = torch.empty((*x.shape[:-1], weight_OI.shape[0]), dtype=torch.int32, device="meta")
            scaled = whole.float()
            return scaled.to(x.dtype)
        return F.linear(x, torch.empty_like(weight_OI))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        weight_OI, _ = ctx.saved_tensors
        return gradients[0] @ torch.empty_like(weight_OI), None, None


class QuantisedLinear(nn.Linear):
    """Stands for bitsandbytes' layers, and with the mask of a linear for 4 bits of its kept tiles."""

    def __init__(self, linear: NamedLinear, bits: int, mask: Mask | None = None):
        with torch.device("meta"):
            O, I = linear.weight_OI.shape
            super().__init__(I, O, bias=False, dtype=linear.weight_OI.dtype)
        self.weight.requires_grad_(False)
        self.register_parameter("bias", linear.module._parameters["bias"])
        self.bits, self.mask = bits, mask

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = _Product.apply(x, self.weight, self.bits)
        return y if self.bias is None else y + self.bias.to(y.dtype)

    def held_bytes(self, double: bool) -> int:
        """As `models/quantised.py` packs it: rows filled up to blocks of 64, or tiles, a scale each block."""
        O, I = self.out_features, self.in_features
        if self.bits == 8:
            return O * I + 4 * O
        padded = O * (-(-I // 64) * 64)
        if isinstance(self.mask, BlockMask) and not self.mask.keeps_all:
            padded = tile_count(self.mask) * self.mask.block**2
        return padded // 2 + math.ceil(padded // 64 * (1 + 4 / 256 if double else 4))
