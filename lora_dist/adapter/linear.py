"""A frozen linear layer and its update in one step, `y = x W^T + bias + s x (mask . BA)^T`: exact, and keeps x, W, A, B and the mask only.

Two forms of the same numbers:

- merged: x (W + s mask . BA)^T, in 32 bits or more only: in 16, W + dW would round the update away. It costs some passes over O x I numbers, on
  CPUs a few MiB at a time (docs/log.md).
- factorised (`tiles.py`): the update is added to the base's output; without a mask, plain LoRA. It costs some passes over T x (I + O).

The gradients of A and B are the factorised form's in both; that of x takes whichever is cheaper. Against a product beside the base's this spares
passes over y and over the gradient of x, and their memory. Called by `layer.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lora_dist import gemm
from lora_dist.adapter.product import masked_delta, without_autocast
from lora_dist.adapter.tiles import add_update_, update_gradients
from lora_dist.gemm import device_type, linear, pieces, product

_PIECE_WEIGHTS = 2**20
"""that are merged at a time on a CPU; fewer cost the products more than they save (docs/log.md)"""
Unpack = Callable[[Tensor, torch.dtype], Tensor]
"""what a linear holds of its weight, and the dtype of the product -> the weight (O, I), good until the next one is asked for"""


class _AdaptedLinear(torch.autograd.Function):
    """Inputs: x_TI, what the update sees of it where that differs (dropout) or None, W_OI, bias_O or None, A_RI, B_OR, mask_PQ (bool) or None,
    block b, scale s, whether to merge, where W is held otherwise than as it is, what makes it so, and whether to take the kernel."""

    @staticmethod
    def _weight(ctx: Any, W: Tensor) -> Tensor:
        return W if ctx.unpack is None else ctx.unpack(W, W.dtype)

    @staticmethod
    def _merged(
        ctx: Any, x: Tensor, W: Tensor, A_RI: Tensor, B_OR: Tensor, mask_PQ: Tensor | None
    ) -> Iterator[tuple[slice, Tensor]]:
        """Rows of W + s mask . BA, for products with x: as few at a time as stay in the processor's cache, or all of them."""
        assert mask_PQ is not None
        W_OI, b = _AdaptedLinear._weight(ctx, W), ctx.block
        O, I = W_OI.shape
        size = O if device_type(x) != "cpu" or gemm.ONEDNN_IS_FASTER else max(1, _PIECE_WEIGHTS // (b * I)) * b
        A, B = A_RI.to(W.dtype), B_OR.to(W.dtype)
        for rows in pieces(x, O, size):
            kept = mask_PQ[rows.start // b : -(-rows.stop // b)]
            yield rows, masked_delta(A, B[rows], kept, b, ctx.scale).add_(W_OI[rows])

    @staticmethod
    def forward(
        ctx: Any,
        x_TI: Tensor,
        dropped_TI: Tensor | None,
        W: Tensor,
        bias_O: Tensor | None,
        A_RI: Tensor,
        B_OR: Tensor,
        mask_PQ: Tensor | None,
        block: int,
        scale: float,
        merged: bool,
        unpack: Unpack | None,
        fused: bool,
    ) -> Tensor:
        seen_TI = x_TI if dropped_TI is None else dropped_TI
        ctx.save_for_backward(seen_TI, W, A_RI, B_OR, mask_PQ)
        ctx.block, ctx.scale, ctx.merged, ctx.unpack, ctx.dropped = block, scale, merged, unpack, dropped_TI is not None
        ctx.fused = fused
        if merged:
            return _by_rows(x_TI, len(B_OR), bias_O, _AdaptedLinear._merged(ctx, x_TI, W, A_RI, B_OR, mask_PQ))
        y_TO = linear(x_TI, _AdaptedLinear._weight(ctx, W), bias_O)
        add_update_(y_TO, seen_TI, A_RI, B_OR, mask_PQ, block, scale, fused)
        return y_TO

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g_TO: Tensor) -> tuple[Tensor | None, ...]:
        seen_TI, W, A_RI, B_OR, mask_PQ = ctx.saved_tensors
        dx = d_seen = None
        if ctx.needs_input_grad[0]:
            # Adding the update to the weight again is a matter of O rows, adding its share to the gradient one of T.
            again = ctx.merged and len(B_OR) <= len(seen_TI)
            if again:
                dx = _sum_over_rows(g_TO, _AdaptedLinear._merged(ctx, g_TO, W, A_RI, B_OR, mask_PQ))
            else:
                dx = product(g_TO, _AdaptedLinear._weight(ctx, W))
            d_seen = None if again or ctx.dropped else dx
        if ctx.dropped and ctx.needs_input_grad[1]:
            d_seen = torch.zeros_like(seen_TI)
        dA, dB = update_gradients(g_TO, seen_TI, A_RI, B_OR, mask_PQ, ctx.block, ctx.scale, d_seen, ctx.fused)
        return dx, d_seen if ctx.dropped else None, None, None, dA, dB, None, None, None, None, None, None


def _by_rows(x_TI: Tensor, O: int, bias_O: Tensor | None, weights: Iterator[tuple[slice, Tensor]]) -> Tensor:
    """(T, O): x W^T + bias, W given in pieces of rows."""
    y_TO = None
    for rows, weight_NI in weights:
        if len(weight_NI) == O:
            return linear(x_TI, weight_NI, bias_O)
        y_TO = x_TI.new_empty((len(x_TI), O)) if y_TO is None else y_TO
        torch.mm(x_TI, weight_NI.T, out=y_TO[:, rows])
    assert y_TO is not None
    return y_TO if bias_O is None else y_TO.add_(bias_O)


def _sum_over_rows(g_TO: Tensor, weights: Iterator[tuple[slice, Tensor]]) -> Tensor:
    """(T, I): g W, W given in pieces of rows."""
    dx_TI = None
    for rows, weight_NI in weights:
        dx_TI = product(g_TO[:, rows], weight_NI) if dx_TI is None else dx_TI.addmm_(g_TO[:, rows], weight_NI)
    assert dx_TI is not None
    return dx_TI


def adapted_linear(
    x: Tensor,
    weight: Tensor,
    bias_O: Tensor | None,
    A_RI: Tensor,
    B_OR: Tensor,
    kept_PQ: Tensor | None,
    block: int,
    scale: float,
    *,
    merged: bool,
    dropped: Tensor | None = None,
    unpack: Unpack | None = None,
    fused: bool = False,
) -> Tensor:
    """x W^T + bias + s dropped (mask . BA)^T for x of shape (..., I).

    Args:
        weight: (O, I), of x's dtype; with `unpack`, what it makes this of. It gets no gradient, nor does the bias.
        kept_PQ: mask of tiles; None: plain LoRA.
        merged: which form; needs a mask, and x as the update sees it.
        dropped: what the update sees of x, of its shape; None: x itself.
        fused: the factorised form by the kernel for GPUs (`kernel.py`).
    """
    flat = None if dropped is None else dropped.reshape(-1, dropped.shape[-1])
    with without_autocast(x):
        y_TO = _AdaptedLinear.apply(
            x.reshape(-1, x.shape[-1]), flat, weight, bias_O, A_RI, B_OR, kept_PQ, block, scale, merged, unpack, fused
        )
    return y_TO.view(*x.shape[:-1], -1)
