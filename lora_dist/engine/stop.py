"""Who asks a run to stop: signals, a time limit, the end of a Slurm job. Asking only sets a flag; the loop acts on it between steps.

A signal is seen by a thread behind `signal.set_wakeup_fd`, so also while the main thread waits in a collective for the others. Before
training there is nothing to save, so a signal ends the process at once; while training, the loop sums `flags` over all processes
before every step and every batch of an evaluation, so that one process that was asked stops them all at the same place. A second
SIGINT ends the process at once. Called by `engine/train.py` and `engine/loop.py`.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Sequence
from types import FrameType

from lora_dist.log import EXIT_STOPPED, logger

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2)
TIME_LIMIT = "time limit"
REASONS = (*(number.name for number in SIGNALS), TIME_LIMIT)
"""in the order of `Stop.flags`; where several apply, the first is the one that is named"""
SECOND_AFTER_S = 1.0
"""A terminal's Ctrl-C may arrive twice, from the terminal and from the launcher; a second one is a second one after this long."""
ABORT_S = 1.0
_CLOSE = 0  # no signal has this number


class Stopped(Exception):
    """Raised on all processes at the same place, between optimizer steps.

    Attributes:
        reason: one of `REASONS`.
    """

    def __init__(self, reason: str):
        super().__init__(reason)
        self.reason = reason


class Stop:
    """Listens from `install` to `close`.

    Args:
        deadline: when the run has to have ended, seconds since the epoch; None for no limit.
        margin_s: how long before it the run stops, besides what the caller of `flags` says it needs.
        exit_code: of a process that ends for a reason; used where a signal arrives before training.
    """

    def __init__(
        self,
        *,
        deadline: float | None = None,
        margin_s: float = 0.0,
        exit_code: Callable[[str], int] = lambda reason: EXIT_STOPPED,
    ):
        self.deadline, self._margin_s, self._exit_code = deadline, margin_s, exit_code
        self.on_abort: Callable[[], None] = lambda: None
        """called, for a second at most, before a second SIGINT ends the process"""
        self._asked: set[str] = set()
        self._first_interrupt_s: float | None = None
        self._training = False
        self._before: dict[int, object] = {}
        self._pipe: tuple[int, int] | None = None
        self._thread: threading.Thread | None = None

    def install(self) -> None:
        """Take the signals over. Without effect outside the main thread, where Python does not allow it (library use)."""
        if threading.current_thread() is not threading.main_thread():
            logger.warning("not in the main thread: signals keep their usual effect")
            return
        self._pipe = os.pipe()
        os.set_blocking(self._pipe[1], False)
        for number in SIGNALS:
            self._before[number] = signal.signal(number, _nothing)
        signal.set_wakeup_fd(self._pipe[1], warn_on_full_buffer=False)
        os.register_at_fork(after_in_child=self._leave_child)
        self._thread = threading.Thread(target=self._listen, args=(self._pipe[0],), name="signals", daemon=True)
        self._thread.start()

    def _leave_child(self) -> None:
        """A forked process would write the signals it gets into this one's pipe. Those that load batches ignore them, for only this process
        decides when to stop; those that tokenise, before training, are ended by SIGTERM as ever."""
        if self._pipe is None:
            return
        self._pipe = None
        signal.set_wakeup_fd(-1)
        for number, handler in self._before.items():
            signal.signal(number, signal.SIG_IGN if self._training else handler)  # type: ignore[arg-type]

    def training_starts(self) -> None:
        """From here on a signal waits for the next place to stop."""
        self._training = True

    def close(self) -> None:
        """Give the signals back."""
        if self._pipe is None or self._thread is None:
            return
        signal.set_wakeup_fd(-1)
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]
        os.write(self._pipe[1], bytes([_CLOSE]))
        self._thread.join()
        for end in self._pipe:
            os.close(end)
        self._pipe = self._thread = None

    def flags(self, needed_s: float) -> list[float]:
        """One number a reason, 1 where this process was asked; to be summed over processes.

        Args:
            needed_s: how long the next step and a save take at most.
        """
        if self.deadline is not None and time.time() + needed_s + self._margin_s >= self.deadline:
            self._asked.add(TIME_LIMIT)
        return [float(reason in self._asked) for reason in REASONS]

    def _listen(self, pipe: int) -> None:
        while True:
            for number in os.read(pipe, 64):
                if number == _CLOSE:
                    return
                if number in SIGNALS:
                    self._receive(signal.Signals(number).name)

    def _receive(self, name: str) -> None:
        now = time.monotonic()
        if not self._training:
            _say(f"{name} before training began: nothing to save")
            os._exit(130 if name == "SIGINT" else self._exit_code(name))
        if name == "SIGINT" and self._first_interrupt_s is not None and now - self._first_interrupt_s >= SECOND_AFTER_S:
            _say("second SIGINT: ending at once; the last checkpoint stands")
            last_words = threading.Thread(target=self.on_abort, daemon=True)
            last_words.start()
            last_words.join(timeout=ABORT_S)
            os._exit(130)
        if name == "SIGINT" and self._first_interrupt_s is None:
            self._first_interrupt_s = now
        if name not in self._asked:
            self._asked.add(name)
            again = "; once more to end at once, without saving" if name == "SIGINT" else ""
            _say(f"{name}: stopping after this step{again}")


def first_reason(sums: Sequence[float]) -> str | None:
    """The reason that summed `flags` give, if any."""
    return next((reason for reason, count in zip(REASONS, sums, strict=True) if count), None)


def _nothing(_number: int, _frame: FrameType | None) -> None:
    """The thread acts; a handler has to be there, or the signal would not be noted at all."""


def _say(text: str) -> None:
    """From a thread, also when the process ends at once."""
    print(f"\nlora-dist[{os.getpid()}]: {text}", file=sys.stderr, flush=True)
