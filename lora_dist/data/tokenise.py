"""Text to token ids: documents and running text, special tokens, and a tokenizer's content digest.

Running text (a `.txt` file, or rows that keep their line breaks) is one document a file or split, unless a separator splits it.
It is tokenised in chunks of `CHUNK_LINES` whole lines, each by itself: where a tokenizer joins characters across the end of a
line, or starts every text with a space mark as Llama's does, a chunk boundary may differ from the whole text by a token, that is
one in tens of thousands. Chunks are cut before the work is spread, so the tokens do not depend on the number of processes.
Called by `text.py`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from datasets.exceptions import DatasetGenerationError
from transformers import PreTrainedTokenizerBase

from lora_dist.log import UserError, logger

CHUNK_LINES = 1000
_READ_CHARS = 8 << 20
_PROBED_ROWS = 1000
_PIECE = datasets.Features({"text": datasets.Value("string"), "opens": datasets.Value("bool"), "closes": datasets.Value("bool")})


# --- tokenizers -----------------------------------------------------------------------------------------------------------


def special_ids(tokenizer: PreTrainedTokenizerBase, mode: str) -> tuple[list[int], list[int]]:
    """Token ids put before and after each document.

    Args:
        mode: bos, eos, both, none, or auto: what the tokenizer itself puts around a text.

    Raises:
        UserError: if the tokenizer has no token of that kind.
    """
    if mode == "auto":
        plain = tokenizer("a", add_special_tokens=False)["input_ids"]
        full = tokenizer("a")["input_ids"]
        for start in range(len(full) - len(plain) + 1):
            if full[start : start + len(plain)] == plain:
                return full[:start], full[start + len(plain) :]
        return [], []
    chosen: list[list[int]] = []
    for name, modes in (("bos", ("bos", "both")), ("eos", ("eos", "both"))):
        token_id = getattr(tokenizer, f"{name}_token_id")
        if mode in modes and token_id is None:
            raise UserError(
                f"data.special_tokens: found {mode}, but the tokenizer has no {name} token, expected auto, none, or one it has"
            )
        chosen.append([token_id] if mode in modes else [])
    return chosen[0], chosen[1]


def tokenizer_digest(tokenizer: PreTrainedTokenizerBase) -> str:
    """sha256 of what decides its tokens; paths, padding and truncation do not matter."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        content = json.loads(backend.to_str())
        content["truncation"] = content["padding"] = None  # left over from the last call
    else:
        content = [type(tokenizer).__name__, sorted(tokenizer.get_vocab().items()), str(tokenizer.special_tokens_map)]
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def token_dtype(tokenizer: PreTrainedTokenizerBase) -> np.dtype:
    """uint16 where all ids fit, else uint32."""
    return np.dtype(np.uint16 if max(tokenizer.get_vocab().values()) < 1 << 16 else np.uint32)


# --- text to pieces -------------------------------------------------------------------------------------------------------


def pieces(part: Path | datasets.Dataset, separator: str | None, scratch: Path) -> datasets.Dataset:
    """Texts to be tokenised each by itself: columns text, and for running text also opens and closes (a document).

    A table is running text if every non-empty row among its first 1,000 ends in a line break; else each row is a document.

    Raises:
        UserError: if a text file is not UTF-8.
    """
    if isinstance(part, Path):
        lines, name = partial(_file_blocks, part), str(part)
    elif _keeps_line_breaks(part):
        lines, name = partial(_row_blocks, part), "the data set"
    else:
        return part
    try:
        return datasets.Dataset.from_generator(
            _piece_rows,
            features=_PIECE,
            cache_dir=str(scratch),
            gen_kwargs={"blocks": lines, "separator": separator, "name": name},
            # An own fingerprint spares hashing the arguments; the scratch folder is this part's own.
            fingerprint=hashlib.sha256(name.encode()).hexdigest()[:16],
        )
    except DatasetGenerationError as error:
        if isinstance(error.__cause__, UnicodeDecodeError):
            raise UserError(f"data.dataset_name: {name} is not UTF-8 text ({error.__cause__.reason})") from error
        raise


def _keeps_line_breaks(rows: datasets.Dataset) -> bool:
    texts = [text for text in rows[: min(_PROBED_ROWS, len(rows))]["text"] if text]
    return bool(texts) and all(text.endswith("\n") for text in texts)


def _file_blocks(path: Path) -> Iterator[str]:
    # utf-8-sig drops the mark some editors put first; line ends become \n, as in the text builder of `datasets`.
    with open(path, encoding="utf-8-sig") as file:
        while block := file.read(_READ_CHARS):
            yield block + file.readline()


def _row_blocks(rows: datasets.Dataset) -> Iterator[str]:
    for batch in rows.iter(_PROBED_ROWS):
        yield "".join(text for text in batch["text"] if text)


def _piece_rows(blocks: Callable[[], Iterator[str]], separator: str | None, name: str) -> Iterator[dict[str, Any]]:
    empty = True
    for text, opens, closes in _chunks(blocks()) if separator is None else _documents(blocks(), separator, name):
        empty = False
        yield {"text": text, "opens": opens, "closes": closes}
    if empty:  # `datasets` makes no table without rows; this one has no tokens
        yield {"text": "", "opens": False, "closes": False}


def _chunks(blocks: Iterable[str]) -> Iterator[tuple[str, bool, bool]]:
    """Chunks of CHUNK_LINES lines, with whether they are the first and the last of their document."""
    lines = chain.from_iterable(map(_lines, blocks))
    chunk, opens = "".join(islice(lines, CHUNK_LINES)), True
    while chunk:
        following = "".join(islice(lines, CHUNK_LINES))
        yield chunk, opens, not following
        chunk, opens = following, False


def _lines(block: str) -> list[str]:
    """Lines with their \\n; str.splitlines would also cut at form feeds and other marks inside a line."""
    *lines, last = block.split("\n")
    return [line + "\n" for line in lines] + ([last] if last else [])


def _documents(blocks: Iterable[str], separator: str, name: str) -> Iterator[tuple[str, bool, bool]]:
    """The stripped, non-blank texts between separators, each whole; a separator may straddle two blocks."""
    rest, separators = "", 0
    for block in blocks:
        *whole, rest = (rest + block).split(separator)
        separators += len(whole)
        yield from ((text.strip(), True, True) for text in whole if text.strip())
    if rest.strip():
        yield rest.strip(), True, True
    if not separators:
        logger.warning("data.document_separator: %r does not occur in %s, which counts as one document", separator, name)


# --- pieces to tokens -----------------------------------------------------------------------------------------------------


def token_chunks(
    texts: datasets.Dataset,
    tokenizer: PreTrainedTokenizerBase,
    *,
    prefix: list[int],
    suffix: list[int],
    dtype: np.dtype,
    num_proc: int,
    scratch: Path,
    desc: str,
) -> list[np.ndarray]:
    """Token ids of all pieces or documents in order, as one-dimensional arrays (views of a file in `scratch`)."""
    running = "opens" in texts.column_names
    tokens = texts.map(
        _tokenise_pieces if running else _tokenise_documents,
        batched=True,
        batch_size=16 if running else 1000,
        remove_columns=texts.column_names,
        features=datasets.Features({"input_ids": datasets.List(datasets.Value(dtype.name))}),
        fn_kwargs={"tokenizer": tokenizer, "prefix": prefix, "suffix": suffix},
        num_proc=min(num_proc, len(texts)) if num_proc > 1 else None,
        cache_file_name=str(scratch / "tokens.arrow"),
        load_from_cache_file=False,
        new_fingerprint="0" * 16,  # never looked up, and hashing a tokenizer takes longer than tokenising a small text
        desc=desc,
    )
    column = tokens.data.column("input_ids")
    return [chunk.flatten().to_numpy() for chunk in column.chunks]


def _encode(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[list[int]]:
    # verbose=False: a text longer than the model's context is what packing is for, no reason to warn.
    options = {"add_special_tokens": False, "return_attention_mask": False, "return_token_type_ids": False, "verbose": False}
    return tokenizer(texts, **options)["input_ids"] if texts else []


def _tokenise_documents(batch: dict[str, list], tokenizer: Any, prefix: list[int], suffix: list[int]) -> dict[str, list]:
    texts = [text for text in batch["text"] if text and not text.isspace()]
    return {"input_ids": [prefix + ids + suffix for ids in _encode(tokenizer, texts)]}


def _tokenise_pieces(batch: dict[str, list], tokenizer: Any, prefix: list[int], suffix: list[int]) -> dict[str, list]:
    encoded = _encode(tokenizer, batch["text"])
    flags = zip(batch["opens"], batch["closes"], strict=True)
    return {
        "input_ids": [
            (prefix if opens else []) + ids + (suffix if closes else [])
            for ids, (opens, closes) in zip(encoded, flags, strict=True)
        ]
    }
