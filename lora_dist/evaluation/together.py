"""Work that every process does by itself, and that fails on all of them where it fails on one. Called by this room and `engine/report.py`."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from lora_dist.log import UserError
from lora_dist.parallel import World

T = TypeVar("T")


class FailedElsewhere(RuntimeError):
    """Another process could not do its part; says which, and why."""


def together(world: World, work: Callable[[], T], *, only_main: bool = False) -> T | None:
    """Collective, but `work` must not be: run it, and then ask whether it went well everywhere.

    Args:
        only_main: rank 0 works, the others wait and get None.

    Raises:
        What `work` raised here; where it failed on other ranks only, `UserError` if it was one there, else `FailedElsewhere`.
    """
    result, problem = None, None
    if world.is_main or not only_main:
        try:
            result = work()
        except Exception as error:
            if world.size == 1:
                raise
            problem = error
    told = None if problem is None else (isinstance(problem, UserError), say(problem))
    found = [(rank, entry) for rank, entry in enumerate(world.gather(told)) if entry is not None]
    if problem is not None:
        raise problem
    if found:
        rank, (mendable, line) = found[0]
        raise UserError(line) if mendable else FailedElsewhere(f"rank {rank}: {line}")
    return result


def main_first(world: World, work: Callable[[], T]) -> T:
    """Collective, but `work` must not be: rank 0 does it first and the others find what it left, such as downloaded files.

    Raises: as `together`.
    """
    first = together(world, work, only_main=True)
    result = together(world, lambda: first if world.is_main else work())
    assert result is not None
    return result


def say(error: BaseException) -> str:
    """One line: a user's mistake in its own words, anything else with its class."""
    text = " ".join(str(error).split())
    return text if isinstance(error, UserError | FailedElsewhere) else f"{type(error).__name__}: {text}"
