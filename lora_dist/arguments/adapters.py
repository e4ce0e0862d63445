"""Options of `lora-dist adapters`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal


@dataclass
class AdaptersArgs:
    """Several adapters of one base: list DIR | add DIR NAME FOLDER | switch DIR NAME | merge-weighted DIR NEW A=0.7 B=0.3 | delete DIR NAME."""

    action: str = ""
    """list, add, switch, merge-weighted or delete."""
    folder: str = ""
    """Folder that holds the adapters; add makes it."""
    name: str = ""
    """Name of the adapter in it."""
    source: str = ""
    """add: folder that train wrote."""
    weights: list[str] = field(default_factory=list)
    """merge-weighted: NAME=WEIGHT of each adapter that goes into the sum."""
    combination_type: Literal["cat", "svd", "linear"] = "cat"
    """merge-weighted: cat is exact, its rank the sum of the ranks; svd is nearest at the largest rank; linear adds factors, roughly."""

    def problems(self) -> Iterator[str]:
        actions = ("list", "add", "switch", "merge-weighted", "delete")
        if self.action not in actions:
            yield f"ACTION: found {self.action or 'nothing'}, expected one of {', '.join(actions)}"
            return
        if not self.folder:
            yield f"DIR: found nothing, expected lora-dist adapters {self.action} DIR"
        if self.action != "list" and not self.name:
            yield f"NAME: found nothing, expected lora-dist adapters {self.action} DIR NAME"
        if self.action == "add" and not self.source:
            yield "FOLDER: found nothing, expected lora-dist adapters add DIR NAME FOLDER"
        if self.action == "merge-weighted" and not self.weights:
            yield "weights: found none, expected lora-dist adapters merge-weighted DIR NEW A=0.7 B=0.3"
        names = [weight.partition("=")[0] for weight in self.weights]
        if len(set(names)) < len(names):
            yield f"weights: found {', '.join(sorted({name for name in names if names.count(name) > 1}))} twice, expected each name once"
        for weight in self.weights:
            name, equals, number = weight.partition("=")
            if not name or not equals or not _is_number(number):
                yield f"weights: found {weight}, expected NAME=NUMBER"


def _is_number(text: str) -> bool:
    try:
        return float(text) == float(text)
    except ValueError:
        return False
