"""What every room may say: the one error type that users meet, and the package logger.

A `UserError` is a mistake a user can mend: a missing file, a wrong key, a base that changed. It carries lines that say what was
found, what was expected and which key to change; the command prints them on stderr and exits with 2. Everything else is a bug
and keeps its traceback.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Mapping

logger = logging.getLogger("lora_dist")
# PEFT imports bitsandbytes where it is installed, which says at once, on stderr, that an optional package of kernels is not.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)

# Exit codes beside 0 (done), 1 (failed), 2 (bad input) and 130 (second Ctrl-C): docs/guide.md has the table.
EXIT_STOPPED = 75
"""Stopped before the end on a signal or a time limit: start again with `--resume auto`. EX_TEMPFAIL of sysexits.h."""
EXIT_HUNG = 76
"""A process made no progress for `health.hang_timeout_s`, and the watch ended the run."""


class UserError(ValueError):
    """A problem the user can mend. `str(error)` is one line a problem.

    Args:
        problems: one line, or several problems that are reported together.
    """

    def __init__(self, problems: str | Iterable[str]):
        self.problems: list[str] = [problems] if isinstance(problems, str) else list(problems)
        super().__init__("\n".join(self.problems))

    def renamed(self, names: Mapping[str, str]) -> UserError:
        """The same problems with options under other names: a command's own, instead of those of `lora-dist train`.

        Args:
            names: by option, which is replaced where it stands as a whole; or by the dotted beginning of options, or another text.
        """
        lines = []
        for line in self.problems:
            for key, name in names.items():
                end = r"(?!\w)" if key[-1].isalnum() else ""
                line = re.sub(rf"(?<![\w./]){re.escape(key)}{end}", name.replace("\\", r"\\"), line)
            lines.append(line)
        return type(self)(lines)

    def __reduce__(self) -> tuple[type[UserError], tuple[list[str]]]:
        return type(self), (self.problems,)  # travels between processes, whatever its class


class GuardError(UserError):
    """The base or its pattern is not what it was; nothing was written. Raised by the guard only."""


def disk_advice(error: OSError, path: object, otherwise: str) -> str:
    """What to do about a file or folder that cannot be written: a thing of the wrong kind in its place has to go, else `otherwise`.

    Args:
        path: what is in the way if the error does not name it.
    """
    if isinstance(error, (IsADirectoryError, NotADirectoryError, FileExistsError)):
        return f"move {error.filename2 or error.filename or path} away, it is not of the kind expected there"
    return otherwise
