"""What is trained whole beside an adapter, or beside the kept weights: norms, biases, embeddings, the head (`adapter.modules_to_save`,
`adapter.bias`).

As in `sparse.py` it is a float32 delta on the frozen base, zero at the start: `p + delta`, summed in float32 and cast to the dtype of the
base. So base, guard, checkpoints and sharding are those of the adapter, a base in placeholders needs no copies, and merging gives the
very values trained with. PEFT's own `modules_to_save` keeps a copy of the module instead, in the precision of the base. A head that shares
its weight with the embedding takes the embedding's delta. Called by `adapter/attach.py`; layers are put in place by the tuners of
masked adapters.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from peft.tuners.lora.layer import Linear as LoraLinear
from peft.tuners.lora.layer import LoraLayer
from torch import Tensor, nn

from lora_dist.blocks import Pattern
from lora_dist.log import UserError

ALL_NORM = "all-norm"
_KEYS = ("weight", "bias")


class WholeLayer(LoraLinear):
    """A module whose own `weight`, `bias` or both are trained."""

    adapter_layer_names = ("lora_whole_weight", "lora_whole_bias")
    other_param_names = ()

    def __init__(self, base_layer: nn.Module, adapter_name: str, *, tied_to: WholeLayer | None = None) -> None:
        nn.Module.__init__(self)
        LoraLayer.__init__(self, nn.Linear(1, 1, device="meta"))  # whose widths it wants to know
        self.base_layer = base_layer
        self.lora_whole_weight = nn.ParameterDict({})
        self.lora_whole_bias = nn.ParameterDict({})
        self._active_adapter = adapter_name
        self.tied_to = [tied_to] if tied_to is not None else []  # a list, or its parameters would be this module's as well

    def __getattr__(self, name: str) -> Any:
        """Of the module, what this one has not: others ask an embedding for its sizes."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            if "base_layer" not in self._modules:
                raise
            return getattr(self._modules["base_layer"], name)

    def add(self, adapter_name: str, keys: Sequence[str], *, trained: bool) -> None:
        """Deltas of zeros for some of its parameters."""
        for key in keys:
            parameter = getattr(self.base_layer, key)
            delta = torch.zeros(parameter.shape, device=parameter.device)
            getattr(self, f"lora_whole_{key}")[adapter_name] = nn.Parameter(delta, requires_grad=trained)

    def deltas(self, adapter_name: str = "default") -> dict[str, Tensor]:
        """Its own, by `weight` and `bias`."""
        found = ((key, getattr(self, f"lora_whole_{key}")) for key in _KEYS)
        return {key: deltas[adapter_name] for key, deltas in found if adapter_name in deltas}

    def value(self, key: str) -> Tensor | None:
        """What the forward pass takes for a parameter, in its dtype; None where the module has none."""
        parameter = getattr(self.base_layer, key)
        source = self.tied_to[0] if self.tied_to and key == "weight" else self
        if source.disable_adapters or source.merged:
            return parameter
        for adapter in source.active_adapters:
            delta = source.deltas(adapter).get(key)
            if delta is not None:
                return (parameter.to(delta.dtype) + delta).to(parameter.dtype)
        return parameter

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Make the trained values the base's own."""
        for adapter in adapter_names or self.active_adapters:
            for key, delta in self.deltas(adapter).items() if adapter not in self.merged_adapters else ():
                parameter = getattr(self.base_layer, key)
                merged = (parameter.data + delta.detach()).to(parameter.dtype)
                if safe_merge and not torch.isfinite(merged).all():
                    raise ValueError(f"NaNs detected in the merged weights. The adapter {adapter} seems to be broken")
                parameter.data = merged
            if self.deltas(adapter) and adapter not in self.merged_adapters:
                self.merged_adapters.append(adapter)

    def unmerge(self) -> None:
        """Inverse of `merge`, to rounding."""
        while self.merged_adapters:
            for key, delta in self.deltas(self.merged_adapters.pop()).items():
                parameter = getattr(self.base_layer, key)
                parameter.data = (parameter.data - delta.detach()).to(parameter.dtype)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        module = self.base_layer
        values: dict[str, Any] = {key: self.value(key) for key in _KEYS if module._parameters.get(key) is not None}
        kept = {key: getattr(module, key) for key in values}
        try:
            module._parameters.update(values)
            return module.forward(*args, **kwargs)  # not through hooks, which would not know these for parameters
        finally:
            module._parameters.update(kept)

    def __repr__(self) -> str:
        return "lora_dist." + nn.Module.__repr__(self)


def layer_bias(layer: Any) -> Tensor | None:
    """The bias that an adapted linear's forward pass takes, trained or not."""
    inner = layer.base_layer
    bias: Tensor | None = inner.value("bias") if isinstance(inner, WholeLayer) else inner.bias
    return bias


class TrainsWhole:
    """Of a PEFT tuner: puts the layers of a config's `whole_parameters` in place."""

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        super().inject_adapter(model, adapter_name, *args, **kwargs)  # type: ignore[misc]
        tuner: Any = self
        config = tuner.peft_config[adapter_name]
        trained = not config.inference_mode and adapter_name in tuner.active_adapters
        put_whole_layers(model, adapter_name, config.whole_parameters, trained=trained)


def put_whole_layers(model: Any, adapter_name: str, names: Sequence[str], *, trained: bool) -> None:
    """Train parameters whole, by their names in the base. Linears that carry an adapter keep it."""
    groups: dict[str, list[str]] = {}
    for name in names:
        module_name, _, key = name.rpartition(".")
        groups.setdefault(module_name, []).append(key)
    embedding, head = _tied(model)
    for name, keys in groups.items():
        module = model.get_submodule(name)
        if hasattr(module, "base_layer") and not isinstance(module, WholeLayer):  # a bias beneath an adapter
            if not isinstance(module.base_layer, WholeLayer):
                module.base_layer = WholeLayer(module.base_layer, adapter_name)
            module = module.base_layer
        elif not isinstance(module, WholeLayer):
            module = _replace(model, name, WholeLayer(module, adapter_name))
        module.add(adapter_name, keys, trained=trained)
        if embedding is not None and embedding in (module, module.base_layer) and not isinstance(head, WholeLayer):
            place = next(place for place, part in model.named_modules() if part is head)
            _replace(model, place, WholeLayer(head, adapter_name, tied_to=module))


def _replace(model: nn.Module, name: str, layer: WholeLayer) -> WholeLayer:
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, layer)
    return layer


def _tied(model: Any) -> tuple[Any, Any]:
    """Embedding and head where they share their weight, else (None, None)."""
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    tied = head is not None and getattr(head, "weight", None) is getattr(embedding, "weight", None)
    return (embedding, head) if tied else (None, None)


def whole_layers(model: nn.Module) -> Iterator[tuple[str, WholeLayer]]:
    """(name in the base, layer) of every module that is trained whole, at least in part; of tied ones the embedding."""
    for name, module in model.named_modules():
        if isinstance(module, WholeLayer) and not module.tied_to:
            yield name.removeprefix("base_model.model.").replace(".base_layer", ""), module


def find_whole_parameters(
    model: Any, names: Sequence[str], bias: str, *, adapted: Sequence[str], pattern: Pattern | None
) -> list[str]:
    """The parameters that are meant, by their names in the base.

    Args:
        model: the base, with an adapter on it.
        names: of modules, or the ends of such; `all-norm`.
        bias: none, lora_only or all.
        adapted: names of the linears that carry the adapter.

    Raises:
        UserError: naming what matches nothing, is pruned, is adapted already, or cannot be trained.
    """
    embedding, head = _tied(model)
    head_name = next((name for name, module in model.named_modules() if module is head), "")
    found, hit = [], set()
    for place, module in model.named_modules():
        if module is head or any(part in place for part in (".lora_", ".modules_to_save", ".original_module")):
            continue  # a head that is tied is trained with the embedding
        name = place.replace(".base_layer", "")
        called = (name, head_name) if module is embedding else (name,)
        norm = "norm" in type(module).__name__.lower()
        meant = {n for n in names if (n == ALL_NORM and norm) or any(_meant(each, n) for each in called)}
        hit |= meant
        for key, parameter in module.named_parameters(recurse=False):
            by_bias = key == "bias" and (bias == "all" or (bias == "lora_only" and name in adapted))
            if meant or by_bias:
                _require_trainable(name, key, parameter, adapted, pattern)
                found.append(f"{name}.{key}")
    missing = [n for n in names if n not in hit]
    if missing:
        raise UserError(
            f"adapter.modules_to_save: {', '.join(missing)} match no module of this model, expected names such as embed_tokens or "
            f"lm_head, or {ALL_NORM}"
        )
    if bias != "none" and not any(name.endswith(".bias") for name in found):
        raise UserError(f"adapter.bias: found {bias}, but there are no such biases in this model; leave it out")
    return list(dict.fromkeys(found))


def _meant(name: str, wanted: str) -> bool:
    """Whether a module, or one that it is in, is called so."""
    return f".{wanted}." in f".{name}."


def _require_trainable(name: str, key: str, parameter: Tensor, adapted: Sequence[str], pattern: Pattern | None) -> None:
    where = "adapter.modules_to_save"
    if key not in _KEYS:
        raise UserError(f"{where}: {name} has a parameter {key}, expected modules with weights and biases only")
    if key == "bias":
        return
    if name in adapted:
        raise UserError(f"{where}: {name} carries the adapter already (adapter.target_modules), expected one of the two")
    if pattern is not None and name in pattern and not pattern[name].keeps_all:
        raise UserError(
            f"{where}: {name} is pruned, and what is trained whole keeps no zeros; train it by adapter.target_modules instead"
        )
    if not parameter.is_floating_point():
        raise UserError(f"{where}: {name} is quantised, expected a module that is not")
