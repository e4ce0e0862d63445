"""Kept tiles of a matrix side by side: `values_nbb`, the n kept tiles in row-major order of the mask, each b x b.

Tiles at an edge that is no multiple of b are filled up with zeros. Shapes: O/I out/in features, b block side, P/Q block rows/columns,
n kept tiles, `at_2n` their block rows and columns. Called by `adapter/sparse.py`.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from lora_dist.blocks.mask import grid


def places(kept_PQ: Tensor) -> Tensor:
    """at_2n (int64) of a mask of tiles, on its device. Waits for the device, to count them."""
    return kept_PQ.nonzero().T.contiguous()


def gather_tiles(weight_OI: Tensor, at_2n: Tensor, b: int) -> Tensor:
    """(n, b, b): the tiles at `at_2n`, copied."""
    O, I = weight_OI.shape
    P, Q = grid((O, I), b)
    if O % b or I % b:
        weight_OI = F.pad(weight_OI, (0, Q * b - I, 0, P * b - O))
    return weight_OI.reshape(P, b, Q, b).transpose(1, 2)[at_2n[0], at_2n[1]]


def scatter_tiles(values_nbb: Tensor, at_2n: Tensor, b: int, shape: tuple[int, int]) -> Tensor:
    """(O, I): the tiles at `at_2n`, exactly +0 elsewhere.

    Args:
        shape: (O, I).
    """
    P, Q = grid(shape, b)
    weight = torch.zeros(P * b, Q * b, dtype=values_nbb.dtype, device=values_nbb.device)
    weight.view(P, b, Q, b).transpose(1, 2)[at_2n[0], at_2n[1]] = values_nbb
    return weight[: shape[0], : shape[1]]
