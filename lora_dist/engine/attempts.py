"""The run folder's books: who this run is, how it stands, and one record of every start.

    run.json                {"run_id", "created"}: made once; every checkpoint names it
    status.json             how the run stands now; written at each start, stop and end, for wrappers and people
    attempts/attempt-3.*    json: who started it where, and how it ended; log: its console; yaml: its configuration

Rank 0 only. A disk that takes no books does not end a run: it is warned of, and `HeldFolder.ensure` writes them later. Called by
`engine/folder.py`, `engine/setup.py` and `engine/train.py`.
"""

from __future__ import annotations

import json
import re
import socket
import subprocess
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

import yaml

from lora_dist.engine.held import HeldFolder, read_run_id, write_whole
from lora_dist.log import logger
from lora_dist.state import ATTEMPTS, RUN, STATUS

_NUMBER = re.compile(r"attempt-(\d+)\.(?:json|log|yaml)")
_GIT_TIMEOUT_S = 10
_PACKAGE = Path(__file__).resolve().parents[1]

State = Literal["running", "stopped", "completed", "failed", "hung"]


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def make_run_id(folder: Path, of_checkpoint: str | None, note: Callable[[str], None]) -> tuple[str, str]:
    """Read the run's id, or give it one.

    Args:
        of_checkpoint: run_id in the manifest of the folder's newest good checkpoint, for a `run.json` that is missing or damaged.
        note: told if there should have been one.

    Returns:
        The id and the text of `run.json`, which the caller writes.
    """
    found = read_run_id(folder)
    if found is not None:
        return found, (folder / RUN).read_text()
    run_id = of_checkpoint or uuid.uuid4().hex
    if (folder / RUN).exists():
        note(f"{RUN} is damaged: written anew, run_id {run_id[:12]}{' (that of the newest checkpoint)' if of_checkpoint else ''}")
    elif of_checkpoint is not None:
        note(f"{RUN} is missing: written anew, run_id {run_id[:12]} (that of the newest checkpoint)")
    return run_id, json.dumps({"run_id": run_id, "created": _now()})


def next_attempt(folder: Path) -> int:
    """Number of the attempt that starts now, from 1; counts the starts in this folder."""
    numbers = [int(match[1]) for path in (folder / ATTEMPTS).glob("attempt-*") if (match := _NUMBER.fullmatch(path.name))]
    return max(numbers, default=0) + 1


def attempt_log(folder: Path, number: int) -> Path:
    return folder / ATTEMPTS / f"attempt-{number}.log"


def code_revision(package: Path = _PACKAGE) -> dict[str, Any]:
    """{"revision", "dirty"} of the checkout that the package runs from; nulls where it is installed, or git is missing.

    `dirty` looks at the package itself: outputs beside it do not count.
    """
    revision = _git(package, "rev-parse", "HEAD") if (package.parent / ".git").exists() else None
    changes = _git(package, "status", "--porcelain", "--", ".") if revision is not None else None
    return {"revision": revision, "dirty": None if changes is None else bool(changes)}


def _git(folder: Path, *argv: str) -> str | None:
    try:
        done = subprocess.run(["git", "-C", str(folder), *argv], capture_output=True, text=True, timeout=_GIT_TIMEOUT_S)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


@dataclass
class Attempt:
    """One start of a run, from `begin` to `end`."""

    number: int
    total_steps: int
    _folder: HeldFolder
    _record: dict[str, Any]

    @classmethod
    def begin(
        cls,
        folder: HeldFolder,
        number: int,
        config: Mapping[str, Any],
        *,
        processes: int,
        argv: Sequence[str],
        first_step: int,
        total_steps: int,
        job: Mapping[str, str],
        versions: Mapping[str, str],
    ) -> Attempt:
        """Open the record of this start, close those of starts that ended without a word, and set the status to running.

        Args:
            number: from `next_attempt`, under the folder's lock.
            processes: ranks.
            argv: command line, program name left out.
            first_step: step of the checkpoint that it goes on from, 0 for a fresh start.
            job: the cluster's ids.
        """
        _close_dead(folder.path, number)
        record = {
            "attempt": number, "started": _now(), "ended": None, "state": "running", "reason": None, "first_step": first_step,
            "last_step": None, "argv": list(argv), "host": socket.gethostname(), "processes": processes, "job": dict(job),
            "versions": dict(versions), "code": code_revision(),
        }  # fmt: skip
        attempt = cls(number, total_steps, folder, record)
        attempt._keep(f"{ATTEMPTS}/attempt-{number}.yaml", yaml.safe_dump(dict(config), sort_keys=False))
        attempt._keep(f"{ATTEMPTS}/attempt-{number}.json", json.dumps(record, indent=1))
        attempt.write_status("running", "resumed" if first_step else "started", step=first_step)
        return attempt

    def write_status(self, state: State, reason: str, *, step: int, exit_code: int | None = None) -> None:
        """How the run stands: `status.json`.

        Args:
            exit_code: that the process is about to end with; None while it runs.
        """
        status = {
            "state": state, "reason": reason, "step": step, "total_steps": self.total_steps, "attempt": self.number,
            "exit_code": exit_code, "time": _now(),
        }  # fmt: skip
        self._keep(STATUS, json.dumps(status))

    def end(self, state: State, reason: str, *, step: int, exit_code: int | None) -> None:
        """Close the record, and set the status. The last word on an attempt: a later call changes nothing."""
        if self._record["ended"] is not None:
            return
        self._record |= {"ended": _now(), "state": state, "reason": reason, "last_step": step}
        self._keep(f"{ATTEMPTS}/attempt-{self.number}.json", json.dumps(self._record, indent=1))
        self.write_status(state, reason, step=step, exit_code=exit_code)

    def _keep(self, name: str, text: str) -> None:
        try:
            self._folder.keep(name, text)
        except OSError as error:
            logger.warning("%s cannot be written (%s): the run goes on", self._folder.path / name, error.strerror)


def note_refusal(folder: Path, reason: str, *, exit_code: int) -> None:
    """A start that would go on with this run has come to nothing: no status of an earlier attempt may say that it is worth another one.
    A completed run stays completed. The caller holds the folder's lock."""
    try:
        before = json.loads((folder / STATUS).read_bytes())
        if before["state"] != "completed":
            write_whole(
                folder / STATUS,
                json.dumps({**before, "state": "failed", "reason": reason, "exit_code": exit_code, "time": _now()}),
            )
    except (OSError, ValueError, KeyError, TypeError) as error:
        logger.info("%s is not brought up to date: %s", folder / STATUS, error)


def _close_dead(folder: Path, now: int) -> None:
    """Attempts before this one that are said to run were killed: nobody can be at work, since this one holds the lock."""
    for file in (folder / ATTEMPTS).glob("attempt-*.json"):
        number = _NUMBER.fullmatch(file.name)
        if number is None or int(number[1]) >= now:
            continue
        try:
            record = json.loads(file.read_bytes())
            if record["state"] != "running":
                continue
            log = attempt_log(folder, int(number[1]))
            seen = datetime.fromtimestamp(log.stat().st_mtime, UTC).isoformat(timespec="seconds") if log.exists() else None
            record |= {"ended": seen, "state": "failed", "reason": "ended without a word (killed, or its machine was lost)"}
            write_whole(file, json.dumps(record, indent=1))
        except (OSError, ValueError, KeyError, TypeError) as error:
            logger.warning("%s cannot be read or written (%s)", file, error)
