"""Settings as texts, and in which of them runs differ. Called by `monitor/report.py`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any


def setting_text(value: Any) -> str:
    """As a user would type it; what is not set is a dash."""
    if value is None or value == "" or value == []:
        return "–"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list):
        return ", ".join(map(setting_text, value))
    return f"{value:g}" if isinstance(value, float) else str(value)


def difference_rows(configs: Sequence[Mapping[str, Any]]) -> list[tuple[str, list[str]]]:
    """Dotted key and the text of each run's value, for the keys that runs differ in; runs without a configuration show so."""
    flat = [
        {f"{section}.{key}": value for section, values in config.items() for key, value in values.items()} for config in configs
    ]
    keys = dict.fromkeys(key for settings in flat for key in settings)
    known = [settings for settings in flat if settings]
    rows = []
    for key in keys:
        if any(settings.get(key) != known[0].get(key) for settings in known):
            texts = [setting_text(settings.get(key)) if settings else "not recorded" for settings in flat]
            rows.append((key, texts))
    return rows
