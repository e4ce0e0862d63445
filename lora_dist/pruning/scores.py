"""What a tile is worth: element scores, summed over each `b x b` tile.

    wanda       S_PQ = sum over the tile of |W_OI| * ||x_I||_2     (Sun et al. 2023, arXiv:2306.11695, per tile)
    energy      S_PQ = sum over the tile of W_OI^2 * ||x_I||_2^2   (what the tile adds to the output, were inputs uncorrelated)
    magnitude   S_PQ = sum over the tile of |W_OI|
    random      S_PQ uniform in [0, 1), from the seed and the layer's name

The score `obs` looks at all tiles of a block row together and is in `obs.py`.

||x_I||_2 is the norm of input column I over all calibration tokens. It is constant down a column of the tile, so |W| is summed
down each block row first and no second O x I tensor is made.

Edge tiles: a plain sum, so a smaller edge tile counts what it holds and no more. A pattern drops a number of *tiles*, each of
which saves one tile's product whatever its size, so the sum is what is lost for one unit of work saved. On stories260K, whose edge
tiles are 12 wide, a mean gave perplexity 90 for the sum's 49 at 20%, and 1,000 for the sum's 2,100 at 50%: neither is better.

Shapes: O/I out/in features, b block side, P = ceil(O/b), Q = ceil(I/b). Called by `pruning/prune.py`.
"""

from __future__ import annotations

import hashlib
from typing import Literal, get_args

import torch
from torch import Tensor

from lora_dist.blocks import grid
from lora_dist.log import UserError

Score = Literal["wanda", "energy", "obs", "magnitude", "random"]
SCORES: tuple[str, ...] = get_args(Score)


def _sum_groups(matrix: Tensor, block: int) -> Tensor:
    """(N, M) -> (ceil(N/b), M): sum of each `b` consecutive rows in float32 (the last group may be smaller)."""
    whole = matrix.shape[0] // block * block
    sums = [matrix[:whole].reshape(-1, block, matrix.shape[1]).sum(1, dtype=torch.float32)]
    if whole < matrix.shape[0]:
        sums.append(matrix[whole:].sum(0, keepdim=True, dtype=torch.float32))
    return torch.cat(sums)


def tile_scores(weight_OI: Tensor, block: int, norm_I: Tensor | None = None, *, squared: bool = False) -> Tensor:
    """Sum of |W_OI| * norm_I over each tile; without `norm_I`, of |W_OI|; `squared`, of their squares.

    Args:
        weight_OI: (O, I), any float dtype, on any device.
        block: tile side b.
        norm_I: (I,) norm of each input column.

    Returns:
        float32 (P, Q) on the weight's device.
    """
    elements_OI = weight_OI.detach().float().square() if squared else weight_OI.detach().abs()
    rows_PI = _sum_groups(elements_OI, block)
    if norm_I is not None:
        rows_PI *= (norm_I.square() if squared else norm_I).to(rows_PI)
    return _sum_groups(rows_PI.T, block).T.contiguous()


def random_scores(shape: tuple[int, int], block: int, seed: int, name: str) -> Tensor:
    """Uniform float32 (P, Q) that depends on seed and layer name only, not on the order in which layers are pruned."""
    digest = hashlib.sha256(f"{seed} {name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
    return torch.rand(grid(shape, block), generator=generator)


def layer_scores(score: str, name: str, weight_OI: Tensor, block: int, *, norm_I: Tensor | None, seed: int) -> Tensor:
    """Tile scores of one linear.

    Args:
        score: wanda, energy, magnitude or random.
        name: the linear's name, for messages and for `random`.
        weight_OI: (O, I).
        block: tile side b.
        norm_I: (I,), needed by `wanda` and `energy`.
        seed: used by `random`.

    Returns:
        float32 (P, Q) on CPU. Waits for the device.

    Raises:
        UserError: if a score is not finite, which means weights or activations that are not.
    """
    if score == "random":
        return random_scores((weight_OI.shape[0], weight_OI.shape[1]), block, seed, name)
    if score in ("wanda", "energy"):
        assert norm_I is not None, f"{score} needs the norms of the calibration inputs"
        scores_PQ = tile_scores(weight_OI, block, norm_I, squared=score == "energy")
    elif score == "magnitude":
        scores_PQ = tile_scores(weight_OI, block)
    else:
        raise ValueError(f"score: found {score!r}, expected one of {', '.join(SCORES)}")
    scores_PQ = scores_PQ.cpu()
    if not torch.isfinite(scores_PQ).all():
        p, q = (~torch.isfinite(scores_PQ)).nonzero()[0].tolist()
        raise UserError(
            f"layer {name}, tile ({p}, {q}): found a score of {float(scores_PQ[p, q])}, so the model's weights or its "
            "activations on the calibration text are not finite (float16 overflows: try dtype=bfloat16 or float32)"
        )
    return scores_PQ
