"""Checkpoints: whole, named CPU tensors in one folder that a reader sees entire or not at all.

    run/checkpoint-500/
      adapter/               adapter_config.json, adapter_model.safetensors, block_mask.safetensors
      optimizer.safetensors  optimizer state by parameter name
      state.json             TrainState
      manifest.json          sha256 and size of every file, identity of base and pattern, versions; written last

Written under a temporary name, every file flushed to disk, the manifest last, then one rename. Called by `engine/loop.py` on
rank 0; knows no process group and no model class.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from lora_dist.log import UserError
from lora_dist.models.export import flush
from lora_dist.state import TrainState

MANIFEST, STATE, OPTIMIZER, ADAPTER = "manifest.json", "state.json", "optimizer.safetensors", "adapter"
FORMAT_VERSION = 1
_NAME = re.compile(r"checkpoint-(\d+)")
_STAGING = ".saving-"


@dataclass(frozen=True)
class Identity:
    """What a checkpoint belongs to; compared on resume."""

    base_fingerprint: str
    pattern_digest: str | None
    """None for plain LoRA on a base without a pattern"""


@dataclass(frozen=True)
class Checkpoint:
    """A verified checkpoint, read."""

    path: Path
    state: TrainState
    optimizer: dict[str, Tensor]
    identity: Identity

    @property
    def adapter(self) -> Path:
        return self.path / ADAPTER


def _sha256(file: Path) -> str:
    with file.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def _content_digest(manifest: Mapping[str, Any]) -> str:
    """sha256 over the manifest's own content, so that a flipped bit in it is not blamed on another file."""
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def save_checkpoint(
    run_dir: Path,
    *,
    write_adapter: Callable[[Path], Any],
    optimizer: Mapping[str, Tensor],
    state: TrainState,
    identity: Identity,
    versions: Mapping[str, str],
) -> Path:
    """Publish `run_dir/checkpoint-{state.step}`.

    Args:
        write_adapter: writes the adapter's files into the folder it is given.

    Returns:
        The folder. A checkpoint of the same step is replaced only after the new one is whole.

    Raises:
        UserError: the disk is full or cannot be written; what was there before is untouched.
    """
    final = run_dir / f"checkpoint-{state.step}"
    staging = run_dir / f"{_STAGING}{final.name}"
    try:
        shutil.rmtree(staging, ignore_errors=True)
        staging.mkdir(parents=True)
        write_adapter(staging / ADAPTER)
        save_file(dict(optimizer), str(staging / OPTIMIZER))
        (staging / STATE).write_text(json.dumps(state.to_dict(), indent=1))
        (staging / OPTIMIZER).chmod((staging / STATE).stat().st_mode)  # safetensors makes its files readable for their owner only
        files = sorted(p for p in staging.rglob("*") if p.is_file())
        manifest = {
            "version": FORMAT_VERSION,
            "step": state.step,
            "base_fingerprint": identity.base_fingerprint,
            "pattern_digest": identity.pattern_digest,
            "versions": dict(versions),
            "files": {str(p.relative_to(staging)): {"sha256": _sha256(p), "bytes": p.stat().st_size} for p in files},
        }
        (staging / MANIFEST).write_text(json.dumps({**manifest, "sha256": _content_digest(manifest)}, indent=1))
        for path in [*files, staging / MANIFEST, staging / ADAPTER, staging]:
            flush(path)
        _replace(staging, final)
        flush(run_dir)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(staging, ignore_errors=True)
        raise UserError(
            f"checkpoint: {final} could not be written ({error}); earlier checkpoints are untouched: free space or set train.output_dir"
        ) from error
    return final


def _replace(staging: Path, final: Path) -> None:
    """Rename `staging` to `final`; an older folder of that name goes only after the new one stands."""
    if not final.exists():
        staging.rename(final)
        return
    old = final.with_name(f"{_STAGING}old-{final.name}")
    shutil.rmtree(old, ignore_errors=True)
    final.rename(old)
    staging.rename(final)
    shutil.rmtree(old)


def list_checkpoints(run_dir: Path) -> list[tuple[int, Path]]:
    """(step, folder) of everything named like a checkpoint, oldest first, verified or not."""
    found = []
    for path in run_dir.glob("checkpoint-*"):
        match = _NAME.fullmatch(path.name)
        if match and path.is_dir():
            found.append((int(match[1]), path))
    return sorted(found)


def verify(path: Path) -> str | None:
    """Why this checkpoint cannot be used, naming the file; None if every file is what its manifest says."""
    try:
        manifest = json.loads((path / MANIFEST).read_text())
        version, files = manifest["version"], manifest["files"]
        if version > FORMAT_VERSION:
            return f"{MANIFEST} has version {version}, this lora_dist reads up to {FORMAT_VERSION}"
        if manifest.pop("sha256") != _content_digest(manifest):
            return f"{MANIFEST} does not have the sha256 that it states"
        for name, entry in files.items():
            file = path / name
            if not file.is_file():
                return f"{name} is missing"
            if file.stat().st_size != entry["bytes"]:
                return f"{name} has {file.stat().st_size} bytes, expected {entry['bytes']}"
            if _sha256(file) != entry["sha256"]:
                return f"{name} does not have the sha256 of the manifest"
        unlisted = {STATE, OPTIMIZER} - set(files)
        if unlisted:
            return f"{MANIFEST} does not list {sorted(unlisted)[0]}"
    except OSError as error:
        return f"{MANIFEST} cannot be read ({error.strerror})"
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        return f"{MANIFEST} is damaged ({type(error).__name__}: {error})"
    return None


def find_checkpoint(run_dir: Path, on_skip: Callable[[Path, str], None]) -> Path | None:
    """The newest checkpoint that verifies; `on_skip` hears of each newer one and why it is skipped."""
    for _, path in reversed(list_checkpoints(run_dir)):
        reason = verify(path)
        if reason is None:
            return path
        on_skip(path, reason)
    return None


def load_checkpoint(path: Path) -> Checkpoint:
    """Read a checkpoint after verifying it.

    Raises:
        UserError: no such folder, or a file that is not what the manifest says, named.
    """
    if not path.is_dir():
        raise UserError(f"train.resume_from_checkpoint: found no folder {path}, expected a checkpoint-N folder or auto")
    reason = verify(path)
    if reason is not None:
        raise UserError(f"train.resume_from_checkpoint: {path} is not whole: {reason}; take an earlier one, or auto")
    manifest = json.loads((path / MANIFEST).read_text())
    try:
        state = TrainState.from_dict(json.loads((path / STATE).read_text()))
    except ValueError as error:
        raise UserError(f"train.resume_from_checkpoint: {path}: {error}") from error
    identity = Identity(manifest["base_fingerprint"], manifest["pattern_digest"])
    return Checkpoint(path, state, load_file(str(path / OPTIMIZER)), identity)


def retain(run_dir: Path, limit: int | None, best_step: int) -> list[Path]:
    """Remove old checkpoints beyond `limit`; never the two newest or the best. Returns what was removed.

    A folder is renamed before it is deleted, so that a kill in between leaves no half checkpoint under a checkpoint's name.
    """
    if limit is None:
        return []
    found = list_checkpoints(run_dir)
    keep = {step for step, _ in found[-2:]} | ({best_step} & {step for step, _ in found})
    for step, _ in reversed(found):
        if len(keep) >= limit:
            break
        keep.add(step)
    removed = [path for step, path in found if step not in keep]
    for path in removed:
        doomed = path.with_name(f"{_STAGING}removing-{path.name}")
        path.rename(doomed)
        shutil.rmtree(doomed)
    return removed


def clear_staging(run_dir: Path) -> None:
    """Remove what a killed save or removal left behind. An older checkpoint set aside by an unfinished replace is put back."""
    for path in run_dir.glob(f"{_STAGING}*"):
        set_aside = path.name.removeprefix(f"{_STAGING}old-")
        if set_aside != path.name and not (run_dir / set_aside).exists():
            path.rename(run_dir / set_aside)
        else:
            shutil.rmtree(path)
