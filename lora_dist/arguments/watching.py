"""Options of report and watch."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from lora_dist.arguments.evaluation import PERPLEXITY_BANDS


@dataclass
class ReportArgs:
    """Write a report of one run or several as one HTML page that needs no network, and its charts as PNG files beside it."""

    runs: list[str] = field(default_factory=list)
    """Run folders (train.output_dir), or metrics.jsonl or train.log alone."""
    output: str | None = None
    """HTML file; default: report.html in the run folder, of several runs in the working directory. An earlier one is replaced."""
    title: str | None = None
    """Heading; default: the names of the runs."""
    evaluation: str | None = None
    """JSON file of lora-dist eval --output, shown as a table: dense, pruned, recovered."""
    bands: list[float] = field(default_factory=lambda: list(PERPLEXITY_BANDS))
    """Upper ends of the perplexity bands ideal, good, fair (the default is for Llama-2-7B on WikiText-2); none: []."""

    def problems(self) -> Iterator[str]:
        if not self.runs:
            yield "RUN: found nothing, expected the folder of a run (train.output_dir)"
        if self.output is not None and not self.output.endswith((".html", ".htm")):
            yield f"output: found {self.output}, expected a file that ends with .html"
        if self.bands and (len(self.bands) != 3 or sorted(self.bands) != self.bands or self.bands[0] <= 0):
            yield f"bands: found {self.bands}, expected three rising numbers above 0, or []"


@dataclass
class WatchArgs:
    """Follow a run in the terminal until it ends: curves, rates, time left, GPU use, warnings. Ctrl-C ends the watching, not the run."""

    run: str = ""
    """Run folder (train.output_dir), or metrics.jsonl or train.log alone, also copied from elsewhere while they grow."""
    once: bool = False
    """Show it once, as plain text where standard output is no terminal (where this is the default)."""
    interval_s: float = 2.0
    """Seconds between looks at the files."""
    svg: str | None = None
    """SVG file for a picture of what is shown last, in colours, at most 100 characters wide, that needs no network."""

    def problems(self) -> Iterator[str]:
        if not self.run:
            yield "RUN: found nothing, expected the folder of a run (train.output_dir)"
        if self.svg is not None and not (self.svg.endswith(".svg") and Path(self.svg).absolute().parent.is_dir()):
            yield f"svg: found {self.svg}, expected a file that ends with .svg, in a folder that is there"
        if not self.interval_s > 0:
            yield f"interval_s: found {self.interval_s}, expected a number above 0"
