"""`lora-dist doctor`: is this machine ready to train? Exit code 1 where a check failed."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from types import FrameType

from lora_dist.arguments import DoctorArgs
from lora_dist.cli.options import Verb, parse

WORKER = "--as-worker"
"""how the doctor starts its own workers, by the same command, so that they end with their launcher"""


class _Terminated(BaseException):
    """SIGTERM, raised so that what was started is ended, and what was written is removed."""


def main(argv: Sequence[str]) -> int:
    if argv and argv[0] == WORKER:
        from lora_dist.operations.doctor.worker import main as work

        return work(Path(argv[1]), int(os.environ["RANK"]))
    args = parse(DoctorArgs, argv, Verb("lora-dist doctor", DoctorArgs.__doc__ or ""))
    from lora_dist.operations.doctor import run
    from lora_dist.operations.doctor.report import Printer

    printer = Printer(_write, as_json=args.json, terminal=sys.stdout.isatty())
    asked = _listen()
    try:
        code = run(args, dict(os.environ), printer)
    except (KeyboardInterrupt, _Terminated):
        code = 0
    if not asked:
        return code
    print("\nlora-dist doctor: interrupted", file=sys.stderr)
    return 128 + asked[0]


def _listen() -> list[int]:
    """Signals that ask to end it, as they come. Each raises as well; but what is raised in a destructor is lost."""
    asked: list[int] = []

    def note(number: int, _frame: FrameType | None) -> None:
        asked.append(number)
        raise KeyboardInterrupt if number == signal.SIGINT else _Terminated

    for number in (signal.SIGINT, signal.SIGTERM):
        if signal.getsignal(number) != signal.SIG_IGN:  # of a job in a shell's background
            signal.signal(number, note)
    return asked


def _write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()
