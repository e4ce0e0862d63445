"""Options of classify."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal


@dataclass
class ClassifyArgs:
    """Label a text, each line of a file, or one text after the other from a terminal or a pipe."""

    model: str = ""
    """Directory (or hub name) of a classifier, or of the base of an adapter that train wrote with model.task_type SEQ_CLS."""
    adapter: str | None = None
    """Folder of that adapter."""
    text: str | None = None
    """Text to label; without it and without file: standard input, a text a line."""
    text_pair: str | None = None
    """Second text of a pair."""
    file: str | None = None
    """File with a text a line; a tab separates the two texts of a pair."""
    max_length: int | None = None
    """Tokens; longer texts are cut. Default: the model's context."""
    batch_size: int = 16
    """Texts at once."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to compute."""
    trust_remote_code: bool = False
    """Run model code that comes with the model."""

    def problems(self) -> Iterator[str]:
        if not self.model:
            yield "MODEL: found nothing, expected the directory of a model"
        if self.text is not None and self.file is not None:
            yield "text, file: found both, expected one at most"
        if self.text_pair is not None and self.text is None:
            yield "text_pair: found without text, expected both"
        for name in ("batch_size", "max_length"):
            value = getattr(self, name)
            if value is not None and value < 1:
                yield f"{name}: found {value}, expected 1 or more"
