"""A teacher's largest probabilities of every label token of the training rows, on disk, in shards of so many rows.

    root/<key>/meta.json                    what it is of: teacher and its precision, rows, temperature, k, vocabulary, rows a shard
    root/<key>/shard-00012.safetensors      rows [12 R, 13 R): index (n, K), log_p (n, K), log_rest (n,), starts (R + 1,)

A shard is written under a temporary name, flushed and renamed, with the sha256 of its contents in its header: what is there under its name is
whole, whoever was killed, and shards of any number of processes belong together. Called by `engine/soft_labels.py`.

Letters for shapes: `n` label tokens of a shard's rows, in order; `K` kept probabilities.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from lora_dist.data.windows import entry_key
from lora_dist.log import UserError, disk_advice, logger

_FORMAT = 1
_SHARD_BYTES = 1 << 26
_OPEN = 64  # shards that are mapped at a time
_STALE_S = 24 * 3600.0
_NAMES = ("index", "log_p", "log_rest", "starts")
_KEY = "train.distill_cache"


@dataclass(frozen=True)
class SoftLabelsOf:
    """What a cache is of; anything else is another cache."""

    teacher: str
    """fingerprint"""
    precision: str
    """that it computes in"""
    rows: str
    """digest of what is trained on"""
    count: int
    """rows"""
    temperature: float
    k: int
    vocabulary: int
    half: bool
    """log-probabilities are kept in 16 bits"""

    @property
    def token_bytes(self) -> int:
        """On disk, a label token."""
        return self.k * ((2 if self.vocabulary <= 2**16 else 4) + (2 if self.half else 4)) + 4


class Top(NamedTuple):
    """Of label tokens, in order."""

    index_NK: np.ndarray
    """token ids"""
    log_p_NK: np.ndarray
    """log-probabilities, largest first"""
    log_rest_N: np.ndarray
    """log of the others' sum"""


class SoftLabels:
    """The cache of one `SoftLabelsOf`, which may have gaps.

    Args:
        root: folder of caches; made if it is not there.
        longest: tokens of the longest row.

    Attributes:
        rows_a_shard, shards: how the rows are dealt.

    Raises:
        UserError: a folder that cannot be written, or whose description is broken.
    """

    def __init__(self, root: Path, of: SoftLabelsOf, *, longest: int):
        self.of, self.folder = of, root / entry_key({"soft labels": _FORMAT, **asdict(of)})
        wanted = max(1, _SHARD_BYTES // (of.token_bytes * longest))
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self.rows_a_shard = self._described(wanted)
            self._remove_stale()
        except OSError as error:
            raise UserError(f"{_KEY}: {root} cannot be used ({error.strerror}), expected a writable folder") from error
        self.shards = -(-of.count // self.rows_a_shard)
        self._opened = functools.lru_cache(maxsize=_OPEN)(self._open)

    def _described(self, wanted: int) -> int:
        """Rows a shard: as the folder says, else as wanted, which is written down."""
        file = self.folder / "meta.json"
        if not file.exists():
            _write(file, lambda part: part.write_text(json.dumps({**asdict(self.of), "rows_a_shard": wanted}, indent=1)))
        try:
            return int(json.loads(file.read_text(encoding="utf-8"))["rows_a_shard"])
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{_KEY}: {file} is broken ({error}): delete {self.folder}, or give another folder") from error

    def _remove_stale(self) -> None:
        for part in self.folder.glob(".*.tmp"):
            if part.exists() and time.time() - part.stat().st_mtime > _STALE_S:
                part.unlink(missing_ok=True)

    def rows_of(self, shard: int) -> range:
        """Numbers of a shard's rows."""
        return range(shard * self.rows_a_shard, min(self.of.count, (shard + 1) * self.rows_a_shard))

    def file(self, shard: int) -> Path:
        return self.folder / f"shard-{shard:05d}.safetensors"

    def whole(self, shards: Sequence[int]) -> list[int]:
        """Those of these that are there and hold what they held when they were written; a damaged one is named in a warning."""
        with ThreadPoolExecutor(max(1, min(4, os.cpu_count() or 1))) as pool:
            good = list(pool.map(self._is_whole, shards))
        return [shard for shard, whole in zip(shards, good, strict=True) if whole]

    def _is_whole(self, shard: int) -> bool:
        if not self.file(shard).exists():
            return False
        try:
            with safe_open(str(self.file(shard)), "np") as handle:
                arrays = {name: handle.get_tensor(name) for name in _NAMES}
                good = handle.metadata()["sha256"] == _digest(arrays) and len(arrays["starts"]) == len(self.rows_of(shard)) + 1
        except (SafetensorError, OSError, KeyError, TypeError) as error:
            logger.warning("%s cannot be read (%s): it is computed again", self.file(shard), error)
            return False
        if not good:
            logger.warning("%s does not hold what was written: it is computed again", self.file(shard))
        return good

    def write(self, shard: int, tops: Sequence[Top]) -> None:
        """A shard, row by row.

        Raises:
            UserError: a disk that cannot be written.
        """
        assert len(tops) == len(self.rows_of(shard))
        index = np.uint16 if self.of.vocabulary <= 2**16 else np.uint32
        arrays = {
            "index": np.concatenate([top.index_NK for top in tops]).astype(index),
            "log_p": np.concatenate([top.log_p_NK for top in tops]).astype(np.float16 if self.of.half else np.float32),
            "log_rest": np.concatenate([top.log_rest_N for top in tops]).astype(np.float32),
            "starts": np.cumsum([0, *(len(top.index_NK) for top in tops)]).astype(np.int64),
        }
        try:
            _write(self.file(shard), lambda part: save_file(arrays, part, metadata={"sha256": _digest(arrays)}))
        except (OSError, SafetensorError) as error:
            advice = (
                disk_advice(error, self.folder, "free some room, or give another folder") if isinstance(error, OSError) else ""
            )
            raise UserError(f"{_KEY}: {self.file(shard)} cannot be written ({error}): {advice}") from error
        self._opened.cache_clear()

    def read(self, rows: Sequence[int]) -> Top:
        """Of these rows' label tokens, one row behind the other."""
        found = []
        for row in rows:
            handle, starts = self._opened(row // self.rows_a_shard)
            start, stop = starts[row % self.rows_a_shard : row % self.rows_a_shard + 2]
            found.append([handle.get_slice(name)[start:stop] for name in _NAMES[:3]])
        if not found:
            return Top(np.zeros((0, self.of.k), np.int64), np.zeros((0, self.of.k), np.float32), np.zeros(0, np.float32))
        index_NK, log_p_NK, log_rest_N = (np.concatenate(each) for each in zip(*found, strict=True))
        return Top(index_NK.astype(np.int64), log_p_NK, log_rest_N)

    def _open(self, shard: int) -> tuple[Any, list[int]]:
        try:
            handle = safe_open(str(self.file(shard)), "np").__enter__()
        except (SafetensorError, OSError) as error:
            raise UserError(
                f"{_KEY}: {self.file(shard)} cannot be read any more ({error}): start again, it is computed anew"
            ) from error
        return handle, handle.get_tensor("starts").tolist()


def _digest(arrays: dict[str, np.ndarray]) -> str:
    digest = hashlib.sha256()
    for name in _NAMES:
        digest.update(f"{name} {arrays[name].dtype} {arrays[name].shape}\n".encode())
        digest.update(np.ascontiguousarray(arrays[name]).data.cast("B") if arrays[name].size else b"")
    return digest.hexdigest()


def _write(file: Path, write: Any) -> None:
    """Under a temporary name, flushed to disk, then renamed."""
    number, name = tempfile.mkstemp(prefix=f".{file.name}.", suffix=".tmp", dir=file.parent)
    part = Path(name)
    try:
        write(part)
        os.fsync(number)
        part.chmod(0o644)
        os.rename(part, file)
    finally:
        os.close(number)
        part.unlink(missing_ok=True)
