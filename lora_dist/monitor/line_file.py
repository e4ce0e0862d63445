"""A file that lines are appended to and that never ends a run: where it cannot be written, lines wait in memory.

Full or read-only disk, folder removed or renamed: warned of once, on stderr. Every later line tries again, what waited first. The file
is opened by its name for each line, so a folder that was made anew is found, and file systems that report errors on closing report
them here. Used by `monitor/console.py` and `monitor/metrics.py` on rank 0; safe to call from several threads.
"""

from __future__ import annotations

import os
import threading
from collections import deque
from pathlib import Path

from lora_dist.log import logger

WAITING_LINES = 10_000
"""lines kept in memory at most; older ones are lost"""


class LineFile:
    """Appends whole lines to `file`, which is made with the first one.

    Args:
        waiting_lines: kept in memory at most while the file cannot be written.
    """

    def __init__(self, file: Path, *, waiting_lines: int = WAITING_LINES):
        self.file = file
        self.lost = 0
        """lines given up since the file could be written last"""
        self._waiting: deque[str] = deque()
        self._limit = waiting_lines
        self._failing = False
        self._lock = threading.Lock()

    def write(self, line: str) -> None:
        """Append one line (without its end). Raises nothing that the disk is to blame for."""
        with self._lock:
            self._waiting.append(line)
            if len(self._waiting) > self._limit:
                self._waiting.popleft()
                self.lost += 1
            self._try()

    def flush(self) -> int:
        """Try once more to write what waits; how many lines are still not in the file, lost ones included."""
        with self._lock:
            if self._waiting:
                self._try()
            return len(self._waiting) + self.lost

    def close(self) -> int:
        """The last `flush`: tells on stderr what is not in the file."""
        missing = self.flush()
        if missing:
            logger.warning("%s lacks %d lines: it could not be written", self.file, missing)
        return missing

    def _try(self) -> None:
        try:
            _append(self.file, "".join(f"{line}\n" for line in self._waiting))
        except OSError as error:
            if not self._failing:
                logger.warning("%s cannot be written (%s): the run goes on, its lines wait in memory", self.file, error.strerror)
            self._failing = True
            return
        self._waiting.clear()
        if self._failing:
            logger.warning("%s can be written again%s", self.file, f"; {self.lost} lines were lost" if self.lost else "")
        self._failing, self.lost = False, 0


def _append(file: Path, text: str) -> None:
    """All of `text` or nothing of it."""
    descriptor = os.open(file, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o666)
    try:
        size = os.fstat(descriptor).st_size
        content = memoryview(text.encode("utf-8", errors="replace"))
        try:
            while content:
                content = content[os.write(descriptor, content) :]
        except OSError:
            os.ftruncate(descriptor, size)
            raise
    finally:
        os.close(descriptor)
