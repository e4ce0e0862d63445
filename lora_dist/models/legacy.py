"""Files that are pickles: the one place of the project that unpickles (held by the layering test)."""

from __future__ import annotations

from pathlib import Path
from pickle import UnpicklingError

import torch
from torch import Tensor

from lora_dist.log import UserError


def load_tensors(path: Path) -> dict[str, Tensor]:
    """Tensors of a torch state dict (`pytorch_model*.bin`) by name; memory-mapped, so nothing is read before it is used.

    Only tensors are unpickled (`weights_only=True`): code in the file does not run.

    Raises:
        UserError: if the file is broken, or holds anything else.
    """
    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (UnpicklingError, RuntimeError, EOFError, OSError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{path}: cannot be read as a torch state dict ({reason}); download or save it again") from error
    if not isinstance(loaded, dict) or not all(isinstance(value, Tensor) for value in loaded.values()):
        raise UserError(f"{path}: found {type(loaded).__name__} with other things than tensors, expected a state dict")
    return loaded
