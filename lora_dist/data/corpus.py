"""A data set as one text, and the text as one stream of token ids: what a perplexity is measured on.

How rows become a text changes the figure, so each known corpus has its own way, that of the published tables (GPTQ, SparseGPT, Wanda):

    wikitext2   test split of wikitext-2-raw-v1, rows joined by two line breaks
    ptb         test split of Penn Treebank, sentences joined by a space
    c4          first 1,100 documents of the first English validation shard, joined by a space

Any other text: a `.txt` file is taken as it is, rows that keep their line breaks are put one behind the other, and other rows, as well as
the documents of a `.txt` file between separators, are joined by two line breaks. Called by
`engine/report.py`.
"""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from transformers import PreTrainedTokenizerBase

from lora_dist.data.files import LocalSplit, names_files
from lora_dist.data.hub import HubSplit
from lora_dist.data.sources import TextSource, cache_root, find_splits
from lora_dist.data.tokenise import special_ids
from lora_dist.log import UserError


@dataclass(frozen=True)
class Preset:
    """A corpus that is known by its name."""

    dataset_name: str
    split: str
    column: str
    joiner: str
    max_rows: int | None = None
    lines: Literal["kept", "stripped"] | None = None
    """whether lines of a local `.txt` file are rows, and lose the spaces around them, as on the hub; None: the file is one row"""


_JOINER = "\n\n"
PRESETS = {
    "wikitext2": Preset("wikitext", "test", "text", "\n\n", lines="kept"),
    "ptb": Preset("ptb", "test", "sentence", " ", lines="stripped"),
    "c4": Preset("c4", "validation", "text", " ", max_rows=1100),
}


@dataclass(frozen=True)
class Corpus:
    """A text, and where it came from."""

    text: str
    source: str
    """hub name or files"""
    split: str | None
    """None: single files"""
    joiner: str | None
    """between rows; None: the text of a file as it is, or rows that keep their line breaks"""
    rows: int
    """1 for the text of a file as it is"""
    sha256: str
    """of the text in UTF-8"""


def read_corpus(name: str, source: TextSource | None, *, split: str = "test", cache_dir: str | Path | None = None) -> Corpus:
    """One text of a data set.

    Args:
        name: wikitext2, ptb and c4 are read and joined in their own way, from wherever they come; others as said above.
        source: None reads a known corpus from the hub.
        split: of a hub data set or a directory; single files are one split. Known corpora on the hub have their own.
        cache_dir: where the revisions of hub data sets are noted; default: `lora_dist/` in the Hugging Face cache.

    Raises:
        UserError: for a source that is missing, empty or unreadable, and a hub that cannot be reached.
    """
    preset = PRESETS.get(name)
    if source is None:
        if preset is None:
            raise UserError(
                f"texts: found {name}, expected {', '.join(PRESETS)}, or NAME=FILE for a text of your own (NAME={name}.txt)"
            )
        source, split = TextSource(preset.dataset_name, text_column=preset.column), preset.split
    root = cache_root(cache_dir)
    files = names_files(source.dataset_name) or Path(source.dataset_name).expanduser().is_file()
    found = find_splits(source, ("train",) if files else (split,), root / "hub")
    chosen = next(iter(found))
    with tempfile.TemporaryDirectory(prefix="lora_dist-corpus-") as scratch:
        rows, joined = _rows(found[chosen], preset, source.document_separator, Path(scratch))
    joiner = None if joined else preset.joiner if preset is not None else _JOINER
    text = (joiner or "").join(rows)
    if not text.strip():
        raise UserError(f"texts: {name}: {source.dataset_name} holds no text")
    return Corpus(
        text, source.dataset_name, None if files else chosen, joiner, len(rows), hashlib.sha256(text.encode()).hexdigest()
    )


def _rows(split: LocalSplit | HubSplit, preset: Preset | None, separator: str | None, scratch: Path) -> tuple[list[str], bool]:
    """The rows of a split in order, and whether they need nothing between them."""
    limit = None if preset is None else preset.max_rows
    rows: list[str] = []
    joined = preset is None
    for part in _parts(split, preset, scratch):
        if isinstance(part, Path):
            content = _read(part)
            if preset is not None and preset.lines is not None:
                rows += _lines(content, preset.lines)
            elif separator is not None:
                rows += [document.strip() for document in content.split(separator) if document.strip()]
                joined = False
            else:
                rows += [content]
        else:
            texts = [text or "" for text in part[:limit]["text"]]
            joined = joined and all(text.endswith("\n") for text in texts if text)
            rows += texts
    return rows[:limit], joined


def _parts(split: LocalSplit | HubSplit, preset: Preset | None, scratch: Path) -> Iterator[Path | Any]:
    """Local files of a known corpus may have the hub's column or the user's."""
    if isinstance(split, LocalSplit) and preset is not None and split.column != preset.column:
        try:
            return iter(list(replace(split, column=preset.column).parts(scratch)))
        except UserError:
            return split.parts(scratch)  # says what is wrong, if it is not the column
    return split.parts(scratch)


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"texts: {path} is not UTF-8 text ({error.reason})") from error


def _lines(content: str, how: str) -> list[str]:
    """The rows that the hub's copy of a corpus has for these lines."""
    lines = content.removesuffix("\n").split("\n")
    return [line.strip() for line in lines] if how == "stripped" else [f"{line}\n" if line.strip() else "" for line in lines]


@dataclass(frozen=True)
class TokenStream:
    """The token ids of a text in one piece."""

    ids_N: np.ndarray
    """(N,) int64, special tokens included"""
    prefix: list[int]
    """special tokens before the text"""
    suffix: list[int]
    """special tokens behind it"""
    ends_N: np.ndarray | None
    """(N,) int64: how many characters of the text the tokens up to this one cover; None: the tokenizer cannot say"""


def token_stream(text: str, tokenizer: PreTrainedTokenizerBase, special_tokens: str = "auto") -> TokenStream:
    """Tokenise a text in one piece, as the published tables do.

    Args:
        special_tokens: auto, bos, eos, both or none, put around the whole text; auto is what the tokenizer adds by itself.

    Raises:
        UserError: special tokens that the tokenizer does not have.
    """
    prefix, suffix = special_ids(tokenizer, special_tokens)
    fast = bool(getattr(tokenizer, "is_fast", False))
    # verbose=False: a text longer than the model's context is what windows are for, no reason to warn.
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=fast, return_attention_mask=False, verbose=False)
    ids_N = np.array([*prefix, *encoded["input_ids"], *suffix], dtype=np.int64)
    ends_N = None
    if fast:
        ends = [end for _, end in encoded["offset_mapping"]]
        ends_N = np.array([*[0] * len(prefix), *ends, *[len(text)] * len(suffix)], dtype=np.int64)
    return TokenStream(ids_N, prefix, suffix, ends_N)
