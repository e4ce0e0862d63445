"""DoRA on a pruned base: W' = m / |V| * V by rows, with V = W + s * mask . BA and |V| the rows' 2-norms.

Scaling a row keeps its zeros, so masking the update is enough: W' is exactly zero wherever the base is pruned. As in PEFT (section
4.3 of the DoRA paper, arXiv 2402.09353), the norms get no gradient. A row of W that is pruned altogether has norm 0; its
norm is taken as 1, so that it stays zero instead of becoming 0/0. Used by `adapter/layer.py`.
"""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners.lora.dora import DoraLinearLayer
from peft.tuners.lora.variants import DoraLinearVariant
from peft.utils.integrations import dequantize_bnb_weight
from torch import Tensor, nn

from lora_dist.adapter.whole import layer_bias
from lora_dist.blocks import BlockLinear


def base_weight(linear: Any) -> Tensor:
    """A linear's weight as the base stores it, or unpacked, or de-quantised, in the precision that it is computed in.

    PEFT's `dequantize_module_weight` would make another parameter of an int8 weight at every call, and does not know the columns that
    4-bit rows are filled up with to whole blocks (`models/padded.py`).
    """
    if isinstance(linear, BlockLinear):
        return linear.dense_OI()
    if getattr(linear, "quant_state", None) is not None:
        import bitsandbytes

        return bitsandbytes.functional.dequantize_4bit(linear.weight.data, linear.quant_state)[:, : linear.in_features]
    if type(linear.weight).__name__ == "Int8Params":
        return dequantize_bnb_weight(linear.weight, state=linear.state)
    return linear.weight


class BlockDoraLayer(DoraLinearLayer):
    """The magnitudes m_O of one adapter in one layer, as PEFT's `DoraLinearLayer` names and saves them."""

    def update_layer(self, *, base_layer: Any, lora_A: Tensor, lora_B: Tensor, scaling: float, **kwargs: Any) -> None:
        """The norms to start from; ones where a quantised base is not read yet (`attach.py` sets them then)."""
        if hasattr(base_layer, "quant_state") and base_layer.quant_state is None:
            norm_O = torch.ones(len(lora_B), device=lora_B.device)
        else:
            weight = base_weight(base_layer).to(lora_A.device)
            norm_O = self.get_weight_norm(weight.detach(), lora_B.detach() @ lora_A.detach(), scaling)
        self.weight = nn.Parameter(norm_O, requires_grad=True)

    def get_weight_norm(self, weight: Tensor, lora_weight: Tensor, scaling: float, adapter_name: str | None = None) -> Tensor:
        """Row norms of V, float32, 1 for a row without any weight.

        Args:
            weight: as the base stores it.
            lora_weight: mask . BA, (O, I).
        """
        weight_OI = weight.T if self.fan_in_fan_out else weight
        norm_O = torch.linalg.vector_norm(weight_OI.float() + scaling * lora_weight.float(), dim=1)
        return torch.where(norm_O > 0, norm_O, torch.ones_like(norm_O))


class BlockDoraVariant(DoraLinearVariant):
    """What `BlockLoraLinear` does for an adapter with `use_dora`; merging and unmerging are PEFT's, over the masked update."""

    @staticmethod
    def init(module: Any, adapter_name: str, **kwargs: Any) -> None:
        if not module.lora_magnitude_vector:  # as PEFT: the first one makes its magnitudes trainable parameters of the layer
            module.adapter_layer_names = (*module.adapter_layer_names, "lora_magnitude_vector")
        layer = BlockDoraLayer(fan_in_fan_out=module.fan_in_fan_out)
        A_RI, B_OR = module.lora_A[adapter_name].weight, module.lora_B[adapter_name].weight
        layer.update_layer(base_layer=module.get_base_layer(), lora_A=A_RI, lora_B=B_OR, scaling=module.scaling[adapter_name])
        module.lora_magnitude_vector[adapter_name] = layer

    @staticmethod
    def forward(module: Any, active_adapter: str, x: Tensor, result: Tensor, **kwargs: Any) -> Tensor:
        """`result` with the adapter's share, in x's dtype."""
        dropout, base = module.lora_dropout[active_adapter], module.get_base_layer()
        weight = base_weight(base)
        if isinstance(dropout, nn.Identity) or not module.training:
            bias = layer_bias(module)
            base_result = result if bias is None else result - bias
        else:
            x = dropout(x)
            if isinstance(base, BlockLinear):
                base_result = base.product(x)
            else:
                base_result = nn.functional.linear(x, (weight.T if module.fan_in_fan_out else weight).to(x.dtype))
        with torch.no_grad():
            delta = module.get_delta_weight(active_adapter)
            magnitude = module.lora_magnitude_vector[active_adapter]
            norm_O = magnitude.get_weight_norm(weight, delta.T if module.fan_in_fan_out else delta, scaling=1)
        factor_O = (magnitude.weight / norm_O).to(x.dtype)
        return result + (factor_O - 1) * base_result + factor_O * module.update(active_adapter, x)
