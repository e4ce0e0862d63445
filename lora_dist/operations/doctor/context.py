"""What all checks are given: the options, the environment as the command found it, the folder to look at, and sizes worked out once."""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from lora_dist.arguments import DoctorArgs
from lora_dist.log import UserError
from lora_dist.operations.doctor.report import Finding

DEFAULT_CHECKPOINT_BYTES = 240_000_000
"""a rank 8 adapter on all linears of a model of 7e9 parameters: 20e6 float32 values, and two moments of each"""
VALUES_STORED = 3
"""an adapter's value and AdamW's two moments"""
OFFLINE_VARIABLES = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_DATASETS_OFFLINE")


@dataclass(frozen=True)
class ModelFacts:
    """What a checkpoint's size follows from."""

    name: str
    parameters: int
    linears: int
    adapter_elements: int
    stored_bytes: int
    """of the weight files; 0 for a hub name whose weights are still to be downloaded"""


@dataclass
class Context:
    """Attributes:
    env: environment variables.
    folder: the run folder, or the nearest folder above it that exists.
    """

    args: DoctorArgs
    env: Mapping[str, str]
    folder: Path

    @property
    def offline_reason(self) -> str:
        """What says that the hub is not to be asked; empty if nothing does."""
        if self.args.offline:
            return "--offline"
        on = [name for name in OFFLINE_VARIABLES if self.env.get(name, "").strip().lower() in ("1", "true", "yes", "on")]
        return f"{on[0]}={self.env[on[0]]}" if on else ""

    @cached_property
    def model(self) -> ModelFacts:
        """Of --model. Raises UserError where it cannot be read."""
        return read_model(self.args.model, self.args.r, offline=bool(self.offline_reason))

    @cached_property
    def checkpoint(self) -> tuple[int, str]:
        """Bytes of a checkpoint, and where the number is from."""
        if self.args.model:
            try:
                return self.model.adapter_elements * 4 * VALUES_STORED, f"{self.args.model}, r {self.args.r}"
            except UserError:
                pass  # told by the check `model`
        return DEFAULT_CHECKPOINT_BYTES, "7e9 parameters, r 8; --model for yours"


Check = Callable[[Context], Generator[Finding, None, None]]


def existing_folder(path: Path) -> Path:
    """The folder itself, or the nearest one above it that exists.

    Raises:
        UserError: a file is in the way.
    """
    for folder in (path, *path.absolute().parents):
        if folder.is_dir():
            return folder
        if folder.exists():
            raise UserError(f"output_dir: found a file, {folder}, expected a folder or a free name")
    raise UserError(f"output_dir: found nothing of {path}")  # unreachable where / exists


def read_model(name: str, r: int, *, offline: bool = False) -> ModelFacts:
    """Read a model's configuration and the list of its weight files, and no weights.

    Args:
        name: directory or hub name.
        r: rank of the adapter.
        offline: the hub is not asked: its cache has to have all of a hub name, weights included.

    Raises:
        UserError: it cannot be found or read, or its weights are not there.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from lora_dist.models.architecture import prunable_linears
    from lora_dist.models.hub import resolve
    from lora_dist.models.loading import quiet_transformers
    from lora_dist.models.sources import weight_files

    with quiet_transformers():
        try:
            folder = resolve(name, "model", weights=False, offline=offline)
            config: Any = AutoConfig.from_pretrained(folder)
            with torch.device("meta"):  # shapes only
                model = AutoModelForCausalLM.from_config(config)
        except (OSError, ValueError, KeyError, TypeError) as error:
            if isinstance(error, UserError):
                raise
            text = " ".join(str(error).split())[:200]
            raise UserError(f"model: found no configuration in {name} that transformers can read ({text})") from error
    linears = prunable_linears(model)
    whole = offline or Path(name).expanduser().is_dir()
    stored = sum(file.stat().st_size for file in weight_files(folder)) if whole else 0
    return ModelFacts(
        name,
        sum(p.numel() for p in model.parameters()),
        len(linears),
        sum(r * (linear.weight_OI.shape[0] + linear.weight_OI.shape[1]) for linear in linears),
        stored,
    )
