"""Who asks a run to stop, within one process; `tests/distributed/test_stop.py` has the real signals to real runs."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from collections.abc import Iterator

import pytest

from lora_dist.config import seconds
from lora_dist.engine.stop import REASONS, TIME_LIMIT, Stop, first_reason


@pytest.fixture
def stop() -> Iterator[Stop]:
    listening = Stop()
    listening.install()
    yield listening
    listening.close()


def asked(stop: Stop) -> str | None:
    deadline = time.monotonic() + 5
    while first_reason(stop.flags(0.0)) is None and time.monotonic() < deadline:
        time.sleep(0.001)
    return first_reason(stop.flags(0.0))


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", "SIGUSR1", "SIGUSR2"])
def test_a_signal_sets_a_flag_and_nothing_else(stop: Stop, name: str, capfd: pytest.CaptureFixture[str]) -> None:
    stop.training_starts()
    assert stop.flags(0.0) == [0.0] * len(REASONS)
    os.kill(os.getpid(), getattr(signal, name))
    assert asked(stop) == name
    assert f"{name}: stopping after this step" in capfd.readouterr().err


def test_closing_gives_the_signals_back() -> None:
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)]
    stop = Stop()
    stop.install()
    assert signal.getsignal(signal.SIGTERM) != before[0]
    stop.close()
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)] == before


def test_a_second_ctrl_c_within_a_moment_counts_as_the_first(stop: Stop) -> None:
    """A terminal and a launcher may both send one."""
    stop.training_starts()
    os.kill(os.getpid(), signal.SIGINT)
    assert asked(stop) == "SIGINT"
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(0.05)
    assert asked(stop) == "SIGINT"  # still alive


def test_the_deadline_counts_what_is_needed_and_the_margin() -> None:
    stop = Stop(deadline=time.time() + 100, margin_s=30)
    assert first_reason(stop.flags(60.0)) is None
    assert first_reason(stop.flags(71.0)) == TIME_LIMIT


def test_flags_of_several_processes_name_the_first_reason() -> None:
    sums = [0.0] * len(REASONS)
    assert first_reason(sums) is None
    sums[REASONS.index("SIGUSR1")], sums[REASONS.index(TIME_LIMIT)] = 1.0, 2.0
    assert first_reason(sums) == "SIGUSR1"


def _sleep() -> None:
    time.sleep(30)


@pytest.mark.parametrize("training", [False, True])
def test_a_forked_process_does_not_speak_for_this_one(stop: Stop, training: bool) -> None:
    """Pools that tokenise end their workers with SIGTERM; workers that load batches ignore it."""
    if training:
        stop.training_starts()
    child = multiprocessing.get_context("fork").Process(target=_sleep)
    child.start()
    time.sleep(0.1)
    child.terminate()
    child.join(0.5)
    assert child.is_alive() == training
    child.kill()
    child.join()
    assert first_reason(stop.flags(0.0)) is None


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("90", 90),
        ("1:30", 90),
        ("00:01:30", 90),
        ("1-00:00:00", 86400),
        ("0.5", 0.5),
        ("0", None),
        ("1-30", None),
        ("soon", None),
    ],
)
def test_durations(text: str, expected: float | None) -> None:
    assert seconds(text) == expected
