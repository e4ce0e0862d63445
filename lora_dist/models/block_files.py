"""A model directory rewritten from dense weights to kept tiles and back, one tensor at a time; nothing else in it changes.

    model_blocks.safetensors   NAME.values (N, b, b) for every pruned linear, all other tensors as they were; metadata: format, version, layers
    block_mask.safetensors     which tiles these are

What is read back is the dense weight to the bit, but that a pruned -0.0 is 0.0. Called by `export.py` and `engine/storage.py`.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from lora_dist.blocks import BlockMask, Pattern, pack
from lora_dist.log import GuardError
from lora_dist.models.shards import BLOCK_FORMAT, BLOCK_PREFIX, BLOCK_VERSION, is_block_file
from lora_dist.models.sources import open_shard, weight_files

DENSE_PREFIX = "model"


def holds_blocks(folder: Path) -> bool:
    """Whether a model directory holds kept tiles."""
    return any(is_block_file(file) for file in weight_files(folder))


def rewrite(source: Path, folder: Path, pattern: Pattern, *, blocks: bool, transposed: Collection[str], prefix: str = "") -> None:
    """Write a directory's weights into another, or into itself, where they take the place of what is there.

    Args:
        pattern: of whole tiles; stored in `folder` already if tiles are to be written.
        blocks: as kept tiles, else dense.
        transposed: linears whose weight is stored as (I, O).
        prefix: the model's, which names in older files lack (`transformer.`).

    Raises:
        GuardError: a pruned tile that is not zero.
        UserError: files that are missing or broken.
    """
    files = weight_files(source)
    weight_map: dict[str, str] = {}
    size = 0
    for file in files:
        out = folder / _renamed(file.name, blocks)
        with open_shard(file) as shard:
            held = dict(_layers(shard.names, pattern, transposed, prefix)) if blocks else {}
            tensors: dict[str, Tensor] = {}
            for name in shard.names:
                stem = name.removesuffix(".weight")
                if stem not in held or not name.endswith(".weight"):
                    tensors[name] = shard.tensor(name)
                    continue
                told = held[stem]
                weight, mask = shard.tensor(name), pattern[told["layer"]]
                assert isinstance(mask, BlockMask)
                weight_OI = weight.T if told["transposed"] else weight
                violation = mask.first_violation(weight_OI)
                if violation is not None:
                    raise GuardError(f"{file}: {violation[0].describe(told['layer'], mask.kind, violation[1])}")
                tensors[f"{stem}.values"] = pack(weight_OI, mask)
        metadata = {"format": "pt"}
        if blocks:
            metadata = {"format": BLOCK_FORMAT, "version": str(BLOCK_VERSION), "layers": json.dumps(held, sort_keys=True)}
        save_file(tensors, str(out), metadata=metadata)
        weight_map |= dict.fromkeys(tensors, out.name)
        size += sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
        if folder == source:
            file.unlink()
    if len(files) > 1:
        _write_index(source, folder, blocks, {"metadata": {"total_size": size}, "weight_map": weight_map})


def _write_index(source: Path, folder: Path, blocks: bool, index: Mapping[str, Any]) -> None:
    name = f"{BLOCK_PREFIX if blocks else DENSE_PREFIX}.safetensors.index.json"
    (folder / name).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    old = f"{DENSE_PREFIX if blocks else BLOCK_PREFIX}.safetensors.index.json"
    if folder == source and (folder / old).is_file():
        (folder / old).unlink()


def _renamed(name: str, blocks: bool) -> str:
    old, new = (DENSE_PREFIX, BLOCK_PREFIX) if blocks else (BLOCK_PREFIX, DENSE_PREFIX)
    rest = name.removeprefix(old)
    return f"{new}{rest}" if rest != name else f"{new}-{name}"


def _layers(names: list[str], pattern: Pattern, transposed: Collection[str], prefix: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """(name in the file, what the file is to say of it) of every weight that is going to be tiles."""
    for name in names:
        stem = name.removesuffix(".weight")
        layer = next((layer for layer in (stem, prefix + stem, stem.removeprefix(prefix)) if layer in pattern), None)
        if layer is not None and name.endswith(".weight") and not pattern[layer].keeps_all:
            yield stem, {"layer": layer, "transposed": layer in transposed}
