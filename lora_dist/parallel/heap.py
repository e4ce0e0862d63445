"""Memory that is freed goes back to the system: for strategies that are chosen to save memory, on CPUs.

glibc takes tensors of up to 32 MiB from its heap once such have been freed, where small ones that live on leave holes between them
that fit no other: gathering a base layer by layer then holds up to half as much again as it needs. With a fixed threshold they are
mapped one by one. Every step then maps and clears its pages anew (docs/measurements.md says what that costs), so `ddp` does not.
Called by `fully_sharded.py` and `zero.py`; `trim` by evaluations, between models.
"""

from __future__ import annotations

import ctypes
import os
import sys

import torch

_M_MMAP_THRESHOLD = -3
"""of glibc's malloc.h"""
_BYTES = 128 * 1024
"""glibc's own threshold, which it otherwise raises while it runs"""


def return_freed_memory(device: torch.device) -> None:
    """From now on, in this process. The user's own MALLOC_MMAP_THRESHOLD_ is left alone; other C libraries need and get nothing."""
    if device.type == "cpu" and sys.platform == "linux" and "MALLOC_MMAP_THRESHOLD_" not in os.environ:
        mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
        if mallopt is not None:
            mallopt(_M_MMAP_THRESHOLD, _BYTES)


def trim() -> None:
    """Give back now what is free at the end of the heap and in whole pages between; other C libraries than glibc need and get nothing."""
    if sys.platform == "linux":
        malloc_trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if malloc_trim is not None:
            malloc_trim(0)
