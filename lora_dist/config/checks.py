"""Checks that sections share, and durations."""

from __future__ import annotations

import re
from collections.abc import Iterator


def positive(section: str, obj: object, *names: str) -> Iterator[str]:
    for name in names:
        value = getattr(obj, name)
        if value is not None and value <= 0:
            yield f"{section}.{name}: found {value}, expected a number above 0"


def fraction(section: str, obj: object, *names: str) -> Iterator[str]:
    for name in names:
        value = getattr(obj, name)
        if not 0 <= value < 1:
            yield f"{section}.{name}: found {value}, expected a number from 0 up to but not including 1"


def seconds(text: str) -> float | None:
    """A duration: seconds, MM:SS, HH:MM:SS or D-HH:MM:SS (as Slurm writes it); None if it is none, or not above 0."""
    match = re.fullmatch(r"(?:(\d+)-(?=\d+:\d+:))?(?:(?:(\d+):)?(\d+):)?(\d+(?:\.\d+)?)", text.strip())
    if match is None:
        return None
    days, hours, minutes, rest = (float(part or 0) for part in match.groups())
    return ((days * 24 + hours) * 60 + minutes) * 60 + rest or None
