"""Whether losses are computed chunk by chunk, without logits, proven equal on the model itself. Called by `engine/setup.py`.

Some families change logits behind the head (soft caps, scales), which a loss that is made inside the head would miss.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import nn

from lora_dist.log import UserError
from lora_dist.models.chunked import chunked_head
from lora_dist.models.loss import causal_loss_sum
from lora_dist.parallel import World

CrossEntropy = Literal["auto", "chunked", "logits"]
_TOKENS = 24
_TOLERANCE = 1e-4  # nats a token, in float32
_HALF_TOLERANCE = 2e-2  # rounding of a loss in 16 bits


@torch.no_grad()
def choose_cross_entropy(model: nn.Module, world: World, asked: CrossEntropy, *, vocab_size: int, key: str) -> str | None:
    """Let losses be computed by chunks, where asked for or possible; None, or why they are not. Collective; two small forward passes.

    Args:
        asked: `auto` takes chunks where they give the same loss, `chunked` insists, `logits` does without.
        key: of the option, for messages.

    Raises:
        UserError: `chunked`, and it cannot be had.
    """
    if asked == "logits":
        return None
    head = chunked_head(model)
    problem = None
    if head is None:
        problem = "its head is no plain linear, or is trained"
    else:
        off = _difference(model, world, vocab_size)
        half = head.weight.dtype != torch.float32
        if not off <= (_HALF_TOLERANCE if half else _TOLERANCE):
            problem = f"the loss is {off:.2g} nats a token off: its logits are changed behind the head"
        head.chunked = all(world.gather(problem is None))
    if problem is not None and asked == "chunked":
        raise UserError(f"{key}: found chunked, which this model does not allow ({problem}), expected auto or logits")
    return problem


def _difference(model: nn.Module, world: World, vocab_size: int) -> float:
    """Of the losses of random tokens, chunked and from logits, nats a token. Waits for the device."""
    head = chunked_head(model)
    assert head is not None
    ids_BL = torch.randint(vocab_size, (1, _TOKENS), generator=torch.Generator().manual_seed(0)).to(world.device)
    was_training = model.training
    model.eval()
    try:
        losses = []
        for chunked in (False, True):
            head.chunked = chunked
            losses.append(float(causal_loss_sum(model, ids_BL, ids_BL)))
    finally:
        head.chunked = False
        model.train(was_training)
    return abs(losses[0] - losses[1]) / (_TOKENS - 1)
