"""Packed windows of token ids, and the content-keyed cache folder they are read from.

    root/<key>/windows.npy   (N, L) token ids, uint16 where the vocabulary allows, else uint32; memory-mapped when read
    root/<key>/meta.json     format, shape and content digest of windows.npy

A plain memory map costs a few microseconds a window, needs no decoding, and is shared by all processes of a machine. An entry is
written under a temporary name and renamed, so a killed or concurrent writer cannot leave half of one. Called by `text.py`.

Letters for shapes: `N` windows, `L` context length in tokens.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lora_dist.data.rows import FILLER, IGNORE_LABEL, RowBatch
from lora_dist.log import UserError, logger

CACHE_FORMAT = 1
_HASH_TOKENS = 1 << 22  # tokens converted and hashed at a time
_VERIFY_BYTES = 1 << 30  # entries above this are checked by size only: hashing them would delay every start of every process
_STALE_S = 24 * 3600.0


class Windows(torch.utils.data.Dataset[torch.Tensor]):
    """Packed windows, read at random from a memory map (or from an array in memory); picklable, so safe in any worker.

    Args:
        rows: path of a `.npy` file with token ids (N, L), or such an array.
        index: which rows, in order (N',); all of them without it.
        digest: content digest of these rows, if known already.
    """

    def __init__(self, rows: Path | np.ndarray, *, index: np.ndarray | None = None, digest: str | None = None):
        self._path = rows if isinstance(rows, Path) else None
        self._rows_NL: np.ndarray = _open_rows(rows) if isinstance(rows, Path) else np.asarray(rows)
        assert self._rows_NL.ndim == 2, f"windows are (N, L), found {self._rows_NL.shape}"
        self._index = index
        self._digest = digest

    def __len__(self) -> int:
        return len(self._rows_NL) if self._index is None else len(self._index)

    def __getitem__(self, i: int) -> torch.Tensor:
        """Token ids (L,), int64."""
        row = i if self._index is None else self._index[i]
        return torch.from_numpy(self._rows_NL[row].astype(np.int64))

    @property
    def context_length(self) -> int:
        """Tokens a window."""
        return self._rows_NL.shape[1]

    @property
    def digest(self) -> str:
        """sha256 of the token ids and their shape: the same for the same windows, whatever path or dtype holds them."""
        if self._digest is None:
            self._digest = _content_digest(self._rows_NL, self._index)
        return self._digest

    def gather(self, rows: Sequence[int] | np.ndarray) -> torch.Tensor:
        """Token ids (len(rows), L), int64: several windows in one copy."""
        chosen = np.asarray(rows, dtype=np.int64)
        return torch.from_numpy(self._rows_NL[chosen if self._index is None else self._index[chosen]].astype(np.int64))

    @property
    def lengths(self) -> None:
        """All of one length."""

    def batch(self, rows: Sequence[int] | np.ndarray) -> RowBatch:
        """Windows (len(rows), L); every token is a label, except in filler rows."""
        chosen = np.asarray(rows, dtype=np.int64)
        filler_B1 = torch.from_numpy(chosen == FILLER)[:, None]
        ids_BL = self.gather(np.maximum(chosen, 0)).masked_fill_(filler_B1, 0)
        tokens = int((chosen != FILLER).sum()) * self.context_length
        return RowBatch(ids_BL, ids_BL.masked_fill(filler_B1, IGNORE_LABEL), None, tokens)

    def subset(self, rows: np.ndarray) -> Windows:
        """The windows at these positions, in this order; nothing is copied."""
        return Windows(
            self._path or self._rows_NL, index=np.asarray(rows, np.int64) if self._index is None else self._index[rows]
        )

    def take(self, n: int) -> Windows:
        """The first n windows, or all if there are fewer."""
        return self if n >= len(self) else self.subset(np.arange(n))

    def __getstate__(self) -> dict[str, Any]:
        # A memory map would be pickled with all its contents; a worker opens the file again instead.
        state = dict(self.__dict__)
        if self._path is not None:
            del state["_rows_NL"]
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        if self._path is not None:
            self._rows_NL = _open_rows(self._path)


def _open_rows(path: Path) -> np.ndarray:
    # np.asarray drops the memmap subclass, whose __getitem__ costs as much again as the copy of a row.
    return np.asarray(np.load(path, mmap_mode="r", allow_pickle=False))


def _content_digest(rows_NL: np.ndarray, index: np.ndarray | None = None) -> str:
    count, length = len(rows_NL) if index is None else len(index), rows_NL.shape[1]
    digest = hashlib.sha256(f"windows {count} x {length}\n".encode())
    step = max(1, _HASH_TOKENS // length)
    for start in range(0, count, step):
        part = slice(start, start + step) if index is None else index[start : start + step]
        digest.update(np.ascontiguousarray(rows_NL[part], dtype="<u4").data)
    return digest.hexdigest()


# --- cache entries ------------------------------------------------------------------------------------------------------


def entry_key(parts: dict[str, Any]) -> str:
    """Name of a cache entry: sha256 over everything its content depends on (JSON values only) and the format's version."""
    text = json.dumps({"format": CACHE_FORMAT, **parts}, sort_keys=True, ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()[:40]


def open_entry(root: Path, key: str) -> Windows | None:
    """The cached windows, or None where there are none; a damaged entry is named in a warning and counts as none."""
    folder = root / key
    if not folder.exists():
        return None
    try:
        return _open_verified(folder)
    except (OSError, ValueError, KeyError, TypeError) as error:
        logger.warning("cache entry %s is damaged (%s): it is rebuilt", folder, error)
        return None


def _open_verified(folder: Path) -> Windows:
    meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
    path = folder / "windows.npy"
    windows = Windows(path, digest=meta["digest"])
    found = [len(windows), windows.context_length]
    if found != meta["shape"]:
        raise ValueError(f"windows.npy has shape {found}, meta.json says {meta['shape']}")
    if path.stat().st_size <= _VERIFY_BYTES and _content_digest(windows._rows_NL) != meta["digest"]:
        raise ValueError("the contents of windows.npy do not match their digest")
    return windows


@contextmanager
def new_entry(root: Path, key: str, opens: Callable[[Path, str], object | None] = open_entry) -> Iterator[Path]:
    """A temporary folder that becomes the entry when the block ends without an error, and vanishes otherwise.

    Anything in its `scratch/` is removed before the entry is published.

    Args:
        opens: reads such an entry; None where it is damaged.

    Raises:
        UserError: if `root` cannot be written.
    """
    try:
        root.mkdir(parents=True, exist_ok=True)
        _remove_stale(root, key)
        folder = Path(tempfile.mkdtemp(prefix=f".{key}.", suffix=".tmp", dir=root))
    except OSError as error:
        raise UserError(f"data.cache_dir: cannot write to {root} ({error.strerror}), expected a writable folder") from error
    try:
        scratch = folder / "scratch"
        scratch.mkdir()
        yield folder
        shutil.rmtree(scratch)
        folder.chmod(0o755)  # mkdtemp makes it private, but caches are often shared by a group
        _publish(folder, root / key, opens)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def write_windows(folder: Path, chunks: Sequence[np.ndarray], context_length: int, dtype: np.dtype) -> None:
    """Concatenate token chunks, cut them into windows, drop the tail, and write the entry's two files, flushed to disk.

    Args:
        chunks: one-dimensional token ids, in order; together one window or more.
    """
    count = sum(map(len, chunks)) // context_length
    path = folder / "windows.npy"
    rows_NL = np.lib.format.open_memmap(path, mode="w+", dtype=dtype, shape=(count, context_length))
    flat, done = rows_NL.reshape(-1), 0
    for chunk in chunks:
        part = chunk[: flat.size - done]
        flat[done : done + len(part)] = part
        done += len(part)
    rows_NL.flush()
    write_meta(folder, {"format": CACHE_FORMAT, "digest": _content_digest(rows_NL), "shape": [count, context_length]})


def write_meta(folder: Path, meta: dict[str, Any]) -> None:
    """`meta.json` of an entry, flushed to disk."""
    with open(folder / "meta.json", "w", encoding="utf-8") as file:
        json.dump(meta, file)
        file.flush()
        os.fsync(file.fileno())


def _publish(folder: Path, final: Path, opens: Callable[[Path, str], object | None]) -> None:
    try:
        os.rename(folder, final)
    except OSError:
        # Something is there: another process was faster (then both wrote the same), or what was there is damaged.
        if opens(final.parent, final.name) is not None:
            return
        aside = Path(tempfile.mkdtemp(prefix=f".{final.name}.", suffix=".tmp", dir=final.parent))
        os.rename(final, aside / "damaged")
        shutil.rmtree(aside, ignore_errors=True)
        os.rename(folder, final)


def _remove_stale(root: Path, key: str) -> None:
    """Temporary folders of writers of this entry that were killed more than a day ago."""
    for folder in root.glob(f".{key}.*.tmp"):
        try:
            if time.time() - folder.stat().st_mtime > _STALE_S:
                shutil.rmtree(folder, ignore_errors=True)
        except FileNotFoundError:  # another process removed it
            pass
