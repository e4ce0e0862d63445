"""A frozen linear that holds the kept tiles of its weight only (`model.storage: blocks`).

    y = x W^T + bias,  W = tiles `values` (N, b, b) in their places, zeros elsewhere

W is made for each product in memory that all layers share (`kept.Scratch`): once forward, once backward for the gradient of x. Nothing of
size O x I is kept for the backward pass. The numbers are those of `nn.Linear` with the zeros, to the bit: it is the same product. Called
by `models/block_storage.py`, which reads the tiles, and by `adapter/`, which puts an adapter on it.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from lora_dist.blocks.kept import Scratch, first_rows, tile_count
from lora_dist.blocks.mask import BlockMask


class _Product(torch.autograd.Function):
    """x W^T + bias. `values` is what the layer holds: under a sharded strategy it is gathered anew for the backward pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, values: Tensor, bias: Tensor | None, layer: BlockLinear) -> Tensor:
        ctx.save_for_backward(values)
        ctx.layer = layer
        return F.linear(x, layer.unpacked_OI(values, x.dtype), bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        (values,) = ctx.saved_tensors
        need_x, _, need_bias, _ = ctx.needs_input_grad
        dx = g @ ctx.layer.unpacked_OI(values, g.dtype) if need_x else None
        return dx, None, g.reshape(-1, g.shape[-1]).sum(0) if need_bias else None, None


class BlockLinear(nn.Linear):
    """See the module docstring. An `nn.Linear`, so that whoever looks for linears finds it.

    Args:
        mask: of its weight.
        values: (N, b, b), in the order of the mask's kept tiles; a placeholder will do.
        bias: (O,), or None.
        scratch: shared with the other layers of the model.
    """

    first_rows: Tensor

    def __init__(self, mask: BlockMask, values: Tensor, bias: nn.Parameter | None, scratch: Scratch) -> None:
        nn.Module.__init__(self)
        if values.shape[0] != tile_count(mask):
            raise ValueError(f"values: found {values.shape[0]} tiles, expected {tile_count(mask)} as in the mask")
        self._set_up(mask, bias, scratch, values.device)
        self.values = nn.Parameter(values, requires_grad=False)

    def _set_up(self, mask: BlockMask, bias: nn.Parameter | None, scratch: Scratch, device: torch.device) -> None:
        self.out_features, self.in_features = mask.shape
        self.mask, self.scratch = mask, scratch
        self.bias = bias  # type: ignore[assignment]
        self.register_buffer("first_rows", first_rows(mask).to(device), persistent=False)

    @property
    def weight(self) -> nn.Parameter:  # type: ignore[override]
        """What is held: its device and dtype are the weight's, its shape is not. PEFT asks every linear for it."""
        return self.values

    def unpacked_OI(self, values: Tensor, dtype: torch.dtype) -> Tensor:
        """The dense weight, good until any layer's next one.

        Args:
            values: `self.values`, or what was saved of it.
            dtype: of the product; that of `values`, but where these are quantised.
        """
        return self.scratch.unpacked(values, self.first_rows, self.mask.shape)

    def dense_OI(self) -> Tensor:
        """The dense weight, a copy."""
        return self.unpacked_OI(self.values.detach(), self.values.dtype).clone()

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = _Product.apply(x, self.values, self.bias, self)
        return y

    def product(self, x: Tensor) -> Tensor:
        """x W^T, without the bias."""
        y: Tensor = _Product.apply(x, self.values, None, self)
        return y

    def reset_parameters(self) -> None:
        """Nothing: what is frozen is not drawn anew."""

    def extra_repr(self) -> str:
        kept = f"{int(self.mask.kept_PQ.sum())} of {self.mask.kept_PQ.numel()} tiles"
        return f"{super().extra_repr()}, {kept} of {self.mask.block}x{self.mask.block}"


def block_layers(model: nn.Module) -> list[tuple[str, BlockLinear]]:
    """(name, layer) of every linear that is held as kept tiles."""
    return [(name, module) for name, module in model.named_modules() if isinstance(module, BlockLinear)]
