"""What a classifier's adapter needs beside the adapter itself: which linears it is for, and a head that is held in float32.

Called by `engine/adapting.py` and `operations/plan/`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def class_targets(names: Sequence[str], wanted: Sequence[str]) -> list[str]:
    """Linears of a classifier by their whole names: all-linear is those of the layers (the head is trained whole), and `dense` the
    attention's output, as LoRA's guides for BERT mean it.

    Args:
        names: of all linears of the layers.
    """
    if list(wanted) == ["all-linear"]:
        return list(names)
    attention = [name for name in names if name.endswith("attention.output.dense")]
    found = []
    for target in wanted:
        inside = attention if target == "dense" and attention else [n for n in names if n == target or n.endswith(f".{target}")]
        found += inside or [target]
    return list(dict.fromkeys(found))


def float_heads(model: Any) -> None:
    """Hold what is trained whole in float32, and feed it that, whatever the base computes in."""
    for module in model.modules():
        held = getattr(module, "modules_to_save", None)
        if not isinstance(held, torch.nn.ModuleDict):
            continue
        if any(parameter.dtype != torch.float32 for parameter in held.parameters()):
            held.float()
            for each in held.values():
                each.register_forward_pre_hook(_to_float)


def _to_float(_module: Any, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(x.float() if isinstance(x, Tensor) and x.is_floating_point() else x for x in inputs)
