"""Perplexity of one stream of tokens by windows that slide over it: each scores the tokens that no window before it has scored.

    loss                 sum of the scored tokens' cross-entropy / their number, nats        (average: token)
                         mean over whole windows of their mean loss, the tail left out       (average: window, as Wanda and GPTQ)
    perplexity           exp(loss)
    word_perplexity      exp(total cross-entropy / words), words as lm-eval counts them: split at white space
    bits_per_byte        total cross-entropy / ln 2 / bytes in UTF-8

With a stride of the window's length every window but the first token of it is scored; with a shorter one, windows overlap and a
token is scored behind `context - stride` tokens or more (https://huggingface.co/docs/transformers/perplexity).

A batch is made of the same windows whatever the number of processes, and losses are added up window by window in order, so that two
processes give one process's figures to the last digit. Called by `engine/report.py`. Letters for shapes: `N` tokens, `B` windows,
`L` tokens a window.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lora_dist.log import UserError
from lora_dist.models.loss import IGNORE
from lora_dist.parallel import World


@dataclass(frozen=True)
class Window:
    """Tokens [start, end) of the stream, of which those from `scored_from` on are scored."""

    start: int
    end: int
    scored_from: int
    """the first token that counts; has a token before it in the window"""

    @property
    def labels(self) -> int:
        return self.end - self.scored_from


def plan_windows(
    tokens: int, *, context: int, stride: int | None = None, average: str = "token", max_samples: int | None = None
) -> list[Window]:
    """The windows over a stream of `tokens` tokens.

    Args:
        context: tokens a window.
        stride: tokens from one window's start to the next one's; None: the context.
        average: token (the short last window counts) or window (whole windows only, which do not overlap).
        max_samples: windows at most.

    Raises:
        UserError: fewer tokens than are needed.
    """
    step = stride or context
    assert 1 <= step <= context and (average == "token" or step == context)
    least = context if average == "window" else 2
    if tokens < least:
        raise UserError(f"block_size: found a text of {tokens} tokens, expected {least} or more: lower it or use more text")
    windows: list[Window] = []
    scored = 0  # tokens before this one are scored, or have nothing before them
    for start in range(0, tokens, step):
        end = min(start + context, tokens)
        if average == "window" and end - start < context:
            break
        first = max(scored, start + 1)
        if end > first:  # a last window of one token has nothing to be scored
            windows.append(Window(start, end, first))
        scored = end
        if end == tokens or len(windows) == max_samples:
            break
    return windows


@dataclass(frozen=True)
class StreamScore:
    """What the windows of a stream lost, over all processes."""

    nll: float
    """summed cross-entropy of the scored tokens, nats"""
    tokens: int
    """scored"""
    loss: float
    """by the average asked for"""
    windows: int
    scored_to: int
    """tokens of the stream before this one are scored, but for the first of the text or of windows that do not overlap"""

    @property
    def perplexity(self) -> float:
        return _exp(self.loss)

    def per_word(self, words: int) -> float:
        """Word-level perplexity."""
        return _exp(self.nll / words)

    def bits_per_byte(self, size: int) -> float:
        return self.nll / math.log(2) / size


def _exp(value: float) -> float:
    """e^value; infinite where that overflows."""
    return math.exp(value) if value < 700 else math.inf


@torch.no_grad()
def window_losses(
    model: nn.Module,
    ids_N: np.ndarray,
    windows: Sequence[Window],
    *,
    batch_size: int,
    world: World,
    sharded: bool = False,
    on_batch: Callable[[], None] | None = None,
) -> list[tuple[int, float]]:
    """This process's share: (number of the window, summed cross-entropy of its scored tokens).

    Args:
        batch_size: windows a forward pass; all of one length, so that nothing is padded.
        sharded: every forward pass is a collective; processes without a batch of their own left repeat their last one.
        on_batch: called after each round of batches.
    """
    batches = _batches(windows, batch_size)
    losses: list[tuple[int, float]] = []
    for start in range(0, len(batches), world.size):
        number = start + world.rank
        if number < len(batches) or sharded:
            rows = batches[min(number, len(batches) - 1)]
            losses_B = _batch_losses(model, ids_N, [windows[row] for row in rows], world.device)
            if number < len(batches):
                losses += zip(rows, losses_B.tolist(), strict=True)  # waits for the device
        if on_batch is not None:
            on_batch()
    return losses


def rounds(windows: Sequence[Window], batch_size: int, world_size: int) -> int:
    """How often `window_losses` calls `on_batch`."""
    return -(-len(_batches(windows, batch_size)) // world_size)


def _batches(windows: Sequence[Window], batch_size: int) -> list[list[int]]:
    """Numbers of the windows of each batch, all of one length."""
    batches: list[list[int]] = []
    for number, window in enumerate(windows):
        last = batches[-1] if batches else []
        if last and len(last) < batch_size and _length(windows[last[0]]) == _length(window):
            last.append(number)
        else:
            batches.append([number])
    return batches


def _length(window: Window) -> int:
    return window.end - window.start


def _batch_losses(model: nn.Module, ids_N: np.ndarray, windows: Sequence[Window], device: torch.device) -> Tensor:
    """Summed cross-entropy (B,) of the windows' scored tokens, float64."""
    ids_BL = torch.from_numpy(np.stack([ids_N[window.start : window.end] for window in windows])).to(device)
    labels_BL = ids_BL.clone()
    for row, window in enumerate(windows):
        labels_BL[row, : window.scored_from - window.start] = IGNORE
    logits_BLV = model(input_ids=ids_BL, use_cache=False).logits
    losses = [  # one row at a time: the float32 copy of all logits would be the largest tensor of the evaluation
        F.cross_entropy(logits_LV[:-1].float(), labels_L[1:], ignore_index=IGNORE, reduction="none").double().sum()
        for logits_LV, labels_L in zip(logits_BLV, labels_BL, strict=True)
    ]
    return torch.stack(losses)


def total(shares: Sequence[Sequence[tuple[int, float]]], windows: Sequence[Window], average: str) -> StreamScore:
    """The score from all processes' shares."""
    losses = [loss for _, loss in sorted(entry for share in shares for entry in share)]
    assert len(losses) == len(windows), f"{len(losses)} losses of {len(windows)} windows"
    tokens, nll = sum(window.labels for window in windows), math.fsum(losses)
    if average == "window":
        loss = math.fsum(loss / window.labels for loss, window in zip(losses, windows, strict=True)) / len(windows)
    else:
        loss = nll / tokens
    return StreamScore(nll, tokens, loss, len(windows), windows[-1].end)


def count_words(text: str) -> int:
    """As lm-eval's `Task.count_words`."""
    return len(re.split(r"\s+", text))


def count_bytes(text: str) -> int:
    return len(text.encode())
