"""Check `save_time`: how long a checkpoint takes to be on disk, against the time between a warning and the end.

Writes what a save writes: adapter and AdamW's moments, hashed, flushed, read back, renamed. The grace period has to hold the step that
is running, perhaps a save that is running, and this one; so half of it is all right.
"""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Generator
from pathlib import Path

from lora_dist.operations.doctor.context import VALUES_STORED, Context
from lora_dist.operations.doctor.disk import cannot_write, scratch
from lora_dist.operations.doctor.report import Finding, fail, ok, size_text, time_text, warn
from lora_dist.process import flush

CHUNK_BYTES = 1 << 22
REMEDIES = (
    "a longer warning (Slurm: --signal=B:USR1@120, KillWait in slurm.conf; elsewhere the time between SIGTERM and SIGKILL), "
    "a local disk, or a smaller --r"
)


class TooSlow(Exception):
    """Raised where writing takes longer than it may.

    Attributes:
        written_bytes: until then.
    """

    def __init__(self, written_bytes: int):
        super().__init__(written_bytes)
        self.written_bytes = written_bytes


def check_save_time(context: Context) -> Generator[Finding, None, None]:
    size, source = context.checkpoint
    grace_s = context.args.grace_s
    free = os.statvfs(context.folder)
    if free.f_bavail * free.f_frsize < size * 1.05:
        yield fail(
            "time to save", f"no room for {size_text(size)} ({source})", "free some space, or --output_dir on another disk"
        )
        return
    try:
        with scratch(context.folder) as inside:
            time_s = save_like_a_run(inside, size, limit_s=max(grace_s, 1.0))
    except TooSlow as slow:
        yield fail(
            "time to save",
            f"{size_text(slow.written_bytes)} of {size_text(size)} in {time_text(grace_s)}, the grace period ({source})",
            REMEDIES,
        )
        return
    except OSError as error:
        yield cannot_write(context.folder, error)
        return
    yield judge(time_s, size, source, grace_s)


def judge(time_s: float, size: int, source: str, grace_s: float) -> Finding:
    text = f"{time_text(time_s)} for {size_text(size)}, {size_text(size / time_s)}/s; grace {time_text(grace_s)} ({source})"
    if time_s > grace_s:
        return fail("time to save", text, REMEDIES)
    if time_s > grace_s / 2:
        return warn("time to save", f"{text}: more than half", REMEDIES)
    return ok("time to save", text)


def save_like_a_run(inside: Path, size: int, limit_s: float) -> float:
    """Write `size` bytes as a checkpoint is written. Returns seconds.

    Raises:
        TooSlow: it takes longer than `limit_s`.
        OSError: the disk is full or does not take it.
    """
    noise = os.urandom(CHUNK_BYTES)  # a file system that compresses gains nothing
    start = time.monotonic()
    deadline = start + limit_s
    staging = inside / ".saving-checkpoint-1"
    staging.mkdir()
    files = {
        staging / "adapter": size // VALUES_STORED,
        staging / "optimizer": size - size // VALUES_STORED,
        staging / "state": 1000,
    }
    written = 0
    for file, length in files.items():
        written += _write(file, length, noise, deadline, written)
    hashes = [_hash(file) for file in files]
    for file in files:
        flush(file)
    flush(staging)
    for file in files:
        _forget(file)
    if [_hash(file) for file in files] != hashes:
        raise OSError(5, "what is read is not what was written")
    os.rename(staging, inside / "checkpoint-1")
    flush(inside)
    return time.monotonic() - start


def _write(file: Path, length: int, noise: bytes, deadline: float, before: int) -> int:
    with file.open("wb") as handle:
        for start in range(0, length, CHUNK_BYTES):
            handle.write(noise[: length - start])
            if time.monotonic() > deadline:
                raise TooSlow(before + start)
        handle.flush()
    flush(file)  # file by file, so that a slow disk is noticed before everything waits in memory
    if time.monotonic() > deadline:
        raise TooSlow(before + length)
    return length


def _forget(file: Path) -> None:
    """Have what is flushed read from the disk again."""
    if hasattr(os, "posix_fadvise"):
        with file.open("rb") as handle:
            os.posix_fadvise(handle.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _hash(file: Path) -> str:
    with file.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()
