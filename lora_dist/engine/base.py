"""A base as a run wants it: whole on every process, or in placeholders that a sharded strategy fills; and its pattern.

Collective throughout. The tensors are read and hashed by one process of each machine, whose copies must be the same base.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lora_dist.blocks import BlockLinear, Guard, NamedLinear, Pattern, Piece, block_layers
from lora_dist.engine.pattern import FoundPattern, base_pattern
from lora_dist.log import GuardError, UserError
from lora_dist.models.architecture import prunable_linears
from lora_dist.models.block_files import holds_blocks
from lora_dist.models.block_storage import BlockReader, require_tiles
from lora_dist.models.heads import HeadSpec
from lora_dist.models.loading import BaseSource, LoadedBase, load_whole, open_base
from lora_dist.models.quantised import DequantisedReader, Quantisation, QuantisedReader, codes, quantised_layers, state_tensors
from lora_dist.models.sources import SourceFacts, read_facts
from lora_dist.models.streaming import TensorReader, load_empty
from lora_dist.parallel import Reader, World, plain_name


@dataclass(frozen=True)
class BaseAndPattern:
    """What `load_for` returns."""

    base: LoadedBase
    found: FoundPattern
    reader: Reader | None
    """reads the weights of a base that is in placeholders; None for a whole one"""
    linears: list[NamedLinear]
    """the prunable linears, under their names in the base"""


def compute_dtype(dtype: str, bf16: bool, fp16: bool) -> torch.dtype:
    """Precision of the frozen base (`model.dtype`, `train.bf16`, `train.fp16`)."""
    if dtype != "auto":
        return getattr(torch, dtype)
    return torch.bfloat16 if bf16 else torch.float16 if fp16 else torch.float32


def load_for(
    world: World,
    name_or_path: str,
    *,
    sharded: bool,
    block: int,
    config_name: str | None = None,
    dtype: torch.dtype | None = None,
    attn_implementation: str | None = None,
    trust_remote_code: bool = False,
    quantisation: Quantisation | None = None,
    dequantise: bool = False,
    storage: str = "dense",
    check: Callable[[BaseSource], None] = lambda source: None,
    head: HeadSpec | None = None,
) -> BaseAndPattern:
    """Collective. Load a base and find its pattern.

    Args:
        sharded: leave placeholders for weights, to be filled piece by piece.
        block: tile side to look for where no mask is stored.
        dtype: None keeps what is stored; of a quantised base, the precision to compute in.
        quantisation: hold the linears of the decoder layers quantised; fingerprint and pattern are those of the stored weights.
        dequantise: hold them as ordinary weights instead, of the values that the quantised ones stand for.
        storage: dense, or blocks: of its pruned linears only the kept tiles are held.
        head: of a classifier; None: a causal language model.
        check: looks at the small files before gigabytes are read; raises UserError.

    Raises:
        UserError: something is missing, broken, or does not fit together; machines hold different bases.
    """
    with world.main_first():
        source = open_base(
            name_or_path,
            config_name=config_name,
            attn_implementation=attn_implementation,
            trust_remote_code=trust_remote_code,
            head=head,
        )
        check(source)
    if sharded and quantisation is not None and quantisation.bits == 8 and not dequantise:
        raise UserError("model.load_in_8bit: found int8 with a sharded base, which is not to be had: set strategy ddp")
    facts = _same_everywhere(world, name_or_path, source)
    device = str(world.device)
    if not sharded and quantisation is None and storage == "dense":
        base = load_whole(source, facts, dtype=dtype, device=device)
        found = base_pattern(base.model, base.source_dir, block=block)
        return BaseAndPattern(base, found, None, prunable_linears(base.model))
    base = load_empty(source, facts, dtype=dtype, device=device)
    reader = TensorReader(base.model, source.source_dir)
    reader.fill_buffers(base.model)

    def read_OI(linear: NamedLinear) -> Tensor:
        weight = reader.whole(f"{linear.name}.weight")
        return weight.T if linear.transposed else weight

    found = world.on_main(lambda: base_pattern(base.model, base.source_dir, block=block, weight_of=read_OI))
    if quantisation is not None and storage == "blocks":
        quantisation = replace(quantisation, tiles=True)
    if storage == "blocks" or (quantisation is not None and quantisation.tiles):
        pattern, linears = require_tiles(found.pattern, name_or_path), prunable_linears(base.model)
        if found.source == "stored" and not holds_blocks(base.source_dir):
            world.on_main(lambda: _require_zeros(pattern, linears, read_OI))
    if quantisation is None and storage == "blocks":
        tiles = BlockReader(base.model, reader, linears, pattern)
        if not sharded:
            tiles.fill(base.model)
        return BaseAndPattern(base, found, tiles if sharded else None, prunable_linears(base.model))
    if quantisation is None:
        return BaseAndPattern(base, found, reader, prunable_linears(base.model))
    readers = _quantised(base.model, reader, found.pattern, quantisation, world, sharded=sharded, dequantise=dequantise)
    return BaseAndPattern(base, found, readers if sharded else None, prunable_linears(base.model))


def _require_zeros(pattern: Pattern, linears: Iterable[NamedLinear], read_OI: Callable[[NamedLinear], Tensor]) -> None:
    """What tiles leave out is zero. Raises GuardError, as a guard on the whole weights would."""
    for linear in linears:
        mask = pattern.get(linear.name)
        violation = None if mask is None else mask.first_violation(read_OI(linear))
        if mask is not None and violation is not None:
            raise GuardError(f"guard at load: {violation[0].describe(linear.name, mask.kind, violation[1])}")


def _quantised(
    model: Any,
    reader: TensorReader,
    pattern: Pattern | None,
    quantisation: Quantisation,
    world: World,
    *,
    sharded: bool,
    dequantise: bool,
) -> Reader:
    """The base in placeholders with its linears quantised, or a reader of what these stand for; filled, unless it is to be sharded."""
    linears = prunable_linears(model)
    dtype = next(model.parameters()).dtype
    found: DequantisedReader | QuantisedReader
    if dequantise:
        found = DequantisedReader(reader, linears, pattern, quantisation)
    else:
        found = QuantisedReader(
            model,
            reader,
            linears,
            pattern,
            quantisation,
            compute_dtype=dtype,
            device=world.device,
            # fully_shard makes parameters of its shards, which want a floating-point dtype
            storage=dtype if sharded else torch.uint8,
        )
        model.is_loaded_in_4bit, model.is_loaded_in_8bit = quantisation.bits == 4, quantisation.bits == 8  # what PEFT asks for
        model.config.quantization_config = quantisation.to_dict()  # where transformers has it; remembered with the adapter
    if not sharded:
        found.fill(model)
    return found


def _same_everywhere(world: World, name: str, source: BaseSource) -> SourceFacts:
    facts = world.once_per_machine(lambda: read_facts(source.source_dir, progress=world.is_main))
    for machine, other in enumerate(facts):
        if other.fingerprint != facts[0].fingerprint:
            raise UserError(
                f"model.name_or_path: {name} has fingerprint {other.fingerprint[:12]} on machine {machine}, {facts[0].fingerprint[:12]} "
                "on machine 0: give all machines the same base"
            )
    return facts[0]


def base_pieces(model: nn.Module, piece: Callable[[nn.Parameter], Piece]) -> dict[str, Piece]:
    """This process's part of every frozen parameter, by its name in the base; of quantised ones their scales too, whole, and of kept
    tiles their places."""
    pieces = {plain_name(name): piece(p) for name, p in model.named_parameters() if not p.requires_grad}
    for name, layer in quantised_layers(model):
        weight = plain_name(f"{name}.{'values' if isinstance(layer, BlockLinear) else 'weight'}")
        pieces |= {f"{weight}.{key}": Piece.whole(tensor) for key, tensor in state_tensors(layer).items()}
    pieces |= {plain_name(f"{name}.first_rows"): Piece.whole(layer.first_rows) for name, layer in block_layers(model)}
    return pieces


def quantised_weights(model: nn.Module, pieces: dict[str, Piece]) -> dict[str, Callable[[], Piece]]:
    """What reads a quantised weight's codes, by its name in the base (`Guard`'s `codes`); kept tiles are `tile_places`' business."""
    names = {plain_name(f"{name}.weight"): layer for name, layer in quantised_layers(model) if not isinstance(layer, BlockLinear)}
    return {name: partial(codes, layer, pieces[name]) for name, layer in names.items()}


def tile_places(model: nn.Module) -> dict[str, Callable[[], Tensor]]:
    """What reads the places of a weight's kept tiles, by the linear's name in the base (`Guard`'s `tiles`)."""
    return {
        plain_name(f"{name}.x").removesuffix(".x"): partial(getattr, layer, "first_rows") for name, layer in block_layers(model)
    }


def require_finite(world: World, pieces: dict[str, Piece]) -> None:
    """Collective.

    Raises:
        UserError: on every process, naming a parameter that holds NaN or infinity.
    """
    # A tensor with scales beside it holds packed codes, whatever its dtype.
    plain = {name: piece for name, piece in pieces.items() if f"{name}.absmax" not in pieces}
    bad = [name for name, piece in plain.items() if not bool(torch.isfinite(piece.tensor).all())]
    world.agree(
        UserError(
            f"model.name_or_path: {len(bad)} parameters of the base hold NaN or infinity, first {bad[0]}: prune or save it again"
        )
        if bad
        else None
    )


def make_guard(
    world: World,
    pieces: dict[str, Piece],
    pattern: Pattern | None,
    linears: Iterable[NamedLinear],
    *,
    sample_chunks: int,
    when: str = "at load",
    codes: Mapping[str, Callable[[], Piece]] | None = None,
    tiles: Mapping[str, Callable[[], Tensor]] | None = None,
) -> Guard:
    """Collective: a guard on every process's own part; what one finds now is raised on all.

    Args:
        codes: `quantised_weights` of a quantised base.
        tiles: `tile_places` of a base that holds kept tiles.

    Raises:
        GuardError: naming layer and tile.
    """
    transposed = {linear.name for linear in linears if linear.transposed}
    guard, problem = None, None
    try:
        guard = Guard(
            pieces, pattern, transposed=transposed, sample_chunks=sample_chunks, when=when, codes=codes or {}, tiles=tiles or {}
        )
    except UserError as error:
        problem = error
    world.agree(problem)
    assert guard is not None
    return guard
