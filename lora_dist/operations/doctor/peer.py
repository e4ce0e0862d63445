"""The other process of the file-system checks: looks at a folder while the first one writes into it. Light to start.

Started by `disk.py` with `command`.
"""

from __future__ import annotations

import errno
import fcntl
import json
import sys
import time
from pathlib import Path

PUBLISHED = "published-"
FILES = ("weights", "state", "manifest")
STATUS = "status"
STOP = "stop"
READY = "ready"


def content(number: int) -> str:
    """Of every file that belongs to `number`: long enough for a half of it to be seen."""
    return f"{number:06d}\n" * 2000


def first_flaw(folder: Path, number: int) -> str | None:
    """What a published folder lacks, or None for a whole one."""
    for name in FILES:
        try:
            text = (folder / name).read_text()
        except FileNotFoundError:
            return f"{folder.name} was there without its file {name}"
        if text != content(number):
            return f"{folder.name}/{name} was there with {len(text)} of {len(content(number))} bytes"
    return None


def status_flaw(file: Path) -> str | None:
    """What a file that is replaced again and again lacks, or None."""
    try:
        text = file.read_text()
    except FileNotFoundError:
        return f"{file.name} was not there for a moment while it was replaced"
    number = text[:6]
    return (
        None
        if number.isdigit() and text == content(int(number))
        else f"{file.name} was there with {len(text)} bytes, half written"
    )


def watch(folder: Path) -> dict[str, object]:
    """Look until the first process says stop: every published folder has to be whole when it is first seen, the status always."""
    seen: set[str] = set()
    reads, flaws = 0, []
    (folder / READY).touch()
    while True:
        last = (folder / STOP).exists()
        for path in folder.glob(f"{PUBLISHED}*"):
            if path.name not in seen:
                seen.add(path.name)
                flaws.append(first_flaw(path, int(path.name.removeprefix(PUBLISHED))))
        flaws.append(status_flaw(folder / STATUS))
        reads += 1
        if last:
            found = [flaw for flaw in flaws if flaw]
            return {"folders": len(seen), "reads": reads, "flaws": len(found), "first": found[0] if found else ""}
        time.sleep(0)  # give the other process its turn on a single core


def lock_state(file: Path) -> str:
    with file.open("a") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return "held"
        except OSError as error:
            if error.errno in (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS):
                return "unsupported"
            raise
        return "free"


def main(what: str, where: str) -> None:
    print(lock_state(Path(where)) if what == "lock" else json.dumps(watch(Path(where))))


def command(what: str, where: Path) -> list[str]:
    """Starts this process: `watch` looks until FOLDER/stop is there, and prints one JSON object; `lock` prints whether the file's lock
    is `held`, `free` or `unsupported`."""
    return [sys.executable, "-c", f"from {__name__} import main; main({what!r}, {str(where)!r})"]
