"""bitsandbytes' 4-bit linear with every row of the weight in blocks of its own.

bitsandbytes 0.50 takes rows whose width is a multiple of 16 for whole blocks of 64 on CPUs with AVX-512: where they are not, weights
come back under another block's scale, wrong by a third. So rows are filled up with zeros to whole blocks, and inputs too; the
product is the same on every device. On processors that cannot multiply 16 bits, the weight is de-quantised for this project's own
product (`gemm.py`). Imported by `quantised.py` where a base is quantised; needs bitsandbytes.
"""

from __future__ import annotations

from typing import Any

import bitsandbytes as bnb
from torch import Tensor
from torch.autograd.function import Function, once_differentiable
from torch.nn.functional import pad

from lora_dist import gemm

BLOCK = 64
"""weights that share a scale, as in QLoRA"""


class _Product(Function):
    """x W^T, W de-quantised from `packed`, which is what is kept of it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, packed: Tensor, layer: Any) -> Tensor:
        ctx.save_for_backward(packed)
        ctx.layer = layer
        return gemm.linear(x.reshape(-1, x.shape[-1]), layer.weight_in(x.dtype, packed)).view(*x.shape[:-1], -1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        (packed,) = ctx.saved_tensors
        dx = gemm.product(g.reshape(-1, g.shape[-1]), ctx.layer.weight_in(g.dtype, packed)) if ctx.needs_input_grad[0] else None
        return None if dx is None else dx.view(*g.shape[:-1], -1), None, None


class PaddedLinear4bit(bnb.nn.Linear4bit):
    """`Linear4bit` whose `quant_state` is of shape (O, I filled up to whole blocks); `in_features` is the weight's own width."""

    @property
    def padding(self) -> int:
        """Columns of zeros behind a row."""
        return -self.in_features % BLOCK

    def weight_in(self, dtype: Any, packed: Tensor) -> Tensor:
        """(O, I), de-quantised from packed data."""
        whole: Tensor = bnb.functional.dequantize_4bit(packed.data, self.quant_state)
        return whole[:, : self.in_features].to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        if x.dtype == self.compute_dtype and gemm.compute_dtype(x) != x.dtype:
            y: Tensor = _Product.apply(x, self.weight, self)
            return y if self.bias is None else y + self.bias.to(y.dtype)
        return super().forward(pad(x, (0, self.padding)) if self.padding else x)
