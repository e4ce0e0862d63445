"""How much memory this process has used, of how much. Called by `engine/telemetry.py` and `engine/train.py`."""

from __future__ import annotations

import resource
import sys

import psutil
import torch


def peak_memory_gib(device: torch.device) -> float:
    """Peak memory of this process: of the GPU's allocator, or resident on CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


def memory_gib(device: torch.device) -> float:
    """All memory of the device: of the GPU, or of this machine."""
    total = torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else psutil.virtual_memory().total
    return total / 2**30
