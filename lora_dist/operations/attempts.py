"""What an attempt of a Slurm job leaves in the run folder, and whether the job is queued again.

`attempts/slurm-JOB-RESTART.json` is written before the attempt's processes start and completed after they have ended; `status.json`, which the
run itself writes, says how it ended, whatever exit code the launchers made of it. Called by `cli/attempt.py` for `launch/slurm.sbatch`.
"""

from __future__ import annotations

import dataclasses
import datetime
import json
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lora_dist.log import EXIT_STOPPED
from lora_dist.state import ATTEMPTS, CHECKPOINT_NAME, STATUS

# Words of a failure whose cause lies in another process: a node or a task that is gone.
_LOST = ("lost another process", "closed by peer", "reset by peer")
_KILLED = 128  # exit codes above are of processes that a signal ended
_BAD_INPUT = 2
# torchrun ends with 1 whatever its workers' code was, and names theirs in its report.
_WORKER_BAD_INPUT = re.compile(r"^\s*exitcode\s*: 2 ", flags=re.MULTILINE)


@dataclass
class Attempt:
    """One attempt; the second half is filled in at its end."""

    job: str
    """job, or ARRAYJOB_TASK"""
    restart: int
    """how often Slurm had requeued the job before"""
    started: str
    first_checkpoint: int
    """newest checkpoint's step at the start, 0 for none"""
    status_before: dict[str, Any] | None = None
    """status.json as an earlier attempt left it"""
    ended: str | None = None
    exit_code: int | None = None
    """of srun"""
    state: str | None = None
    """as status.json has it; None: this attempt wrote none"""
    reason: str | None = None
    last_checkpoint: int | None = None
    decision: str | None = None
    """why the job is, or is not, queued again"""


@dataclass(frozen=True)
class Verdict:
    """What becomes of the job: queued again, or ended with an exit code."""

    requeue: bool
    exit_code: int
    text: str


@dataclass(frozen=True)
class Limits:
    requeues: int
    """at most, for one job"""
    idle: int
    """attempts in a row without a newer checkpoint"""
    retry_failed: bool = False
    """queue again also where the run failed by itself"""


def begin(folder: Path, job: str, restart: int) -> Path:
    """Note the start of an attempt; the file that has it."""
    file = folder / ATTEMPTS / f"slurm-{job}-{restart}.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    _write(file, Attempt(job, restart, _now(), newest_checkpoint(folder), read_status(folder)))
    return file


def conclude(file: Path, exit_code: int, limits: Limits) -> Verdict:
    """Note the end of an attempt, and decide what becomes of the job.

    Args:
        file: what `begin` returned.
        exit_code: of the step that ran the processes.
    """
    folder, attempt = file.parents[1], Attempt(**json.loads(file.read_text()))
    status = read_status(folder)
    silent = status is None or status == attempt.status_before
    attempt.ended, attempt.exit_code, attempt.last_checkpoint = _now(), exit_code, newest_checkpoint(folder)
    if status is not None and not silent:
        attempt.state, attempt.reason = status.get("state"), status.get("reason")
    done = status is not None and status.get("state") == "completed"
    if (exit_code == 0 and (silent or done)) or attempt.state == "completed":
        verdict = Verdict(False, 0, "the run is complete")
    else:
        own_code = status.get("exit_code") if status is not None and not silent else _worker_code(file)
        verdict = _after_stop(attempt, own_code, earlier_attempts(file), limits)
    attempt.decision = verdict.text
    _write(file, attempt)
    return verdict


def _after_stop(attempt: Attempt, own_code: int | None, earlier: list[Attempt], limits: Limits) -> Verdict:
    """An attempt that did not complete the run.

    Args:
        own_code: exit code that the run gave itself, which launchers turn into their own.
    """
    if _BAD_INPUT in (own_code, attempt.exit_code):
        return Verdict(False, _BAD_INPUT, f"bad input, which another attempt would not mend{_said(attempt)}: not requeued")
    if attempt.reason == "SIGINT":
        return Verdict(False, EXIT_STOPPED, "stopped by SIGINT, an interrupt by hand: not requeued")
    if attempt.state == "failed" and not limits.retry_failed and not _lost_process(attempt):
        return Verdict(False, 1, f"the run failed by itself{_said(attempt)}: not requeued (REQUEUE_FAILED=1 requeues it)")
    idle = 0
    for one in [attempt, *reversed(earlier)]:
        if (one.last_checkpoint or 0) > one.first_checkpoint:
            break
        idle += 1
    if idle >= limits.idle:
        return Verdict(
            False,
            1,
            f"no progress: {idle} attempts in a row left the newest checkpoint at step {attempt.last_checkpoint}: not requeued",
        )
    how = f"{attempt.state}{_said(attempt)}" if attempt.state not in (None, "running") else "ended without a word"
    where = f"{how}, newest checkpoint at step {attempt.last_checkpoint}"
    if attempt.restart >= limits.requeues:
        return Verdict(
            False, EXIT_STOPPED, f"{where}; requeued {attempt.restart} times, MAX_REQUEUES={limits.requeues}: not again"
        )
    return Verdict(True, EXIT_STOPPED, f"{where}: requeued")


def _worker_code(file: Path) -> int | None:
    """What a worker that ended before it wrote a status said to torchrun, if that was bad input."""
    console = file.with_suffix(".out")
    found = console.exists() and _WORKER_BAD_INPUT.search(console.read_text(errors="replace"))
    return _BAD_INPUT if found else None


def _said(attempt: Attempt) -> str:
    return f" ({attempt.reason})" if attempt.reason else ""


def _lost_process(attempt: Attempt) -> bool:
    """A lost node or a killed process makes the others fail too, with words of their own."""
    reason = (attempt.reason or "").lower()
    return any(words in reason for words in _LOST) or (attempt.exit_code or 0) > _KILLED


def newest_checkpoint(folder: Path) -> int:
    """Step of the newest published checkpoint, 0 for none. By names alone: whether one is whole is for the run to find out."""
    steps = [int(match.group(1)) for path in folder.glob("checkpoint-*") if (match := CHECKPOINT_NAME.fullmatch(path.name))]
    return max(steps, default=0)


def read_status(folder: Path) -> dict[str, Any] | None:
    try:
        content = json.loads((folder / STATUS).read_text())
    except (OSError, ValueError):
        return None
    return content if isinstance(content, dict) else None


def earlier_attempts(file: Path) -> list[Attempt]:
    """The same job's attempts before this one that came to their end; a killed batch script leaves one without."""
    job = re.sub(r"-\d+$", "", file.stem)
    found = []
    for other in file.parent.glob(f"{job}-*.json"):
        if other != file and re.fullmatch(re.escape(job) + r"-\d+", other.stem):
            found.append(Attempt(**json.loads(other.read_text())))
    return sorted((one for one in found if one.ended is not None), key=lambda one: one.restart)


def _write(file: Path, attempt: Attempt) -> None:
    """At once, so that a kill leaves the old or the new."""
    temporary = file.with_suffix(".tmp")
    temporary.write_text(json.dumps(dataclasses.asdict(attempt), indent=1) + "\n")
    os.replace(temporary, file)


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="milliseconds")
