"""Layers of one module that are given the same input, computed at once by the first of them that is called: q, k and v; gate and up.

The others are handed what is theirs when they are called with the very same tensor. Layers called with another one were no siblings, and are
computed alone from then on. Put on a model by `attach.py`, used by `layer.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, compiler, nn

from lora_dist.adapter.linear import adapted_linears

NAMES = (
    ("q_proj", "k_proj", "v_proj"),
    ("query", "key", "value"),
    ("gate_proj", "up_proj"),
    ("w1", "w3"),
)
"""of siblings, as transformers' models name them"""


class Siblings:
    """See the module's docstring. A plain object beside the modules, which neither names nor owns them.

    Args:
        layers: `BlockLoraLinear`s.
    """

    def __init__(self, layers: Sequence[Any]):
        self._layers = list(layers)
        self._x: Tensor | None = None
        self._waiting: dict[int, Tensor] = {}

    def output(self, layer: Any, x: Tensor) -> Tensor | None:
        """The layer's output; None: it is to be computed alone."""
        if not any(layer is one for one in self._layers) or compiler.is_compiling():
            return None
        y = self._waiting.pop(id(layer), None)
        if y is not None and self._x is x:
            if not self._waiting:
                self._x = None
            return y
        if self._waiting or y is not None:  # their inputs differ
            self._layers, self._x, self._waiting = [], None, {}
            return None
        if any(one.drops_out for one in self._layers):  # each layer by itself
            return None
        adapted = []
        for one in self._layers:
            each = one.prepared(x)
            if each is None or each.form == "kernel":
                return None
            adapted.append(each)
        outputs = dict(zip(map(id, self._layers), adapted_linears(x, adapted), strict=True))
        y = outputs.pop(id(layer))
        self._x, self._waiting = x, outputs
        return y


def link_siblings(model: nn.Module) -> None:
    """Have the adapted linears of a model that are siblings by name computed together."""
    for module in model.modules():
        for names in NAMES:
            layers: list[Any] = [child for name, child in module.named_children() if name in names and hasattr(child, "siblings")]
            if len(layers) > 1:
                together = Siblings(layers)
                for layer in layers:
                    layer.siblings = together
