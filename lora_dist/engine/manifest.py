"""What a checkpoint's manifest promises, and whether its files keep it. Reads, never writes. Called by `engine/checkpoint.py`."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from lora_dist.adapter import ADAPTER_CONFIG, ADAPTER_FILE
from lora_dist.blocks import MASK_FILE
from lora_dist.log import UserError
from lora_dist.state import CHECKPOINT_NAME

MANIFEST, STATE, OPTIMIZER, ADAPTER = "manifest.json", "state.json", "optimizer.safetensors", "adapter"
FORMAT_VERSION = 2  # 1: no run_id


def sha256(file: Path) -> str:
    with file.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def content_digest(manifest: Mapping[str, Any]) -> str:
    """sha256 over the manifest's own content, so that a flipped bit in it is not blamed on another file."""
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def verify(path: Path, *, run_id: str | None = None) -> str | None:
    """Why this checkpoint cannot be used, naming the file; None if every file is what its manifest says.

    Args:
        run_id: of the run it has to be of; None takes any. Checkpoints of format 1 do not name theirs.
    """
    try:
        if not path.is_dir():
            return "is a link that leads nowhere" if path.is_symlink() else "is no folder"
        manifest = read_manifest(path)
        return (
            _misplaced(path, manifest)
            or _wrong_file(path, manifest["files"])
            or _wrong_content(path, manifest)
            or _of_another_run(manifest, run_id)
        )
    except UserError as error:
        return str(error)
    except OSError as error:
        return f"{_within(path, error.filename)} cannot be read ({error.strerror})"


def _within(path: Path, file: object) -> str:
    """A file's name as seen from its checkpoint."""
    name = Path(str(file))
    return str(name.relative_to(path)) if path in name.parents else name.name


def read_manifest(path: Path) -> dict[str, Any]:
    """What `manifest.json` says, without its own digest.

    Raises:
        UserError: missing, damaged, or of a later version.
    """
    if not (path / MANIFEST).is_file():
        raise UserError(f"{MANIFEST} is missing")
    try:
        manifest = json.loads((path / MANIFEST).read_bytes())
        version, stated = manifest["version"], manifest.pop("sha256")
        if version > FORMAT_VERSION:
            raise UserError(f"{MANIFEST} has version {version}, this lora_dist reads up to {FORMAT_VERSION}")
        if stated != content_digest(manifest):
            raise UserError(f"{MANIFEST} does not have the sha256 that it states")
        files = manifest["files"]
        needed = {STATE, OPTIMIZER, f"{ADAPTER}/{ADAPTER_CONFIG}", f"{ADAPTER}/{ADAPTER_FILE}"}
        if manifest["pattern_digest"] is not None:
            needed.add(f"{ADAPTER}/{MASK_FILE}")
        for name in sorted(needed - set(files)):
            raise UserError(f"{MANIFEST} does not list {name}")
        for name in files:
            if Path(name).is_absolute() or ".." in Path(name).parts:
                raise UserError(f"{MANIFEST} lists {name}, which is not below the checkpoint")
    except UserError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError) as error:  # not JSON, or not of this form
        raise UserError(f"{MANIFEST} is damaged ({type(error).__name__}: {error})") from error
    return dict(manifest)


def _misplaced(path: Path, manifest: Mapping[str, Any]) -> str | None:
    """A checkpoint of one step under the name of another."""
    named = CHECKPOINT_NAME.fullmatch(path.name)
    if named and int(named[1]) != manifest["step"]:
        return f"{MANIFEST} is of step {manifest['step']}, expected {named[1]} by the folder's name"
    return None


def _wrong_file(path: Path, files: Mapping[str, Mapping[str, Any]]) -> str | None:
    for name, entry in files.items():
        file = path / name
        if not file.is_file():
            return f"{name} is missing"
        if file.stat().st_size != entry["bytes"]:
            return f"{name} has {file.stat().st_size} bytes, expected {entry['bytes']}"
        if sha256(file) != entry["sha256"]:
            return f"{name} does not have the sha256 of the manifest"
    return None


def _wrong_content(path: Path, manifest: Mapping[str, Any]) -> str | None:
    """Files that are what was written, but that no save of one run could have written together."""
    try:
        step = json.loads((path / STATE).read_bytes())["step"]
    except (ValueError, KeyError, TypeError) as error:
        return f"{STATE} is damaged ({type(error).__name__}: {error})"
    if step != manifest["step"]:
        return f"{STATE} is of step {step}, {MANIFEST} of step {manifest['step']}"
    for name in (OPTIMIZER, f"{ADAPTER}/{ADAPTER_FILE}"):
        try:
            with safe_open(str(path / name), framework="pt") as tensors:
                tensors.keys()
        except SafetensorError as error:
            return f"{name} is damaged ({error})"
    return None


def _of_another_run(manifest: Mapping[str, Any], run_id: str | None) -> str | None:
    found = manifest.get("run_id")
    if run_id is not None and found is not None and found != run_id:
        return f"{MANIFEST} is of another run (run_id {str(found)[:12]}, expected {run_id[:12]})"
    return None
