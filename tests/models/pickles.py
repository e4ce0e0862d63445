"""Pickles for tests: hostile ones that would leave a mark if anything in them ran, and one as an old transformers wrote it."""

from __future__ import annotations

import os
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers.models.llama.modeling_llama as modeling_llama
from torch import nn

from tests.tiny import tiny_model, tiny_tokenizer


class Evil:
    """Runs a command when it is unpickled."""

    def __init__(self, marker: Path):
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.marker}",)


def torch_file(path: Path, pickle: bytes) -> Path:
    """A file as torch.save writes it, around pickle code of the test's own."""
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in (("data.pkl", pickle), ("byteorder", b"little"), ("version", b"3\n")):
            archive.writestr(f"archive/{name}", content)
    return path


def text(value: str) -> bytes:
    """Pickle code that pushes a text."""
    data = value.encode()
    return b"X" + len(data).to_bytes(4, "little") + data


def call(name: str, argument: str) -> bytes:
    """Pickle code that calls `module:attribute` with a text."""
    module, _, attribute = name.partition(":")
    return b"\x80\x02c" + module.encode() + b"\n" + attribute.encode() + b"\n" + text(argument) + b"\x85R."


class _OldAttention(nn.Module):
    """As transformers 4.36 had it: `LlamaSdpaAttention`, with rotary frequencies of its own."""


class _OldRotary(nn.Module):
    """As transformers 4.36 had it: `LlamaLinearScalingRotaryEmbedding`."""


for _kind, _name in ((_OldAttention, "LlamaSdpaAttention"), (_OldRotary, "LlamaLinearScalingRotaryEmbedding")):
    _kind.__module__, _kind.__qualname__ = modeling_llama.__name__, _name  # as a pickle is to name them


def old_llama(path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, nn.Module]:
    """A pickle with classes and configuration keys of transformers 4.36; and the same model of today, for its logits."""
    today = tiny_model("llama")
    today.config.rope_parameters = {"rope_type": "linear", "factor": 2.0, "rope_theta": 5000.0}
    rebuilt = type(today)(today.config).eval()
    rebuilt.load_state_dict(today.state_dict())
    old: Any = tiny_model("llama")
    del old.model.rotary_emb
    for layer in old.model.layers:
        attention, rotary = _OldAttention(), _OldRotary()
        rotary.register_buffer("inv_freq", torch.ones(4))  # stored, by some versions
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            setattr(attention, name, getattr(layer.self_attn, name))
        attention.rotary_emb, attention.head_dim, attention.config = rotary, 8, old.config
        layer.self_attn = attention
    state = vars(old.config)
    for key in ("rope_parameters", "head_dim", "model_type"):
        state.pop(key, None)
    state.update(rope_theta=5000.0, rope_scaling={"type": "linear", "factor": 2.0}, a_key_of_then=7, _flash_attn_2_enabled=False)
    with monkeypatch.context() as patched:
        for kind in (_OldAttention, _OldRotary):
            patched.setattr(modeling_llama, kind.__qualname__, kind, raising=False)
        torch.save({"model": old, "tokenizer": tiny_tokenizer()}, path)
    return path, rebuilt
