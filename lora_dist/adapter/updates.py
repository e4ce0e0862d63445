"""What an adapter does to the base's weights, layer by layer, and merging it.

Called by `engine/merge.py`, through `lora_dist.adapter`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from peft import PeftModel
from peft.utils import ModulesToSaveWrapper
from torch import Tensor, nn

from lora_dist.adapter.dora import base_weight
from lora_dist.adapter.whole import WholeLayer, whole_layers
from lora_dist.blocks import BlockMask, Pattern


def is_adapter_parameter(name: str) -> bool:
    """Whether a parameter or buffer belongs to an adapter and not to the base."""
    return any(part in name for part in (".lora_", ".ia3_", ".ranknum."))


def update_outside_mask(updates: Iterable[tuple[str, Tensor]], pattern: Pattern) -> float:
    """Share of a plain adapter's squared update that falls on pruned weights, 0 to 1: what `--project` would throw away.

    Args:
        updates: (name in the base, delta_OI) of every adapted linear.
    """
    lost = total = 0.0
    for name, delta_OI in updates:
        total += float(delta_OI.square().sum())
        if name in pattern:
            lost += float(delta_OI[~pattern[name].expand(delta_OI.device)].square().sum())
    return lost / total if total else 0.0


def layer_update(layer: Any) -> Tensor:
    """delta_OI of one adapted linear, float32: merged weight minus base weight."""
    transposed = getattr(layer, "fan_in_fan_out", False)
    if hasattr(layer, "ia3_l"):
        weight = _weight_OI(layer, transposed)
        return weight * layer.ia3_l["default"].detach().float() - weight
    delta = layer.get_delta_weight("default").detach().float()
    delta_OI = delta.T if transposed else delta
    if "default" not in getattr(layer, "lora_magnitude_vector", {}):
        return delta_OI
    weight, magnitude = _weight_OI(layer, transposed), layer.lora_magnitude_vector["default"]
    norm_O = magnitude.get_weight_norm(weight.T if transposed else weight, delta_OI, scaling=1)
    return (magnitude.weight.detach().float() / norm_O)[:, None] * (weight + delta_OI) - weight


def compute_beside(model: Any) -> None:
    """Have masked updates computed beside the weights from here on, never added to them: what is compared with a merged model has to come
    about otherwise than that."""
    for _, layer in lora_layers(model):
        forms = getattr(layer, "lora_form", {})
        for adapter, form in forms.items():
            if form == "auto":
                forms[adapter] = "factorised" if isinstance(layer.lora_mask[adapter], BlockMask) else "dense"


def bias_update(layer: Any) -> Tensor | None:
    """What merging adds to the linear's bias, float32; None where it leaves it alone. Only IA3 scales it, with the outputs."""
    bias = layer.get_base_layer().bias if hasattr(layer, "ia3_l") and not layer.is_feedforward else None
    return None if bias is None else bias.detach().float() * (layer.ia3_l["default"].detach().float().flatten() - 1)


def _weight_OI(layer: Any, transposed: bool) -> Tensor:
    weight = base_weight(layer.get_base_layer()).detach().float()
    return weight.T if transposed else weight


@torch.no_grad()
def update_norms(model: PeftModel, trained: Mapping[str, Tensor]) -> dict[str, float]:
    """Frobenius norm of the update of every linear with a LoRA of its own, by its name in the base, without building the update:
    ||B_p A_q||^2 = <B_p^T B_p, A_q A_q^T>, summed over kept tiles (p, q). Others
    (DoRA, AdaLoRA, IA3, LoRA under masks of single weights) are left out.

    Args:
        trained: whole tensors by parameter name, on CPU (`Strategy.trainable_tensors`); where there are none, nothing is returned.
    """
    norms = {}
    for name, layer in lora_layers(model):
        prefix = f"base_model.model.{name}"
        delta = trained.get(f"{prefix}.lora_delta.default")
        if delta is not None:
            norms[name] = float(torch.linalg.vector_norm(delta, dtype=torch.float64))
            continue
        A_RI = trained.get(f"{prefix}.lora_A.default.weight")
        B_OR = trained.get(f"{prefix}.lora_B.default.weight")
        mask = getattr(layer, "lora_mask", {}).get("default")
        special = "default" in getattr(layer, "lora_magnitude_vector", {}) or hasattr(layer, "lora_E")
        if A_RI is None or B_OR is None or special or not (mask is None or isinstance(mask, BlockMask)):
            continue
        A_RI, B_OR = A_RI.double(), B_OR.double()
        if mask is None:
            square = ((B_OR.T @ B_OR) * (A_RI @ A_RI.T)).sum()
        else:
            grams_P, grams_Q = _grams(B_OR.T, mask.block), _grams(A_RI, mask.block)
            square = ((grams_P @ grams_Q.T) * mask.kept_PQ.to("cpu")).sum()
        norms[name] = abs(layer.scaling["default"]) * math.sqrt(max(0.0, float(square)))
    return norms


def _grams(factor_RC: Tensor, block: int) -> Tensor:
    """Of every block of columns, X X^T as one row: (C/b, R^2)."""
    short = -factor_RC.shape[1] % block
    padded_RC = torch.nn.functional.pad(factor_RC, (0, short))
    blocks_RNb = padded_RC.view(factor_RC.shape[0], -1, block)
    return torch.einsum("rnb,snb->nrs", blocks_RNb, blocks_RNb).flatten(1)


def lora_layers(model: PeftModel) -> Iterator[tuple[str, Any]]:
    """(name in the base, layer) of every linear that carries the adapter, of any type."""
    prefix = "base_model.model."
    for name, module in model.named_modules():
        if isinstance(module, WholeLayer):
            continue
        if hasattr(module, "ia3_l") or (hasattr(module, "lora_A") and hasattr(module, "get_delta_weight")):
            yield name.removeprefix(prefix), module


def merge_adapter(model: PeftModel) -> nn.Module:
    """Add the update to the base weights and return the bare base, all of it in the base's own dtype."""
    wrapped = [(name, module) for name, module in model.named_modules() if isinstance(module, ModulesToSaveWrapper)]
    for name, module in wrapped:  # what was trained whole; PEFT's IA3 asks it for a weight, which a pooler has none of
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, module.modules_to_save["default"])
    with torch.no_grad():
        for _, layer in whole_layers(model):  # PEFT reaches none that lies beneath an adapter
            layer.merge(safe_merge=True)
        merged = model.merge_and_unload(safe_merge=True)
    assert isinstance(merged, nn.Module)
    return merged
