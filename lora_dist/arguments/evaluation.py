"""Options of eval."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal


@dataclass
class EvalArgs:
    """Loss and perplexity of a model on text, token-weighted over windows of the context length."""

    model: str = ""
    """Directory (or hub name) of the model."""
    adapter: str | None = None
    """Adapter folder to put on it."""
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
    bands: list[float] = field(default_factory=lambda: [7.0, 10.0, 50.0])
    """Perplexities up to which a model is called ideal, good and fair; the defaults are for Llama-2-7B on WikiText-2."""
    output: str | None = None
    """JSON file to write the figures to."""
    strategy: Literal["ddp", "fsdp2"] = "ddp"
    """Under torchrun: ddp holds the whole model on every process, fsdp2 a part of it."""
    trust_remote_code: bool = False
    """Run model code that comes with the model."""

    def problems(self) -> Iterator[str]:
        if not self.model:
            yield "MODEL: found nothing, expected the directory of a model"
        for name in ("block_size", "max_samples", "batch_size", "holdout_windows"):
            value = getattr(self, name)
            if value is not None and value < 1:
                yield f"{name}: found {value}, expected 1 or more"
        if not 0 <= self.seed < 2**63:
            yield f"seed: found {self.seed}, expected a number from 0 up to 2**63"
        if len(self.bands) != 3 or sorted(self.bands) != self.bands:
            yield f"bands: found {self.bands}, expected three rising numbers"
