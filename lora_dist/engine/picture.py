"""`pattern.json` in the run folder: the pattern as pictures of at most 64x64 shares a linear, for `lora-dist report`. Rank 0 only.

    {"format": "lora_dist.pattern_picture", "version": 1, "kind", "block", "digest", "sparsity",
     "linears": [{"name", "shape": [O, I], "tiles", "kept_tiles", "sparsity", "picture": {"rows", "columns", "kept"}}, ...]}

`kept` is base64 of rows * columns bytes, row by row: 255 times the share that is kept. `tiles` is 0 for masks of single elements, which are
counted from their packed bits, never unpacked: under 10 s for a 7B model (tiles: 1 s). Called by `engine/setup.py`.
"""

from __future__ import annotations

import base64
import json
from typing import Any

import numpy as np
import numpy.typing as npt

from lora_dist.blocks import BlockMask, ElementMask, Pattern
from lora_dist.blocks.mask import Mask
from lora_dist.engine.held import HeldFolder
from lora_dist.log import logger
from lora_dist.state import PATTERN

FORMAT, VERSION = "lora_dist.pattern_picture", 1
SIDE = 64
"""rows and columns of a picture, at most"""


def keep_picture(folder: HeldFolder, pattern: Pattern) -> None:
    """Write `pattern.json`. A disk that does not take it is warned of, and tried again with the next save."""
    try:
        folder.keep(PATTERN, json.dumps(pattern_picture(pattern)))
    except OSError as error:
        logger.warning("%s cannot be written (%s): the run goes on", folder.path / PATTERN, error.strerror)


def pattern_picture(pattern: Pattern) -> dict[str, Any]:
    """The content of `pattern.json`."""
    linears = [_linear(name, mask) for name, mask in pattern.items()]
    elements = [linear["shape"][0] * linear["shape"][1] for linear in linears]
    pruned = sum(linear["sparsity"] * count for linear, count in zip(linears, elements, strict=True))
    return {
        "format": FORMAT,
        "version": VERSION,
        "kind": pattern.kind,
        "block": pattern.block,
        "digest": pattern.digest,
        "sparsity": pruned / sum(elements) if elements else 0.0,
        "linears": linears,
    }


def _linear(name: str, mask: Mask) -> dict[str, Any]:
    kept, per_cell = _cells(mask)
    shares = _pooled(kept, per_cell)
    if isinstance(mask, BlockMask):
        tiles, kept_tiles, kept_elements = mask.kept_PQ.numel(), int(mask.kept_PQ.sum()), mask.kept_elements()
    else:
        tiles, kept_tiles, kept_elements = 0, 0, int(kept.sum())
    return {
        "name": name,
        "shape": list(mask.shape),
        "tiles": tiles,
        "kept_tiles": kept_tiles,
        "sparsity": 1 - kept_elements / (mask.shape[0] * mask.shape[1]),
        "picture": {
            "rows": shares.shape[0],
            "columns": shares.shape[1],
            "kept": base64.b64encode(np.rint(255 * shares).astype(np.uint8).tobytes()).decode(),
        },
    }


def _cells(mask: Mask) -> tuple[npt.NDArray[np.uint8], int]:
    """How much is kept in each cell of a grid, and how much a cell holds: a tile, or the eight elements of a byte."""
    if isinstance(mask, ElementMask) and mask.shape[1] % 8 == 0:
        return np.bitwise_count(mask.bits.numpy()).reshape(mask.shape[0], -1), 8
    kept = mask.kept_PQ if isinstance(mask, BlockMask) else mask.expand()
    return kept.numpy().astype(np.uint8), 1


def _pooled(kept: npt.NDArray[np.uint8], per_cell: int) -> npt.NDArray[np.float64]:
    """Share kept in each field of a picture, (rows, columns) of at most `SIDE` each."""
    rows, columns = (np.arange(min(SIDE, length)) * length // min(SIDE, length) for length in kept.shape)
    fields = np.add.reduceat(np.add.reduceat(kept, columns, axis=1, dtype=np.int64), rows, axis=0)
    heights, widths = (np.diff(starts, append=length) for starts, length in zip((rows, columns), kept.shape, strict=True))
    return fields / (per_cell * heights[:, None] * widths[None, :])
