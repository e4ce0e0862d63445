"""The run folder: may this run use it, where does it resume from, and moving an older run aside (never deleting).

Called by `engine/setup.py` on rank 0, in this order: `wait_for_folder`, `check_folder`, `claim_folder`.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Any

import yaml
from safetensors import SafetensorError

from lora_dist.adapter import ADAPTER_FILE
from lora_dist.engine.attempts import make_run_id, next_attempt
from lora_dist.engine.checkpoint import (
    MANIFEST,
    SET_ASIDE,
    STATE,
    clear_staging,
    find_checkpoint,
    list_checkpoints,
    named_checkpoints,
    put_back,
    run_id_of,
    verify,
)  # fmt: skip
from lora_dist.engine.held import LOCK, HeldFolder, lock_folder, read_run_id
from lora_dist.log import UserError, disk_advice
from lora_dist.process import flush
from lora_dist.state import ATTEMPTS, CONFIG, RUN

_MODEL_MARKS = ("config.json", "model.safetensors", "model.safetensors.index.json", "pytorch_model.bin")
_MAY_CHANGE = {
    "train.resume_from_checkpoint",
    "train.overwrite_output_dir",
    "train.output_dir",
    "train.lock_timeout_s",
    "train.max_runtime",
}


def holds_run(folder: Path) -> bool:
    """Whether an earlier run left a checkpoint or an adapter here. Logs alone are of a run that saved nothing."""
    kept = (ADAPTER_FILE, f"*/{ADAPTER_FILE}", f"{SET_ASIDE}*")  # the last: a checkpoint that a killed save was about to replace
    return folder.is_dir() and (bool(list_checkpoints(folder)) or any(any(folder.glob(name)) for name in kept))


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
    """newer checkpoints that cannot be used, and why"""
    best_lost: bool = False
    """the best checkpoint before the one to go on from cannot be used, and no earlier one could make it again"""

    @property
    def own(self) -> bool:
        """Whether the checkpoint is one of the folder's."""
        return self.checkpoint is not None and self.checkpoint.absolute().parent.resolve() == self.folder.resolve()


def wait_for_folder(folder: Path, *, resume: str | None, timeout_s: float, note: Callable[[str], None]) -> IO[str] | None:
    """Before a resuming run looks at the checkpoints: wait until the attempt before it has let go of the folder, and keep others out.

    Args:
        resume: `train.resume_from_checkpoint`; a fresh start waits for nobody and gets None.

    Returns:
        The lock, for `claim_folder`; None where there is nobody to wait for.

    Raises:
        UserError: another run is still at work in it, or the folder cannot be written.
    """
    into = resume == "auto" or (resume is not None and Path(resume).resolve().parent == folder.resolve())
    if not into or not (folder / LOCK).exists():
        return None
    try:
        lock = lock_folder(folder, wait_s=timeout_s, note=note)
        for path in put_back(folder):
            note(f"put {path.name} back, which a killed save was about to replace")
    except OSError as error:
        raise _cannot_write(folder, error) from error
    return lock


def check_folder(folder: Path, *, resume: str | None, overwrite: bool, needs_best: bool = True) -> FolderPlan:
    """Decide where a run goes on from and whether it may use the folder. Writes nothing.

    Args:
        resume: `train.resume_from_checkpoint`: a folder, auto, or None.
        overwrite: an older run may be moved aside; without effect when resuming from this folder.
        needs_best: the run ends with its best adapter, so that has to be whole too.

    Raises:
        UserError: the folder holds another run, cannot be written, or the checkpoint is not there.
    """
    plan = FolderPlan(folder, None, False, ())
    if resume == "auto":
        plan = _newest(folder, needs_best)
        if plan.checkpoint is None and plan.skipped and not overwrite:
            raise UserError(
                f"train.resume_from_checkpoint: no checkpoint in {folder} is whole and of this run ({'; '.join(plan.skipped)}); "
                "start anew with --train.overwrite_output_dir true (moves the folder aside)"
                + (f", or remove {RUN} if the checkpoints are the run's own" if "of another run" in "".join(plan.skipped) else "")
            )
    elif resume is not None:
        plan = _named(folder, Path(resume), needs_best)
    if any((folder / name).exists() for name in _MODEL_MARKS):
        raise UserError(f"train.output_dir: {folder} holds a model, expected a folder of the run's own")
    other_run = holds_run(folder) and not plan.own
    if other_run and not overwrite:
        raise UserError(
            f"train.output_dir: {folder} already holds a run; go on with it (--train.resume_from_checkpoint auto), move it "
            "aside (--train.overwrite_output_dir true), or choose another folder"
        )
    if other_run and plan.checkpoint is not None and folder.resolve() in plan.checkpoint.resolve().parents:
        raise UserError(f"train.resume_from_checkpoint: {plan.checkpoint} lies inside {folder}, but is no checkpoint-N of it")
    _require_writable(folder)
    if resume == "auto" and plan.checkpoint is None and not other_run and (folder / RUN).exists():
        plan = replace(plan, skipped=(f"{folder} has no checkpoint: starting from step 0",))
    return replace(plan, move_aside=other_run)


def _newest(folder: Path, needs_best: bool) -> FolderPlan:
    """The newest checkpoint of this run that verifies, and whose best one does: training again from there makes the lost one again.

    Where none has a whole best one, the newest that verifies.
    """
    run_id, skipped = _run_id(folder), []

    def skip(path: Path, why: str) -> None:
        skipped.append(f"skipping {path.name}: {why}")

    checkpoint = find_checkpoint(folder, skip, run_id=run_id, also=_best_problem if needs_best else None)
    if checkpoint is not None or not skipped or not needs_best:
        return FolderPlan(folder, checkpoint, False, tuple(skipped))
    skipped = []
    checkpoint = find_checkpoint(folder, skip, run_id=run_id)
    if checkpoint is not None:
        skipped.append(_best_lost(checkpoint))
    return FolderPlan(folder, checkpoint, False, tuple(skipped), best_lost=checkpoint is not None)


def _named(folder: Path, checkpoint: Path, needs_best: bool) -> FolderPlan:
    """A checkpoint that the user has chosen.

    Raises:
        UserError: it is not there, not whole, or lies in this folder but is of another run.
    """
    if not (checkpoint / MANIFEST).is_file():
        found = "no folder" if not checkpoint.is_dir() else f"no {MANIFEST} in"
        raise UserError(f"train.resume_from_checkpoint: found {found} {checkpoint}, expected a checkpoint-N folder or auto")
    plan = FolderPlan(folder, checkpoint, False, ())
    if not plan.own:
        return plan  # its best checkpoint is in another folder, and counts no more
    reason = verify(checkpoint, run_id=_run_id(folder))
    if reason is not None:
        raise UserError(f"train.resume_from_checkpoint: {checkpoint} is not whole: {reason}; take an earlier one, or auto")
    if needs_best and _best_problem(checkpoint) is not None:
        return replace(plan, skipped=(_best_lost(checkpoint),), best_lost=True)
    return plan


def _best_problem(checkpoint: Path) -> str | None:
    """Why the best checkpoint that a whole one refers to cannot be used; None where it can, or there is none."""
    step, best = (json.loads((checkpoint / STATE).read_bytes()).get(key, -1) for key in ("step", "best_step"))
    if best <= 0 or best == step:
        return None
    reason = verify(checkpoint.with_name(f"checkpoint-{best}"), run_id=run_id_of(checkpoint))
    return None if reason is None else f"its best checkpoint-{best} cannot be used ({reason})"


def _best_lost(checkpoint: Path) -> str:
    return f"{checkpoint.name} is used, but {_best_problem(checkpoint)}: the best adapter is chosen among later evaluations"


def _run_id(folder: Path) -> str | None:
    """The run of this folder: what `run.json` says, else the newest checkpoint that verifies; None if neither names one."""
    found = read_run_id(folder)
    newest = find_checkpoint(folder, lambda path, why: None) if found is None else None
    return found if newest is None else run_id_of(newest)


def _cannot_write(folder: Path, error: OSError) -> UserError:
    advice = disk_advice(error, folder, "choose another folder or free space")
    return UserError(f"train.output_dir: {folder} cannot be written ({error}); {advice}")


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
        advice = disk_advice(error, existing, "choose another folder or free space")
        raise UserError(f"train.output_dir: {existing} cannot be written ({error.strerror}); {advice}") from error


def changed_settings(folder: Path, config: Mapping[str, Any]) -> list[str]:
    """Settings that differ from those of the earlier attempt in this folder, one line each."""
    file = folder / CONFIG
    try:
        before = yaml.safe_load(file.read_text()) if file.exists() else {}
        then = {section: {**config[section], **(before.get(section) or {})} for section in config}
    except (OSError, yaml.YAMLError, UnicodeDecodeError, AttributeError, TypeError):
        return [f"{CONFIG} of the earlier attempt cannot be read: its settings are not compared"]
    lines = []
    for section, values in config.items():
        for key, value in values.items():
            old = then[section][key]
            if old != value and f"{section}.{key}" not in _MAY_CHANGE:
                lines.append(f"{section}.{key} was {old} before, is {value} now")
    return lines


@dataclass(frozen=True)
class Claim:
    """The run folder, held by this process (rank 0)."""

    folder: HeldFolder
    attempt: int
    """number of this start"""


def claim_folder(plan: FolderPlan, config: Mapping[str, Any], note: Callable[[str], None], lock: IO[str] | None = None) -> Claim:
    """Carry the plan out, once every other part of the run has been checked. Rank 0 only.

    Args:
        lock: of `wait_for_folder`.

    Raises:
        UserError: the folder cannot be written, or another run is at work in it.
    """
    folder = plan.folder
    for text in plan.skipped:
        note(text)
    try:
        if folder.is_dir() and lock is None:
            lock = lock_folder(folder)  # nobody is at work in what is about to be moved or cleaned
        if plan.move_aside:
            note(f"moved the older run aside: {move_aside(folder)}")
            if lock is not None:
                lock.close()
            lock = None
        if not folder.is_dir():
            folder.mkdir(parents=True)
            flush(folder.parent)
        lock = lock or lock_folder(folder)
        run_id, run_text = make_run_id(folder, _run_id(folder), note)
        clear_staging(folder)
        if plan.own and plan.checkpoint is not None:
            _set_later_aside(folder, plan.checkpoint, note)
        if plan.checkpoint is not None:
            for text in changed_settings(folder, config):
                note(text)
        held = HeldFolder(folder, lock, run_id)
        held.keep(RUN, run_text)
        held.keep(CONFIG, yaml.safe_dump(dict(config), sort_keys=False))
        (folder / ATTEMPTS).mkdir(exist_ok=True)
        return Claim(held, next_attempt(folder))
    except OSError as error:
        raise _cannot_write(folder, error) from error


def _set_later_aside(folder: Path, checkpoint: Path, note: Callable[[str], None]) -> None:
    """Going on from an older checkpoint: rename the later ones, so that they are not mistaken for this run's."""
    step = {path.resolve(): n for n, path in list_checkpoints(folder)}.get(checkpoint.resolve())
    for later, path in named_checkpoints(folder):
        if step is not None and later > step:
            target, n = path.with_name(f"superseded-{path.name}"), 1
            while os.path.lexists(target):
                target, n = path.with_name(f"superseded-{n}-{path.name}"), n + 1
            path.rename(target)
            note(f"set a later checkpoint aside: {target.name}")


def publish_files(
    folder: Path, write: Callable[[Path], object], check: Callable[[Path], str | None] = lambda staged: None
) -> None:
    """Let `write` fill a temporary folder, then move each file, flushed, to its name in `folder` at once.

    Args:
        check: looks at the files before they are moved; what is wrong with them, or None.

    Raises:
        UserError: full or read-only disk, or what `check` said.
    """
    staging = folder / ".saving-final"
    advice = "the checkpoints are whole: free space and resume"
    try:
        shutil.rmtree(staging, ignore_errors=True)
        staging.mkdir(parents=True)
        write(staging)
        for file in sorted(staging.iterdir()):
            flush(file)
        problem = check(staging)
        if problem is not None:
            raise UserError(f"train.output_dir: {folder}: {problem}; the checkpoints are whole: check the disk and resume")
        for file in sorted(staging.iterdir()):
            os.replace(file, folder / file.name)
        staging.rmdir()
        flush(folder)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(staging, ignore_errors=True)
        raise UserError(f"train.output_dir: {folder} could not be written ({error}); {advice}") from error
    except UserError:
        shutil.rmtree(staging, ignore_errors=True)
        raise
