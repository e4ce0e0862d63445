"""The masked update's product, `y = s * x @ (mask . BA)^T`, exact and without keeping anything of size O x I.

Two forms of the same numbers (design section 3):

- factorised, for whole tiles: never builds BA.

      z[q,t,:] = x[t, block q] A[:, block q]^T          (Q,T,R)   batched small products
      u[p,t,:] = sum_q mask[p,q] z[q,t,:]               (P,T,R)   one product with the P x Q mask
      y[t, block p] = s u[p,t,:] B[block p, :]^T        (T,O)

- dense, for any mask: builds mask . BA for the product and again in the backward pass.

Shapes: T tokens, I/O in/out features, b block side, P/Q block rows/columns, R rank. Both save x, A, B and the mask only; z, u and
the masked delta are computed again from them. Called by `adapter/layer.py`; forms are compared by `scripts/bench_layer.py`.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from lora_dist.blocks import unpack_bits


def without_autocast(x: Tensor) -> AbstractContextManager[Any]:
    """Products inside are in the dtype of their inputs. The meta device, on which runs are planned, has no autocast to turn off."""
    return nullcontext() if x.is_meta else torch.autocast(x.device.type, enabled=False)


def _pad_last(tensor: Tensor, block: int) -> Tensor:
    """Zero-pad the last dimension to a whole number of blocks."""
    short = -tensor.shape[-1] % block
    return F.pad(tensor, (0, short)) if short else tensor


def _blocks_of_columns(x_TC: Tensor, block: int) -> Tensor:
    """(T, C) -> (C/b, T, b); a view where C is a whole number of blocks."""
    padded = _pad_last(x_TC, block)
    return padded.view(padded.shape[0], -1, block).transpose(0, 1)


def _join_columns(x_NTb: Tensor, columns: int) -> Tensor:
    """(N, T, b) -> (T, columns): inverse of `_blocks_of_columns`."""
    return x_NTb.transpose(0, 1).reshape(x_NTb.shape[1], -1)[:, :columns]


def _mix(mask_MN: Tensor, x_NTR: Tensor) -> Tensor:
    """Sum over n of mask[m,n] x[n]: (M,N) and (N,T,R) -> (M,T,R), one product."""
    n, t, r = x_NTR.shape
    return (mask_MN @ x_NTR.reshape(n, t * r)).view(-1, t, r)


class _Factorised(torch.autograd.Function):
    """See the module docstring. Inputs: x_TI, A_RI, B_OR, mask_PQ (bool), block b, scale s."""

    @staticmethod
    def forward(ctx: Any, x_TI: Tensor, A_RI: Tensor, B_OR: Tensor, mask_PQ: Tensor, block: int, scale: float) -> Tensor:
        ctx.save_for_backward(x_TI, A_RI, B_OR, mask_PQ)
        ctx.block, ctx.scale = block, scale
        u_PTR = _Factorised._inner(x_TI, A_RI, mask_PQ, block)
        B_PbR = _blocks_of_columns(B_OR.to(x_TI.dtype).T, block).transpose(1, 2)
        y_PTb = torch.bmm(u_PTR, (B_PbR * scale).transpose(1, 2))
        return _join_columns(y_PTb, B_OR.shape[0])

    @staticmethod
    def _inner(x_TI: Tensor, A_RI: Tensor, mask_PQ: Tensor, block: int) -> Tensor:
        """u (P, T, R)."""
        A_QRb = _blocks_of_columns(A_RI.to(x_TI.dtype), block)
        z_QTR = torch.bmm(_blocks_of_columns(x_TI, block), A_QRb.transpose(1, 2))
        return _mix(mask_PQ.to(x_TI.dtype), z_QTR)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g_TO: Tensor) -> tuple[Tensor | None, ...]:
        x_TI, A_RI, B_OR, mask_PQ = ctx.saved_tensors
        block, scale, dtype = ctx.block, ctx.scale, x_TI.dtype
        need_x, need_A, need_B = ctx.needs_input_grad[:3]
        g_PTb = _blocks_of_columns(g_TO, block)
        dx = dA = dB = None
        if need_B:
            u_PTR = _Factorised._inner(x_TI, A_RI, mask_PQ, block)
            dB_PRb = torch.bmm(u_PTR.transpose(1, 2), g_PTb) * scale
            dB = _join_columns(dB_PRb, B_OR.shape[0]).T.to(B_OR.dtype)
        if need_x or need_A:
            B_PbR = _blocks_of_columns(B_OR.to(dtype).T, block).transpose(1, 2) * scale
            du_PTR = torch.bmm(g_PTb, B_PbR)
            dz_QTR = _mix(mask_PQ.T.to(dtype), du_PTR)
            if need_A:
                dA_QRb = torch.bmm(dz_QTR.transpose(1, 2), _blocks_of_columns(x_TI, block))
                dA = _join_columns(dA_QRb, A_RI.shape[1]).to(A_RI.dtype)
            if need_x:
                A_QRb = _blocks_of_columns(A_RI.to(dtype), block)
                dx = _join_columns(torch.bmm(dz_QTR, A_QRb), x_TI.shape[1])
        return dx, dA, dB, None, None, None


def _mask_(weight_OI: Tensor, kept: Tensor, block: int) -> Tensor:
    """Zero what is not kept, in place; `kept` as in `masked_delta`."""
    O, I = weight_OI.shape
    if kept.dtype == torch.uint8:
        return weight_OI.masked_fill_(~unpack_bits(kept, O * I).view(O, I), 0.0)
    if O % block == 0 and I % block == 0:
        P, Q = kept.shape
        weight_OI.view(P, block, Q, block).masked_fill_(~kept[:, None, :, None], 0.0)
        return weight_OI
    return weight_OI.masked_fill_(~kept.repeat_interleave(block, 0)[:O].repeat_interleave(block, 1)[:, :I], 0.0)


def masked_delta(A_RI: Tensor, B_OR: Tensor, kept: Tensor, block: int, scale: float) -> Tensor:
    """(O, I): s * mask . BA, exactly +0 outside the mask.

    Args:
        kept: bool (P, Q) for whole tiles, or packed uint8 bits of an (O, I) element mask (then block is 1).
    """
    return _mask_((B_OR * scale) @ A_RI, kept, block)


class _Dense(torch.autograd.Function):
    """The general path: rebuilds the masked delta in the backward pass. `kept` as in `masked_delta`."""

    @staticmethod
    def forward(ctx: Any, x_TI: Tensor, A_RI: Tensor, B_OR: Tensor, kept: Tensor, block: int, scale: float) -> Tensor:
        ctx.save_for_backward(x_TI, A_RI, B_OR, kept)
        ctx.block, ctx.scale = block, scale
        delta_OI = masked_delta(A_RI.to(x_TI.dtype), B_OR.to(x_TI.dtype), kept, block, scale)
        return F.linear(x_TI, delta_OI)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g_TO: Tensor) -> tuple[Tensor | None, ...]:
        x_TI, A_RI, B_OR, kept = ctx.saved_tensors
        A, B = A_RI.to(x_TI.dtype), B_OR.to(x_TI.dtype)
        need_x, need_A, need_B = ctx.needs_input_grad[:3]
        dx = dA = dB = None
        if need_x:
            dx = g_TO @ masked_delta(A, B, kept, ctx.block, ctx.scale)
        if need_A or need_B:
            dW_OI = _mask_(g_TO.T @ x_TI, kept, ctx.block).mul_(ctx.scale)
            if need_A:
                dA = (B.T @ dW_OI).to(A_RI.dtype)
            if need_B:
                dB = (dW_OI @ A.T).to(B_OR.dtype)
        return dx, dA, dB, None, None, None


def masked_product(x: Tensor, A_RI: Tensor, B_OR: Tensor, kept: Tensor, block: int, scale: float, *, factorised: bool) -> Tensor:
    """s * x @ (mask . BA)^T for x of shape (..., I), computed in x's dtype.

    Args:
        A_RI, B_OR: the adapter's factors, in any floating dtype (gradients come back in it).
        kept: bool (P, Q) mask of tiles, or packed uint8 bits of an element mask.
        block: tile side.
        factorised: which form; needs a mask of tiles.

    Raises:
        ValueError: factorised form asked for with an element mask.
    """
    if factorised and kept.dtype != torch.bool:
        raise ValueError("form: found factorised with an element mask, expected dense (only whole tiles factorise)")
    function = _Factorised if factorised else _Dense
    x_TI = x.reshape(-1, x.shape[-1])
    with without_autocast(x):  # the caller has cast x already
        y_TO = function.apply(x_TI, A_RI, B_OR, kept, block, scale)
    return y_TO.view(*x.shape[:-1], -1)
