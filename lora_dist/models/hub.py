"""A model's name -> a local directory: a path as it is, a hub name downloaded (or taken from the hub's local cache)."""

from __future__ import annotations

import re
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import GatedRepoError, LocalEntryNotFoundError, RepositoryNotFoundError

from lora_dist.log import UserError

_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
_SMALL = ["*.json", "*.txt", "*.model", "*.jinja"]
"""configuration and tokenizer"""
PICKLES = (".bin", ".pt", ".pth", ".pkl")
"""endings of pickled models"""


def resolve(name: str, key: str, *, weights: bool = True, code: bool = False, offline: bool = False) -> Path:
    """Local directory of a model.

    Args:
        name: directory or hub name.
        key: option that the name is from, for messages.
        weights: download the weights too (safetensors; torch files only where there are none).
        code: download model code and subfolders too.
        offline: take a hub name from the cache only.

    Raises:
        UserError: if there is no such directory, and the hub does not have it, cannot be reached, or does not let us in.
    """
    path = Path(name).expanduser()
    if path.is_dir():
        return path
    if path.exists():
        advice = f": `lora-dist convert {name} OUT` makes one of a pickle" if path.suffix in PICKLES else ""
        raise UserError(f"{key}: found a file, {name}, expected the directory of a model in Hugging Face format{advice}")
    if not _HUB_NAME.fullmatch(name):
        raise UserError(f"{key}: found no directory {name}, expected one that holds config.json and model.safetensors")
    wanted = _SMALL + (["*.safetensors"] if weights else []) + (["*.py"] if code else [])
    folder = _download(name, key, wanted, code, offline)
    if weights and not list(folder.glob("*.safetensors")):
        folder = _download(name, key, [*wanted, "*.bin"], code, offline)
    return folder


def _download(name: str, key: str, wanted: list[str], code: bool, offline: bool) -> Path:
    ignored = None if code else ["*/*"]
    try:
        return Path(snapshot_download(name, allow_patterns=wanted, ignore_patterns=ignored, local_files_only=offline))
    except GatedRepoError as error:
        raise _hub_error(name, key, "it is gated, and its conditions have to be accepted on its page") from error
    except RepositoryNotFoundError as error:
        raise _hub_error(name, key, "there is no such model, or it is private") from error
    except LocalEntryNotFoundError as error:
        if offline:
            raise UserError(f"{key}: found neither a directory {name} nor a model of that name in the hub's cache") from error
        reason = str(error.__cause__ or error).splitlines()[0]
        raise _hub_error(name, key, f"the hub cannot be reached, {reason}") from error
    except Exception as error:  # the client's transport errors have no common public base, and each means the same here
        reason = (str(error).splitlines() or [""])[0]
        raise _hub_error(name, key, f"{type(error).__name__}: {reason}") from error


def _hub_error(name: str, key: str, reason: str) -> UserError:
    return UserError(
        f"{key}: found no local directory {name}, and it could not be loaded from the hub ({reason}): give a local directory, "
        "set HF_ENDPOINT to a mirror that can be reached, or HF_TOKEN if the model is gated or private"
    )
