"""The run folder: may this run use it, where does it resume from, and moving an older run aside (never deleting)."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import yaml
from safetensors import SafetensorError

from lora_dist.adapter import ADAPTER_FILE
from lora_dist.engine.checkpoint import MANIFEST, clear_staging, find_checkpoint, list_checkpoints
from lora_dist.log import UserError, logger

_MODEL_MARKS = ("config.json", "model.safetensors", "model.safetensors.index.json", "pytorch_model.bin")
METRICS, LOG, CONFIG, LOCK = "metrics.jsonl", "train.log", "run_config.yaml", ".lock"
_MAY_CHANGE = {"train.resume_from_checkpoint", "train.overwrite_output_dir", "train.output_dir"}


def holds_run(folder: Path) -> bool:
    """Whether an earlier run left a checkpoint or an adapter here. Logs alone are of a run that saved nothing."""
    return folder.is_dir() and ((folder / ADAPTER_FILE).exists() or bool(list_checkpoints(folder)))


def move_aside(folder: Path) -> Path:
    """Rename a run folder to a name that is free; returns the new name."""
    stamp = time.strftime("%Y%m%d-%H%M%S")
    target, n = folder.with_name(f"{folder.name}.old-{stamp}"), 1
    while target.exists():
        target, n = folder.with_name(f"{folder.name}.old-{stamp}-{n}"), n + 1
    folder.rename(target)
    return target


@dataclass(frozen=True)
class FolderPlan:
    """What `check_folder` decided; nothing has been written yet."""

    folder: Path
    checkpoint: Path | None
    """to go on from"""
    move_aside: bool
    """an older run is to be renamed"""
    skipped: tuple[str, ...]
    """newer checkpoints that do not verify, and why"""


def check_folder(folder: Path, *, resume: str | None, overwrite: bool) -> FolderPlan:
    """Decide where a run goes on from and whether it may use the folder. Writes nothing.

    Args:
        resume: `train.resume_from_checkpoint`: a folder, auto, or None.
        overwrite: an older run may be moved aside; without effect when resuming from this folder.

    Raises:
        UserError: the folder holds another run, cannot be written, or the checkpoint is not there.
    """
    checkpoint, skipped = None, []
    if resume == "auto":
        checkpoint = find_checkpoint(folder, lambda path, why: skipped.append(f"skipping {path.name}: {why}"))
        if checkpoint is None and skipped and not overwrite:
            raise UserError(
                f"train.resume_from_checkpoint: no checkpoint in {folder} is whole ({'; '.join(skipped)}); "
                "start anew with --train.overwrite_output_dir true (moves the folder aside)"
            )
    elif resume is not None:
        checkpoint = Path(resume)
        if not (checkpoint / MANIFEST).is_file():
            found = "no folder" if not checkpoint.is_dir() else f"no {MANIFEST} in"
            raise UserError(f"train.resume_from_checkpoint: found {found} {checkpoint}, expected a checkpoint-N folder or auto")
    own = checkpoint is not None and checkpoint.resolve().parent == folder.resolve()
    if any((folder / name).exists() for name in _MODEL_MARKS):
        raise UserError(f"train.output_dir: {folder} holds a model, expected a folder of the run's own")
    other_run = holds_run(folder) and not own
    if other_run and not overwrite:
        raise UserError(
            f"train.output_dir: {folder} already holds a run; go on with it (--train.resume_from_checkpoint auto), move it "
            "aside (--train.overwrite_output_dir true), or choose another folder"
        )
    if other_run and checkpoint is not None and folder.resolve() in checkpoint.resolve().parents:
        raise UserError(f"train.resume_from_checkpoint: {checkpoint} lies inside {folder}, but is no checkpoint-N of it")
    _require_writable(folder)
    return FolderPlan(folder, checkpoint, other_run, tuple(skipped))


def _require_writable(folder: Path) -> None:
    """The folder, or the nearest one above it that exists, takes new files (found by trying: root ignores permissions)."""
    existing = folder
    while not existing.exists():
        existing = existing.parent
    try:
        if not existing.is_dir():
            raise NotADirectoryError(20, "is a file, not a folder")
        with tempfile.TemporaryFile(dir=existing) as probe:
            probe.write(b"x" * 4096)
            probe.flush()
    except OSError as error:
        raise UserError(
            f"train.output_dir: {existing} cannot be written ({error.strerror}); choose another folder or free space"
        ) from error


def lock_folder(folder: Path) -> IO[str]:
    """Keep other runs out of the folder for as long as the returned file is open (the system lets go when a process dies).

    Raises:
        UserError: another process is running in it.
    """
    handle = (folder / LOCK).open("a")
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        handle.close()
        raise UserError(f"train.output_dir: another run is at work in {folder}; wait for it, or choose another folder") from error
    except OSError as error:  # a file system without locks
        if error.errno not in (errno.ENOLCK, errno.EOPNOTSUPP):
            raise
        logger.warning("%s: this file system has no locks, two runs in one folder would not be noticed", folder)
    return handle


def changed_settings(folder: Path, config: Mapping[str, Any]) -> list[str]:
    """Settings that differ from those of the earlier attempt in this folder, one line each."""
    file = folder / CONFIG
    try:
        before = yaml.safe_load(file.read_text()) if file.exists() else {}
    except (OSError, yaml.YAMLError):
        return [f"{CONFIG} of the earlier attempt cannot be read: its settings are not compared"]
    lines = []
    for section, values in config.items():
        for key, value in values.items():
            old = (before.get(section) or {}).get(key, value) if isinstance(before, dict) else value
            if old != value and f"{section}.{key}" not in _MAY_CHANGE:
                lines.append(f"{section}.{key} was {old} before, is {value} now")
    return lines


def claim_folder(plan: FolderPlan, config: Mapping[str, Any], note: Callable[[str], None]) -> IO[str]:
    """Carry the plan out, once every other part of the run has been checked. Rank 0 only. Returns the lock, to be kept open.

    Raises:
        UserError: the folder cannot be written, or another run is at work in it.
    """
    for text in plan.skipped:
        note(text)
    try:
        if plan.folder.is_dir():
            lock_folder(plan.folder).close()  # nobody is at work in what is about to be moved or cleaned
        if plan.move_aside:
            note(f"moved the older run aside: {move_aside(plan.folder)}")
        plan.folder.mkdir(parents=True, exist_ok=True)
        clear_staging(plan.folder)
        if plan.checkpoint is not None and plan.checkpoint.resolve().parent == plan.folder.resolve():
            _set_later_aside(plan.folder, plan.checkpoint, note)
        lock = lock_folder(plan.folder)
        if plan.checkpoint is not None:
            for text in changed_settings(plan.folder, config):
                note(text)
        (plan.folder / CONFIG).write_text(yaml.safe_dump(dict(config), sort_keys=False))
        return lock
    except OSError as error:
        raise UserError(
            f"train.output_dir: {plan.folder} cannot be written ({error}); choose another folder or free space"
        ) from error


def _set_later_aside(folder: Path, checkpoint: Path, note: Callable[[str], None]) -> None:
    """Going on from an older checkpoint: rename the later ones, so that they are not mistaken for this run's."""
    step = {path.resolve(): n for n, path in list_checkpoints(folder)}.get(checkpoint.resolve())
    for later, path in list_checkpoints(folder):
        if step is not None and later > step:
            target, n = path.with_name(f"superseded-{path.name}"), 1
            while target.exists():
                target, n = path.with_name(f"superseded-{n}-{path.name}"), n + 1
            path.rename(target)
            note(f"set a later checkpoint aside: {target.name}")


def publish_files(folder: Path, write: Callable[[Path], object]) -> None:
    """Let `write` fill a temporary folder, then move each file to its name in `folder` at once.

    Raises:
        UserError: full or read-only disk.
    """
    staging = folder / ".saving-final"
    try:
        shutil.rmtree(staging, ignore_errors=True)
        staging.mkdir()
        write(staging)
        for file in sorted(staging.iterdir()):
            os.replace(file, folder / file.name)
        staging.rmdir()
    except (OSError, SafetensorError) as error:
        shutil.rmtree(staging, ignore_errors=True)
        raise UserError(
            f"train.output_dir: {folder} could not be written ({error}); the checkpoints are whole: free space and resume"
        ) from error
