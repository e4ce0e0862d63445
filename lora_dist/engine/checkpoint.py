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

import json
import math
import os
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
from lora_dist.engine.manifest import (
    ADAPTER,
    FORMAT_VERSION,
    MANIFEST,
    OPTIMIZER,
    STATE,
    content_digest,
    read_manifest,
    sha256,
    verify,
)  # fmt: skip
from lora_dist.log import UserError, logger
from lora_dist.process import flush
from lora_dist.state import CHECKPOINT_NAME, TrainState

__all__ = [
    "ADAPTER", "MANIFEST", "SET_ASIDE", "STATE", "Checkpoint", "Identity", "adapter_problem", "clear_staging", "find_checkpoint",
    "list_checkpoints", "load_checkpoint", "named_checkpoints", "put_back", "retain", "run_id_of", "save_checkpoint", "tensor_norms", "verify",
]  # fmt: skip

NORM_TOLERANCE = 1e-6  # relative
_STAGING = ".saving-"
SET_ASIDE = f"{_STAGING}old-"  # an older checkpoint of the step that is being replaced


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
        manifest_text = json.dumps({**manifest, "sha256": content_digest(manifest)}, indent=1)
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
        str(path.relative_to(folder)): {"sha256": sha256(path), "bytes": path.stat().st_size} for path in paths if path.is_file()
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
        found = sha256(staging / name)
        if found != entry["sha256"]:
            return f"{name} has sha256 {found[:12]} on the disk, expected {entry['sha256'][:12]}"
    for name, text in texts.items():
        if (staging / name).read_text() != text:
            return f"{name} does not read as it was written"
    moments = load_file(str(staging / OPTIMIZER))
    problem = adapter_problem(staging / ADAPTER, norms) or _other_names(OPTIMIZER, moments, optimizer)
    if problem is not None:
        return problem
    for name, tensor in moments.items():
        if not _same_bits(tensor, optimizer[name]):
            return f"{OPTIMIZER}: tensor {name} is not the one that was to be saved"
    return None


def adapter_problem(folder: Path, norms: Mapping[str, float]) -> str | None:
    """The first difference of the adapter file in `folder` from the live adapter, named; None if there is none.

    Args:
        norms: as for `save_checkpoint`.

    Raises:
        OSError, SafetensorError: the file cannot be read.
    """
    adapter = load_file(str(folder / ADAPTER_FILE))
    odd = _other_names(ADAPTER_FILE, adapter, norms)
    if odd is not None:
        return odd
    for name, norm in tensor_norms(adapter).items():
        if adapter[name].numel() == 0:
            return f"{ADAPTER_FILE}: tensor {name} has shape {tuple(adapter[name].shape)}, expected elements"
        if not math.isclose(norm, norms[name], rel_tol=NORM_TOLERANCE):  # not a number is close to nothing
            return f"{ADAPTER_FILE}: tensor {name} has norm {norm:.9g}, expected {norms[name]:.9g} (the live adapter's)"
    return None


def _other_names(file: str, found: Mapping[str, Any], expected: Mapping[str, Any]) -> str | None:
    odd = sorted(found.keys() ^ expected.keys())
    if not odd:
        return None
    what = "lacks" if odd[0] in expected else "holds an unknown"
    return f"{file} {what} tensor {odd[0]} ({len(found)} tensors found, {len(expected)} expected)"


def _same_bits(a: Tensor, b: Tensor) -> bool:
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    return torch.equal(a.reshape(-1).view(torch.uint8), b.detach().cpu().reshape(-1).view(torch.uint8))


def _replace(staging: Path, final: Path) -> None:
    """Rename `staging` to `final`; an older thing of that name goes only after the new one stands."""
    if not os.path.lexists(final):
        staging.rename(final)
        return
    old = final.with_name(f"{SET_ASIDE}{final.name}")
    _remove(old)
    final.rename(old)
    staging.rename(final)
    flush(final.parent)
    _remove(old)


def _remove(path: Path) -> None:
    """Whatever it is: a folder and all in it, a file, a link (not what it points to), nothing."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def named_checkpoints(run_dir: Path) -> list[tuple[int, Path]]:
    """(step, path) of everything that has a checkpoint's name, oldest first: also files and links that lead nowhere."""
    names = ((CHECKPOINT_NAME.fullmatch(path.name), path) for path in run_dir.glob("checkpoint-*"))
    return sorted((int(match[1]), path) for match, path in names if match)


def list_checkpoints(run_dir: Path) -> list[tuple[int, Path]]:
    """(step, folder) of every folder named like a checkpoint, oldest first, verified or not."""
    return [(step, path) for step, path in named_checkpoints(run_dir) if path.is_dir()]


def run_id_of(path: Path) -> str | None:
    """The run that a checkpoint, which verifies, names as its own; None in format 1."""
    return read_manifest(path).get("run_id")


def find_checkpoint(
    run_dir: Path,
    on_skip: Callable[[Path, str], None],
    *,
    run_id: str | None = None,
    also: Callable[[Path], str | None] | None = None,
) -> Path | None:
    """The newest checkpoint (of this run) that verifies; `on_skip` hears of each newer one and why it is skipped.

    Args:
        also: a further reason to skip one that verifies.
    """
    for _, path in reversed(named_checkpoints(run_dir)):
        reason = verify(path, run_id=run_id)
        if reason is None and also is not None:
            reason = also(path)
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
    manifest = read_manifest(path)
    try:
        state = TrainState.from_dict(json.loads((path / STATE).read_text()))
        optimizer = load_file(str(path / OPTIMIZER))
    except (ValueError, TypeError, SafetensorError) as error:
        raise UserError(f"train.resume_from_checkpoint: {path}: {error}") from error
    return Checkpoint(path, state, optimizer, Identity(manifest["base_fingerprint"], manifest["pattern_digest"]))


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
    try:
        for path in removed:
            doomed = path.with_name(f"{_STAGING}removing-{path.name}")
            _remove(doomed)
            path.rename(doomed)
            flush(run_dir)
            _remove(doomed)
    except OSError as error:  # the new checkpoint stands: nothing is lost by an old one more
        logger.warning("checkpoint: %s could not be removed (%s); train.save_total_limit is exceeded", path, error)
    return removed


def put_back(run_dir: Path) -> list[Path]:
    """Checkpoints that a killed save had renamed to replace them get their names back, unless the new one stands."""
    found = []
    for path in sorted(run_dir.glob(f"{SET_ASIDE}*")):
        target = run_dir / path.name.removeprefix(SET_ASIDE)
        if not os.path.lexists(target):
            path.rename(target)
            found.append(target)
    return found


def clear_staging(run_dir: Path) -> None:
    """Remove what a killed save or removal left behind. An older checkpoint set aside by an unfinished replace is put back."""
    put_back(run_dir)
    for path in run_dir.glob(f"{_STAGING}*"):
        _remove(path)
