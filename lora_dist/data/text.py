"""From a data set to packed windows: find the splits, tokenise, concatenate, cut into windows, and keep them in a cache.

The cache is keyed by content: the files' bytes (or the hub data set's fingerprint), the tokenizer, the context length, the
special tokens, the separator and the column. The same text under another path is found again; a changed one is not. Called by
`engine/setup.py` and the commands that measure perplexity.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, Self, TypeVar

import numpy as np
from transformers import PreTrainedTokenizerBase

from lora_dist.data.files import LocalSplit
from lora_dist.data.hub import HubSplit
from lora_dist.data.sampler import stable_permutation
from lora_dist.data.sources import TextSource, cache_root, find_splits
from lora_dist.data.tokenise import pieces, special_ids, token_chunks, token_dtype, tokenizer_digest
from lora_dist.data.windows import Windows, entry_key, new_entry, open_entry, write_windows
from lora_dist.log import UserError

__all__ = ["TextSource", "WindowSplits", "Windows", "hold_out", "load_windows"]

_MAX_PROC = 8
_SMALL_BYTES = 32 << 20  # below this, starting processes costs more than they save


@dataclass(frozen=True)
class WindowSplits:
    """The windows of each split that is there: train, validation, test."""

    splits: dict[str, Windows]
    from_cache: bool
    """nothing had to be tokenised"""


@dataclass(frozen=True)
class _Packing:
    """How text becomes windows: everything but the text that the result depends on."""

    tokenizer: PreTrainedTokenizerBase
    tokenizer_sha256: str
    context_length: int
    prefix: list[int]
    suffix: list[int]
    separator: str | None
    num_proc: int | None


def load_windows(
    source: TextSource,
    tokenizer: PreTrainedTokenizerBase,
    *,
    context_length: int,
    special_tokens: str = "auto",
    splits: tuple[str, ...] = ("train", "validation"),
    num_proc: int | None = None,
    cache_dir: str | Path | None = None,
) -> WindowSplits:
    """Windows of `context_length` tokens of each split; the tail of a split that fills no window is dropped.

    Args:
        source: the data set.
        tokenizer: any tokenizer of transformers; its length limit is ignored.
        context_length: tokens a window.
        special_tokens: auto, bos, eos, both or none, put around each document; auto is what the tokenizer adds by itself.
        splits: the ones wanted; those that the source does not have are left out.
        num_proc: processes that tokenise; default: the cores, 8 at most, and 1 for small texts.
        cache_dir: where windows are kept; default: `lora_dist/` in the Hugging Face cache.

    Raises:
        UserError: for a source that is missing, empty or unreadable, a hub that cannot be reached, a text shorter than one
            window, special tokens that the tokenizer does not have.
    """
    if source.document_separator == "":
        raise UserError("data.document_separator: found an empty text, expected one such as <|endoftext|>, or none")
    prefix, suffix = special_ids(tokenizer, special_tokens)
    packing = _Packing(
        tokenizer, tokenizer_digest(tokenizer), context_length, prefix, suffix, source.document_separator, num_proc
    )
    root = cache_root(cache_dir)
    windows: dict[str, Windows] = {}
    from_cache = True
    for name, split in find_splits(source, splits, root / "hub").items():
        key = entry_key(_key_parts(split, packing))
        cached = open_entry(root, key)
        if cached is None:
            from_cache = False
            cached = _build(root, key, name, split, packing)
        windows[name] = cached
    return WindowSplits(windows, from_cache)


class _Divisible(Protocol):
    def __len__(self) -> int: ...

    def subset(self, rows: np.ndarray) -> Self: ...


D = TypeVar("D", bound=_Divisible)


def hold_out(windows: D, count: int, seed: int, *, noun: str = "windows") -> tuple[D, D]:
    """Training windows (or examples) and `count` held-out ones, chosen at random by seed; both keep the order they had.

    Raises:
        UserError: if nothing would be left to train on.
    """
    if count >= len(windows):
        more = ", or make windows shorter with data.block_size" if noun == "windows" else ""
        raise UserError(
            f"data.holdout_windows: found {count} of {len(windows)} {noun}, expected fewer: lower it, or set data.validation_file{more}"
        )
    held = np.zeros(len(windows), dtype=bool)
    held[stable_permutation(len(windows), "hold_out", seed)[:count].numpy()] = True
    return windows.subset(np.flatnonzero(~held)), windows.subset(np.flatnonzero(held))


def _key_parts(split: LocalSplit | HubSplit, packing: _Packing) -> dict:
    return {
        "content": split.content_key(),
        "column": split.column,
        "tokenizer": packing.tokenizer_sha256,
        "context_length": packing.context_length,
        "special": [packing.prefix, packing.suffix],
        "separator": packing.separator,
    }


def _build(root: Path, key: str, name: str, split: LocalSplit | HubSplit, packing: _Packing) -> Windows:
    dtype = token_dtype(packing.tokenizer)
    with new_entry(root, key) as folder:
        chunks: list[np.ndarray] = []
        for number, part in enumerate(split.parts(folder / "scratch")):
            scratch = folder / "scratch" / f"part-{number}"
            scratch.mkdir()
            texts = pieces(part, packing.separator, scratch)
            if len(texts) == 0:
                continue
            chunks += token_chunks(
                texts,
                packing.tokenizer,
                prefix=packing.prefix,
                suffix=packing.suffix,
                dtype=dtype,
                num_proc=packing.num_proc or processes_for(texts.data.nbytes),
                scratch=scratch,
                desc=f"Tokenising {name}",
            )
        found = sum(map(len, chunks))
        if found < packing.context_length:
            raise UserError(
                f"data.block_size: found {found} tokens in the {name} split, expected {packing.context_length} or more (one "
                "window): lower it or use more text"
            )
        write_windows(folder, chunks, packing.context_length, dtype)
    built = open_entry(root, key)
    if built is None:
        raise UserError(f"data.cache_dir: what was written to {root / key} does not read back, expected a sound disk")
    return built


def processes_for(text_bytes: int) -> int:
    """Processes that tokenise so much text: the cores, 8 at most; 1 for little."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return 1 if text_bytes < _SMALL_BYTES else min(cores, _MAX_PROC)
