"""What a process asks of the kernel. Standard library only, so that it can be had before anything heavy is imported."""

from __future__ import annotations

import ctypes
import gc
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def end_with_parent() -> None:
    """Have the kernel kill this process as soon as the one that started it is dead, also by SIGKILL, which lets nobody tidy up.

    Called by whatever would go on alone: workers of a launcher (they would wait for a dead store, or write), data workers (they hold
    the run folder's lock, which forks inherit). Linux only; elsewhere without effect.
    """
    if sys.platform == "linux":
        PR_SET_PDEATHSIG = 1
        ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


@contextmanager
def heavy_imports() -> Iterator[None]:
    """Python looks through all objects for garbage again and again while their number grows, and imports leave none: without that,
    importing torch, transformers and PEFT takes a fifth less time. What is there at the end is not looked through again later."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.freeze()
            gc.enable()


def flush(path: Path) -> None:
    """fsync a file or a folder, and wait for it (the folder's entry is what makes a new name last).

    Raises:
        OSError: the disk is full or broken.
    """
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
