"""A base with or without an adapter, ready to evaluate, generate or merge; identity and pattern checked on the way."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lora_dist.adapter import ADAPTER_CONFIG, is_masked, load_adapter, read_adapter_config
from lora_dist.blocks import Pattern
from lora_dist.engine.pattern import FoundPattern, base_pattern
from lora_dist.models.loading import LoadedBase, load_base


@dataclass(frozen=True)
class OpenModel:
    """What `open_model` returns."""

    model: Any
    """the PEFT model, or the bare base"""
    base: LoadedBase
    found: FoundPattern
    """of the base"""
    masked: bool
    """whether there is an adapter that respects a pattern"""


def open_model(
    name_or_path: str,
    adapter: str | None = None,
    *,
    config_name: str | None = None,
    dtype: torch.dtype | None = None,
    device: str = "cpu",
    block: int = 16,
    trust_remote_code: bool = False,
    progress: bool = True,
) -> OpenModel:
    """Load a base, and an adapter onto it.

    Args:
        dtype: None keeps what is stored.
        block: tile side to look for where no mask is stored; a masked adapter's own pattern decides otherwise.

    Raises:
        UserError: something is missing or broken.
        GuardError: the adapter belongs to another base, or another pattern.
    """
    if adapter is not None and (Path(adapter) / "adapter" / ADAPTER_CONFIG).is_file():
        adapter = str(Path(adapter) / "adapter")  # a checkpoint
    if adapter is not None:  # read first: what is wrong with it should not cost the loading of gigabytes
        trained_with: Pattern | None = getattr(read_adapter_config(adapter), "_pattern", None)
        if trained_with is not None and trained_with.kind == "block":
            block = trained_with.block
    base = load_base(
        name_or_path, config_name=config_name, dtype=dtype, device=device, trust_remote_code=trust_remote_code, progress=progress
    )
    found = base_pattern(base.model, base.source_dir, block=block)
    if adapter is None:
        return OpenModel(base.model, base, found, False)
    model = load_adapter(base.model, adapter, base_fingerprint=base.fingerprint, pattern=found.pattern)
    model.eval()
    return OpenModel(model, base, found, is_masked(model))
