"""Which classes a pickled model may name: modules of torch and of transformers' decoders, their configurations, tokenizers.

Names only. Nothing that is allowed here is called or built from the pickle's own arguments: `legacy.py` reads every one of them as
an inert record of what the pickle says about it. The list says what belongs into a pickled model; anything else in one is a sign of
another kind of file, or of an attack. Called by `legacy.py` and `pickled.py`.
"""

from __future__ import annotations

import importlib
import re
from functools import cache
from typing import Any

import torch
from torch import nn
from transformers import PretrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES, model_type_to_module_name
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

_TORCH = re.compile(r"(torch\.nn\.modules\.[a-z_]+)\.([A-Z]\w*)")
_DECODER = re.compile(r"(transformers\.models\.(\w+)\.modeling_\2)\.([A-Z]\w*)")
_CONFIG = re.compile(r"(transformers\.models\.(\w+)\.configuration_\2)\.([A-Z]\w*Config)")
_TOKENIZER = re.compile(r"transformers\.models\.(?!auto\.)(\w+)\.tokenization_\1(_fast)?\.[A-Z]\w*Tokenizer(Fast)?")
_ACTIVATION = re.compile(r"(transformers\.activations)\.([A-Z]\w*)")
_CONV1D = re.compile(r"(transformers\.pytorch_utils)\.(Conv1D)")  # GPT-2's linear
_LISTED = {
    "transformers.generation.configuration_utils.GenerationConfig",
    "transformers.configuration_utils.PretrainedConfig",
    "transformers.configuration_utils.PreTrainedConfig",
    "transformers.tokenization_utils_fast.PreTrainedTokenizerFast",
    "transformers.tokenization_utils_tokenizers.PreTrainedTokenizerFast",
    "transformers.tokenization_utils_tokenizers.TokenizersBackend",
    "transformers.tokenization_utils_sentencepiece.SentencePieceBackend",
    "transformers.tokenization_utils.Trie",
    "transformers.tokenization_utils.ExtensionsTrie",
    "transformers.tokenization_utils_base.AddedToken",
    "transformers.tokenization_utils_base.TruncationStrategy",
    "transformers.utils.generic.PaddingStrategy",
    "transformers.utils.generic.TensorType",
    "tokenizers.AddedToken",
    "tokenizers.Tokenizer",
    "tokenizers.models.Model",
    "torch.nn.modules.module.Module",
    # the only functions: how rotary frequencies and activations are computed, kept by modules of some versions
    "torch._C._nn.gelu",
    "torch._C._nn.silu",
    "torch.nn.functional.gelu",
    "torch.nn.functional.silu",
    "torch.nn.functional.relu",
    *(
        f"transformers.modeling_rope_utils._compute_{kind}_parameters"
        for kind in ("default_rope", "linear_scaling_rope", "dynamic_ntk", "yarn", "longrope", "llama3")
    ),
}


@cache
def _decoder_rooms() -> frozenset[str]:
    """Folders of transformers/models that hold a causal language model (`llama`)."""
    return frozenset(model_type_to_module_name(kind) for kind in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def is_allowed(name: str) -> bool:
    """Whether a pickled model may name this class (`torch.nn.modules.linear.Linear`)."""
    if name in _LISTED or _TOKENIZER.fullmatch(name):
        return True
    if match := _TORCH.fullmatch(name) or _ACTIVATION.fullmatch(name) or _CONV1D.fullmatch(name):
        return _is_class(match[1], match[2], nn.Module, must_exist=True)
    if match := _DECODER.fullmatch(name):
        return match[2] in _decoder_rooms() and _is_class(match[1], match[3], nn.Module, must_exist=False)
    if match := _CONFIG.fullmatch(name):
        return match[2] in _decoder_rooms() and _is_class(match[1], match[3], PretrainedConfig, must_exist=False)
    return False


def _is_class(module: str, name: str, kind: type, *, must_exist: bool) -> bool:
    """Whether a name is a class of this kind; one that this version no longer has (LlamaSdpaAttention) passes if it need not exist."""
    found = _find(module, name)
    if found is None:
        return not must_exist
    return isinstance(found, type) and issubclass(found, kind)


def _find(module: str, name: str) -> Any:
    try:
        return getattr(importlib.import_module(module), name, None)
    except ImportError:
        return None


def module_class(name: str) -> type[nn.Module] | None:
    """The module class of an allowed name, None if this version of transformers has none of that name."""
    if not is_allowed(name) or not any(kind.fullmatch(name) for kind in (_TORCH, _ACTIVATION, _CONV1D, _DECODER)):
        return None
    found = _find(*name.rsplit(".", 1))
    assert found is None or issubclass(found, nn.Module)
    return found


def model_type_of(config_class: str) -> str | None:
    """transformers' name of the family (`llama`) whose configuration class is called this (`LlamaConfig`)."""
    return next((kind for kind, name in CONFIG_MAPPING_NAMES.items() if name == config_class), None)


def is_plain(value: Any) -> bool:
    """Whether a value is data of Python's or torch's own, without anything that could act."""
    if isinstance(value, dict):
        return all(is_plain(key) and is_plain(item) for key, item in value.items())
    if isinstance(value, (list, tuple, set)):
        return all(map(is_plain, value))
    return value is None or type(value) in (bool, int, float, str, bytes, torch.dtype, torch.device)
