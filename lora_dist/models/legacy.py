"""Files that are pickles: the one place of the project that reads or writes them (held by the layering test).

`load_tensors` reads a torch state dict, `save_pickled` writes a whole model. Called by `sources.py`, `pickled.py`, `engine/deliver.py`
and `scripts/prune_structured.py`.
"""

from __future__ import annotations

from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from torch import Tensor, nn

from lora_dist.log import UserError
from lora_dist.process import flush


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


_HOOKS = tuple(name for name in vars(nn.Module()) if name.endswith("_hooks"))
_DISPATCHED = ("forward", "_hf_hook", "_old_forward")
"""what accelerate puts on a module that it places"""
_FOREIGN = ("lora_dist.", "peft.", "accelerate.", "deepspeed.")


def save_pickled(model: nn.Module, tokenizer: Any, path: str | Path) -> Path:
    """Write the whole model and its tokenizer as one pickle, which a Python with torch and transformers alone can open:
    `torch.load(path, weights_only=False)["model"]`.

    The file appears whole or not at all, and takes the place of an old one. Hooks are left out.

    Args:
        model: transformers' model, on any device; nothing in it is changed.

    Raises:
        UserError: a class of this project or of a training library in the model (an adapter that is not merged), or a place
            that cannot be written.
    """
    out = Path(path).expanduser()
    foreign = sorted({name for name in map(_class_name, model.modules()) if name.startswith(_FOREIGN)})
    if foreign:
        raise UserError(
            f"{out}: found {', '.join(foreign)} in the model, expected classes of transformers and torch: merge it first"
        )
    staged = out.with_name(f".{out.name}.saving")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        torch.save({"model": _without_hooks(model, {}), "tokenizer": tokenizer}, staged)
        flush(staged)
        staged.replace(out)
        flush(out.parent)
    except (OSError, RuntimeError) as error:  # torch's writer raises RuntimeError on a full disk
        raise UserError(f"{out}: cannot be written ({error}); free space or choose another place") from error
    finally:
        staged.unlink(missing_ok=True)
    return out


def _class_name(module: nn.Module) -> str:
    return f"{type(module).__module__}.{type(module).__qualname__}"


def _without_hooks(module: nn.Module, done: dict[nn.Module, nn.Module]) -> nn.Module:
    """The same tree of modules over the same tensors; hooks are functions of whoever set them, which a reader need not have."""
    if module not in done:
        bare = done[module] = module.__new__(type(module))
        state = {name: value for name, value in vars(module).items() if name not in _DISPATCHED}
        state |= {name: type(state[name])() for name in _HOOKS if name in state}
        state["_modules"] = {
            name: None if child is None else _without_hooks(child, done) for name, child in module._modules.items()
        }
        bare.__dict__.update(state)
    return done[module]
