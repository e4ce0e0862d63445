"""The update of a linear layer, masked by tiles, added to its output, and its gradients, in small products only: nothing of size O x I is made.

All of it once more in the backward pass (design section 3):

    z[q,t,:] = A[:, block q] x[t, block q]            (Q,T,R)   batched small products
    u[p,t,:] = sum_q mask[p,q] z[q,t,:]               (P,T,R)   one product with the P x Q mask
    y[t, block p] += s B[block p, :] u[p,t,:]         (T,O)

On CPUs it goes over chunks of tokens: what is between two products stays in the processor's cache and is not allocated anew (docs/log.md has
what that is worth). On GPUs `kernel.py` can do all of it in one kernel.

Shapes: T tokens, C tokens of a chunk, I/O in/out features, b block side, P/Q block rows/columns, R rank. Called by `linear.py` and `product.py`.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lora_dist.gemm import compute_dtype, device_type, pieces

CHUNK_BYTES = {"cpu": 2**20}
"""of z, and of u, of a chunk in 32 bits; devices that are not named take all tokens at once"""
_HALF = 4
"""so many times as much in 16 bits, whose products cost more to start"""
_LEAST_TOKENS = 32
KERNEL_BLOCKS = (16, 32, 64)
KERNEL_RANKS = (16, 32, 64)


def add_update_(
    y_TO: Tensor,
    x_TI: Tensor,
    A_RI: Tensor,
    B_OR: Tensor,
    mask_PQ: Tensor,
    block: int,
    scale: float,
    fused: bool = False,
) -> None:
    """y += s x (mask . BA)^T, in place. Factors may be of another dtype than x. `fused`: by the kernel."""
    if fused:
        kernel = _kernel()
        f_QbR, h_PRb = kernel.factors(A_RI, B_OR * scale, block, x_TI.dtype)
        kernel.run(x_TI, f_QbR, mask_PQ, h_PRb, y_TO=y_TO)
        return
    dtype, O = compute_dtype(x_TI), y_TO.shape[1]
    A_RI, B_OR = A_RI.to(dtype), B_OR.to(dtype)
    A_QbR, B_PRb, mask_PQ = _columns(A_RI, block), _rows(B_OR * scale, block).transpose(1, 2), mask_PQ.to(dtype)
    for chunks, z_SQCR, u_SPCR in _chunks(x_TI, mask_PQ, A_RI.shape[0]):
        for rows, z_QCR in zip(chunks, z_SQCR, strict=True):
            torch.bmm(_blocks(x_TI[rows].to(dtype), block), A_QbR, out=z_QCR)
        _mix(mask_PQ, z_SQCR, u_SPCR)
        for rows, u_PCR in zip(chunks, u_SPCR, strict=True):
            _add_blocks_(y_TO[rows], torch.bmm(u_PCR, B_PRb), O)


def update_gradients(
    g_TO: Tensor,
    x_TI: Tensor,
    A_RI: Tensor,
    B_OR: Tensor,
    mask_PQ: Tensor,
    block: int,
    scale: float,
    dx_TI: Tensor | None,
    fused: bool = False,
) -> tuple[Tensor, Tensor]:
    """Gradients of A and B, in their dtypes; that of x is added to `dx_TI`, where there is one. `fused` as above."""
    if fused:
        kernel, R = _kernel(), A_RI.shape[0]
        f_QbR, h_PRb = kernel.factors(A_RI, B_OR * scale, block, x_TI.dtype)
        dA_QRb = kernel.run(g_TO, h_PRb.transpose(1, 2), mask_PQ.T, f_QbR.transpose(1, 2), y_TO=dx_TI, w_TO=x_TI)
        dB_PRb = kernel.run(x_TI, f_QbR, mask_PQ, h_PRb, w_TO=g_TO)
        dA_RI, dB_OR = (
            dA_QRb.transpose(0, 1).reshape(-1, A_RI.shape[1]),
            dB_PRb.transpose(1, 2).reshape(B_OR.shape[0], -1) * scale,
        )
        return dA_RI[:R].to(A_RI.dtype), dB_OR[:, :R].to(B_OR.dtype)
    dtype = compute_dtype(x_TI)
    A, B = A_RI.to(dtype), B_OR.to(dtype)
    R, wide = A.shape[0], torch.promote_types(dtype, torch.float32)
    A_QbR, B_PbR, mask = _columns(A, block), _rows(B * scale, block), mask_PQ.to(dtype)
    dA_QRb = A.new_zeros((len(A_QbR), R, block), dtype=wide)
    dB_PRb = B.new_zeros((len(B_PbR), R, block), dtype=wide)
    for chunks, z_SQCR, u_SPCR in _chunks(x_TI, mask, R):
        x_SQCb, g_SPCb = ([_blocks(each[rows].to(dtype), block) for rows in chunks] for each in (x_TI, g_TO))
        for x_QCb, z_QCR in zip(x_SQCb, z_SQCR, strict=True):
            torch.bmm(x_QCb, A_QbR, out=z_QCR)
        _mix(mask, z_SQCR, u_SPCR)
        for g_PCb, u_PCR in zip(g_SPCb, u_SPCR, strict=True):
            _add_bmm_(dB_PRb, u_PCR.transpose(1, 2), g_PCb)
            torch.bmm(g_PCb, B_PbR, out=u_PCR)  # from here on gradients of u and z, in their places
        _mix(mask.T, u_SPCR, z_SQCR)
        for rows, x_QCb, z_QCR in zip(chunks, x_SQCb, z_SQCR, strict=True):
            _add_bmm_(dA_QRb, z_QCR.transpose(1, 2), x_QCb)
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


def _chunks(x_TI: Tensor, mask_PQ: Tensor, rank: int) -> Iterator[tuple[list[slice], Tensor, Tensor]]:
    """Rows of x by chunk, one for each thread at a time, and room for their z (S,Q,C,R) and u (S,P,C,R), of the mask's dtype."""
    (P, Q), T = mask_PQ.shape, len(x_TI)
    chunk_bytes = CHUNK_BYTES.get(device_type(x_TI))
    if chunk_bytes is not None and mask_PQ.element_size() == 2:
        chunk_bytes *= _HALF
    C = T if chunk_bytes is None else min(T, max(_LEAST_TOKENS, chunk_bytes // (max(P, Q) * rank * mask_PQ.element_size())))
    chunks = list(pieces(x_TI, T, max(1, C)))
    whole = [rows for rows in chunks if rows.stop - rows.start == C]
    S = max(1, min(torch.get_num_threads(), len(whole))) if device_type(x_TI) == "cpu" else 1
    z, u = mask_PQ.new_empty(S * Q * C * rank), mask_PQ.new_empty(S * P * C * rank)
    for together in [whole[i : i + S] for i in range(0, len(whole), S)] + [[rows] for rows in chunks[len(whole) :]]:
        s, c = len(together), together[0].stop - together[0].start
        yield together, z[: s * Q * c * rank].view(s, Q, c, rank), u[: s * P * c * rank].view(s, P, c, rank)


def _add_bmm_(out_BMN: Tensor, a_BMK: Tensor, b_BKN: Tensor) -> None:
    """out += a b, batch by batch; in one operation where they are of one dtype."""
    if out_BMN.dtype == a_BMK.dtype:
        out_BMN.baddbmm_(a_BMK, b_BKN)
    else:
        out_BMN += torch.bmm(a_BMK, b_BKN)


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


def _mix(mask_MN: Tensor, x_SNCR: Tensor, out_SMCR: Tensor) -> None:
    """out[m] = sum over n of mask[m,n] x[n], one product for each chunk."""
    if len(x_SNCR) == 1:
        torch.mm(mask_MN, x_SNCR[0].flatten(1), out=out_SMCR[0].flatten(1))
    else:
        torch.bmm(mask_MN.expand(len(x_SNCR), -1, -1), x_SNCR.flatten(2), out=out_SMCR.flatten(2))


def _add_blocks_(y_CN: Tensor, update_MCb: Tensor, columns: int) -> None:
    """y += the blocks beside each other. Copied first: adding with strides is 7 times slower in 16 bits on a CPU, and as fast in 32."""
    M, C, b = update_MCb.shape
    y_CN += update_MCb.transpose(0, 1).reshape(C, M * b)[:, :columns]
