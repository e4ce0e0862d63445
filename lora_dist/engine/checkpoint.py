"""Checkpoints: whole, named CPU tensors in one folder that a reader sees entire or not at all.

    run/checkpoint-500/
      adapter/               adapter_config.json, adapter_model.safetensors, block_mask.safetensors
      optimizer.safetensors  optimizer state by parameter name
      state.json             TrainState
      manifest.json          sha256 and size of every file, identity of base and pattern, versions; written last

Written under a temporary name, every file flushed to disk, the manifest last; read again from the disk and compared with what was to
be saved; then one rename. Called on rank 0 by `engine/loop.py`, from a thread as well; knows no process group and no model class.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from lora_dist.adapter import ADAPTER_FILE
from lora_dist.log import UserError
from lora_dist.models.export import flush
from lora_dist.state import TrainState

MANIFEST, STATE, OPTIMIZER, ADAPTER = "manifest.json", "state.json", "optimizer.safetensors", "adapter"
FORMAT_VERSION = 2  # 1: no run_id
NORM_TOLERANCE = 1e-6  # relative
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


def tensor_norms(tensors: Mapping[str, Tensor]) -> dict[str, float]:
    """2-norm of each tensor, summed in float64. Waits for the device."""
    return {name: float(torch.linalg.vector_norm(tensor.detach().double())) for name, tensor in tensors.items()}


def save_checkpoint(
    run_dir: Path,
    *,
    write_adapter: Callable[[Path], Any],
    optimizer: Mapping[str, Tensor],
    state: TrainState,
    identity: Identity,
    versions: Mapping[str, str],
    norms: Mapping[str, float],
    run_id: str | None,
) -> Path:
    """Publish `run_dir/checkpoint-{state.step}`. May run in a thread: touches nothing but its arguments and the folder.

    Args:
        run_dir: exists.
        write_adapter: writes the adapter's files into the folder it is given.
        norms: `tensor_norms` of the live adapter, by the names in its file (the keys of `adapter_tensors`); what was written has
            exactly these tensors, of these norms to 1e-6.
        state: changed by nobody meanwhile.
        run_id: of `run.json`.

    Returns:
        The folder. A checkpoint of the same step is replaced only after the new one is whole.

    Raises:
        UserError: the disk is full or cannot be written, or what is read back is not what was to be saved; what was there before
            is untouched.
    """
    final = run_dir / f"checkpoint-{state.step}"
    staging = run_dir / f"{_STAGING}{final.name}"
    try:
        shutil.rmtree(staging, ignore_errors=True)
        staging.mkdir()
        write_adapter(staging / ADAPTER)
        save_file(dict(optimizer), str(staging / OPTIMIZER))
        state_text = json.dumps(state.to_dict(), indent=1)
        (staging / STATE).write_text(state_text)
        (staging / OPTIMIZER).chmod((staging / STATE).stat().st_mode)  # safetensors makes its files readable for their owner only
        files = _flush_files(staging)
        manifest = {
            "version": FORMAT_VERSION,
            "run_id": run_id,
            "step": state.step,
            "base_fingerprint": identity.base_fingerprint,
            "pattern_digest": identity.pattern_digest,
            "versions": dict(versions),
            "files": files,
        }
        manifest_text = json.dumps({**manifest, "sha256": _content_digest(manifest)}, indent=1)
        (staging / MANIFEST).write_text(manifest_text)
        flush(staging / MANIFEST)
        flush(staging)
        problem = _read_back(staging, files, {MANIFEST: manifest_text, STATE: state_text}, norms, optimizer)
        if problem is not None:
            raise UserError(
                f"checkpoint: {final} was not written as it should be: {problem}; nothing was published, earlier checkpoints are "
                "untouched: check the disk of train.output_dir"
            )
        _replace(staging, final)
        flush(run_dir)
    except UserError:
        shutil.rmtree(staging, ignore_errors=True)
        raise
    except (OSError, SafetensorError) as error:
        shutil.rmtree(staging, ignore_errors=True)
        raise UserError(
            f"checkpoint: {final} could not be written ({error}); earlier checkpoints are untouched: free space or set train.output_dir"
        ) from error
    return final


def _flush_files(folder: Path) -> dict[str, dict[str, Any]]:
    """Hash what was written, then flush every file and folder below `folder`, and let the system forget them, so that the next
    reader gets what is on the disk. Returns sha256 and size by relative name."""
    paths = sorted(folder.rglob("*"))
    entries = {
        str(path.relative_to(folder)): {"sha256": _sha256(path), "bytes": path.stat().st_size} for path in paths if path.is_file()
    }
    for path in [*paths, folder]:
        flush(path)
        if path.is_file() and hasattr(os, "posix_fadvise"):
            with path.open("rb") as handle:
                os.posix_fadvise(handle.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    return entries


def _read_back(
    staging: Path,
    files: Mapping[str, Mapping[str, Any]],
    texts: Mapping[str, str],
    norms: Mapping[str, float],
    optimizer: Mapping[str, Tensor],
) -> str | None:
    """Read the staged files again; the first difference from what was to be saved, named, or None."""
    for name, entry in files.items():
        found = _sha256(staging / name)
        if found != entry["sha256"]:
            return f"{name} has sha256 {found[:12]} on the disk, expected {entry['sha256'][:12]}"
    for name, text in texts.items():
        if (staging / name).read_text() != text:
            return f"{name} does not read as it was written"
    adapter, moments = load_file(str(staging / ADAPTER / ADAPTER_FILE)), load_file(str(staging / OPTIMIZER))
    for file, found_names, names in ((ADAPTER_FILE, set(adapter), set(norms)), (OPTIMIZER, set(moments), set(optimizer))):
        if found_names != names:
            odd = sorted(found_names ^ names)[0]
            return f"{file} {'lacks' if odd in names else 'holds an unknown'} tensor {odd} ({len(found_names)} found, {len(names)} expected)"
    for name, norm in tensor_norms(adapter).items():
        if adapter[name].numel() == 0:
            return f"{ADAPTER_FILE}: tensor {name} has shape {tuple(adapter[name].shape)}, expected elements"
        if not math.isclose(norm, norms[name], rel_tol=NORM_TOLERANCE):  # not a number is close to nothing
            return f"{ADAPTER_FILE}: tensor {name} has norm {norm:.9g}, expected {norms[name]:.9g} (the live adapter's)"
    for name, tensor in moments.items():
        if not _same_bits(tensor, optimizer[name]):
            return f"{OPTIMIZER}: tensor {name} is not the one that was to be saved"
    return None


def _same_bits(a: Tensor, b: Tensor) -> bool:
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    return torch.equal(a.reshape(-1).view(torch.uint8), b.detach().cpu().reshape(-1).view(torch.uint8))


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
