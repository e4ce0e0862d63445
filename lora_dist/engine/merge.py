"""Merge an adapter into its base and prove two things: pruned tiles are exactly zero, and logits are what they were.

In the memory of one process, or shard by shard under fsdp2, where no process ever holds the whole model.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lora_dist.adapter import (
    bias_update,
    compute_beside,
    is_adapter_parameter,
    layer_update,
    lora_layers,
    merge_adapter,
    update_outside_mask,
    whole_layers,
)
from lora_dist.arguments import MergeArgs
from lora_dist.blocks import Guard, Pattern
from lora_dist.engine.base import make_guard, require_finite
from lora_dist.engine.open_model import OpenModel, adapter_quantisation, open_model
from lora_dist.log import GuardError, UserError
from lora_dist.models.architecture import prunable_linears
from lora_dist.models.block_storage import require_tiles
from lora_dist.models.export import StreamedModel, check_output, plan_shards, prove_zeros, save_model
from lora_dist.models.quantised import Quantisation
from lora_dist.parallel import World, plain_name

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
    quantised: QuantisedReport | None = None
    """where the adapter was trained on a quantised base"""


@dataclass(frozen=True)
class QuantisedReport:
    """Logits of an adapter of a quantised base, in float32; differences as in `MergeReport`."""

    quantisation: str
    into: str
    """dequantised or original: what it was merged into"""
    logits_error: float
    """merged against the quantised base with its adapter; int8 quantises inputs as well, and no ordinary weights can do that"""
    other_logits_difference: float
    """the adapter on de-quantised weights against the adapter on stored ones"""


@torch.no_grad()
def probe_logits(model: nn.Module, ids_BL: Tensor) -> Tensor:
    """Logits in float32, (B, L, vocabulary); of a classifier (B, classes)."""
    cache = {"use_cache": False} if hasattr(model, "generation_config") and model.generation_config is not None else {}
    return model(input_ids=ids_BL, **cache).logits.float()


def relative_difference(a: Tensor, b: Tensor) -> float:
    """Largest |a - b| over the largest |b|."""
    return float((a - b).abs().max() / b.abs().max().clamp_min(1e-30))


def merge(args: MergeArgs, world: World) -> MergeReport:
    """Collective. Merge, prove, write.

    Raises:
        UserError: bad input; plain LoRA into a pruned base without `project` or `densify`.
        GuardError: adapter of another base; a pruned tile that is not zero. Nothing is left in OUT.
    """
    world.on_main(lambda: check_output(args.out))
    trained_on = adapter_quantisation(args.adapter)
    probes = _probe_forms(args, world, trained_on)
    opened = _open(args, world, "dequantised" if trained_on is None else args.into)
    pattern = opened.found.pattern
    plain_on_pruned = not opened.masked and pattern is not None
    if plain_on_pruned and not (args.project or args.densify):
        lost = update_outside_mask(updates(opened), pattern)  # type: ignore[arg-type]
        raise UserError(
            f"ADAPTER: found an unmasked update for a base with {pattern.sparsity:.0%} pruned weights; merging it would destroy the pattern. "  # type: ignore[union-attr]
            f"Two ways out: --project merges and sets pruned tiles back to zero (throws away {lost:.0%} of the squared update: expect "
            "a much worse model, evaluate it), --densify merges all of it and gives the sparsity up"
        )
    project = pattern if args.project and plain_on_pruned else None
    kept = None if args.densify and plain_on_pruned else pattern
    if args.storage == "blocks":
        require_tiles(kept, args.base, key="storage")
    lost = update_outside_mask(updates(opened), project) if project is not None else 0.0
    dtype = opened.base.stored_dtype if args.dtype == "auto" else getattr(torch, args.dtype)
    merging = merge_sharded if opened.sharded is not None else merge_whole
    errors = merging(opened, world, Path(args.out), project=project, kept=kept, dtype=dtype, storage=args.storage)
    transposed = {linear.name for linear in opened.linears if linear.transposed}
    quantised = None
    if trained_on is not None:
        other = relative_difference(probes["original"], probes["dequantised"])
        quantised = QuantisedReport(str(trained_on), args.into, relative_difference(errors.logits, probes["quantised"]), other)

    def prove() -> MergeReport:
        try:
            if trained_on is not None and trained_on.bits == 4 and args.into == "dequantised":
                assert quantised is not None
                check_logits(quantised.logits_error, project=project)
            zero_tiles = 0 if kept is None else prove_zeros(Path(args.out), kept, transposed=transposed)
        except UserError:
            shutil.rmtree(args.out)  # this call made it
            raise
        report = MergeReport(
            Path(args.out), kept.digest if kept else None, zero_tiles, errors.rounded, errors.float32, lost, quantised
        )
        (Path(args.out) / "merge.json").write_text(json.dumps({**asdict(report), **vars(args)}, indent=1, default=str))
        return report

    return world.on_main(prove)


def _open(args: MergeArgs, world: World, form: str) -> OpenModel:
    """Collective. Base and adapter, the base in one of its forms: quantised, dequantised (as stored, if it never was), original."""
    opened = open_model(
        args.base,
        args.adapter,
        world=world,
        strategy=args.strategy,
        config_name=args.config_name,
        dtype=torch.float32,  # the sum is made in float32 and rounded once
        trust_remote_code=args.trust_remote_code,
        as_stored=form == "original",
        dequantise=form == "dequantised",
    )
    compute_beside(opened.model)
    return opened


def _probe_forms(args: MergeArgs, world: World, trained_on: Quantisation | None) -> dict[str, Tensor]:
    """Collective. Logits of an adapter of a quantised base, by the base's form, one after the other; nothing for other adapters."""
    found = {}
    for form in ("quantised", "dequantised", "original") if trained_on is not None else ():
        opened = _open(args, world, form)
        found[form] = probe_logits(opened.model, probe_tokens(opened.base.model, world.device))
    return found


def check_logits(error: float, *, project: Pattern | None) -> None:
    """Raises GuardError where merging changed what the model computes."""
    if error > MAX_LOGITS_ERROR and project is None:
        raise GuardError(
            f"guard after merging: merged logits differ from the adapter's by {error:.1e} of the largest, expected at most "
            f"{MAX_LOGITS_ERROR:.0e}; nothing was written"
        )


def probe_tokens(model: Any, device: torch.device) -> Tensor:
    """Random token ids (rows, tokens), the same at every call."""
    vocabulary = model.get_input_embeddings().num_embeddings
    length = min(PROBE_TOKENS, getattr(model.config, "max_position_embeddings", PROBE_TOKENS))
    return torch.randint(vocabulary, (PROBE_ROWS, length), generator=torch.Generator().manual_seed(0)).to(device)


def updates(opened: OpenModel) -> Iterator[tuple[str, Tensor]]:
    """(name in the base, delta_OI) of every adapted linear, float32; collective where the model is sharded."""
    return _of_layers(opened, layer_update)


def _whole_delta(key: str, layer: Any) -> Tensor | None:
    delta: Tensor | None = layer.deltas().get(key)
    return delta


def _of_layers(
    opened: OpenModel, value: Callable[[Any], Tensor | None], layers_of: Callable[[Any], Iterator[tuple[str, Any]]] = lora_layers
) -> Iterator[tuple[str, Tensor]]:
    """(name in the base, what `value` makes of the layer, if anything); the layer is whole meanwhile."""
    layers = list(layers_of(opened.model))
    if opened.sharded is None:
        for name, layer in layers:
            found = value(layer)
            if found is not None:
                yield name, found
        return
    for unit in opened.sharded.all_units():
        parts = set(unit.modules())
        inside = [(name, layer) for name, layer in layers if layer in parts]
        layers = [pair for pair in layers if pair not in inside]
        if inside:
            with opened.sharded.gathered(unit):
                found_inside = [(name, value(layer)) for name, layer in inside]
                kept = [(name, found.clone()) for name, found in found_inside if found is not None]
            yield from kept


@dataclass(frozen=True)
class LogitErrors:
    """Largest |merged - adapter| logit over the largest |adapter| logit."""

    float32: float
    rounded: float
    logits: Tensor
    """of the merged model, float32 weights"""


def merge_whole(
    opened: OpenModel,
    world: World,
    out: Path,
    *,
    project: Pattern | None,
    kept: Pattern | None,
    dtype: torch.dtype,
    storage: str = "dense",
) -> LogitErrors:
    """Merge in this process's memory and write."""
    ids_BL = probe_tokens(opened.base.model, world.device)
    before = probe_logits(opened.model, ids_BL)
    merged: Any = merge_adapter(opened.model)
    if project is not None:
        for linear in prunable_linears(merged):
            if linear.name in project:
                linear.weight_OI.masked_fill_(~project[linear.name].expand(linear.weight_OI.device), 0.0)
    logits = probe_logits(merged, ids_BL)
    float32 = relative_difference(logits, before)
    check_logits(float32, project=project)
    transposed = {linear.name for linear in prunable_linears(merged) if linear.transposed}
    Guard(dict(merged.named_parameters()), kept, transposed=transposed, when="after merging")
    merged.to(dtype)
    rounded = relative_difference(probe_logits(merged, ids_BL), before)
    merged.config.use_cache = opened.base.use_cache
    world.on_main(lambda: save_model(merged, opened.base.tokenizer, out, pattern=kept, storage=storage))
    return LogitErrors(float32, rounded, logits)


@torch.no_grad()
def merge_sharded(
    opened: OpenModel,
    world: World,
    out: Path,
    *,
    project: Pattern | None,
    kept: Pattern | None,
    dtype: torch.dtype,
    storage: str = "dense",
) -> LogitErrors:
    """Collective. Merge shard by shard; rank 0 gathers and writes a file at a time, so that no process ever holds the whole model."""
    sharded, model, base = opened.sharded, opened.model, opened.base.model
    assert sharded is not None
    # Before a forward pass, which leaves the root's parameters gathered: these are the shards.
    parameters = {plain_name(name): p for name, p in base.named_parameters() if not is_adapter_parameter(name)}
    ids_BL = probe_tokens(base, world.device)
    before = probe_logits(model, ids_BL)
    transposed = {linear.name for linear in opened.linears if linear.transposed}
    for key in ("weight", "bias"):
        for name, delta in _of_layers(opened, partial(_whole_delta, key), whole_layers):
            sharded.add(parameters[f"{name}.{key}"], delta)
    for name, delta_O in _of_layers(opened, bias_update):
        sharded.add(parameters[f"{name}.bias"], delta_O)
    for name, delta_OI in updates(opened):
        if project is not None and name in project:
            delta_OI.masked_fill_(~project[name].expand(delta_OI.device), 0.0)
        sharded.add(parameters[f"{name}.weight"], delta_OI.T if name in transposed else delta_OI)
    with model.disable_adapter():
        logits = probe_logits(model, ids_BL)
        float32 = relative_difference(logits, before)
    check_logits(float32, project=project)
    pieces = {name: sharded.piece(p) for name, p in parameters.items()}
    require_finite(world, pieces)
    make_guard(world, pieces, kept, opened.linears, sample_chunks=1, when="after merging")
    for piece in pieces.values():
        piece.tensor.copy_(piece.tensor.to(dtype))
    with model.disable_adapter():
        rounded = relative_difference(probe_logits(model, ids_BL), before)
    _write_gathered(opened, world, out, parameters, kept, dtype, storage)
    return LogitErrors(float32, rounded, logits)


def _write_gathered(
    opened: OpenModel,
    world: World,
    out: Path,
    parameters: Mapping[str, nn.Parameter],
    kept: Pattern | None,
    dtype: torch.dtype,
    storage: str,
) -> None:
    """Collective: every process gathers, rank 0 writes; its failure is raised on all once the gathering is over."""
    assert opened.sharded is not None
    model = opened.base.model
    kept_names = set(model.state_dict())
    buffers = {plain_name(n): b for n, b in model.named_buffers() if n in kept_names and not is_adapter_parameter(n)}
    empty = {name: torch.empty(p.shape, dtype=dtype, device="meta") for name, p in parameters.items()}
    files, index = plan_shards(empty | {name: buffer.to("meta") for name, buffer in buffers.items()})
    problem, writer = None, None
    for file, names in files.items():
        tensors = {}
        for name in names:
            whole = opened.sharded.whole(parameters[name]).to(dtype) if name in parameters else buffers[name]
            if world.is_main:
                tensors[name] = whole.cpu().contiguous()
        if world.is_main and problem is None:
            try:
                writer = writer or StreamedModel(out)
                writer.add(file, tensors)
            except UserError as error:
                problem = error
    world.agree(problem)

    def finish() -> None:
        assert writer is not None
        model.config.use_cache, model.config.dtype = opened.base.use_cache, dtype
        transposed = {linear.name for linear in opened.linears if linear.transposed}
        writer.finish(model, opened.base.tokenizer, index, kept, storage=storage, transposed=transposed)

    world.on_main(finish)
