"""Merge an adapter into its base and prove two things: pruned tiles are exactly zero, and logits are what they were."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lora_dist.adapter import merge_adapter, update_outside_mask
from lora_dist.arguments import MergeArgs
from lora_dist.blocks import Guard, Pattern
from lora_dist.engine.open_model import open_model
from lora_dist.log import GuardError, UserError
from lora_dist.models.architecture import prunable_linears
from lora_dist.models.export import check_output, prove_zeros, save_model

PROBE_ROWS, PROBE_TOKENS = 4, 64
MAX_LOGITS_ERROR = 1e-3
"""largest difference of merged and adapter logits, in float32, over the largest logit; rounding gives about 1e-6"""


@dataclass(frozen=True)
class MergeReport:
    """What was proven, and what it cost."""

    out: Path
    pattern_digest: str | None
    """of the merged model; None if it has no pattern (any more)"""
    zero_tiles: int
    """pruned tiles (elements, for an element mask) found exactly 0.0 in the written files"""
    logits_error: float
    """largest |merged - adapter| logit over the largest |adapter| logit, on random tokens, in the merged precision"""
    logits_error_fp32: float
    """the same with merged weights held in float32, before rounding to the written precision"""
    update_lost: float
    """share of the squared update that fell on pruned weights and was set to zero (--project), else 0"""


@torch.no_grad()
def _probe_logits(model: nn.Module, ids_BL: Tensor) -> Tensor:
    return model(input_ids=ids_BL, use_cache=False).logits.float()


def _relative(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max() / b.abs().max().clamp_min(1e-30))


def merge(args: MergeArgs) -> MergeReport:
    """Merge, prove, write.

    Raises:
        UserError: bad input; plain LoRA into a pruned base without `project` or `densify`.
        GuardError: adapter of another base; a pruned tile that is not zero. Nothing is left in OUT.
    """
    check_output(args.out)
    opened = open_model(
        args.base,
        args.adapter,
        config_name=args.config_name,
        dtype=torch.float32,  # the sum is made in float32 and rounded once
        device=args.device,
        trust_remote_code=args.trust_remote_code,
    )
    pattern = opened.found.pattern
    plain_on_pruned = not opened.masked and pattern is not None
    if plain_on_pruned and not (args.project or args.densify):
        lost = update_outside_mask(opened.model, pattern)  # type: ignore[arg-type]
        raise UserError(
            f"ADAPTER: found plain LoRA for a base with {pattern.sparsity:.0%} pruned weights; merging it would destroy the pattern. "  # type: ignore[union-attr]
            f"Two ways out: --project merges and sets pruned tiles back to zero (throws away {lost:.0%} of the squared update: expect "
            "a much worse model, evaluate it), --densify merges all of it and gives the sparsity up"
        )
    tokens = torch.Generator().manual_seed(0)
    vocabulary = opened.base.model.get_input_embeddings().num_embeddings
    length = min(PROBE_TOKENS, getattr(opened.base.model.config, "max_position_embeddings", PROBE_TOKENS))
    ids_BL = torch.randint(vocabulary, (PROBE_ROWS, length), generator=tokens).to(args.device)
    before = _probe_logits(opened.model, ids_BL)
    project = args.project and plain_on_pruned
    lost = update_outside_mask(opened.model, pattern) if project else 0.0  # type: ignore[arg-type]
    merged: Any = merge_adapter(opened.model)
    if project:
        _apply(merged, pattern)  # type: ignore[arg-type]
    error_fp32 = _relative(_probe_logits(merged, ids_BL), before)
    if error_fp32 > MAX_LOGITS_ERROR and not project:
        raise GuardError(
            f"guard after merging: merged logits differ from the adapter's by {error_fp32:.1e} of the largest, expected at most "
            f"{MAX_LOGITS_ERROR:.0e}; nothing was written"
        )
    kept = None if args.densify and plain_on_pruned else pattern
    _check_zeros(merged, kept, "after merging")
    merged.to(opened.base.stored_dtype if args.dtype == "auto" else getattr(torch, args.dtype))
    error = _relative(_probe_logits(merged, ids_BL), before)
    merged.config.use_cache = opened.base.use_cache
    save_model(merged, opened.base.tokenizer, args.out, pattern=kept)
    try:
        zero_tiles = 0 if kept is None else prove_zeros(Path(args.out), kept, transposed=_transposed(merged))
    except UserError:
        shutil.rmtree(args.out)  # this call made it
        raise
    report = MergeReport(Path(args.out), kept.digest if kept else None, zero_tiles, error, error_fp32, lost)
    (Path(args.out) / "merge.json").write_text(
        json.dumps({**{k: str(v) if isinstance(v, Path) else v for k, v in vars(report).items()}, **vars(args)}, indent=1)
    )
    return report


def _apply(model: nn.Module, pattern: Pattern) -> None:
    for linear in prunable_linears(model):
        if linear.name in pattern:
            linear.weight_OI.masked_fill_(~pattern[linear.name].expand(linear.weight_OI.device), 0.0)


def _transposed(model: nn.Module) -> set[str]:
    return {linear.name for linear in prunable_linears(model) if linear.transposed}


def _check_zeros(model: nn.Module, pattern: Pattern | None, when: str) -> None:
    Guard(dict(model.named_parameters()), pattern, transposed=_transposed(model)).check_pattern(when)
