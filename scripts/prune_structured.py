#!/usr/bin/env python
"""Drop attention heads and feed-forward neurons of a model, as many of each layer as its weights suggest, and pickle the result.

    python scripts/prune_structured.py models/llama out/HGSP_30/pruned_model.bin --ratio 0.3

A reference for structured pruning, not a method of merit: what a head or a neuron is worth is the norm of its weights. Query heads go
in groups with the key-value head that they share, so every layer keeps its ratio of query to key-value heads. The file holds
`{'model', 'tokenizer'}`, as pruning tools write it; `lora-dist convert` turns it into a directory. Called by users and tests.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lora_dist.__main__ import run_reporting
from lora_dist.log import UserError
from lora_dist.models.architecture import decoder_layers
from lora_dist.models.legacy import save_pickled
from lora_dist.models.loading import load_base


def _keep(linear: nn.Linear, *, rows: Tensor | None = None, columns: Tensor | None = None) -> None:
    """Keep some of a linear's output rows or input columns, in place."""
    weight_OI = linear.weight.detach()
    if rows is not None:
        weight_OI = weight_OI[rows]
        if linear.bias is not None:
            linear.bias = nn.Parameter(linear.bias.detach()[rows].clone())
    if columns is not None:
        weight_OI = weight_OI[:, columns]
    linear.weight = nn.Parameter(weight_OI.clone())
    linear.out_features, linear.in_features = weight_OI.shape


def _best(worth_N: Tensor, count: int) -> Tensor:
    return worth_N.topk(count).indices.sort().values


def keep_heads(attention: Any, kv_heads: Tensor) -> None:
    """Keep these key-value heads of an attention module, and the query heads that read them."""
    size, groups = attention.head_dim, attention.num_key_value_groups
    rows = (kv_heads[:, None] * size + torch.arange(size)).flatten()
    query_heads = (kv_heads[:, None] * groups + torch.arange(groups)).flatten()
    query_rows = (query_heads[:, None] * size + torch.arange(size)).flatten()
    _keep(attention.q_proj, rows=query_rows)
    _keep(attention.k_proj, rows=rows)
    _keep(attention.v_proj, rows=rows)
    _keep(attention.o_proj, columns=query_rows)
    for name, count in (("num_heads", len(query_heads)), ("num_key_value_heads", len(kv_heads))):
        if hasattr(attention, name):  # older transformers, and some families, reshape by them
            setattr(attention, name, count)


def keep_neurons(mlp: Any, neurons: Tensor) -> None:
    """Keep these neurons of a gated feed-forward module."""
    _keep(mlp.gate_proj, rows=neurons)
    _keep(mlp.up_proj, rows=neurons)
    _keep(mlp.down_proj, columns=neurons)
    if hasattr(mlp, "intermediate_size"):
        mlp.intermediate_size = len(neurons)


def _worth(layer: Any) -> tuple[Tensor, Tensor]:
    """Norm of each key-value head's output weights (with those of its query heads), and of each neuron's: (heads,), (neurons,)."""
    attention, mlp = layer.self_attn, layer.mlp
    per_kv_head = attention.head_dim * attention.num_key_value_groups
    heads = attention.o_proj.weight.detach().float().T.reshape(-1, per_kv_head * attention.o_proj.out_features).norm(dim=1)
    neurons = mlp.down_proj.weight.detach().float().norm(dim=0) * mlp.up_proj.weight.detach().float().norm(dim=1)
    return heads, neurons


def _counts(worths: Sequence[Tensor], ratio: float) -> list[int]:
    """How many to keep of each layer, the weakest of all layers dropped together; at least one each."""
    threshold = torch.cat([worth / worth.mean() for worth in worths]).quantile(ratio)
    return [max(1, int((worth / worth.mean() > threshold).sum())) for worth in worths]


def _listed(text: str | None, worths: Sequence[Tensor], name: str) -> list[int] | None:
    if text is None:
        return None
    counts = [int(part) if part.strip().isdecimal() else 0 for part in text.split(",")]
    most = [len(worth) for worth in worths]
    if len(counts) != len(worths) or any(not 1 <= count <= limit for count, limit in zip(counts, most, strict=False)):
        raise UserError(f"{name}: found {text}, expected {len(worths)} numbers, one a layer, from 1 to {max(most)}")
    return counts


@torch.no_grad()
def prune(model: Any, *, ratio: float = 0.3, kv_heads: str | None = None, neurons: str | None = None) -> list[tuple[int, int]]:
    """Prune in place; key-value heads and neurons kept, a pair a layer.

    Args:
        ratio: share of heads, and of neurons, to drop over all layers.
        kv_heads: how many to keep instead, `2,1,2`, one a layer.
        neurons: how many to keep instead, one a layer.
    """
    layers: list[Any] = list(decoder_layers(model)[1])
    heads_worth, neurons_worth = zip(*(_worth(layer) for layer in layers), strict=True)
    heads_kept = _listed(kv_heads, heads_worth, "kv_heads") or _counts(heads_worth, ratio)
    neurons_kept = _listed(neurons, neurons_worth, "neurons") or _counts(neurons_worth, ratio)
    for i, layer in enumerate(layers):
        keep_heads(layer.self_attn, _best(heads_worth[i], heads_kept[i]))
        keep_neurons(layer.mlp, _best(neurons_worth[i], neurons_kept[i]))
    return list(zip(heads_kept, neurons_kept, strict=True))


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("model", help="directory or hub name of a model of Llama's build")
    parser.add_argument("out", help="file to write, such as out/HGSP_30/pruned_model.bin")
    parser.add_argument(
        "--ratio", type=float, default=0.3, help="share of heads and neurons to drop over all layers (default 0.3)"
    )
    parser.add_argument("--kv_heads", help="key-value heads to keep, one number a layer, such as 2,1,2")
    parser.add_argument("--neurons", help="feed-forward neurons to keep, one number a layer")
    flags = parser.parse_args(argv)
    if not 0 <= flags.ratio < 1:
        raise UserError(f"ratio: found {flags.ratio}, expected a number from 0 up to but not including 1")
    base = load_base(flags.model)
    before = sum(parameter.numel() for parameter in base.model.parameters())
    for i, (heads, width) in enumerate(prune(base.model, ratio=flags.ratio, kv_heads=flags.kv_heads, neurons=flags.neurons)):
        print(f"layer {i}: {heads} key-value heads, {width} neurons kept")
    after = sum(parameter.numel() for parameter in base.model.parameters())
    base.model.config.use_cache = base.use_cache
    out = save_pickled(base.model, base.tokenizer, flags.out)
    print(f"{before:,} -> {after:,} parameters, saved in {out}")
    return 0


if __name__ == "__main__":
    sys.exit(run_reporting("prune_structured.py", lambda: main(sys.argv[1:])))
