"""`x W^T` and `x W` in float32 on CPUs by whichever of torch's two libraries is faster; elsewhere torch's own choice.

torch takes float32 products to MKL, which is tuned for Intel's processors; on AMD's with AVX-512, oneDNN's are a fifth faster (docs/log.md).
The choice depends on the processor alone, so that a run that goes on gives the same bits. Not seen by autograd: for use inside
`torch.autograd.Function`. Called by `adapter/linear.py` and `models/chunked.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def _onednn_is_faster() -> bool:
    """On this machine's processor, in float32."""
    capabilities: Mapping[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()  # torch 2.9 has no such function
    amd = str(capabilities.get("cpu_name", "")).startswith("AMD") and bool(capabilities.get("avx512_f"))
    return amd and bool(torch.backends.mkldnn.is_available()) and hasattr(torch.ops.mkldnn, "_linear_pointwise")


ONEDNN_IS_FASTER = _onednn_is_faster()
"""a plain constant, which torch.compile can see"""


def _by_onednn(x: Tensor) -> bool:
    return x.dtype == torch.float32 and x.device.type == "cpu" and ONEDNN_IS_FASTER and bool(torch.backends.mkldnn.enabled)


def linear(x_TI: Tensor, weight_OI: Tensor, bias_O: Tensor | None = None) -> Tensor:
    """(T, O): x W^T + bias, of one dtype."""
    if _by_onednn(x_TI):
        if torch.compiler.is_compiling():
            return _opaque(x_TI, weight_OI, bias_O)
        return torch.ops.mkldnn._linear_pointwise(x_TI, weight_OI, bias_O, "none", [], "")
    return F.linear(x_TI, weight_OI, bias_O)


def product(x_TO: Tensor, weight_OI: Tensor) -> Tensor:
    """(T, I): x W, of one dtype."""
    return linear(x_TO, weight_OI.T) if _by_onednn(x_TO) else x_TO @ weight_OI


@torch.library.custom_op("lora_dist::onednn_linear", mutates_args=())
def _opaque(x_TI: Tensor, weight_OI: Tensor, bias_O: Tensor | None) -> Tensor:
    """For inductor, which takes torch's own operation only with weights that it has packed itself."""
    return torch.ops.mkldnn._linear_pointwise(x_TI, weight_OI, bias_O, "none", [], "")


@_opaque.register_fake
def _(x_TI: Tensor, weight_OI: Tensor, bias_O: Tensor | None) -> Tensor:
    return x_TI.new_empty(len(x_TI), len(weight_OI))
