"""The masked update's factorised form in one Triton kernel, for GPUs (`adapter.form triton`).

`tiles.py` writes z and u, each as large as x or y, between its products; here they stay in registers. A program takes some block columns of
the result and walks over tokens; for each piece of tokens it goes over all block columns of the input:

    z[q] = x[:, block q] f_q           (t, R)   a batch of small products
    u   += mask[:, q] z[q]             (p, t R)  one product on the tensor cores
    y[:, block p] += u[p] h_p          (t, b)   a batch of small products
    dh[p] += u[p]^T w[:, block p]      (R, b)   where the factor's gradient is asked for

One kernel serves all of the layer: y from x; dx and A's gradient from the gradient of y, factors and mask turned round; B's gradient from
x again. Sums over tokens are taken in a fixed order, without atomic additions, so that a run that goes on gives the same bits.

Tiles of 16, 32 or 64; ranks are filled up to 16, 32 or 64. Triton comes with torch's CUDA builds; its interpreter runs the kernel
on a CPU for the tests, and it compiles for GPUs that are not there (tests/adapter/test_kernel.py). Speed on a GPU: not yet measured.
Shapes: T tokens, b block side, P/Q block rows/columns of the mask, R rank. Called by `tiles.py`.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from lora_dist.adapter.tiles import KERNEL_RANKS

_TOKENS = 16
"""of a piece: the least that a tensor core takes"""
_ACCUMULATED = 8192
"""numbers of u in registers; with twice as many a program of 8 warps spills several times as much (ptxas, sm_90)"""
_PROGRAMS = 64
"""that share the tokens; each walks over its part"""
WARPS = 8


@triton.jit
def masked_update_kernel(  # type: ignore[no-untyped-def]
    x_ptr, f_ptr, mask_ptr, h_ptr, y_ptr, w_ptr, dh_ptr,
    x_stride, y_stride, w_stride, mask_row, mask_column, T, M, N, pieces,
    R: tl.constexpr, b: tl.constexpr, TOKENS: tl.constexpr, GROUP: tl.constexpr, STEP: tl.constexpr,
    HAS_Y: tl.constexpr, HAS_GRADIENT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """See the module docstring. x (T, N b), f (N, b, R), mask (M, N), h (M, R, b), y (T, M b), w (T, M b), dh (splits, M, R, b) float32."""
    split, group = tl.program_id(0), tl.program_id(1)
    m_G = group * GROUP + tl.arange(0, GROUP)
    r_R, i_b, n_S = tl.arange(0, R), tl.arange(0, b), tl.arange(0, STEP)
    in_M = m_G < M
    dtype = x_ptr.dtype.element_ty
    h_offsets = m_G[:, None, None] * (R * b) + r_R[None, :, None] * b + i_b[None, None, :]
    dh_GRb = tl.full((GROUP, R, b), 0.0, tl.float32)
    for piece in range(split * pieces, (split + 1) * pieces):
        t_t = piece * TOKENS + tl.arange(0, TOKENS)
        in_T = t_t < T
        u_GtR = tl.full((GROUP, TOKENS * R), 0.0, tl.float32)
        for first in range(0, N, STEP):
            n = first + n_S
            in_N = n < N
            x_Stb = tl.load(
                x_ptr + t_t[None, :, None].to(tl.int64) * x_stride + n[:, None, None] * b + i_b[None, None, :],
                mask=in_T[None, :, None] & in_N[:, None, None],
                other=0.0,
            )
            f_SbR = tl.load(
                f_ptr + n[:, None, None] * (b * R) + i_b[None, :, None] * R + r_R[None, None, :],
                mask=in_N[:, None, None],
                other=0.0,
            )
            z_StR = tl.dot(x_Stb, f_SbR, input_precision=PRECISION).to(dtype)
            mask_GS = tl.load(
                mask_ptr + m_G[:, None] * mask_row + n[None, :] * mask_column, mask=in_M[:, None] & in_N[None, :], other=0
            )
            u_GtR = tl.dot(mask_GS.to(dtype), tl.reshape(z_StR, (STEP, TOKENS * R)), u_GtR, input_precision=PRECISION)
        u = tl.reshape(u_GtR, (GROUP, TOKENS, R)).to(dtype)
        inside = in_T[None, :, None] & in_M[:, None, None]
        columns = m_G[:, None, None] * b + i_b[None, None, :]
        if HAS_Y:
            h_GRb = tl.load(h_ptr + h_offsets, mask=in_M[:, None, None], other=0.0)
            y_at = y_ptr + t_t[None, :, None].to(tl.int64) * y_stride + columns
            update_Gtb = tl.dot(u, h_GRb, input_precision=PRECISION)
            tl.store(y_at, (tl.load(y_at, mask=inside, other=0.0) + update_Gtb).to(dtype), mask=inside)
        if HAS_GRADIENT:
            w_Gtb = tl.load(w_ptr + t_t[None, :, None].to(tl.int64) * w_stride + columns, mask=inside, other=0.0)
            dh_GRb += tl.dot(tl.trans(u, (0, 2, 1)), w_Gtb, input_precision=PRECISION)
    if HAS_GRADIENT:
        tl.store(dh_ptr + split.to(tl.int64) * M * R * b + h_offsets, dh_GRb, mask=in_M[:, None, None])


def settings(rank: int) -> dict[str, Any]:
    """What is fixed when it is compiled, for a rank of `KERNEL_RANKS`."""
    return {"TOKENS": _TOKENS, "GROUP": max(16, _ACCUMULATED // (_TOKENS * rank)), "STEP": 16, "PRECISION": "ieee"}


def factors(A_RI: Tensor, B_OR: Tensor, block: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(Q, b, R) of A and (P, R, b) of B, for `run`; both filled up to a rank that the kernel takes."""
    fill = next(R for R in KERNEL_RANKS if len(A_RI) <= R) - len(A_RI)
    A, B = F.pad(A_RI.to(dtype), (0, 0, 0, fill)), F.pad(B_OR.to(dtype), (0, fill))
    return A.T.reshape(-1, block, A.shape[0]), B.view(-1, block, B.shape[1]).transpose(1, 2)


def run(
    x_TI: Tensor,
    f_NbR: Tensor,
    mask_MN: Tensor,
    h_MRb: Tensor,
    *,
    y_TO: Tensor | None = None,
    w_TO: Tensor | None = None,
) -> Tensor | None:
    """y += the update, in place, and (M, R, b) float32, the gradient of h for a gradient w of y; either may be left out.

    Args:
        x_TI: of N whole blocks a row; y and w of M; in 16 or 32 bits, on a GPU.
        y_TO: rows may have gaps between them, elements may not.
        mask_MN: bool; of any strides.
    """
    f_NbR, h_MRb = f_NbR.contiguous(), h_MRb.contiguous()
    x_TI, w_TO = x_TI.contiguous(), None if w_TO is None else w_TO.contiguous()
    (M, R, b), N, T = h_MRb.shape, f_NbR.shape[0], len(x_TI)
    constants = settings(R)
    pieces = triton.cdiv(triton.cdiv(T, _TOKENS), _PROGRAMS)
    splits = triton.cdiv(triton.cdiv(T, _TOKENS), pieces)
    dh = None if w_TO is None else x_TI.new_empty((splits, M, R, b), dtype=torch.float32)
    masked_update_kernel[(splits, triton.cdiv(M, constants["GROUP"]))](
        x_TI, f_NbR, mask_MN.view(torch.uint8), h_MRb, x_TI if y_TO is None else y_TO, x_TI if w_TO is None else w_TO,
        x_TI if dh is None else dh, x_TI.stride(0), 0 if y_TO is None else y_TO.stride(0), 0 if w_TO is None else w_TO.stride(0),
        mask_MN.stride(0), mask_MN.stride(1), T, M, N, pieces, R=R, b=b,
        HAS_Y=y_TO is not None, HAS_GRADIENT=w_TO is not None, num_warps=WARPS, **constants,
    )  # fmt: skip
    return None if dh is None else dh.sum(0)
