"""What an adapter does to the base's weights, layer by layer, and merging it.

Called by `engine/merge.py`, through `lora_dist.adapter`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from peft import PeftModel
from peft.utils import ModulesToSaveWrapper
from torch import Tensor, nn

from lora_dist.adapter.dora import base_weight
from lora_dist.blocks import Pattern


def is_adapter_parameter(name: str) -> bool:
    """Whether a parameter or buffer belongs to an adapter and not to the base."""
    return any(part in name for part in (".lora_", ".ia3_", ".ranknum."))


def count_parameters(model: PeftModel) -> tuple[int, int]:
    """(trained, all), what is trained whole counted once: PEFT keeps the frozen original beside it."""
    trained, total = model.get_nb_trainable_parameters()
    wrappers = [module for module in model.modules() if isinstance(module, ModulesToSaveWrapper)]
    return trained, total - sum(p.numel() for wrapper in wrappers for p in wrapper.original_module.parameters())


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


def bias_update(layer: Any) -> Tensor | None:
    """What merging adds to the linear's bias, float32; None where it leaves it alone. Only IA3 scales it, with the outputs."""
    bias = layer.get_base_layer().bias if hasattr(layer, "ia3_l") and not layer.is_feedforward else None
    return None if bias is None else bias.detach().float() * (layer.ia3_l["default"].detach().float().flatten() - 1)


def _weight_OI(layer: Any, transposed: bool) -> Tensor:
    weight = base_weight(layer.get_base_layer()).detach().float()
    return weight.T if transposed else weight


def lora_layers(model: PeftModel) -> Iterator[tuple[str, Any]]:
    """(name in the base, layer) of every linear that carries the adapter, of any type."""
    prefix = "base_model.model."
    for name, module in model.named_modules():
        if hasattr(module, "ia3_l") or (hasattr(module, "lora_A") and hasattr(module, "get_delta_weight")):
            yield name.removeprefix(prefix), module


def merge_adapter(model: PeftModel) -> nn.Module:
    """Add the update to the base weights and return the bare base, all of it in the base's own dtype."""
    with torch.no_grad():
        merged = model.merge_and_unload(safe_merge=True)
    assert isinstance(merged, nn.Module)
    return merged
