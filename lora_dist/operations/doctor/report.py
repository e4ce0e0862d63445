"""What a check says: a status, its name, what was found with numbers, and what to do about it; and how that is shown.

Used by every check of the doctor; `Printer` by `cli/doctor.py`.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum

from lora_dist.log import UserError

NAME_WIDTH = 16
"""columns of a check's name"""


class Status(StrEnum):
    OK = "OK"
    WARN = "WARN"
    FAIL = "FAIL"
    SKIP = "SKIP"


@dataclass(frozen=True)
class Finding:
    """One line of the doctor's report.

    Attributes:
        remedy: a command or option; with every FAIL and WARN.
    """

    status: Status
    name: str
    found: str
    remedy: str = ""


def ok(name: str, found: str) -> Finding:
    return Finding(Status.OK, name, found)


def skip(name: str, found: str, remedy: str = "") -> Finding:
    return Finding(Status.SKIP, name, found, remedy)


def warn(name: str, found: str, remedy: str) -> Finding:
    return Finding(Status.WARN, name, found, remedy)


def fail(name: str, found: str, remedy: str) -> Finding:
    return Finding(Status.FAIL, name, found, remedy)


def one_line(error: BaseException, limit: int = 300) -> str:
    """An exception as one line: its kind (unless it was made for users), and what it says."""
    text = " ".join(str(error).split())[:limit]
    if isinstance(error, UserError):
        return text
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def size_text(size_bytes: float) -> str:
    """`12.3 MB`; decimal units, as disks and networks are labelled."""
    for unit in ("B", "kB", "MB", "GB"):
        if size_bytes < 1000:
            return f"{size_bytes:.3g} {unit}" if size_bytes < 100 else f"{size_bytes:.0f} {unit}"
        size_bytes /= 1000
    return f"{size_bytes:.3g} TB" if size_bytes < 100 else f"{size_bytes:,.0f} TB"


def time_text(time_s: float) -> str:
    """`35 us`, `1.2 ms`, `3.4 s`, `2 h 10 min`."""
    if time_s < 1e-3:
        return f"{time_s * 1e6:.0f} us"
    if time_s < 1:
        return f"{time_s * 1e3:.3g} ms"
    if time_s < 120:
        return f"{time_s:.3g} s"
    minutes = round(time_s / 60)
    return f"{minutes} min" if minutes < 120 else f"{minutes // 60:,} h {minutes % 60} min"


class Printer:
    """Shows findings as they come, one line each, a remedy on a line of its own below it; or one JSON object a line.

    Args:
        write: takes a text, line ends included, and shows it at once.
        terminal: show which check is at work, until it has something to say.
    """

    def __init__(self, write: Callable[[str], None], *, as_json: bool = False, terminal: bool = False):
        self._write, self._json, self._terminal = write, as_json, terminal and not as_json
        self._counts: Counter[Status] = Counter()
        self._noted = False

    def working(self, check: str) -> None:
        """A check has begun."""
        if self._terminal:
            self._write(f"\r\x1b[K...   {check}")
            self._noted = True

    def show(self, finding: Finding) -> None:
        self._counts[finding.status] += 1
        if self._json:
            self._line(finding.__dict__)
            return
        self._clear()
        self._write(f"{finding.status:<5} {finding.name:<{NAME_WIDTH}} {finding.found}\n")
        if finding.remedy:
            self._write(f"      -> {finding.remedy}\n")

    def close(self, time_s: float) -> int:
        """Show the summary. Returns the exit code: 1 where a check failed."""
        count, failed = self._counts, self._counts[Status.FAIL]
        if self._json:
            self._line({"summary": {str(status): count[status] for status in Status}, "time_s": round(time_s, 3)})
        else:
            self._clear()
            verdict = "not ready" if failed else "ready, see the warnings" if count[Status.WARN] else "ready"
            self._write(
                f"\n{verdict}: {count[Status.OK]} ok, {count[Status.WARN]} to look at, {failed} failed, {count[Status.SKIP]} skipped, "
                f"in {time_text(time_s)}\n"
            )
        return 1 if failed else 0

    def _clear(self) -> None:
        if self._noted:
            self._write("\r\x1b[K")
            self._noted = False

    def _line(self, value: dict[str, object]) -> None:
        self._write(json.dumps(value, ensure_ascii=False) + "\n")
