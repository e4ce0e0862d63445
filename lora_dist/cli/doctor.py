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

    signal.signal(signal.SIGTERM, _terminate)
    printer = Printer(_write, as_json=args.json, terminal=sys.stdout.isatty())
    try:
        return run(args, dict(os.environ), printer)
    except (KeyboardInterrupt, _Terminated) as error:
        print("\nlora-dist doctor: interrupted", file=sys.stderr)
        return 130 if isinstance(error, KeyboardInterrupt) else 143


def _write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


def _terminate(_number: int, _frame: FrameType | None) -> None:
    raise _Terminated
