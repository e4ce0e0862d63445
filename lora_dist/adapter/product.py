"""The masked update's product, `y = s * x @ (mask . BA)^T`, exact and without keeping anything of size O x I.

Two forms of the same numbers (design section 3); `linear.py` has those that include the base's own product:

- factorised, for whole tiles: never builds BA (`tiles.py`).
- dense, for any mask: builds mask . BA for the product and again in the backward pass.

Shapes: T tokens, I/O in/out features, b block side, P/Q block rows/columns, R rank. Both save x, A, B and the mask only; the rest is computed
again from them. Called by `adapter/layer.py`; forms are compared by `scripts/bench_layer.py`.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lora_dist.adapter.tiles import add_update_, update_gradients
from lora_dist.blocks import unpack_bits
from lora_dist.gemm import matmul


def without_autocast(x: Tensor) -> AbstractContextManager[Any]:
    """Products inside are in the dtype of their inputs. The meta device, on which runs are planned, has no autocast to turn off."""
    return nullcontext() if x.is_meta else torch.autocast(x.device.type, enabled=False)


class _Factorised(torch.autograd.Function):
    """See the module docstring. Inputs: x_TI, A_RI, B_OR, mask_PQ (bool), block b, scale s, whether to take the kernel."""

    @staticmethod
    def forward(
        ctx: Any, x_TI: Tensor, A_RI: Tensor, B_OR: Tensor, mask_PQ: Tensor, block: int, scale: float, fused: bool
    ) -> Tensor:
        ctx.save_for_backward(x_TI, A_RI, B_OR, mask_PQ)
        ctx.block, ctx.scale, ctx.fused = block, scale, fused
        y_TO = x_TI.new_zeros((len(x_TI), B_OR.shape[0]))
        add_update_(y_TO, x_TI, A_RI, B_OR, mask_PQ, block, scale, fused)
        return y_TO

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g_TO: Tensor) -> tuple[Tensor | None, ...]:
        x_TI, A_RI, B_OR, mask_PQ = ctx.saved_tensors
        dx_TI = torch.zeros_like(x_TI) if ctx.needs_input_grad[0] else None
        dA, dB = update_gradients(g_TO, x_TI, A_RI, B_OR, mask_PQ, ctx.block, ctx.scale, dx_TI, ctx.fused)
        return dx_TI, dA, dB, None, None, None, None


def _mask_(weight_OI: Tensor, kept: Tensor, block: int) -> Tensor:
    """Zero what is not kept, in place; `kept` as in `masked_delta`."""
    O, I = weight_OI.shape
    if kept.dtype == torch.uint8:
        return weight_OI.masked_fill_(~unpack_bits(kept, O * I).view(O, I), 0.0)
    if O % block == 0 and I % block == 0 and not weight_OI.requires_grad:  # autograd would not see it
        bits = {2: torch.int16, 4: torch.int32, 8: torch.int64}[weight_OI.element_size()]
        # All bits of a kept weight, none of another's: several times faster than filling, which goes tile by tile.
        kept_P1I = kept.to(bits).neg_()[..., None].expand(-1, -1, block).reshape(-1, 1, I)
        weight_OI.view(bits).view(-1, block, I).bitwise_and_(kept_P1I)
        return weight_OI
    return weight_OI.masked_fill_(~kept.repeat_interleave(block, 0)[:O].repeat_interleave(block, 1)[:, :I], 0.0)


def masked_delta(A_RI: Tensor, B_OR: Tensor, kept: Tensor, block: int, scale: float, *, out_OI: Tensor | None = None) -> Tensor:
    """(O, I): s * mask . BA, exactly +0 outside the mask.

    Args:
        kept: bool (P, Q) for whole tiles, or packed uint8 bits of an (O, I) element mask (then block is 1).
        out_OI: where to.
    """
    delta_OI = matmul(B_OR * scale, A_RI) if out_OI is None else torch.mm(B_OR * scale, A_RI, out=out_OI)
    return _mask_(delta_OI, kept, block)


def dense_gradients(
    g_TO: Tensor,
    x_TI: Tensor,
    A_RI: Tensor,
    B_OR: Tensor,
    kept: Tensor,
    block: int,
    scale: float,
    *,
    out_OI: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Gradients of A and B, in their dtypes, by way of the weight's, which is made for it (in `out_OI`)."""
    A, B = A_RI.to(x_TI.dtype), B_OR.to(x_TI.dtype)
    dW_OI = _mask_(matmul(g_TO.T, x_TI) if out_OI is None else torch.mm(g_TO.T, x_TI, out=out_OI), kept, block)
    return matmul(B.T, dW_OI).mul_(scale).to(A_RI.dtype), matmul(dW_OI, A.T).mul_(scale).to(B_OR.dtype)


class _Dense(torch.autograd.Function):
    """The general path: rebuilds the masked delta in the backward pass. `kept` as in `masked_delta`."""

    @staticmethod
    def forward(ctx: Any, x_TI: Tensor, A_RI: Tensor, B_OR: Tensor, kept: Tensor, block: int, scale: float) -> Tensor:
        ctx.save_for_backward(x_TI, A_RI, B_OR, kept)
        ctx.block, ctx.scale = block, scale
        delta_OI = masked_delta(A_RI.to(x_TI.dtype), B_OR.to(x_TI.dtype), kept, block, scale)
        return matmul(x_TI, delta_OI.T)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g_TO: Tensor) -> tuple[Tensor | None, ...]:
        x_TI, A_RI, B_OR, kept = ctx.saved_tensors
        A, B = A_RI.to(x_TI.dtype), B_OR.to(x_TI.dtype)
        need_x, need_A, need_B = ctx.needs_input_grad[:3]
        dx = dA = dB = None
        if need_x:
            dx = matmul(g_TO, masked_delta(A, B, kept, ctx.block, ctx.scale))
        if need_A or need_B:
            dA, dB = dense_gradients(g_TO, x_TI, A_RI, B_OR, kept, ctx.block, ctx.scale)
        return dx, dA, dB, None, None, None


def masked_product(
    x: Tensor, A_RI: Tensor, B_OR: Tensor, kept: Tensor, block: int, scale: float, *, factorised: bool, fused: bool = False
) -> Tensor:
    """s * x @ (mask . BA)^T for x of shape (..., I), computed in x's dtype.

    Args:
        A_RI, B_OR: the adapter's factors, in any floating dtype (gradients come back in it).
        kept: bool (P, Q) mask of tiles, or packed uint8 bits of an element mask.
        block: tile side.
        factorised: which form; needs a mask of tiles.
        fused: the factorised form by the kernel for GPUs (`kernel.py`).

    Raises:
        ValueError: factorised form asked for with an element mask.
    """
    if factorised and kept.dtype != torch.bool:
        raise ValueError("form: found factorised with an element mask, expected dense (only whole tiles factorise)")
    x_TI = x.reshape(-1, x.shape[-1])
    with without_autocast(x):  # the caller has cast x already
        if factorised:
            y_TO = _Factorised.apply(x_TI, A_RI, B_OR, kept, block, scale, fused)
        else:
            y_TO = _Dense.apply(x_TI, A_RI, B_OR, kept, block, scale)
    return y_TO.view(*x.shape[:-1], -1)
