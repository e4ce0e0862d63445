"""Perplexity of a model directory, with or without an adapter, on any text; alone or under torchrun."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Literal

import torch

from lora_dist.data.loader import eval_batches
from lora_dist.data.sources import TextSource
from lora_dist.data.text import hold_out, load_windows
from lora_dist.engine.open_model import open_model
from lora_dist.evaluation.perplexity import EvalResult, evaluate_loss
from lora_dist.log import UserError
from lora_dist.parallel import World


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
    trust_remote_code: bool = False
    """Run model code that comes with the model."""

    def problems(self) -> Iterator[str]:
        if not self.model:
            yield "MODEL: found nothing, expected the directory of a model"
        for name in ("block_size", "max_samples", "batch_size", "holdout_windows"):
            value = getattr(self, name)
            if value is not None and value < 1:
                yield f"{name}: found {value}, expected 1 or more"
        if len(self.bands) != 3 or sorted(self.bands) != self.bands:
            yield f"bands: found {self.bands}, expected three rising numbers"


@dataclass(frozen=True)
class EvalReport:
    """Figures, and how they were obtained."""

    result: EvalResult
    context: int
    windows: int
    dtype: str
    split: str


# The rooms below name options as `lora-dist train` does; here they are called otherwise.
_KEYS = {"data.": "", "model.name_or_path": "MODEL", "model.config_name": "config_name"}


def evaluate(args: EvalArgs, world: World, progress: Callable[[int], Callable[[], None]]) -> EvalReport:
    """Evaluate. Collective.

    Args:
        progress: given the number of batches, returns what to call after each.

    Raises:
        UserError: something is missing, broken or does not fit together.
    """
    try:
        return _evaluate(args, world, progress)
    except UserError as error:
        raise error.renamed(_KEYS) from error


def _evaluate(args: EvalArgs, world: World, progress: Callable[[int], Callable[[], None]]) -> EvalReport:
    with world.main_first():
        opened = open_model(
            args.model,
            args.adapter,
            config_name=args.config_name,
            dtype=None if args.dtype == "auto" else getattr(torch, args.dtype),
            device=str(world.device),
            trust_remote_code=args.trust_remote_code,
            progress=world.is_main,
        )
    limit = getattr(opened.base.model.config, "max_position_embeddings", 2048)
    context = args.block_size or min(limit, 2048)
    if context > limit:
        raise UserError(f"block_size: found {context}, expected at most the model's context of {limit}")
    source = TextSource(
        dataset_name=args.dataset_name,
        dataset_config_name=args.dataset_config_name,
        text_column=args.text_column,
        document_separator=args.document_separator,
    )
    with world.main_first():
        splits = load_windows(
            source,
            opened.base.tokenizer,
            context_length=context,
            special_tokens=args.special_tokens,
            splits=(args.split, "train"),
            cache_dir=args.cache_dir,
        ).splits
    if args.split not in splits and (len(splits) > 1 or not _is_files(args.dataset_name)):
        raise UserError(f"split: {args.dataset_name} has no {args.split}, found {', '.join(splits)}")
    split = args.split if args.split in splits else "train"
    windows = splits[split]
    if args.holdout_windows is not None:
        windows = hold_out(windows, args.holdout_windows, args.seed)[1]
    if args.max_samples is not None:
        windows = windows.take(min(args.max_samples, len(windows)))
    batches = eval_batches(windows, batch_size=args.batch_size, rank=world.rank, world=world.size)
    tick = progress(-(-len(windows) // (args.batch_size * world.size)))
    result = evaluate_loss(opened.model, batches, world=world, samples=len(windows), on_batch=tick)
    return EvalReport(
        result, context, len(windows), str(next(opened.base.model.parameters()).dtype).removeprefix("torch."), split
    )


def _is_files(name: str) -> bool:
    return name.endswith((".txt", ".json", ".jsonl", ".csv", ".parquet"))
