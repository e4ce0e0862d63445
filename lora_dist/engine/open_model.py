"""A base with or without an adapter, ready to evaluate, generate or merge; identity and pattern checked on the way."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from lora_dist.adapter import (
    adapter_folder,
    adapter_identity,
    is_masked,
    load_adapter,
    read_adapter_config,
    read_labels,
    read_quantisation,
)
from lora_dist.arguments import QuantisedArgs
from lora_dist.blocks import NamedLinear
from lora_dist.engine.base import load_for
from lora_dist.engine.cross_entropy import choose_cross_entropy
from lora_dist.engine.pattern import FoundPattern
from lora_dist.log import UserError
from lora_dist.models.architecture import shard_units
from lora_dist.models.chunked import put_chunked_head
from lora_dist.models.heads import HeadSpec
from lora_dist.models.loading import LoadedBase
from lora_dist.models.quantised import Quantisation, quantisation_of
from lora_dist.parallel import World
from lora_dist.parallel.fully_sharded import FullySharded


@dataclass(frozen=True)
class OpenModel:
    """What `open_model` returns."""

    model: Any
    """the PEFT model, or the bare base; what to call for a forward pass"""
    base: LoadedBase
    found: FoundPattern
    """of the base"""
    linears: list[NamedLinear]
    """the prunable linears, as they were before an adapter was put on them"""
    masked: bool
    """whether there is an adapter that respects a pattern"""
    sharded: FullySharded | None
    """where the base is cut over processes; every forward pass is a collective then"""
    quantisation: Quantisation | None
    """of the base as it is held, or as it was de-quantised from"""


def open_model(
    name_or_path: str,
    adapter: str | None = None,
    *,
    world: World,
    strategy: str = "ddp",
    config_name: str | None = None,
    dtype: torch.dtype | None = None,
    block: int = 16,
    trust_remote_code: bool = False,
    quantisation: Quantisation | None = None,
    as_stored: bool = False,
    dequantise: bool = False,
    storage: str = "dense",
    scoring: bool = False,
) -> OpenModel:
    """Collective. Load a base, and an adapter onto it, on `world.device`.

    Args:
        strategy: ddp (whole on every process) or fsdp2 (cut over all of them).
        dtype: None keeps what is stored.
        quantisation: of the base; None: as the adapter was trained.
        as_stored: leave the base as it is stored, whatever the adapter was trained on.
        dequantise: hold what the quantised weights stand for, as ordinary weights.
        storage: dense, or blocks: of pruned linears the kept tiles only.
        scoring: losses are to be computed without logits where the model allows it (`cross_entropy.py`).
        block: tile side to look for where no mask is stored; a masked adapter's own pattern decides otherwise.

    Raises:
        UserError: something is missing or broken.
        GuardError: the adapter belongs to another base, or another pattern.
    """
    head: HeadSpec | None = None
    if adapter is not None:  # read first: what is wrong with it should not cost the loading of gigabytes
        with world.main_first():
            adapter = str(adapter_folder(adapter))
            trained_with = adapter_identity(adapter, read_adapter_config(adapter))[1]
            remembered = None if as_stored else adapter_quantisation(adapter)
        if quantisation is None and remembered is not None and storage == "blocks" and not remembered.tiles:
            raise UserError(
                f"storage: found blocks, but {adapter} was trained on a base in {remembered}, whose numbers tiles would not have: leave it out, "
                "or say how to hold the base (load_in_4bit, as_stored)"
            )
        quantisation = quantisation or remembered
        if trained_with is not None and trained_with.block > 1:  # of a mixed pattern too
            block = trained_with.block
        labels = read_labels(adapter)
        if labels is not None:
            names = tuple(labels["id2label"][number] for number in sorted(labels["id2label"]))
            head = HeadSpec(labels["num_labels"], names=names)
    opened = load_for(
        world,
        name_or_path,
        sharded=strategy == "fsdp2",
        block=block,
        config_name=config_name,
        dtype=dtype,
        trust_remote_code=trust_remote_code,
        quantisation=None if as_stored else quantisation,
        dequantise=dequantise,
        storage=storage,
        head=head,
    )
    base, found, model = opened.base, opened.found, opened.base.model
    scoring = scoring and not base.heads and put_chunked_head(base.model)
    if adapter is not None:
        model = load_adapter(base.model, adapter, base_fingerprint=base.fingerprint, pattern=found.pattern)
        model.eval()
    masked = adapter is not None and is_masked(model)
    held = None if as_stored else quantisation
    sharded = None
    if strategy == "fsdp2":
        sharded = FullySharded(model, base.model, shard_units(base.model), world, reader=opened.reader, adamw=None)
        sharded.check_in_force()
    if scoring:
        choose_cross_entropy(model, world, "auto", vocab_size=base.model.config.get_text_config().vocab_size, key="")
    return OpenModel(model, base, found, opened.linears, masked, sharded, held)


def require_language_model(opened: OpenModel, name: str) -> None:
    """Raises UserError for a classifier, which has no next token to predict."""
    if opened.base.heads:
        raise UserError(
            f"MODEL: {name} is a classifier, expected a causal language model; lora-dist classify labels texts with it"
        )


def asked_quantisation(args: QuantisedArgs) -> Quantisation | None:
    """What a command's options say; None: what the adapter remembers."""
    return quantisation_of(args.load_in_4bit, args.load_in_8bit, args.bnb_4bit_quant_type, args.bnb_4bit_use_double_quant)


def adapter_quantisation(adapter: str) -> Quantisation | None:
    """How the base was quantised that an adapter was trained on. Raises UserError as `read_quantisation`."""
    config = read_quantisation(adapter_folder(adapter))
    return None if config is None else Quantisation.from_dict(config)
