"""Options of eval.

Alone, `lora-dist eval MODEL` tells the loss over packed windows of `dataset_name`, as training does. With `metrics`, `texts` or
`compare` it writes a report: `engine/report.py`'s `evaluate_models(args, world)`, which other commands call too.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal

from lora_dist.arguments.quantised import QuantisedArgs

PERPLEXITY_BANDS = (7.0, 10.0, 50.0)
"""upper ends of ideal, good and fair, of Llama-2-7B on WikiText-2"""
METRICS = ("ppl", "zeroshot", "speed", "memory")
ZERO_SHOT_TASKS = ("boolq", "piqa", "hellaswag", "winogrande", "arc_easy", "arc_challenge", "openbookqa")
_COUNTS = (
    "block_size", "max_samples", "batch_size", "holdout_windows", "stride", "limit", "num_fewshot", "max_new_tokens", "prompt_tokens",
    "generation_batch_size", "repetitions",
)  # fmt: skip
_REPORT_ONLY = ("stride", "average", "tasks", "task_data", "limit", "num_fewshot", "output_markdown", "trust_pickle")


@dataclass
class _Evaluated:
    """What to evaluate. A base of `EvalArgs`, so that help lists it first."""

    model: str = ""
    """Directory (or hub name) of the model."""
    adapter: str | None = None
    """Adapter folder to put on it."""


@dataclass
class EvalArgs(QuantisedArgs, _Evaluated):
    """Loss and perplexity of a model on text; with metrics, texts or compare a report: perplexities, zero-shot accuracy, speed, memory."""

    metrics: list[Literal["ppl", "zeroshot", "speed", "memory", "all"]] = field(default_factory=list)
    """Make a report of these (comma-separated); with texts or compare alone: ppl."""
    compare: list[str] = field(default_factory=list)
    """Models to report side by side instead of MODEL: NAME=DIR or NAME=DIR+ADAPTER, comma-separated; dense and pruned name the ends of
    recovery."""
    texts: list[str] = field(default_factory=list)
    """Texts of metric ppl, comma-separated: wikitext2, ptb and c4 from the hub, or NAME=FILE (also NAME=DIRECTORY); default: that of
    dataset_name."""
    stride: int | None = None
    """Tokens that windows over a text are apart (each scores what is new to it); default: block_size."""
    average: Literal["token", "window"] = "token"
    """token: every scored token counts the same. window: the mean of whole windows' means, the tail left out, as Wanda does."""
    tasks: list[str] = field(default_factory=lambda: list(ZERO_SHOT_TASKS))
    """Tasks of metric zeroshot: any of lm-eval's, or YAML files of tasks (comma-separated)."""
    task_data: str | None = None
    """Folder of local files for the default tasks, one a task; default: the hub."""
    limit: int | None = None
    """Questions of each task at most."""
    num_fewshot: int = 0
    """Solved examples before each question."""
    max_new_tokens: int = 64
    """Tokens to generate for metrics speed and memory."""
    prompt_tokens: int = 128
    """Tokens of each prompt for the same."""
    generation_batch_size: int = 1
    """Prompts at a time for the same."""
    repetitions: int = 5
    """How often to time them, behind a warm-up."""
    dataset_name: str = "wikitext"
    """Hub name, local directory, or local files (comma-separated)."""
    dataset_config_name: str | None = None
    """Configuration of a hub data set."""
    split: str = "test"
    """Split to evaluate; single files are one split, whatever its name."""
    text_column: str = "text"
    """Column that holds the text in JSON, CSV and parquet."""
    document_separator: str | None = None
    """Text that separates documents inside .txt files."""
    special_tokens: Literal["auto", "bos", "eos", "both", "none"] = "auto"
    """Special tokens put around each document."""
    block_size: int | None = None
    """Context length in tokens; default: the model's, 2048 at most."""
    holdout_windows: int | None = None
    """Evaluate only the windows that train holds out of this data set: its data.holdout_windows (and --seed its train.seed)."""
    seed: int = 42
    """Seed of the held-out windows."""
    max_samples: int | None = None
    """Use at most this many windows."""
    batch_size: int = 8
    """Windows a process holds at once."""
    config_name: str | None = None
    """Where to take config and tokenizer from if the model has none of its own."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Precision to compute in; auto: as stored."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to compute; auto: GPUs if there are any."""
    cache_dir: str | None = None
    """Where tokenised text is kept."""
    bands: list[float] = field(default_factory=lambda: list(PERPLEXITY_BANDS))
    """Perplexities up to which a model is called ideal, good and fair; the defaults are for Llama-2-7B on WikiText-2."""
    output: str | None = None
    """JSON file to write the figures to."""
    output_markdown: str | None = None
    """Markdown file for a report's table; default: beside output."""
    strategy: Literal["ddp", "fsdp2"] = "ddp"
    """Under torchrun: ddp holds the whole model on every process, fsdp2 a part of it."""
    trust_remote_code: bool = False
    """Run model code that comes with the model."""
    trust_pickle: bool = False
    """In a report: open a pickled model that names classes outside of the allow-list; code in it runs."""

    @property
    def makes_report(self) -> bool:
        """Whether it is more than the loss over packed windows that is asked for."""
        return bool(self.metrics or self.texts or self.compare)

    @property
    def chosen_metrics(self) -> tuple[str, ...]:
        """Of a report, in its order."""
        return tuple(m for m in METRICS if m in (self.metrics or ["ppl"]) or "all" in self.metrics)

    def problems(self) -> Iterator[str]:
        yield from QuantisedArgs.problems(self)
        if bool(self.model) == bool(self.compare):
            found = "both" if self.model else "nothing"
            yield f"MODEL, compare: found {found}, expected the directory of a model, or several with --compare NAME=DIR,NAME=DIR"
        least = {"max_new_tokens": 2, "num_fewshot": 0}
        for name in _COUNTS:
            value = getattr(self, name)
            if value is not None and value < least.get(name, 1):
                yield f"{name}: found {value}, expected {least.get(name, 1)} or more"
        yield from self._report_problems()
        if not 0 <= self.seed < 2**63:
            yield f"seed: found {self.seed}, expected a number from 0 up to 2**63"
        if len(self.bands) != 3 or sorted(self.bands) != self.bands:
            yield f"bands: found {self.bands}, expected three rising numbers"

    def _report_problems(self) -> Iterator[str]:
        for option, example in (("compare", "pruned=DIR"), ("texts", "stories=FILE.txt")):
            names = [entry.partition("=")[0] for entry in getattr(self, option)]
            for entry in getattr(self, option):
                if option == "compare" and not re.fullmatch(r"[^=]+=.+", entry):
                    yield f"{option}: found {entry}, expected NAME=DIR or NAME=DIR+ADAPTER, such as {example}"
                if option == "texts" and ("=" in entry) and not re.fullmatch(r"[^=]+=.+", entry):
                    yield f"{option}: found {entry}, expected wikitext2, ptb, c4 or NAME=FILE, such as {example}"
            for name in sorted({name for name in names if names.count(name) > 1}):
                yield f"{option}: found {name} twice, expected every name once"
        if self.compare and self.adapter:
            yield "adapter: found with compare, expected it behind its model there: NAME=DIR+ADAPTER"
        if self.average == "window" and self.stride is not None and self.stride != self.block_size:
            yield f"stride: found {self.stride} with average window, expected none: whole windows do not overlap"
        if self.stride is not None and self.block_size is not None and self.stride > self.block_size:
            yield f"stride: found {self.stride}, expected at most block_size, {self.block_size}: else tokens between windows are left out"
        if not self.tasks and "zeroshot" in self.chosen_metrics:
            yield "tasks: found nothing, expected some of lm-eval's tasks"
        if not self.makes_report:
            alone = [name for name in _REPORT_ONLY if getattr(self, name) != getattr(EvalArgs(), name)]
            if alone:
                yield f"{', '.join(alone)}: found without a report, expected --metrics, --texts or --compare with it"
