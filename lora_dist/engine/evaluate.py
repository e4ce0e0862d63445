"""Loss of a model directory, with or without an adapter, over the packed windows of any text; alone or under torchrun.

What `lora-dist eval` does without metrics; `report.py` is the other half.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from lora_dist.arguments import EvalArgs
from lora_dist.data.loader import eval_batches
from lora_dist.data.sources import TextSource
from lora_dist.data.text import Windows, hold_out, load_windows
from lora_dist.engine.open_model import OpenModel, asked_quantisation, open_model, require_language_model
from lora_dist.evaluation.perplexity import EvalResult, evaluate_loss
from lora_dist.evaluation.together import main_first
from lora_dist.log import UserError
from lora_dist.parallel import World


@dataclass(frozen=True)
class EvalReport:
    """Figures, and how they were obtained."""

    result: EvalResult
    context: int
    windows: int
    dtype: str
    split: str


# The rooms below name options as `lora-dist train` does; here they are called otherwise.
KEYS = {"data.": "", "model.name_or_path": "MODEL", "model.config_name": "config_name"}


def evaluate(args: EvalArgs, world: World, progress: Callable[[int], Callable[[], None]]) -> EvalReport:
    """Evaluate. Collective.

    Args:
        progress: given the number of batches, returns what to call after each.

    Raises:
        UserError: something is missing, broken or does not fit together.
    """
    try:
        opened = open_for_evaluation(args, args.model, args.adapter, world)
        context = context_of(args, opened)
        result, windows, split = packed_loss(args, opened, context, world, progress)
    except UserError as error:
        raise error.renamed(KEYS) from error
    return EvalReport(result, context, len(windows), dtype_of(opened), split)


def open_for_evaluation(args: EvalArgs, model: str, adapter: str | None, world: World) -> OpenModel:
    """Collective. A model as the options say."""
    opened = open_model(
        model,
        adapter,
        world=world,
        strategy=args.strategy,
        config_name=args.config_name,
        dtype=None if args.dtype == "auto" else getattr(torch, args.dtype),
        trust_remote_code=args.trust_remote_code,
        quantisation=asked_quantisation(args),
        as_stored=args.as_stored,
        storage=args.storage,
        scoring=True,
    )
    require_language_model(opened, model)
    return opened


def dtype_of(opened: OpenModel) -> str:
    """What the base computes in, and how it is quantised: float32, ..."""
    dtype = str(next(opened.base.model.parameters()).dtype).removeprefix("torch.")
    return dtype if opened.quantisation is None else f"{dtype}, base in {opened.quantisation}"


def context_of(args: EvalArgs, opened: OpenModel) -> int:
    """Tokens a window.

    Raises:
        UserError: more than the model takes.
    """
    limit = getattr(opened.base.model.config, "max_position_embeddings", 2048)
    context = args.block_size or min(limit, 2048)
    if context > limit:
        raise UserError(f"block_size: found {context}, expected at most the model's context of {limit}")
    return context


def packed_loss(
    args: EvalArgs, opened: OpenModel, context: int, world: World, progress: Callable[[int], Callable[[], None]]
) -> tuple[EvalResult, Windows, str]:
    """Collective. The loss over the packed windows of `dataset_name`, those windows, and the split that they are of.

    Raises:
        UserError: no such data or split, or too little of it.
    """
    windows, split = main_first(world, lambda: _packed_windows(args, opened.base.tokenizer, context))
    batches = eval_batches(windows, batch_size=args.batch_size, rank=world.rank, world=world.size)
    tick = progress(-(-len(windows) // (args.batch_size * world.size)))
    return evaluate_loss(opened.model, batches, world=world, samples=len(windows), on_batch=tick), windows, split


def _packed_windows(args: EvalArgs, tokenizer: Any, context: int) -> tuple[Windows, str]:
    source = TextSource(
        dataset_name=args.dataset_name,
        dataset_config_name=args.dataset_config_name,
        text_column=args.text_column,
        document_separator=args.document_separator,
    )
    splits = load_windows(
        source,
        tokenizer,
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
    return windows if args.max_samples is None else windows.take(min(args.max_samples, len(windows))), split


def _is_files(name: str) -> bool:
    return name.endswith((".txt", ".json", ".jsonl", ".csv", ".parquet"))
