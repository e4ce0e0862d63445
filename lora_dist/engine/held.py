"""The run folder while this process works in it: its lock, its small files, and making it anew when it is removed under the run.

Rank 0 only. Made by `engine/folder.py`; written to by `engine/attempts.py`; `ensure` is called by `engine/saver.py` before a save, in
its thread, so everything here may be called from several threads.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import re
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import IO

from lora_dist.log import UserError, logger
from lora_dist.process import flush
from lora_dist.state import RUN

LOCK = ".lock"
_POLL_S = 0.2
_RUN_ID = re.compile(r"[0-9a-f]{32}")


class FolderBusy(UserError):
    """Another process is at work in the folder."""


def lock_folder(folder: Path, *, wait_s: float = 0.0, note: Callable[[str], None] = lambda text: None) -> IO[str] | None:
    """Keep other runs out of the folder for as long as the returned file is open (the system lets go when a process dies).

    Args:
        wait_s: how long to wait for another process to let go.
        note: told once, if there is something to wait for.

    Returns:
        The open file; None where the file system has no locks.

    Raises:
        FolderBusy: another process is running in it.
        OSError: the lock cannot be written.
    """
    deadline, told = time.monotonic() + wait_s, False
    while True:
        handle = (folder / LOCK).open("a")
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if _same(folder / LOCK, handle.fileno()):
                return handle
            handle.close()  # removed, with its folder, between opening and locking
        except BlockingIOError as error:
            handle.close()
            if time.monotonic() >= deadline:
                raise FolderBusy(
                    f"train.output_dir: another run is at work in {folder}{f' (waited {wait_s:g} s)' if wait_s else ''}; "
                    "wait for it, or choose another folder"
                ) from error
            if not told:
                note(f"another run is at work in {folder}: waiting up to {wait_s:g} s for it to end (train.lock_timeout_s)")
            told = True
            time.sleep(_POLL_S)
        except OSError as error:  # a file system without locks
            handle.close()
            if error.errno not in (errno.ENOLCK, errno.EOPNOTSUPP):
                raise
            logger.warning("%s: this file system has no locks, two runs in one folder would not be noticed", folder)
            return None


def _same(path: Path, descriptor: int) -> bool:
    """Whether a name still leads to an open file or folder."""
    try:
        return os.path.samestat(os.stat(path), os.fstat(descriptor))
    except (FileNotFoundError, NotADirectoryError):
        return False


class HeldFolder:
    """The run folder, locked.

    Args:
        path: exists.
        lock: open file, from `lock_folder`.
        run_id: of its `run.json`.
    """

    def __init__(self, path: Path, lock: IO[str] | None, run_id: str):
        self.path, self.run_id = path, run_id
        self._lock = lock
        self._folder = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
        self._kept: dict[str, str] = {}
        self._unwritten: set[str] = set()
        self._changing = threading.RLock()

    def keep(self, name: str, text: str) -> None:
        """Write a small file, whole or not at all, and again wherever the folder has to be made anew.

        Raises:
            OSError: it could not be written now; `ensure` tries again.
        """
        with self._changing:
            self._kept[name] = text
            self._unwritten.add(name)
            write_whole(self.path / name, text)
            self._unwritten.discard(name)

    def ensure(self) -> str | None:
        """Make the folder anew if it is no longer the one that this run began in. Returns what happened to it, None if nothing did.

        What was kept is written again, and the new folder locked; logs follow by themselves. Checkpoints that went with it are gone.

        Raises:
            UserError: it cannot be made, or another run has taken its place.
        """
        with self._changing:
            try:
                if _same(self.path, self._folder):
                    self._mend()
                    return None
                where = self._last_name()
                self._make_anew()
            except OSError as error:
                raise UserError(
                    f"train.output_dir: {self.path} cannot be used any more ({error.strerror}); mount or free it, or resume elsewhere"
                ) from error
        if where is None:
            return f"the run folder {self.path} was removed while the run was at work; made anew; earlier checkpoints are gone"
        return (
            f"the run folder {self.path} was moved to {where} while the run was at work; made anew; earlier checkpoints are there"
        )

    def close(self) -> None:
        """Let others work in the folder."""
        with self._changing:
            if self._lock is not None:
                self._lock.close()
            self._lock = None
            if self._folder >= 0:
                os.close(self._folder)
            self._folder = -1

    def _mend(self) -> None:
        """The folder is the same: write what could not be written before or is missing, and lock it again if the lock is gone."""
        if self._lock is not None and not _same(self.path / LOCK, self._lock.fileno()):
            lock = lock_folder(self.path)
            self._lock.close()
            self._lock = lock
        for name in list(self._kept):
            if name in self._unwritten or not (self.path / name).exists():
                with suppress(OSError):  # whether the disk takes anything is for the save to find out
                    self.keep(name, self._kept[name])

    def _last_name(self) -> str | None:
        """What the folder that this run began in is called now; None if it is removed, or it cannot be told."""
        if os.fstat(self._folder).st_nlink == 0:
            return None
        with suppress(OSError):
            name = os.readlink(f"/proc/self/fd/{self._folder}")
            return name if _same(Path(name), self._folder) else None
        return None

    def _make_anew(self) -> None:
        self.path.mkdir(parents=True, exist_ok=True)
        lock = lock_folder(self.path)
        if (self.path / RUN).exists() and read_run_id(self.path) != self.run_id:
            raise UserError(
                f"train.output_dir: {self.path} was replaced by another run's folder while this run was at work; choose another folder"
            )
        folder = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY)
        try:
            for name, text in self._kept.items():
                write_whole(self.path / name, text)
            flush(self.path.parent)
        except OSError:
            os.close(folder)
            raise
        os.close(self._folder)
        if self._lock is not None:
            self._lock.close()
        self._lock, self._folder, self._unwritten = lock, folder, set()


def read_run_id(folder: Path) -> str | None:
    """What `run.json` says; None if it is missing or damaged."""
    try:
        run_id = json.loads((folder / RUN).read_bytes())["run_id"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return run_id if isinstance(run_id, str) and _RUN_ID.fullmatch(run_id) else None


def write_whole(file: Path, text: str) -> None:
    """Write a small file so that a reader sees the old content or the new, also after a crash.

    Raises:
        OSError
    """
    file.parent.mkdir(exist_ok=True)
    staging = file.with_name(f".{file.name}.tmp")
    try:
        with staging.open("w", encoding="utf-8") as handle:
            handle.write(text)
            handle.flush()
            os.fsync(handle.fileno())
        os.replace(staging, file)
    except OSError:
        with suppress(OSError):
            staging.unlink(missing_ok=True)
        raise
    flush(file.parent)
