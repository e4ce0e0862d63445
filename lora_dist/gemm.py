"""`x W^T` and `x W` on CPUs by whichever way torch has that is fastest; elsewhere torch's own choice.

- float32: torch takes products to MKL, which is tuned for Intel's processors; on AMD's, oneDNN's are faster with AVX-512 (by a fifth), and
  without it for few rows and a wide weight, as a chunk of a loss is.
- 16 bits on processors that cannot multiply them: torch's own loops take x W at a two-hundredth of float32's speed and x W^T at a sixth.
  There, pieces of both are made float32, multiplied, and rounded once (docs/log.md).

The choice depends on the processor alone, so that a run that goes on gives the same bits. Not seen by autograd: for use inside
`torch.autograd.Function`. Called by `adapter/` (`linear.py`, `product.py`, `sparse.py`, `tiles.py`) and `models/` (`chunked.py`, `padded.py`).
"""

from __future__ import annotations

import platform
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def _onednn_is_faster() -> tuple[bool, bool]:
    """On this machine's processor, in float32: for all products, and for few rows by a wide weight."""
    capabilities: Mapping[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()  # torch 2.9 has no such function
    there = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    amd = there and str(capabilities.get("cpu_name", "")).startswith("AMD")
    return amd and bool(capabilities.get("avx512_f")), amd


def _without_products() -> tuple[torch.dtype, ...]:
    """16-bit dtypes that this machine's processor cannot multiply."""
    if platform.machine() not in ("x86_64", "AMD64") or not torch.backends.mkldnn.is_available():
        return ()
    asked = {torch.bfloat16: "_is_mkldnn_bf16_supported", torch.float16: "_is_mkldnn_fp16_supported"}
    return tuple(
        dtype for dtype, name in asked.items() if hasattr(torch.ops.mkldnn, name) and not getattr(torch.ops.mkldnn, name)()
    )


ONEDNN_IS_FASTER, ONEDNN_IS_FASTER_FOR_FEW = _onednn_is_faster()
"""plain constants, which torch.compile can see"""
_FEW_ROWS = range(64, 257)
EMULATED = _without_products()
"""likewise"""
_meta_is = "meta"
_PIECE_ROWS = 512
_PIECE_WEIGHTS = 2**20


def device_type(x: Tensor) -> str:
    """Where x is, or is thought to be."""
    return _meta_is if x.is_meta else x.device.type


@contextmanager
def meta_is(device_type: str) -> Iterator[None]:
    """What the block computes on the meta device goes the ways, and allocates the pieces, of another device: for a rehearsal."""
    global _meta_is
    before, _meta_is = _meta_is, device_type
    try:
        yield
    finally:
        _meta_is = before


def compute_dtype(x: Tensor) -> torch.dtype:
    """What products of x are best computed in: its own, or float32 where the processor has no other."""
    return torch.float32 if x.dtype in EMULATED and device_type(x) == "cpu" else x.dtype


def _by_onednn(x: Tensor, columns: int = 0) -> bool:
    # No layer that is compiled is so wide, and the number of rows is a symbol there.
    few = ONEDNN_IS_FASTER_FOR_FEW and not torch.compiler.is_compiling() and len(x) in _FEW_ROWS and columns >= 16 * len(x)
    return (
        x.dtype == torch.float32 and x.device.type == "cpu" and (ONEDNN_IS_FASTER or few) and bool(torch.backends.mkldnn.enabled)
    )


def linear(x_TI: Tensor, weight_OI: Tensor, bias_O: Tensor | None = None, out_TO: Tensor | None = None) -> Tensor:
    """(T, O): x W^T + bias, of one dtype; in `out_TO`, where that spares memory that would be handed out anew."""
    if _by_onednn(x_TI, len(weight_OI)):
        if torch.compiler.is_compiling():
            return _opaque(x_TI, weight_OI, bias_O)
        return torch.ops.mkldnn._linear_pointwise(x_TI, weight_OI, bias_O, "none", [], "")
    if compute_dtype(x_TI) != x_TI.dtype:
        y_TO = matmul(x_TI, weight_OI.T)
        return y_TO if bias_O is None else y_TO.add_(bias_O)
    if out_TO is None:
        return F.linear(x_TI, weight_OI, bias_O)
    if bias_O is None:
        return torch.mm(x_TI, weight_OI.T, out=out_TO)
    return torch.addmm(bias_O, x_TI, weight_OI.T, out=out_TO)


def product(x_TO: Tensor, weight_OI: Tensor) -> Tensor:
    """(T, I): x W, of one dtype."""
    return linear(x_TO, weight_OI.T) if _by_onednn(x_TO) else matmul(x_TO, weight_OI)


def matmul(x_TK: Tensor, weight_KN: Tensor) -> Tensor:
    """(T, N): x W, of one dtype; of 16 bits that the processor cannot multiply, in float32, a few MiB at a time, rounded once."""
    if compute_dtype(x_TK) == x_TK.dtype:
        return x_TK @ weight_KN
    y_TN = x_TK.new_empty((len(x_TK), weight_KN.shape[1]))
    for rows in pieces(x_TK, len(x_TK), _PIECE_ROWS):
        wide_CK = x_TK[rows].float()
        for columns in pieces(x_TK, weight_KN.shape[1], max(16, _PIECE_WEIGHTS // max(1, len(weight_KN)))):
            y_TN[rows, columns] = wide_CK @ weight_KN[:, columns].float()
    return y_TN


def pieces(x: Tensor, length: int, size: int) -> Iterator[slice]:
    """Slices of `size` that make up `length`; on the meta device the first two only, which need as much memory as all."""
    return (slice(start, min(start + size, length)) for start in range(0, min(length, 2 * size) if x.is_meta else length, size))


@torch.library.custom_op("lora_dist::onednn_linear", mutates_args=())
def _opaque(x_TI: Tensor, weight_OI: Tensor, bias_O: Tensor | None) -> Tensor:
    """For inductor, which takes torch's own operation only with weights that it has packed itself."""
    return torch.ops.mkldnn._linear_pointwise(x_TI, weight_OI, bias_O, "none", [], "")


@_opaque.register_fake
def _(x_TI: Tensor, weight_OI: Tensor, bias_O: Tensor | None) -> Tensor:
    return x_TI.new_empty(len(x_TI), len(weight_OI))
