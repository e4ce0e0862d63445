"""Files that are pickles: the one place of the project that reads or writes them (held by the layering test).

`load_tensors` reads a torch state dict; `read_inert` reads a pickle of whole objects without building any of them, so that nothing
in the file can act: torch's restricted reader (`weights_only`) is given, for each class of the allow-list, a class of the same
name that only notes what it is given. `save_pickled` writes a whole model. Called by `sources.py`, `pickled.py`, `engine/deliver.py` and
`scripts/prune_structured.py`.
"""

from __future__ import annotations

import tarfile
import zipfile
import zlib
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from torch import Tensor, nn
from torch.serialization import get_unsafe_globals_in_checkpoint, safe_globals

from lora_dist.log import UserError, logger
from lora_dist.models.allowed import is_allowed
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


class Inert:
    """Stands for an object in a pickle: keeps its arguments and its state, and does nothing with them."""

    __slots__ = ("arguments", "state")
    path = ""
    """class or function that the pickle names"""
    arguments: tuple[Any, ...]
    state: Any

    def __new__(cls, *arguments: Any, **keywords: Any) -> Inert:
        made = object.__new__(cls)
        made.arguments, made.state = arguments, None
        return made

    def __init__(self, *arguments: Any, **keywords: Any) -> None:
        """The arguments are kept by `__new__`, which is all that a pickle calls for most objects."""

    def __setstate__(self, state: Any) -> None:
        self.state = state


def read_inert(path: Path) -> Any:
    """What a torch file holds, with an `Inert` in the place of every object that is not a tensor or plain data.

    Nothing in the file is run, imported or built, whatever it holds. Tensors are memory-mapped.

    Raises:
        UserError: a file of another kind; or one that names anything outside of the allow-list, every such name listed.
    """
    _require_torch_zip(path)
    try:
        found = sorted(get_unsafe_globals_in_checkpoint(path))
        refused = [name for name in found if not is_allowed(name)]
        if refused:
            raise UserError(
                f"{path}: names what does not belong into a pickled model: {', '.join(refused)}. A pickle can run any code when it is "
                "opened, so nothing was; if you know where the file is from, --trust_pickle opens it all the same"
            )
        # Classes made here, because the reader looks them up by identity, one for each name.
        stands = [(type(name.rpartition(".")[2], (Inert,), {"path": name, "__slots__": ()}), name) for name in found]
        with safe_globals(stands):  # type: ignore[arg-type]
            return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except UserError:
        raise
    except Exception as error:  # a hostile file can make the reader fail in any way, and each means the same
        raise UserError(
            f"{path}: cannot be read without running it ({type(error).__name__}: {_line(error)}); download or save it again, with "
            "torch.save and its usual pickle protocol, or open it with --trust_pickle if you know where it is from"
        ) from error


def read_trusted(path: Path) -> Any:
    """What a torch file holds, opened as a pickle is: code in it runs.

    Raises:
        UserError: it cannot be opened, for want of a class that this environment does not have, for example.
    """
    _require_torch_zip(path)
    try:
        return torch.load(path, map_location="cpu", weights_only=False, mmap=True)
    except Exception as error:  # whatever the code in it raises
        raise UserError(
            f"{path}: cannot be opened ({type(error).__name__}: {_line(error)}); it needs the packages it was saved with"
        ) from error


def globals_of(path: Path) -> list[str]:
    """Classes and functions that a torch file names beside torch's own tensors. Nothing is run."""
    try:
        return sorted(get_unsafe_globals_in_checkpoint(path))
    except Exception as error:  # a newer pickle protocol, which only --trust_pickle opens
        return [f"unknown ({_line(error)})"]


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]


_OLD_MAGIC = b"\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19"
"""torch's own number at the start of its files, before version 1.6"""


def _require_torch_zip(path: Path) -> None:
    """Raises UserError, saying what the file is, unless it is a whole file of torch.save."""
    if not path.is_file():
        raise UserError(f"{path}: found no such file, expected a pickled model")
    with path.open("rb") as file:
        start = file.read(512)
    kind = ""
    if not start:
        kind = "an empty file"
    elif start.startswith(b"PK\x03\x04"):
        try:
            with zipfile.ZipFile(path) as archive:
                names = {name.rpartition("/")[2] for name in archive.namelist()}
                damaged = _damaged_member(archive) if "data.pkl" in names else None
        except (zipfile.BadZipFile, zlib.error, EOFError, OSError, ValueError, RuntimeError) as error:  # or encrypted
            raise UserError(
                f"{path}: is a truncated or damaged torch file ({_line(error)}); download or save it again"
            ) from error
        if damaged is not None:
            raise UserError(
                f"{path}: is damaged: {damaged} in it does not match its checksum (CRC-32); download or save it again"
            )
        if "data.pkl" not in names:
            kind = "a zip archive, not one of torch.save"
        elif "constants.pkl" in names:
            kind = "a TorchScript program"
    elif _OLD_MAGIC in start[:20]:
        kind = "a file of torch before version 1.6"
    elif tarfile.is_tarfile(path):
        kind = "a tar archive"
    elif start[:1] == b"\x80":
        kind = "a bare pickle"
    elif start[8:9] == b"{":
        kind = "a safetensors file"
    else:
        kind = "no torch file"
    if kind:
        raise UserError(f"{path}: is {kind}, expected a model saved by torch.save (1.6 or later); it was not opened")


def _damaged_member(archive: zipfile.ZipFile) -> str | None:
    """The first part of a torch file whose bytes are not those that were saved; None if all are, or there is nothing to tell it by.

    torch itself does not look. Reads the file once, a piece at a time.
    """
    if not any(member.CRC for member in archive.infolist()):  # torch.serialization.set_crc32_options(False)
        logger.warning("%s: was saved without checksums, so whether it is damaged cannot be told", archive.filename)
        return None
    return archive.testzip()


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
        if staged.is_file():
            staged.unlink()
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
