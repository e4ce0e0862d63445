"""The tokenizer of a pickle, rebuilt from what it is made of: the JSON of a fast one, the sentencepiece model of a slow one.

Vocabularies and settings are taken, never a path: what a pickle says of files on this disk is not read. Called by `engine/convert.py`.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from lora_dist.log import UserError
from lora_dist.models.allowed import is_plain
from lora_dist.models.legacy import Inert
from lora_dist.models.loading import quiet_transformers

SAMPLE = "The 3 birds, über 12.5 km:\n\tif (x != y): naïve 'words' 東京 🐦 don't."
"""text that two tokenizers are compared on"""
_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_SETTINGS = (
    "model_max_length",
    "padding_side",
    "truncation_side",
    "chat_template",
    "clean_up_tokenization_spaces",
    "model_input_names",
    "add_bos_token",
    "add_eos_token",
    "legacy",
)


def rebuild_tokenizer(record: Any, path: Path) -> PreTrainedTokenizerBase:
    """A tokenizer of today's transformers with the same vocabulary, special tokens, chat template and settings.

    Args:
        record: from `legacy.read_inert`, or a real tokenizer from `legacy.read_trusted`.
        path: of the pickle, for messages.

    Raises:
        UserError: there is none, or one that holds no vocabulary.
    """
    if isinstance(record, PreTrainedTokenizerBase):
        return record
    name = type(record).path.rpartition(".")[2] if isinstance(record, Inert) else type(record).__name__
    state = record.state if isinstance(record, Inert) else None
    if record is None or not isinstance(state, dict):
        raise _cannot(path, "holds no tokenizer" if record is None else f"holds {name} as tokenizer")
    text = _fast_json(state.get("_tokenizer"))
    sentencepiece = state.get("sp_model_proto")
    try:
        if text is not None:
            return PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(text), **_settings(state))
        if isinstance(sentencepiece, bytes):
            return _from_sentencepiece(sentencepiece, _settings(state))
    except Exception as error:  # the tokenizers library raises plain `Exception`, sentencepiece its own
        reason = " ".join(str(error).split())[:200]
        raise _cannot(path, f"holds a tokenizer ({name}) that cannot be rebuilt ({type(error).__name__}: {reason})") from error
    raise _cannot(path, f"holds a tokenizer ({name}) without a vocabulary of its own")


def _cannot(path: Path, what: str) -> UserError:
    return UserError(f"{path}: {what}; give the tokenizer of the model it was made from with --tokenizer DIR")


def _fast_json(record: Any) -> str | None:
    """tokenizer.json as a pickled `tokenizers.Tokenizer` holds it."""
    state = record.state if isinstance(record, Inert) else None
    return state.decode("utf-8") if isinstance(state, bytes) else None


def _settings(state: Mapping[str, Any]) -> dict[str, Any]:
    """Special tokens and settings, wherever the version that wrote them kept them."""
    initial = state.get("init_kwargs") if isinstance(state.get("init_kwargs"), dict) else {}
    special = state.get("_special_tokens_map") if isinstance(state.get("_special_tokens_map"), dict) else {}
    found: dict[str, Any] = {}
    for name in _TOKENS:
        for place, key in ((special, name), (state, f"_{name}"), (initial, name)):
            content = _content(place.get(key)) if place else None
            if content is not None:
                found[name] = content
                break
    extra = state.get("_additional_special_tokens") or state.get("_extra_special_tokens") or ()
    if isinstance(extra, (list, tuple)):
        found["additional_special_tokens"] = [content for content in map(_content, extra) if content is not None]
    for name in _SETTINGS:
        for value in (state.get(name), state.get(f"_{name}"), initial.get(name) if initial else None):
            if value is not None and is_plain(value):
                found[name] = value
                break
    return {key: value for key, value in found.items() if value != []}


def _content(token: Any) -> str | None:
    """Text of a special token: a string, or an AddedToken."""
    if isinstance(token, Inert):
        token = token.state.get("content") if isinstance(token.state, dict) else None
    return token if isinstance(token, str) else None


def _from_sentencepiece(model: bytes, settings: Mapping[str, Any]) -> PreTrainedTokenizerBase:
    """A tokenizer from a sentencepiece model, by transformers' own conversion, checked against sentencepiece itself.

    Raises:
        ValueError: saying what is wrong.
    """
    if find_spec("sentencepiece") is None:
        raise ValueError("its vocabulary needs the sentencepiece package")
    expected = import_module("sentencepiece").SentencePieceProcessor(model_proto=model).encode(SAMPLE)
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "tokenizer.model").write_bytes(model)
        config = {"tokenizer_class": "LlamaTokenizer", **settings}
        Path(folder, "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
        with quiet_transformers():
            made = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    assert isinstance(made, PreTrainedTokenizerBase)
    if made(SAMPLE, add_special_tokens=False).input_ids != expected:
        raise ValueError("transformers' conversion of its sentencepiece model gives other tokens")
    return made
