"""What a process asks of the kernel. Standard library only, so that it can be had before anything heavy is imported."""

from __future__ import annotations

import ctypes
import signal
import sys


def end_with_parent() -> None:
    """Have the kernel kill this process as soon as the one that started it is dead, also by SIGKILL, which lets nobody tidy up.

    Called by whatever would go on alone: workers of a launcher (they would wait for a dead store, or write), data workers (they hold
    the run folder's lock, which forks inherit). Linux only; elsewhere without effect.
    """
    if sys.platform == "linux":
        PR_SET_PDEATHSIG = 1
        ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
