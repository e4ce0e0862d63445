"""Frozen linear layers that are given one input, and their updates, in one step: `y = x W^T + bias + s x (mask . BA)^T` for each, exact.

Kept for the backward pass are x, W, A, B and the mask, of plain LoRA x A^T (T, R) as well. Two forms of the same numbers:

- merged: x (W + s mask . BA)^T, in 32 bits or more only: in 16, W + dW would round the update away. It costs some passes over O x I numbers, on
  CPUs a few MiB at a time, into memory that all layers share (docs/log.md).
- beside: the update is added to the base's output, with a mask in factorised form (`tiles.py`), without as plain LoRA. It costs some passes
  over T x (I + O).

The gradients of A and B are the second form's in both, or, where a narrow layer has a high rank, taken from the weight's gradient, which is
made for it (`dense`); that of x takes whichever is cheaper. Against a product beside the base's this spares passes over y and over the
gradient of x, and their memory. Layers with one input (q, k and v; gate and up) add to one gradient of x, and those of plain LoRA read x for
all of their A at once. Called by `layer.py` and `siblings.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lora_dist import gemm
from lora_dist.adapter.product import dense_gradients, masked_delta, without_autocast
from lora_dist.adapter.tiles import add_update_, update_gradients
from lora_dist.blocks import Scratch
from lora_dist.gemm import compute_dtype, device_type, linear, matmul, pieces, product

_PIECE_WEIGHTS = 2**21
"""that are merged at a time on a CPU, to stay in its cache (docs/log.md)"""
_SCRATCH = Scratch()
"""for W + dW, or for the weight's gradient, of one layer at a time on a CPU: memory handed out anew costs as much as what is computed in it"""
Unpack = Callable[[Tensor, torch.dtype], Tensor]
"""what a linear holds of its weight, and the dtype of the product -> the weight (O, I), good until the next one is asked for"""


Form = Literal["beside", "merged", "kernel"]
"""see the module's docstring; merged needs a mask, and x as the update sees it. kernel: beside, with a mask, by the kernel for GPUs
(`kernel.py`)"""


class Adapted(NamedTuple):
    """A frozen linear and its update."""

    weight: Tensor
    """(O, I), of x's dtype; with `unpack`, what it makes this of. It gets no gradient, nor does the bias."""
    bias_O: Tensor | None
    A_RI: Tensor
    B_OR: Tensor
    kept_PQ: Tensor | None
    """mask of tiles; None: plain LoRA"""
    block: int
    scale: float
    form: Form = "beside"
    dense: bool = False
    """whether a merged update's gradients of A and B are taken from the weight's, which is cheaper where a narrow layer has a high rank"""
    unpack: Unpack | None = None

    @property
    def weight_OI(self) -> Tensor:
        return self.weight if self.unpack is None else self.unpack(self.weight, self.weight.dtype)

    def merged_OI(self, x: Tensor) -> Tensor:
        """W + s mask . BA, for a product with x; good until `_scratch` is asked for again."""
        assert self.kept_PQ is not None
        W_OI, b = self.weight_OI, self.block
        O, I = W_OI.shape
        A, B = self.A_RI.to(W_OI.dtype), self.B_OR.to(W_OI.dtype)
        merged_OI = _scratch(O, I, W_OI)
        for rows in pieces(x, O, max(1, _PIECE_WEIGHTS // (b * I)) * b if device_type(x) == "cpu" else O):
            kept = self.kept_PQ[rows.start // b : -(-rows.stop // b)]
            masked_delta(A, B[rows], kept, b, self.scale, out_OI=merged_OI[rows]).add_(W_OI[rows])
        return merged_OI


def _scratch(O: int, I: int, like: Tensor) -> Tensor:
    """(O, I), with anything in it; on a CPU good until the next call."""
    shared = like.device.type == "cpu" and not torch.compiler.is_compiling()
    return _SCRATCH.matrix(O, I, like) if shared else like.new_empty((O, I))


_TENSORS = 5
"""the first fields of `Adapted`, which autograd has to see"""


class _AdaptedLinears(torch.autograd.Function):
    """Inputs: x_TI, what the updates see of it where that differs (dropout) or None, the other fields of each layer, and its tensors."""

    @staticmethod
    def forward(
        ctx: Any, x_TI: Tensor, dropped_TI: Tensor | None, fields: Sequence[Sequence[Any]], *tensors: Tensor | None
    ) -> tuple[Tensor, ...]:
        layers = _layers(tensors, fields)
        seen_TI = x_TI if dropped_TI is None else dropped_TI
        plain = [layer for layer in layers if layer.kept_PQ is None]
        z_TS = matmul(seen_TI, _stacked(plain, x_TI.dtype).T) if plain else None
        parts = iter(() if z_TS is None else z_TS.split([len(layer.A_RI) for layer in plain], 1))
        ys = []
        for layer in layers:
            if layer.form == "merged":
                ys.append(linear(x_TI, layer.merged_OI(x_TI), layer.bias_O))
                continue
            y_TO = linear(x_TI, layer.weight_OI, layer.bias_O)
            if layer.kept_PQ is None:
                _add_product_(y_TO, next(parts), layer.B_OR.to(x_TI.dtype).T, layer.scale)
            else:
                add_update_(
                    y_TO, seen_TI, layer.A_RI, layer.B_OR, layer.kept_PQ, layer.block, layer.scale, layer.form == "kernel"
                )
            ys.append(y_TO)
        ctx.save_for_backward(seen_TI, z_TS, *tensors)
        ctx.fields, ctx.dropped = fields, dropped_TI is not None
        return tuple(ys)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        seen_TI, z_TS, *tensors = ctx.saved_tensors
        layers = _layers(tensors, ctx.fields)
        dx = None
        # Adding the update to the weight again is a matter of O rows, adding its share to the gradient, beside its tiles, one of T.
        again = [layer.form == "merged" and (layer.dense or len(layer.B_OR) <= len(seen_TI)) for layer in layers]
        if ctx.needs_input_grad[0]:
            for layer, g_TO, merged in zip(layers, gradients, again, strict=True):
                dx = _plus(dx, g_TO, layer.merged_OI(g_TO) if merged else layer.weight_OI)
        d_seen = dx
        if ctx.dropped:
            d_seen = torch.zeros_like(seen_TI) if ctx.needs_input_grad[1] else None
        plain = [i for i, layer in enumerate(layers) if layer.kept_PQ is None]
        of_plain = _plain_gradients([(layers[i], gradients[i]) for i in plain], seen_TI, z_TS, d_seen)
        pairs = dict(zip(plain, of_plain, strict=True))
        for i, layer in enumerate(layers):
            if layer.kept_PQ is not None and layer.dense:
                factors = layer.A_RI, layer.B_OR
                room_OI = _scratch(len(layer.B_OR), seen_TI.shape[1], seen_TI)
                pairs[i] = dense_gradients(
                    gradients[i], seen_TI, *factors, layer.kept_PQ, layer.block, layer.scale, out_OI=room_OI
                )
            elif layer.kept_PQ is not None:
                A_RI, B_OR, kept_PQ, into = layer.A_RI, layer.B_OR, layer.kept_PQ, None if again[i] else d_seen
                pairs[i] = update_gradients(
                    gradients[i], seen_TI, A_RI, B_OR, kept_PQ, layer.block, layer.scale, into, layer.form == "kernel"
                )
        result = [gradient for i in range(len(layers)) for gradient in (None, None, *pairs[i], None)]
        return dx, d_seen if ctx.dropped else None, None, *result


def _layers(tensors: Sequence[Tensor | None], fields: Sequence[Sequence[Any]]) -> list[Adapted]:
    own: list[Sequence[Any]] = [tensors[i * _TENSORS : (i + 1) * _TENSORS] for i in range(len(fields))]
    return [Adapted(*some, *others) for some, others in zip(own, fields, strict=True)]


def _stacked(layers: Sequence[Adapted], dtype: torch.dtype) -> Tensor:
    """(S, I): A of all layers, ranks below each other."""
    factors = [layer.A_RI.to(dtype) for layer in layers]
    return factors[0] if len(factors) == 1 else torch.cat(factors)


def _plain_gradients(
    layers: Sequence[tuple[Adapted, Tensor]], x_TI: Tensor, z_TS: Tensor | None, dx_TI: Tensor | None
) -> Iterator[tuple[Tensor, Tensor]]:
    """Gradients of A and B, in their dtypes, of layers without a mask, each with the gradient of its output; that of x is added to `dx_TI`.

    Args:
        z_TS: x A^T of all of them, ranks beside each other; None: there are no such layers.
    """
    if z_TS is None:
        return
    dtype = x_TI.dtype
    each = [matmul(g_TO, layer.B_OR.to(dtype)).mul_(layer.scale) for layer, g_TO in layers]
    dz_TS = each[0] if len(each) == 1 else torch.cat(each, 1)
    if dx_TI is not None:
        _add_product_(dx_TI, dz_TS, _stacked([layer for layer, _ in layers], dtype), 1.0)
    ranks = [len(layer.A_RI) for layer, _ in layers]
    parts = zip(layers, matmul(dz_TS.T, x_TI).split(ranks), z_TS.split(ranks, 1), strict=True)
    for (layer, g_TO), dA_RI, z_TR in parts:
        dB_OR = matmul(g_TO.T, z_TR).mul_(layer.scale)
        yield dA_RI.to(layer.A_RI.dtype), dB_OR.to(layer.B_OR.dtype)


def _add_product_(y_TN: Tensor, x_TK: Tensor, weight_KN: Tensor, scale: float) -> None:
    """y += scale x W; in one operation where the processor multiplies their dtype."""
    if compute_dtype(x_TK) == x_TK.dtype:
        y_TN.addmm_(x_TK, weight_KN, alpha=scale)
    else:
        y_TN.add_(matmul(x_TK, weight_KN), alpha=scale)


def _plus(dx_TI: Tensor | None, g_TO: Tensor, weight_OI: Tensor) -> Tensor:
    """(T, I): dx, in its place, plus g W."""
    if dx_TI is None:
        return product(g_TO, weight_OI)
    if gemm.ONEDNN_IS_FASTER:
        return dx_TI.add_(product(g_TO, weight_OI))
    _add_product_(dx_TI, g_TO, weight_OI, 1.0)
    return dx_TI


def adapted_linears(x: Tensor, layers: Sequence[Adapted], dropped: Tensor | None = None) -> list[Tensor]:
    """x W^T + bias + s dropped (mask . BA)^T for x of shape (..., I), by layer.

    Args:
        dropped: what the updates see of x, of its shape; None: x itself.
    """
    flat = None if dropped is None else dropped.reshape(-1, dropped.shape[-1])
    tensors = [tensor for layer in layers for tensor in layer[:_TENSORS]]
    with without_autocast(x):
        ys = _AdaptedLinears.apply(x.reshape(-1, x.shape[-1]), flat, [layer[_TENSORS:] for layer in layers], *tensors)
    return [y_TO.view(*x.shape[:-1], -1) for y_TO in ys]
