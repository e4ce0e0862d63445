"""The update of a linear layer added to its output, and its gradients, in small products only: nothing of size O x I is made.

With a mask of tiles (design section 3), all of it once more in the backward pass:

    z[q,t,:] = A[:, block q] x[t, block q]            (Q,T,R)   batched small products
    u[p,t,:] = sum_q mask[p,q] z[q,t,:]               (P,T,R)   one product with the P x Q mask
    y[t, block p] += s B[block p, :] u[p,t,:]         (T,O)

Without a mask it is plain LoRA: z = A x, y += s B z. On CPUs the masked one goes over chunks of tokens: what is between two products stays in
the processor's cache and is not allocated anew (docs/log.md has what that is worth). On GPUs `kernel.py` can do all of it in one kernel.

Shapes: T tokens, C tokens of a chunk, I/O in/out features, b block side, P/Q block rows/columns, R rank. Called by `linear.py` and `product.py`.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lora_dist.gemm import compute_dtype, device_type, matmul, pieces

CHUNK_BYTES = {"cpu": 2**19}
"""of z, and of u, of a chunk in 32 bits; devices that are not named take all tokens at once"""
_HALF = 8
"""so many times as much in 16 bits, whose products cost more to start"""
_LEAST_TOKENS = 32
KERNEL_BLOCKS = (16, 32, 64)
KERNEL_RANKS = (16, 32, 64)


def add_update_(
    y_TO: Tensor,
    x_TI: Tensor,
    A_RI: Tensor,
    B_OR: Tensor,
    mask_PQ: Tensor | None,
    block: int,
    scale: float,
    fused: bool = False,
) -> None:
    """y += s x (mask . BA)^T, in place. Factors may be of another dtype than x. `fused`: by the kernel, with a mask."""
    if fused and mask_PQ is not None:
        kernel = _kernel()
        f_QbR, h_PRb = kernel.factors(A_RI, B_OR * scale, block, x_TI.dtype)
        kernel.run(x_TI, f_QbR, mask_PQ, h_PRb, y_TO=y_TO)
        return
    if mask_PQ is None:
        A_RI, B_OR = A_RI.to(x_TI.dtype), B_OR.to(x_TI.dtype)
        _add_product_(y_TO, matmul(x_TI, A_RI.T), B_OR.T, scale)
        return
    dtype, O = compute_dtype(x_TI), y_TO.shape[1]
    A_RI, B_OR = A_RI.to(dtype), B_OR.to(dtype)
    A_QbR, B_PRb, mask_PQ = _columns(A_RI, block), _rows(B_OR * scale, block).transpose(1, 2), mask_PQ.to(dtype)
    for rows, z_QCR, u_PCR in _chunks(x_TI, mask_PQ, A_RI.shape[0]):
        torch.bmm(_blocks(x_TI[rows].to(dtype), block), A_QbR, out=z_QCR)
        _mix(mask_PQ, z_QCR, u_PCR)
        _add_blocks_(y_TO[rows], torch.bmm(u_PCR, B_PRb), O)


def update_gradients(
    g_TO: Tensor,
    x_TI: Tensor,
    A_RI: Tensor,
    B_OR: Tensor,
    mask_PQ: Tensor | None,
    block: int,
    scale: float,
    dx_TI: Tensor | None,
    fused: bool = False,
) -> tuple[Tensor, Tensor]:
    """Gradients of A and B, in their dtypes; that of x is added to `dx_TI`, where there is one. `fused` as above."""
    if fused and mask_PQ is not None:
        kernel, R = _kernel(), A_RI.shape[0]
        f_QbR, h_PRb = kernel.factors(A_RI, B_OR * scale, block, x_TI.dtype)
        dA_QRb = kernel.run(g_TO, h_PRb.transpose(1, 2), mask_PQ.T, f_QbR.transpose(1, 2), y_TO=dx_TI, w_TO=x_TI)
        dB_PRb = kernel.run(x_TI, f_QbR, mask_PQ, h_PRb, w_TO=g_TO)
        dA_RI, dB_OR = (
            dA_QRb.transpose(0, 1).reshape(-1, A_RI.shape[1]),
            dB_PRb.transpose(1, 2).reshape(B_OR.shape[0], -1) * scale,
        )
        return dA_RI[:R].to(A_RI.dtype), dB_OR[:, :R].to(B_OR.dtype)
    if mask_PQ is None:
        A, B = A_RI.to(x_TI.dtype), B_OR.to(x_TI.dtype)
        dz_TR = matmul(g_TO, B).mul_(scale)
        if dx_TI is not None:
            _add_product_(dx_TI, dz_TR, A, 1.0)
        return matmul(dz_TR.T, x_TI).to(A_RI.dtype), matmul(g_TO.T, matmul(x_TI, A.T).mul_(scale)).to(B_OR.dtype)
    dtype = compute_dtype(x_TI)
    A, B = A_RI.to(dtype), B_OR.to(dtype)
    R, wide = A.shape[0], torch.promote_types(dtype, torch.float32)
    A_QbR, B_PbR, mask = _columns(A, block), _rows(B * scale, block), mask_PQ.to(dtype)
    dA_QRb = A.new_zeros((len(A_QbR), R, block), dtype=wide)
    dB_PRb = B.new_zeros((len(B_PbR), R, block), dtype=wide)
    for rows, z_QCR, u_PCR in _chunks(x_TI, mask, R):
        x_QCb, g_PCb = _blocks(x_TI[rows].to(dtype), block), _blocks(g_TO[rows].to(dtype), block)
        torch.bmm(x_QCb, A_QbR, out=z_QCR)
        _mix(mask, z_QCR, u_PCR)
        dB_PRb += torch.bmm(u_PCR.transpose(1, 2), g_PCb)
        torch.bmm(g_PCb, B_PbR, out=u_PCR)  # from here on gradients of u and z, in their places
        _mix(mask.T, u_PCR, z_QCR)
        dA_QRb += torch.bmm(z_QCR.transpose(1, 2), x_QCb)
        if dx_TI is not None:
            _add_blocks_(dx_TI[rows], torch.bmm(z_QCR, A_QbR.transpose(1, 2)), x_TI.shape[1])
    dA_RI = dA_QRb.transpose(0, 1).reshape(R, -1)[:, : A.shape[1]]
    dB_OR = dB_PRb.transpose(1, 2).reshape(-1, R)[: B.shape[0]] * scale
    return dA_RI.to(A_RI.dtype), dB_OR.to(B_OR.dtype)


def kernel_fits(block: int, rank: int) -> bool:
    """Whether there is a kernel for tiles and rank."""
    return block in KERNEL_BLOCKS and rank <= KERNEL_RANKS[-1]


def _kernel() -> Any:
    """Loaded where it is asked for: it needs Triton, which torch's CUDA builds bring."""
    return importlib.import_module("lora_dist.adapter.kernel")


def _chunks(x_TI: Tensor, mask_PQ: Tensor, rank: int) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Rows of x, and room for their z (Q,C,R) and u (P,C,R), of the mask's dtype."""
    (P, Q), T = mask_PQ.shape, len(x_TI)
    chunk_bytes = CHUNK_BYTES.get(device_type(x_TI))
    if chunk_bytes is not None and mask_PQ.element_size() == 2:
        chunk_bytes *= _HALF
    C = T if chunk_bytes is None else min(T, max(_LEAST_TOKENS, chunk_bytes // (max(P, Q) * rank * mask_PQ.element_size())))
    z, u = mask_PQ.new_empty(Q * C * rank), mask_PQ.new_empty(P * C * rank)
    for rows in pieces(x_TI, T, max(1, C)):
        c = rows.stop - rows.start
        yield rows, z[: Q * c * rank].view(Q, c, rank), u[: P * c * rank].view(P, c, rank)


def _add_product_(y_TN: Tensor, x_TK: Tensor, weight_KN: Tensor, scale: float) -> None:
    """y += scale x W; in one operation where the processor multiplies their dtype."""
    if compute_dtype(x_TK) == x_TK.dtype:
        y_TN.addmm_(x_TK, weight_KN, alpha=scale)
    else:
        y_TN.add_(matmul(x_TK, weight_KN), alpha=scale)


def _pad_last(tensor: Tensor, block: int) -> Tensor:
    """Zero-pad the last dimension to a whole number of blocks."""
    short = -tensor.shape[-1] % block
    return F.pad(tensor, (0, short)) if short else tensor


def _blocks(x_CN: Tensor, block: int) -> Tensor:
    """(C, N) -> (N/b, C, b); a view where N is a whole number of blocks."""
    padded = _pad_last(x_CN, block)
    return padded.unflatten(1, (-1, block)).transpose(0, 1)


def _columns(A_RI: Tensor, block: int) -> Tensor:
    """(R, I) -> (Q, b, R), contiguous."""
    return _pad_last(A_RI, block).T.reshape(-1, block, A_RI.shape[0])


def _rows(B_OR: Tensor, block: int) -> Tensor:
    """(O, R) -> (P, b, R), contiguous."""
    short = -B_OR.shape[0] % block
    return (F.pad(B_OR, (0, 0, 0, short)) if short else B_OR).reshape(-1, block, B_OR.shape[1])


def _mix(mask_MN: Tensor, x_NCR: Tensor, out_MCR: Tensor) -> None:
    """out[m] = sum over n of mask[m,n] x[n], one product."""
    torch.mm(mask_MN, x_NCR.view(len(x_NCR), -1), out=out_MCR.view(len(out_MCR), -1))


def _add_blocks_(y_CN: Tensor, update_MCb: Tensor, columns: int) -> None:
    """y += the blocks beside each other. Copied first: adding with strides is 7 times slower in 16 bits on a CPU, and as fast in 32."""
    M, C, b = update_MCb.shape
    y_CN += update_MCb.transpose(0, 1).reshape(C, M * b)[:, :columns]
