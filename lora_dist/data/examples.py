"""Examples of instruction data in a content-keyed cache, memory-mapped: what `windows.py` and `text.py` are for running text.

    root/<key>/tokens.npy    (T,) token ids of all examples, one behind the other, uint16 where the vocabulary allows, else uint32
    root/<key>/labels.npy    (T,) uint8: 1 where a token is a label; never an example's first
    root/<key>/starts.npy    (N + 1,) int64: where each example begins
    root/<key>/meta.json     format, content digest, and what became of the records

Called by `engine/data.py`.

Letters for shapes: `N` examples, `T` tokens of all of them, `B` rows, `L` tokens of a batch's longest row.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

import datasets
import numpy as np
import torch

from lora_dist.data.files import LocalSplit
from lora_dist.data.hub import HubSplit
from lora_dist.data.records import Format, columns_of, detect_format, record_tables
from lora_dist.data.rows import FILLER, IGNORE_LABEL, RowBatch
from lora_dist.data.sources import TextSource, cache_root, find_splits
from lora_dist.data.text import processes_for
from lora_dist.data.tokenise import token_dtype
from lora_dist.data.windows import entry_key, new_entry, write_meta
from lora_dist.log import UserError, logger

EXAMPLES_FORMAT = 1
_NAMED = 5  # bad records that messages name
_HASH_ROWS = 4096
_VERIFY_BYTES = 1 << 30  # as in windows.py
_FILES = ("tokens", "labels", "starts")
_TARGETS = "targets"


class RecordEncoder(Protocol):
    """What records are made into examples by: `encoding.Encoder`, `classification.ClassEncoder`."""

    @property
    def kind(self) -> str: ...

    @property
    def tokenizer(self) -> Any: ...

    @property
    def columns(self) -> tuple[str, ...]:
        """that are read"""

    def key_parts(self) -> dict[str, Any]:
        """JSON values that decide what a record becomes."""

    def encode_batch(self, batch: Mapping[str, list]) -> dict[str, list]:
        """A row a record: input_ids, labels, lost, answer_tokens, truncated, bad; of classified ones the target, as text, too."""


@dataclass(frozen=True)
class RecordsReport:
    """What became of the records of a split."""

    records: int
    bad: int
    named: tuple[tuple[int, str], ...]
    """the first bad ones: number, counted from 1, and reason"""
    truncated: int
    """examples that were cut to the longest that is allowed"""
    lost_share: float
    """of the answers' tokens of these, what was cut off"""

    def first_bad(self) -> str:
        listed = "; ".join(f"record {number}: {reason}" for number, reason in self.named)
        return listed + (f"; and {self.bad - len(self.named)} more" if self.bad > len(self.named) else "")


class Examples(torch.utils.data.Dataset[tuple[torch.Tensor, torch.Tensor]]):
    """Examples of unlike lengths, read at random from memory maps; picklable, so safe in any worker.

    Args:
        folder: of a cache entry.
        index: which examples, in order (N',); all of them without it.
        digest: content digest of these, if known already.
    """

    def __init__(self, folder: Path, *, index: np.ndarray | None = None, digest: str | None = None):
        self._folder, self._index, self._digest = folder, index, digest
        self._open()

    @property
    def folder(self) -> Path:
        """of the cache entry"""
        return self._folder

    def _open(self) -> None:
        self._tokens_T, self._labels_T, starts = (
            np.asarray(np.load(self._folder / f"{name}.npy", mmap_mode="r", allow_pickle=False)) for name in _FILES
        )
        chosen = slice(None) if self._index is None else self._index
        self._starts_N, self._ends_N = starts[:-1][chosen], starts[1:][chosen]

    def __len__(self) -> int:
        return len(self._starts_N)

    def __getitem__(self, i: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Token ids and labels (L,), int64; labels are -100 where nothing is learnt, and not shifted."""
        ids, labels = self.arrays(i)
        return torch.from_numpy(ids), torch.from_numpy(labels)

    def arrays(self, i: int) -> tuple[np.ndarray, np.ndarray]:
        """As `__getitem__`."""
        part = slice(int(self._starts_N[i]), int(self._ends_N[i]))
        ids = self._tokens_T[part].astype(np.int64)
        return ids, np.where(self._labels_T[part] != 0, ids, IGNORE_LABEL)

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each example (N,), int64."""
        return np.asarray(self._ends_N - self._starts_N)

    @property
    def digest(self) -> str:
        """sha256 of lengths, token ids and labels: the same for the same examples, wherever they lie."""
        if self._digest is None:
            self._digest = _content_digest(self)
        return self._digest

    def batch(self, rows: Sequence[int] | np.ndarray) -> RowBatch:
        """Examples (len(rows), L) filled up on the right."""
        return side_by_side([None if row == FILLER else [self.arrays(row)] for row in rows], packed=False)

    def subset(self, rows: np.ndarray) -> Examples:
        """The examples at these positions, in this order; nothing is copied."""
        rows = np.asarray(rows, np.int64)
        return Examples(self._folder, index=rows if self._index is None else self._index[rows])

    def take(self, n: int) -> Examples:
        """The first n examples, or all if there are fewer."""
        return self if n >= len(self) else self.subset(np.arange(n))

    def by_length(self) -> Examples:
        """The same from the longest to the shortest, so that neighbours need little padding."""
        return self.subset(np.argsort(-self.lengths, kind="stable"))

    def __getstate__(self) -> dict[str, Any]:
        # Memory maps would be pickled with all their contents; a worker opens the files again instead.
        return {"_folder": self._folder, "_index": self._index, "_digest": self._digest}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._open()


def side_by_side(rows: Sequence[Sequence[tuple[np.ndarray, np.ndarray]] | None], *, packed: bool) -> RowBatch:
    """Rows of one or, packed, several examples each; None is a filler row.

    Padding comes behind everything that counts, so causal attention never sees it and no mask is needed. In packed rows its positions are
    all 0: sequences of their own, within any model's context.
    """
    lengths = [0 if row is None else sum(len(ids) for ids, _ in row) for row in rows]
    shape = (len(rows), max(2, *lengths))  # 2: a row without any next token is no row
    ids_BL = torch.zeros(shape, dtype=torch.int64)
    labels_BL = torch.full(shape, IGNORE_LABEL, dtype=torch.int64)
    positions_BL = torch.zeros(shape, dtype=torch.int64)
    for b, row in enumerate(rows):
        start = 0
        for ids, labels in row or ():
            end = start + len(ids)
            ids_BL[b, start:end] = torch.from_numpy(ids)
            labels_BL[b, start:end] = torch.from_numpy(labels)
            positions_BL[b, start:end] = torch.arange(len(ids))
            start = end
    return RowBatch(ids_BL, labels_BL, positions_BL if packed else None, sum(lengths))


def _content_digest(examples: Examples) -> str:
    lengths_N = examples.lengths
    digest = hashlib.sha256(f"examples {len(examples)}\n".encode())
    digest.update(np.ascontiguousarray(lengths_N, dtype="<i8").data)
    for start in range(0, len(examples), _HASH_ROWS):
        rows = [examples.arrays(i) for i in range(start, min(start + _HASH_ROWS, len(examples)))]
        for parts in zip(*rows, strict=True):
            digest.update(np.concatenate(parts).astype("<i8").data)
    return digest.hexdigest()


# --- loading --------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ExampleSplits:
    """The examples of each split that is there, and what became of its records."""

    splits: dict[str, Examples]
    reports: dict[str, RecordsReport]
    from_cache: bool
    """nothing had to be tokenised"""
    target_numbers: dict[str, np.ndarray] = field(default_factory=dict)
    """of classified examples (N,), float64: the number to predict, or the place in `target_names`"""
    target_names: dict[str, tuple[str, ...]] = field(default_factory=dict)
    """labels as they stand in the data, each once"""


def load_examples(
    source: TextSource,
    encoder: RecordEncoder,
    *,
    max_bad_share: float,
    splits: tuple[str, ...] = ("train", "validation"),
    num_proc: int | None = None,
    cache_dir: str | Path | None = None,
) -> ExampleSplits:
    """Examples of each split.

    Args:
        source: the data set.
        encoder: what records are made into.
        max_bad_share: more bad records than this, of all of a split, are an error.
        splits: the ones wanted; those that the source does not have are left out.
        num_proc: processes that tokenise; default: the cores, 8 at most, and 1 for little data.
        cache_dir: where examples are kept; default: `lora_dist/` in the Hugging Face cache.

    Raises:
        UserError: for a source that is missing, empty or unreadable, a hub that cannot be reached, too many bad records.
    """
    root = cache_root(cache_dir)
    found: dict[str, Examples] = {}
    reports: dict[str, RecordsReport] = {}
    from_cache = True
    for name, split in find_splits(source, splits, root / "hub", noun="records").items():
        key = entry_key({"examples": EXAMPLES_FORMAT, "content": split.content_key(), **encoder.key_parts()})
        entry = open_examples(root, key)
        if entry is None:
            from_cache = False
            _build(root, key, name, split, encoder, num_proc, max_bad_share)
            entry = open_examples(root, key)
        if entry is None:
            raise UserError(f"data.cache_dir: what was written to {root / key} does not read back, expected a sound disk")
        found[name], reports[name] = entry
        _require_few_bad(name, reports[name], max_bad_share, encoder.kind)
    if not all((found_folder / f"{_TARGETS}.npy").is_file() for found_folder in (each.folder for each in found.values())):
        return ExampleSplits(found, reports, from_cache)
    targets = {name: np.load(each.folder / f"{_TARGETS}.npy", allow_pickle=False) for name, each in found.items()}
    names = {name: tuple(json.loads((each.folder / "meta.json").read_text())["targets"]) for name, each in found.items()}
    return ExampleSplits(found, reports, from_cache, targets, names)


def format_of(source: TextSource, cache_dir: str | Path | None = None) -> Format | Literal["text"]:
    """What the rows of a source are, by their columns.

    Raises:
        UserError: neither examples nor text; and as `load_examples`.
    """
    root = cache_root(cache_dir)
    found_splits = find_splits(source, ("train", "validation"), root / "hub", noun="records")
    columns = columns_of(next(iter(found_splits.values())))
    found = detect_format(columns, source.text_column)
    if found is None:
        raise UserError(
            f"data.format: {source.dataset_name} has the columns {', '.join(sorted(columns))}, expected instruction and output (alpaca), "
            f"messages or conversations (chat), prompt and completion, or {source.text_column} (data.text_column)"
        )
    return found


def _require_few_bad(name: str, report: RecordsReport, max_bad_share: float, kind: str) -> None:
    if not report.records:
        raise UserError(f"data.dataset_name: the {name} split holds no record, expected one at least")
    if report.bad > max_bad_share * report.records or report.bad == report.records:
        raise UserError(
            f"data.dataset_name: found {report.bad:,} bad records of {report.records:,} in the {name} split ({report.first_bad()}), "
            f"expected {max_bad_share:.0%} at most (data.max_bad_share) of the format {kind} (data.format)"
        )


def open_examples(root: Path, key: str) -> tuple[Examples, RecordsReport] | None:
    """The cached examples, or None where there are none; a damaged entry is named in a warning and counts as none."""
    folder = root / key
    if not folder.exists():
        return None
    try:
        meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
        report = RecordsReport(
            **{**meta["report"], "named": tuple((number, reason) for number, reason in meta["report"]["named"])}
        )
        examples = Examples(folder, digest=meta["digest"])
        if sum((folder / f"{file}.npy").stat().st_size for file in _FILES) <= _VERIFY_BYTES:
            if _content_digest(examples) != meta["digest"]:
                raise ValueError("its contents do not match their digest")
        return examples, report
    except (OSError, ValueError, KeyError, TypeError, IndexError) as error:
        logger.warning("cache entry %s is damaged (%s): it is rebuilt", folder, error)
        return None


def _build(
    root: Path,
    key: str,
    name: str,
    split: LocalSplit | HubSplit,
    encoder: RecordEncoder,
    num_proc: int | None,
    max_bad_share: float,
) -> None:
    with new_entry(root, key, open_examples) as folder:
        scratch = folder / "scratch"
        tables = [
            _encoded(table, encoder, num_proc, scratch / f"tokens-{number}.arrow", f"Tokenising {name}")
            for number, table in enumerate(record_tables(split, scratch))
        ]
        report = _report(tables)
        lengths = np.concatenate([_lengths(table) for table in tables])
        lengths = lengths[lengths > 0]
        if not len(lengths):
            _require_few_bad(name, report, max_bad_share, encoder.kind)
        for file, column, dtype in (
            ("tokens", "input_ids", token_dtype(encoder.tokenizer)),
            ("labels", "labels", np.dtype(np.uint8)),
        ):
            out_T = np.lib.format.open_memmap(folder / f"{file}.npy", mode="w+", dtype=dtype, shape=(int(lengths.sum()),))
            done = 0
            for values in _flat(tables, column):
                out_T[done : done + len(values)] = values
                done += len(values)
            out_T.flush()
        np.save(folder / "starts.npy", np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64))
        digest = _content_digest(Examples(folder))
        meta = {"format": EXAMPLES_FORMAT, "digest": digest, "report": dataclasses.asdict(report)}
        write_meta(folder, {**meta, **_write_targets(folder, tables, encoder)})


def _write_targets(folder: Path, tables: Sequence[datasets.Dataset], encoder: RecordEncoder) -> dict[str, Any]:
    """The targets of the usable records, in order; returns what the entry's meta.json says of them."""
    if "target" not in tables[0].column_names:
        return {}
    texts = [text for table in tables for text, bad in zip(table["target"], table["bad"], strict=True) if bad is None]
    if encoder.key_parts().get("regression"):
        np.save(folder / f"{_TARGETS}.npy", np.array([float(text) for text in texts]))
        return {"targets": []}
    names = sorted(set(texts))
    places = {name: i for i, name in enumerate(names)}
    np.save(folder / f"{_TARGETS}.npy", np.array([places[text] for text in texts], dtype=np.float64))
    return {"targets": names}


def _encoded(table: datasets.Dataset, encoder: RecordEncoder, num_proc: int | None, file: Path, desc: str) -> datasets.Dataset:
    read = [name for name in table.column_names if name in encoder.columns] or table.column_names
    table = table.select_columns(read)
    processes = num_proc or processes_for(table.data.nbytes)
    features = {
        "input_ids": datasets.List(datasets.Value(token_dtype(encoder.tokenizer).name)),
        "labels": datasets.List(datasets.Value("uint8")),
        "lost": datasets.Value("int64"),
        "answer_tokens": datasets.Value("int64"),
        "truncated": datasets.Value("bool"),
        "bad": datasets.Value("string"),
    }
    if encoder.kind == "classification":
        features["target"] = datasets.Value("string")
    return table.map(
        encoder.encode_batch,
        batched=True,
        batch_size=1000,
        remove_columns=table.column_names,
        features=datasets.Features(features),
        num_proc=min(processes, len(table)) if processes > 1 else None,
        cache_file_name=str(file),
        load_from_cache_file=False,
        new_fingerprint="0" * 16,  # never looked up
        desc=desc,
    )


def _report(tables: Sequence[datasets.Dataset]) -> RecordsReport:
    columns = {
        name: np.concatenate([table.data.column(name).to_numpy() for table in tables])
        for name in ("lost", "answer_tokens", "truncated", "bad")
    }
    bad = [(i + 1, reason) for i, reason in enumerate(columns["bad"]) if reason is not None]
    cut = columns["truncated"].astype(bool)
    return RecordsReport(
        records=len(cut),
        bad=len(bad),
        named=tuple(bad[:_NAMED]),
        truncated=int(cut.sum()),
        lost_share=float(columns["lost"][cut].sum() / max(1, columns["answer_tokens"][cut].sum())),
    )


def _lengths(table: datasets.Dataset) -> np.ndarray:
    chunks = table.data.column("input_ids").chunks
    return np.concatenate([np.diff(chunk.offsets.to_numpy()) for chunk in chunks] or [np.empty(0, np.int64)])


def _flat(tables: Sequence[datasets.Dataset], column: str) -> Iterator[np.ndarray]:
    for table in tables:
        for chunk in table.data.column(column).chunks:
            yield chunk.flatten().to_numpy()
