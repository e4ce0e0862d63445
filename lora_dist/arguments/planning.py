"""Options of `lora-dist plan`."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

_UNITS = {"": 1.0, "K": 2.0**10, "M": 2.0**20, "G": 2.0**30, "T": 2.0**40}


@dataclass
class PlanArgs:
    """Will a run fit, how fast will it be, and how is it best started: from its configuration alone, nothing is loaded. What else is
    given are options of lora-dist train, as that takes them."""

    config: str = ""
    """The run's YAML; further ones with --config."""
    gpus: int = 1
    """GPUs (processes, with --device cpu) that the run gets."""
    gpu_memory: str = "80GB"
    """Memory of each, such as 80GB or 24GiB; GB counts as GiB, as GPUs are labelled."""
    gpu_flops: float | None = None
    """Floating-point operations a second that a GPU reaches in bf16, not its peak; default: 40% of 312e12 (an A100)."""
    bandwidth: float | None = None
    """Bytes a second that a GPU sends to the others; default 50e9."""
    measure: bool = False
    """Measure the operations a second on this machine, on one layer of the model, instead of gpu_flops."""
    device: Literal["cuda", "cpu"] = "cuda"
    """What the run is to be on."""
    overhead: str | None = None
    """Memory that the framework itself takes; default 1GB on GPUs (context, collectives), 0.7GB of imports on CPUs."""
    all: bool = False
    """Show every choice, not only the fastest of each strategy and precision."""
    json: str | None = None
    """File for everything, as JSON."""

    def problems(self) -> Iterator[str]:
        if self.gpus < 1:
            yield f"gpus: found {self.gpus}, expected 1 or more"
        for key in ("gpu_memory", "overhead"):
            value = getattr(self, key)
            if value is not None and (size(value) is None or (key == "gpu_memory" and not size(value))):
                yield f"{key}: found {value}, expected a size such as 80GB or 512MiB"
        for key in ("gpu_flops", "bandwidth"):
            value = getattr(self, key)
            if value is not None and not value > 0:
                yield f"{key}: found {value}, expected a number above 0"
        if self.measure and self.gpu_flops is not None:
            yield "measure, gpu_flops: found both, expected one: the rate is measured or given"


def size(text: str) -> int | None:
    """Bytes of 80GB, 512MiB or a plain number; None where it is none."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?)(?:i?B)?", text.strip(), re.IGNORECASE)
    return None if match is None else int(float(match[1]) * _UNITS[match[2].upper()])
