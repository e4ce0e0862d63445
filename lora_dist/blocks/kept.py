"""A weight that is held as its kept tiles (`tiles.py`): cutting it, and the one dense matrix that all layers are unpacked into in turn.

Shapes: O/I out/in features, b block side, P/Q block rows/columns, N tiles that are held: the kept ones in row-major order of the mask. A
weight that keeps none has one tile of zeros all the same, which is never unpacked: sharded strategies want something to cut. Called
by `block_linear.py` and `models/block_storage.py`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lora_dist.blocks.mask import BlockMask
from lora_dist.blocks.tiles import gather_tiles


def tile_count(mask: BlockMask) -> int:
    """Tiles that a weight is held as."""
    return max(1, int(mask.kept_PQ.sum()))


def first_rows(mask: BlockMask) -> Tensor:
    """int32 (N,): where each kept tile begins in the weight, filled up to whole tiles and read as rows of b elements.

    Tile (p, q) begins at p b Q + q, and its next row is Q further on.
    """
    P, Q = mask.kept_PQ.shape
    if P * Q * mask.block >= 2**31:
        raise ValueError(
            f"weight of {mask.shape}: found {P * Q * mask.block} rows of {mask.block} elements, expected below 2**31"
        )
    p_N, q_N = mask.kept_PQ.nonzero(as_tuple=True)
    return (p_N * (mask.block * Q) + q_N).to(torch.int32)


def pack(weight_OI: Tensor, mask: BlockMask) -> Tensor:
    """(N, b, b): the kept tiles of a weight, copied; what lies in pruned ones is left out."""
    return pack_range(weight_OI, mask, 0, tile_count(mask))


def rows_of_range(mask: BlockMask, start: int, stop: int) -> tuple[int, int]:
    """Rows [from, to) of the weight that tiles [start, stop) lie in; (0, 0) for none."""
    p_N = mask.kept_PQ.nonzero()[start:stop, 0]
    if not len(p_N):
        return 0, 0
    return int(p_N[0]) * mask.block, min(mask.shape[0], (int(p_N[-1]) + 1) * mask.block)


def pack_range(weight_OI: Tensor, mask: BlockMask, start: int, stop: int, *, first_row: int = 0) -> Tensor:
    """Tiles [start, stop) of `pack`.

    Args:
        weight_OI: the weight, or those of its rows from `first_row`, a multiple of the block, that `rows_of_range` says.
    """
    b = mask.block
    places_N2 = mask.kept_PQ.nonzero()[start:stop]
    if not len(places_N2):
        return weight_OI.new_zeros((min(stop, tile_count(mask)) - start, b, b))
    at_2N = (places_N2 - torch.tensor([first_row // b, 0])).T.to(weight_OI.device)
    return gather_tiles(weight_OI, at_2N, b).contiguous()  # of a transposed weight it is not


class Scratch:
    """Memory for one dense weight at a time, shared by all layers of a model: as large as the largest of them, one a dtype and device."""

    def __init__(self) -> None:
        self._held: dict[tuple[torch.dtype, torch.device], Tensor] = {}

    def matrix(self, rows: int, columns: int, like: Tensor) -> Tensor:
        """(rows, columns) of `like`'s dtype and device, with anything in it; good until the next call.

        It is used up by a product before the next layer asks: both are queued on the same stream, so on a GPU too.
        """
        key, size = (like.dtype, like.device), rows * columns
        if key not in self._held or self._held[key].numel() < size:
            self._held.pop(key, None)  # before the larger one is there
            with torch.inference_mode(False):  # memory made in inference mode could not be written to outside of it
                self._held[key] = torch.empty(size, dtype=like.dtype, device=like.device)
        return self._held[key][:size].view(rows, columns)

    def unpacked(self, values_Nbb: Tensor, first_rows_N: Tensor, shape: tuple[int, int]) -> Tensor:
        """The dense (O, I) weight, zeros where no tile is; good until the next call. Waits for nothing."""
        b = values_Nbb.shape[-1]
        P, Q = -(-shape[0] // b), -(-shape[1] // b)
        matrix = self.matrix(P * b, Q * b, values_Nbb)
        if values_Nbb.is_meta:  # only its memory counts, where a run is planned
            return matrix[: shape[0], : shape[1]]
        matrix.zero_()
        rows = first_rows_N.long()[:, None] + torch.arange(0, b * Q, Q, device=first_rows_N.device)
        matrix.view(-1, b).index_copy_(0, rows.view(-1), values_Nbb[: len(first_rows_N)].reshape(-1, b))
        return matrix[: shape[0], : shape[1]]

    def held_bytes(self) -> int:
        return sum(held.numel() * held.element_size() for held in self._held.values())

    def __deepcopy__(self, memo: object) -> Scratch:
        return Scratch()
