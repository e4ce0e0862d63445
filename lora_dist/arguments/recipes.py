"""Options of `lora-dist recipe`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass


@dataclass
class RecipeArgs:
    """Run the stages of a recipe, one after the other: prune, train, merge, eval, as often as it says. What is done is skipped, what was
    broken off is gone on with."""

    file: str = ""
    """YAML: output_dir, model, stages; also defaults by verb, and processes."""
    dry_run: bool = False
    """Check every stage's options and show what would be run, but run nothing."""

    def problems(self) -> Iterator[str]:
        if not self.file:
            yield "FILE: found nothing, expected lora-dist recipe FILE.yaml"
