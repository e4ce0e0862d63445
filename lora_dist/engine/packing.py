"""Proof, on the model itself, that examples packed into one row do not see each other. Called by `engine/setup.py`.

Whether positions that start anew become block-diagonal attention depends on the model's code and its attention kernel; ALiBi, code that
comes with a model, and kernels that look at a batch of one row only do not do so.
"""

from __future__ import annotations

import torch
from torch import nn

from lora_dist.log import UserError
from lora_dist.models.loss import IGNORE, causal_loss_sum
from lora_dist.parallel import World

_LENGTHS = (20, 12, 9)
_TOLERANCE = 1e-4  # nats a token, in float32
_HALF_TOLERANCE = 2e-2  # rounding of a loss in 16 bits
_HALF_SHARE = 0.1  # ... or this share of what mixing the examples would do


@torch.no_grad()
def require_separate(model: nn.Module, world: World, *, vocab_size: int, max_length: int, rows: int, kernel: str) -> None:
    """Losses of examples of random tokens, packed and alone, are equal. Collective; a few forward passes of 41 tokens.

    Args:
        max_length: tokens of the longest example.
        rows: of a micro-batch.
        kernel: name of the attention kernel, for the message.

    Raises:
        UserError: on every process, for a model that mixes them.
    """
    lengths = [min(length, max_length) for length in _LENGTHS]
    generator = torch.Generator().manual_seed(0)
    ids = [torch.randint(vocab_size, (length,), generator=generator) for length in lengths]
    was_training = model.training
    model.eval()
    problem = None
    try:
        alone = torch.tensor([_loss(model, world, each[None], None, 0, len(each)) for each in ids])
        packed_L, positions_L = torch.cat(ids), torch.cat([torch.arange(length) for length in lengths])
        bounds = [(sum(lengths[:i]), sum(lengths[: i + 1])) for i in range(len(lengths))]
        together, mixed = (
            torch.tensor([_loss(model, world, packed_L.repeat(min(rows, 2), 1), where, *bound) for bound in bounds])
            for where in (positions_L.repeat(min(rows, 2), 1), None)
        )
        off, would_be = float((together - alone).abs().max()), float((mixed - alone).abs().max())
        half = next(model.parameters()).dtype != torch.float32
        if not (off <= _HALF_TOLERANCE or off <= _HALF_SHARE * would_be if half else off <= _TOLERANCE):
            problem = f"the loss of an example is {off:.2g} nats a token off where it shares a row with others"
    except TypeError as error:  # no position_ids
        problem = str(error)
    finally:
        model.train(was_training)
    world.agree(
        UserError(
            f"data.packing: found true, but this model does not keep examples apart with {kernel} attention ({problem}), expected a model "
            "that does: set it to false (train.group_by_length saves padding as well), or try model.attn_implementation sdpa or eager"
        )
        if problem is not None
        else None
    )


def _loss(model: nn.Module, world: World, ids_BL: torch.Tensor, positions_BL: torch.Tensor | None, start: int, end: int) -> float:
    """Mean loss of the tokens behind the first of [start, end), nats. Waits for the device."""
    labels_BL = torch.full_like(ids_BL, IGNORE)
    labels_BL[:, start + 1 : end] = ids_BL[:, start + 1 : end]
    loss = causal_loss_sum(model, ids_BL.to(world.device), labels_BL.to(world.device), positions_BL)
    return float(loss) / (len(ids_BL) * (end - start - 1))
