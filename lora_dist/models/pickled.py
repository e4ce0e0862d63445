"""What a pickle of `{'model', 'tokenizer'}` says -> a model of today's transformers, its tokenizer, and the means to prove it.

Weights and configuration are taken by name; the objects themselves, of whatever version, are left behind. Works on the inert records
of `legacy.read_inert` and on the real objects of `legacy.read_trusted` alike. Called by `engine/convert.py`.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import CONFIG_MAPPING, GenerationConfig

from lora_dist.log import UserError
from lora_dist.models.allowed import is_plain, model_type_of, module_class
from lora_dist.models.building import build_empty, match_names, set_tensor
from lora_dist.models.legacy import Inert
from lora_dist.models.loading import quiet_transformers
from lora_dist.models.sources import some
from lora_dist.models.uneven import LayerWidths, NotStructured, find_widths, head_size, set_widths

_STATE_KEYS = ("model", "state_dict", "model_state_dict")
_COMPUTED = re.compile(r"(.*\.)?(rotary_emb\.(inv_freq|original_inv_freq|cos_cached|sin_cached)|masked_bias)")
"""buffers that older versions stored, and that are computed from the configuration now"""
_NUMBER = re.compile(r"\.(\d+)(?=\.)")
_NOT_KEPT = {
    "model_type",
    "auto_map",
    "transformers_version",
    "pruned_heads",
    "torch_dtype",
    "dtype",
    "architectures",
    "name_or_path",
}
_MAX_DEPTH = 64


@dataclass
class Pickled:
    """What was found in a pickle."""

    what: str
    """in words"""
    tensors: dict[str, Tensor]
    """by name, as a state dict has them; tied ones stand under each of their names"""
    module: Any = None
    """the model as the pickle has it, None where there are only tensors"""
    config: Any = None
    """what it says of the configuration"""
    generation: Any = None
    tokenizer: Any = None


def understand(loaded: Any, path: Path) -> Pickled:
    """Find model and tokenizer in what `legacy` read.

    Raises:
        UserError: saying what was found instead.
    """
    root, tokenizer, around = loaded, None, ""
    if isinstance(loaded, dict) and not _is_state(loaded):
        key = next((key for key in _STATE_KEYS if key in loaded), None)
        if key is None:
            keys = some([str(key) for key in loaded], 8) or "nothing"
            raise UserError(f"{path}: holds a dictionary of {keys}; expected {{'model', 'tokenizer'}}, a model or a state dict")
        root, tokenizer, around = loaded[key], loaded.get("tokenizer"), f" under {key!r}"
    with_tokenizer = f" and a tokenizer ({_class_of(tokenizer)})" if tokenizer is not None else ", no tokenizer"
    if isinstance(root, dict) and _is_state(root):
        return Pickled(f"a state dict of {len(root)} tensors{around}{with_tokenizer}", _kept(root), tokenizer=tokenizer)
    state = _state(root)
    if not isinstance(state, dict) or "_modules" not in state:
        raise UserError(f"{path}: holds {_class_of(root)}{around}; expected {{'model', 'tokenizer'}}, a model or a state dict")
    tensors = dict(_walk(root, "", path, 0))
    what = f"a model ({_class_of(root)}, {len(tensors)} tensors){around}{with_tokenizer}"
    return Pickled(what, _kept(tensors), root, state.get("config"), state.get("generation_config"), tokenizer)


def _is_state(value: dict[Any, Any]) -> bool:
    return bool(value) and all(isinstance(key, str) and isinstance(item, Tensor) for key, item in value.items())


def _kept(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach() for name, tensor in tensors.items() if not _COMPUTED.fullmatch(name)}


def _class_of(value: Any) -> str:
    return type(value).path.rpartition(".")[2] if isinstance(value, Inert) else type(value).__name__


def _path_of(value: Any) -> str:
    return type(value).path if isinstance(value, Inert) else f"{type(value).__module__}.{type(value).__qualname__}"


def _state(value: Any) -> Any:
    """Attributes of an object, inert or real."""
    return value.state if isinstance(value, Inert) else getattr(value, "__dict__", None)


def _part(state: Any, key: str, path: Path) -> dict[str, Any]:
    part = state.get(key, {}) if isinstance(state, dict) else None
    if not isinstance(part, dict) or not all(isinstance(name, str) for name in part):
        raise UserError(f"{path}: a module in it is damaged: its {key} are {type(part).__name__}, expected a dictionary of names")
    return part


def _walk(module: Any, prefix: str, path: Path, depth: int) -> Iterator[tuple[str, Tensor]]:
    """Parameters and stored buffers of a module and all below it, by name."""
    if depth > _MAX_DEPTH:
        raise UserError(f"{path}: modules are nested more than {_MAX_DEPTH} deep, first at {prefix[:80]}...")
    state = _state(module)
    passing = state.get("_non_persistent_buffers_set", ()) if isinstance(state, dict) else ()
    for key in ("_parameters", "_buffers"):
        for name, tensor in _part(state, key, path).items():
            if isinstance(tensor, Tensor) and not (key == "_buffers" and name in passing):
                yield prefix + name, tensor
    for name, child in _part(state, "_modules", path).items():
        if child is not None:
            yield from _walk(child, f"{prefix}{name}.", path, depth + 1)


# --- configuration --------------------------------------------------------------------------------------------------------------


def read_config(found: Pickled, path: Path) -> Any:
    """The configuration of a pickled model as this transformers has it; keys that it does not know are left out.

    Raises:
        UserError: no configuration, one of a family that this transformers does not have, or of a quantised model.
    """
    state, name = _state(found.config), _class_of(found.config)
    if not isinstance(state, dict):
        raise UserError(f"{path}: the model has no configuration; give that of its family with --config_name")
    kind = model_type_of(name) or state.get("model_type")
    if not isinstance(kind, str) or kind not in CONFIG_MAPPING:
        raise UserError(f"{path}: found configuration {name}, which this transformers does not know; give one with --config_name")
    if state.get("quantization_config") is not None:
        raise UserError(f"{path}: holds a quantised model; save it in float32, bfloat16 or float16")
    values = {key: _json(value) for key, value in state.items() if _wanted(key) and is_plain(value)}
    with quiet_transformers():
        config_class = CONFIG_MAPPING[kind]
        known = {*config_class().to_dict(), *config_class.attribute_map, "rope_scaling", "rope_theta", "head_dim"}
        try:
            config = config_class.from_dict({key: value for key, value in values.items() if key in known})
        except Exception as error:  # its own checks raise what they like
            raise UserError(
                f"{path}: its configuration cannot be used ({type(error).__name__}: {error}); give one with --config_name"
            ) from error
    size = next((size for size in _head_sizes(found.module) if isinstance(size, int) and size > 0), None)
    if size is not None and size != head_size(config):
        config.head_dim = size
    return config


def _wanted(key: Any) -> bool:
    return isinstance(key, str) and not key.startswith("_") and key not in _NOT_KEPT


def _json(value: Any) -> Any:
    """Plain data as config.json has it."""
    if isinstance(value, dict):
        return {key: _json(item) for key, item in value.items()}
    if isinstance(value, (list, tuple, set)):
        return [_json(item) for item in value]
    return str(value).removeprefix("torch.") if isinstance(value, (torch.dtype, torch.device)) else value


def _head_sizes(module: Any) -> Iterator[Any]:
    """What the attention modules say of the width of a head."""
    state = _state(module)
    if not isinstance(state, dict):
        return
    if "head_dim" in state and "q_proj" in state.get("_modules", {}):
        yield state["head_dim"]
    for child in state.get("_modules", {}).values():
        yield from _head_sizes(child)


def read_generation(found: Pickled) -> GenerationConfig | None:
    """Defaults of generation that the pickle has."""
    state = _state(found.generation)
    if not isinstance(state, dict):
        return None
    values = {key: value for key, value in state.items() if _wanted(key) and is_plain(value) and value is not None}
    known = set(vars(GenerationConfig()))
    with quiet_transformers():
        return GenerationConfig.from_dict({key: _json(value) for key, value in values.items() if key in known})


# --- model ----------------------------------------------------------------------------------------------------------------------


def build(found: Pickled, config: Any, path: Path) -> tuple[Any, LayerWidths | None]:
    """A model of today's transformers over the pickle's own tensors, in the precision they are stored in; and its layers' widths,
    where structured pruning changed them.

    Raises:
        UserError: tensors that do not fit the configuration, nor structured pruning of it.
    """
    shapes = {name: tuple(tensor.shape) for name, tensor in found.tensors.items()}
    said, held = getattr(config, "num_hidden_layers", None), _layer_count(shapes)
    if isinstance(said, int) and said > held:  # millions of them would be built for minutes
        raise UserError(f"{path}: holds weights of {held} layers, its configuration says {said}; give another with --config_name")
    try:
        widths = find_widths(shapes, config, any_width=True)
    except NotStructured as reason:
        raise UserError(f"{path}: the weights do not fit the configuration, nor structured pruning of it: {reason}") from reason
    if widths is not None:
        set_widths(config, widths)
    _settle_tie(config, found.tensors)
    try:
        with quiet_transformers():
            model = build_empty(config, dtype=_main_dtype(found.tensors), device="cpu", widths=widths)
    except UserError:
        raise
    except Exception as error:  # a configuration without sense fails anywhere in the family's own code
        raise UserError(
            f"{path}: no model can be built from its configuration ({type(error).__name__}: {error}); give one with --config_name"
        ) from error
    for name, key in match_names(model, path, shapes, advice="check that the configuration belongs to these weights").items():
        set_tensor(model, name, found.tensors[key])
    model.tie_weights()
    model.generation_config = read_generation(found) or GenerationConfig.from_model_config(config)
    return model.requires_grad_(False).eval(), widths


def _layer_count(names: Iterable[str]) -> int:
    """How many modules of one list have tensors of these names: the layers, or more of something within them."""
    lists: dict[str, set[str]] = {}
    for name in names:
        for match in _NUMBER.finditer(name):
            lists.setdefault(name[: match.start()], set()).add(match[1])
    return max(map(len, lists.values()), default=0)


def nan_tensors(tensors: Mapping[str, Tensor]) -> list[str]:
    """Names of tensors that hold a NaN."""
    kinds = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
    return [name for name, tensor in tensors.items() if tensor.dtype in kinds and bool(tensor.isnan().any())]


def _settle_tie(config: Any, tensors: Mapping[str, Tensor]) -> None:
    """A head that is not the embedding (any more) is not tied, whatever the configuration says."""
    head, embedding = tensors.get("lm_head.weight"), tensors.get("model.embed_tokens.weight")
    if head is None or embedding is None or not getattr(config, "tie_word_embeddings", False):
        return
    if head.shape != embedding.shape or not torch.equal(head, embedding):
        config.tie_word_embeddings = False


def _main_dtype(tensors: Mapping[str, Tensor]) -> torch.dtype:
    elements: dict[torch.dtype, int] = {}
    for tensor in tensors.values():
        if tensor.is_floating_point():
            elements[tensor.dtype] = elements.get(tensor.dtype, 0) + tensor.numel()
    if not elements:
        raise UserError("PICKLE: found no floating-point tensors, expected a language model's weights")
    return max(elements, key=lambda dtype: elements[dtype])


# --- proof ----------------------------------------------------------------------------------------------------------------------


class CannotRun(Exception):
    """The pickled module has classes that this transformers does not have."""


def revive(found: Pickled, config: Any, attn_implementation: str) -> nn.Module:
    """The pickled module itself, to run it once as it was: of its own classes, with its own attributes, as far as these are plain data.

    No constructor and no `__setstate__` is called, and nothing but numbers, texts, tensors and modules is taken over: hooks and
    whatever else could act stay behind.

    Args:
        config: stands in for the pickled configuration, which holds more than data.

    Raises:
        CannotRun: a class is gone.
    """
    config = copy.deepcopy(config)
    config._attn_implementation = attn_implementation
    return _revive(found.module, config, {})


def _revive(inert: Any, config: Any, done: dict[int, nn.Module]) -> nn.Module:
    if id(inert) in done:
        return done[id(inert)]
    name = _path_of(inert)
    kind = module_class(name)
    if kind is None:
        raise CannotRun(f"this transformers has no {name.rpartition('.')[2]}")
    module = done[id(inert)] = kind.__new__(kind)
    nn.Module.__init__(module)
    state = _state(inert)
    own = set(vars(module))
    module.__dict__.update(
        {
            key: value
            for key, value in state.items()
            if isinstance(key, str) and key not in own and not key.startswith("__") and is_plain(value)
        }
    )
    if "config" in state:
        module.__dict__["config"] = config
    module.__dict__["_non_persistent_buffers_set"] = set(state.get("_non_persistent_buffers_set", ()))
    module.__dict__["_parameters"].update({key: _tensor(value) for key, value in state.get("_parameters", {}).items()})
    module.__dict__["_buffers"].update({key: _tensor(value) for key, value in state.get("_buffers", {}).items()})
    for key, child in state.get("_modules", {}).items():
        module.__dict__["_modules"][key] = None if child is None else _revive(child, config, done)
    return module.eval()


def _tensor(value: Any) -> Tensor | None:
    return value if isinstance(value, Tensor) else None
