"""The pattern: the masks of all pruned linears of a model, with one digest, kept bit-packed beside model or adapter.

File `block_mask.safetensors`: one uint8 tensor a linear (packed bits), and metadata: format version, digest, and for each linear
its kind, shape and block side. Written by `prune` and with every adapter; read by `train`, `merge`, `eval`, `inspect`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from lora_dist.blocks.mask import BlockMask, ElementMask, Mask, mask_digest
from lora_dist.log import GuardError, UserError

MASK_FILE = "block_mask.safetensors"
FORMAT_VERSION = 1


@dataclass(frozen=True)
class LayerStats:
    """One linear's share of the pattern."""

    name: str
    shape: tuple[int, int]
    block: int
    tiles: int
    """0 for an element mask"""
    pruned_tiles: int
    kept_elements: int

    @property
    def elements(self) -> int:
        return self.shape[0] * self.shape[1]

    @property
    def sparsity(self) -> float:
        """Share of elements that are pruned."""
        return 1 - self.kept_elements / self.elements


class Pattern(Mapping[str, Mask]):
    """Masks by the linear's module name in the base model (`model.layers.0.self_attn.q_proj`)."""

    def __init__(self, masks: Mapping[str, Mask]):
        self._masks = dict(sorted(masks.items()))

    def __getitem__(self, name: str) -> Mask:
        return self._masks[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._masks)

    def __len__(self) -> int:
        return len(self._masks)

    @property
    def kind(self) -> Literal["block", "element"]:
        """block where every mask is one of whole tiles."""
        return "block" if all(mask.kind == "block" for mask in self.values()) else "element"

    @property
    def is_mixed(self) -> bool:
        """Whether some masks are of tiles and some of elements."""
        return len({mask.kind for mask in self.values()}) > 1

    @property
    def block(self) -> int:
        """The tile side (the largest, should layers differ); 1 for element masks."""
        return max((mask.block for mask in self.values()), default=1)

    @cached_property
    def digest(self) -> str:
        """sha256 over names and masks; equal digests mean the same pattern."""
        hasher = hashlib.sha256()
        for name, mask in self.items():
            hasher.update(f"{name} {mask_digest(mask)}\n".encode())
        return hasher.hexdigest()

    def with_gaps(self) -> list[str]:
        """Linears of whose tiles a whole row or column is pruned: what only they lead to, or come from, plays no part any more."""
        return [
            name
            for name, mask in self.items()
            if isinstance(mask, BlockMask) and not (mask.kept_PQ.any(0).all() and mask.kept_PQ.any(1).all())
        ]

    def stats(self) -> list[LayerStats]:
        rows = []
        for name, mask in self.items():
            tiles = mask.kept_PQ.numel() if isinstance(mask, BlockMask) else 0
            pruned = tiles - int(mask.kept_PQ.sum()) if isinstance(mask, BlockMask) else 0
            rows.append(LayerStats(name, mask.shape, mask.block, tiles, pruned, mask.kept_elements()))
        return rows

    @property
    def sparsity(self) -> float:
        """Share of all elements of the listed linears that are pruned."""
        rows = self.stats()
        total = sum(row.elements for row in rows)
        return 1 - sum(row.kept_elements for row in rows) / total if total else 0.0

    def save(self, path: str | Path) -> Path:
        """Write the mask file; `path` is the file or the directory to put it in."""
        path = Path(path)
        file = path / MASK_FILE if path.is_dir() else path
        layers = {name: {"kind": m.kind, "shape": list(m.shape), "block": m.block} for name, m in self.items()}
        metadata = {
            "format": "lora_dist.block_mask",
            "version": str(FORMAT_VERSION),
            "digest": self.digest,
            "layers": json.dumps(layers, sort_keys=True),
        }
        save_file({name: mask.packed() for name, mask in self.items()}, str(file), metadata=metadata)
        return file

    @classmethod
    def load(cls, path: str | Path) -> Pattern:
        """Read a mask file (or the one in a directory) and prove its digest.

        Raises:
            UserError: if the file is missing, unreadable or of a later version.
            GuardError: if its content does not have the digest that it states.
        """
        path = Path(path)
        file = path / MASK_FILE if path.is_dir() else path
        if not file.is_file():
            raise UserError(f"block mask: found no file {file}, expected {MASK_FILE}")
        try:
            with safe_open(str(file), "pt") as handle:
                metadata = handle.metadata() or {}
                if metadata.get("format") != "lora_dist.block_mask":
                    raise UserError(f"block mask: {file} was not written by lora_dist (metadata {metadata})")
                if int(metadata["version"]) > FORMAT_VERSION:
                    raise UserError(
                        f"block mask: {file} has version {metadata['version']}, this lora_dist reads {FORMAT_VERSION}"
                    )
                layers = json.loads(metadata["layers"])
                masks: dict[str, Mask] = {}
                for name, info in layers.items():
                    mask_class = BlockMask if info["kind"] == "block" else ElementMask
                    masks[name] = mask_class.from_packed(handle.get_tensor(name), tuple(info["shape"]), info["block"])
        except (SafetensorError, KeyError, OSError, json.JSONDecodeError) as error:
            raise UserError(f"block mask: {file} cannot be read ({error})") from error
        pattern = cls(masks)
        if pattern.digest != metadata["digest"]:
            raise GuardError(
                f"block mask: {file} has digest {pattern.digest[:12]}, but states {metadata['digest'][:12]}: the file is damaged"
            )
        return pattern

    def differences(self, other: Pattern) -> str | None:
        """One line that names the first layer (and tile) in which `other` differs from this pattern, or None if equal."""
        if self.digest == other.digest:
            return None
        for name in sorted(set(self) | set(other)):
            if name not in other or name not in self:
                return f"layer {name}: in one pattern only"
            mine, theirs = self[name], other[name]
            if (mine.kind, mine.shape, mine.block) != (theirs.kind, theirs.shape, theirs.block):
                return (
                    f"layer {name}: {mine.kind} mask of {mine.shape}, block {mine.block}, against "
                    f"{theirs.kind} mask of {theirs.shape}, block {theirs.block}"
                )
            if mask_digest(mine) != mask_digest(theirs):
                if isinstance(mine, BlockMask) and isinstance(theirs, BlockMask):
                    changed_PQ = mine.kept_PQ != theirs.kept_PQ
                    p, q = changed_PQ.nonzero()[0].tolist()
                    return (
                        f"layer {name}, tile ({p}, {q}): kept in one pattern, pruned in the other ({int(changed_PQ.sum())} such)"
                    )
                return f"layer {name}: element masks differ"
        return None


def detect_pattern(weights: Iterable[tuple[str, Tensor]], kind: Literal["block", "element"], block: int) -> Pattern:
    """Find the pattern in weights.

    Args:
        weights: (module name, weight_OI) of every linear that may be pruned.
        kind: whole tiles, or single elements.
        block: tile side, unused for elements.

    Returns:
        A mask for every linear given, dense ones included (they keep every tile), so that the guard knows them too.
    """
    if kind == "block":
        return Pattern({name: BlockMask.detect(weight_OI, block) for name, weight_OI in weights})
    return Pattern({name: ElementMask.detect(weight_OI) for name, weight_OI in weights})
