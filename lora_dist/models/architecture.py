"""Where a model keeps its layers (of a decoder or an encoder), and which linears may be pruned: those of the layers, nothing else.

Llama, Mistral, Qwen2/3 keep them in `model.layers`, GPT-2 in `transformer.h`, OPT in `model.decoder.layers`, BERT in `bert.encoder.layer`;
 the search is for
the repeated blocks, not for names. Called by `engine/` (prune, setup).
"""

from __future__ import annotations

from typing import Any

from torch import nn

from lora_dist.blocks import NamedLinear, find_linears
from lora_dist.log import UserError


def _block_lists(model: nn.Module) -> list[tuple[str, nn.ModuleList]]:
    """Outermost module lists whose every item holds a linear."""
    found: list[tuple[str, nn.ModuleList]] = []
    for name, module in model.named_modules():
        if not isinstance(module, nn.ModuleList) or not len(module):
            continue
        if any(name.startswith(f"{outer}.") for outer, _ in found):
            continue  # the experts of a layer, not the layers
        if all(find_linears(item) for item in module):
            found.append((name, module))
    return found


def decoder_layers(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """Name and list of the model's decoder layers (`model.layers`).

    Raises:
        UserError: naming the model's class, if there is not exactly one list of repeated blocks of the configured length.
    """
    count = getattr(getattr(model, "config", None), "num_hidden_layers", None)
    found = _block_lists(model)
    groups = getattr(getattr(model, "config", None), "num_hidden_groups", None)
    if groups is not None:
        count = groups  # ALBERT's layers share their weights by groups
    if count is not None:
        found = [(name, layers) for name, layers in found if len(layers) == count]
    if len(found) != 1:
        seen = ", ".join(name for name, _ in found) or "none"
        expected = "one list of repeated decoder layers" + ("" if count is None else f" of length {count}")
        raise UserError(
            f"model class {type(model).__name__}: expected {expected}, found {seen}; decoder-only models such as Llama, Mistral, "
            "Qwen2, Qwen3, GPT-2 and OPT, and encoders such as BERT, are understood"
        )
    return found[0]


def prunable_linears(model: nn.Module) -> list[NamedLinear]:
    """The linears of the decoder layers, in order; never the head or the embeddings. Raises as `decoder_layers`."""
    prefix, layers = decoder_layers(model)
    return [linear for i, layer in enumerate(layers) for linear in find_linears(layer, f"{prefix}.{i}")]


def shard_units(model: Any) -> list[nn.Module]:
    """What is gathered and freed as one: each decoder layer; embedding and head too, where each has its own weight."""
    units = list(decoder_layers(model)[1])
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    if getattr(head, "weight", None) is not None and head.weight is not embedding.weight:
        units += [embedding, head]
    return units


def matrix_elements(model: nn.Module) -> int:
    """Elements of all linears' weights, the head's included, however they are stored (4-bit codes, placeholders)."""
    total = 0
    for linear in find_linears(model):
        module: Any = linear.module
        total += module.nx * module.nf if linear.transposed else module.in_features * module.out_features
    return total
