"""When to kill a training run: before its k-th file operation, or the moment a file appears in its folder.

`arm` runs inside a rank and kills it, and others, before an operation of `RunFiles` that was counted out beforehand: the same
number hits the same point of a save each time. `FolderWatch` runs in the program that kills from outside, woken by the kernel within
a fraction of a millisecond of a file's appearance. Called by scripts/fuzz_kills.py and scripts/preloaded.py. Linux only.
"""

from __future__ import annotations

import ctypes
import os
import signal
import struct
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

STAGING = ".saving-"
CHECKPOINT = "checkpoint-"
"""in the paths of a checkpoint's files, staged or not"""
_CHANGES = {"os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.chmod", "os.truncate", "shutil.rmtree"}
_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND


def _path(value: Any, dir_fd: Any = None) -> str:
    """A path out of an event's arguments, "" where there is none; one relative to an open folder is put behind that folder's."""
    if not isinstance(value, str | bytes | os.PathLike):
        return ""
    path = os.fsdecode(value)
    if isinstance(dir_fd, int) and dir_fd >= 0:
        return os.path.join(os.readlink(f"/proc/self/fd/{dir_fd}"), path)
    return path


def operation(event: str, args: tuple[Any, ...], folder: str) -> str | None:
    """What an audit event of Python does to the files in `folder`, None if nothing; a file in staging being opened in any way counts,
    because flushing one begins with it."""
    if event == "open":
        path, _, flags = args
        path = _path(path)
        writes = isinstance(flags, int) and bool(flags & _WRITES)
        if path.startswith(folder) and (writes or STAGING in path):
            return f"open {path.removeprefix(folder)}{'' if writes else ' to flush'}"
    elif event in _CHANGES:
        dir_fd = {"os.remove": 1, "os.rmdir": 1, "os.mkdir": 2, "os.rename": 2, "shutil.rmtree": 1}.get(event, len(args))
        path = _path(args[0], args[dir_fd] if dir_fd < len(args) else None)
        if path.startswith(folder):
            to = f" to {_path(args[1]).removeprefix(folder)}" if event == "os.rename" else ""
            return f"{event.rpartition('.')[2]} {path.removeprefix(folder)}{to}"
    return None


def arm(*, folder: str, only: str, number: int, victims: Sequence[int], itself: bool, record: str) -> None:
    """From now on count this process's operations on the files of `folder`, and kill before the `number`-th.

    Args:
        only: count operations whose paths hold this text.
        number: 0 kills nobody.
        victims: process ids to kill.
        itself: this process dies too, last.
        record: file that gets one line an operation counted; its last line is the one that was not carried out.
    """
    folder = os.path.join(os.path.realpath(folder), "")
    owner, counted, inside = os.getpid(), 0, False
    lines = os.open(record, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)

    def hook(event: str, args: tuple[Any, ...]) -> None:
        nonlocal counted, inside
        if inside or (event != "open" and event not in _CHANGES) or os.getpid() != owner:  # not in data workers
            return
        inside = True
        try:
            text = operation(event, args, folder)
            if text is None or only not in text:
                return
            counted += 1
            os.write(lines, text.encode() + b"\n")
            if counted == number:
                for pid in [*victims, *([owner] if itself else [])]:
                    os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            return  # the other rank has ended already
        finally:
            inside = False

    sys.addaudithook(hook)


class FolderWatch:
    """Names of what is created in, moved into or changed in one folder, as it happens (inotify).

    Raises:
        OSError: the kernel refuses.
    """

    _CREATE, _MOVED_TO, _MODIFY = 0x100, 0x80, 0x2
    _NONBLOCK = 0o4000

    def __init__(self, folder: Path):
        self._libc = ctypes.CDLL(None, use_errno=True)
        self._descriptor = self._libc.inotify_init1(self._NONBLOCK)
        mask = self._CREATE | self._MOVED_TO | self._MODIFY
        if self._descriptor < 0 or self._libc.inotify_add_watch(self._descriptor, os.fsencode(folder), mask) < 0:
            raise OSError(ctypes.get_errno(), f"cannot watch {folder}")

    def fileno(self) -> int:
        return self._descriptor

    def read(self) -> list[tuple[str, str]]:
        """(what happened, name) since the last call: created, moved or changed. Does not wait."""
        try:
            data = os.read(self._descriptor, 65536)
        except BlockingIOError:
            return []
        found, at = [], 0
        while at < len(data):
            _, mask, _, length = struct.unpack_from("iIII", data, at)
            name = data[at + 16 : at + 16 + length].rstrip(b"\0").decode()
            found.append(("created" if mask & self._CREATE else "moved" if mask & self._MOVED_TO else "changed", name))
            at += 16 + length
        return found

    def close(self) -> None:
        os.close(self._descriptor)
