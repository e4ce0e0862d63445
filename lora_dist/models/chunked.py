"""Cross-entropy of a language model without its logits: chunk by chunk of tokens, the gradient of the hidden states at once.

The stock loss keeps logits and their gradient for all tokens, in float32: 2 T V numbers (tokens, vocabulary). Here a chunk's logits live as long
as its loss and, while training, its part of the hidden states' gradient takes to compute; what is kept for the backward pass is that gradient,
as large as the hidden states themselves. The head is frozen, so nothing else is needed.

The sum is computed inside the head, where whoever shards the model has gathered its weight. A teacher's divergence (`lesson.py`) is added the
same way, its logits made chunk by chunk of its own hidden states. Called by `loss.py`, `engine/cross_entropy.py` and `engine/teacher.py`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from lora_dist.gemm import device_type, linear, product
from lora_dist.models.lesson import SMALLEST, Lesson, log_sum

IGNORE = -100
"""label of a token that does not count"""
CHUNK_BYTES = {"cpu": 2**24, "cuda": 2**28}
"""of a chunk's shares in float32, which its logits lie beside; smaller ones cost time on their device (docs/log.md)"""


def chunk_rows(hidden_TH: Tensor, vocabulary: int, chunk_bytes: int, *, lesson: bool = False) -> int:
    """Tokens of a chunk: as many as its bytes have room for. Without shares beside the logits, twice as many, a teacher's half as many; in
    multiples of 64, which products like."""
    rows = chunk_bytes // ((8 if lesson else 2 if shares_in_place(hidden_TH) else 4) * vocabulary)
    return max(1, min(rows // 64 * 64 or rows, len(hidden_TH)))


def shares_in_place(hidden_TH: Tensor) -> bool:
    """Whether a softmax of logits takes their place: on CPUs in float32."""
    return hidden_TH.dtype == torch.float32 and device_type(hidden_TH) == "cpu"


class _ChunkedSum(torch.autograd.Function):
    """Inputs: hidden_TH (all of them count), weight_VH, bias_V or None, targets_T, bytes of a chunk, a teacher's lesson or None; a float32
    scalar."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_TH: Tensor,
        weight_VH: Tensor,
        bias_V: Tensor | None,
        targets_T: Tensor,
        chunk_bytes: int,
        lesson: Lesson | None,
    ) -> Tensor:
        total, divergence = (torch.zeros((), dtype=torch.float32, device=hidden_TH.device) for _ in range(2))
        # float16 has no room for the small gradients of an unscaled loss
        kept = torch.float32 if hidden_TH.dtype == torch.float16 else hidden_TH.dtype
        grad_TH = torch.empty_like(hidden_TH, dtype=kept) if ctx.needs_input_grad[0] else None
        T, V = len(hidden_TH), weight_VH.shape[0]
        rows = chunk_rows(hidden_TH, V, chunk_bytes, lesson=lesson is not None)
        in_place = lesson is None and shares_in_place(hidden_TH)
        # Kept from chunk to chunk: memory that a CPU hands out anew has to be zeroed first.
        logits_buffer = hidden_TH.new_empty((rows, V)) if in_place else None
        shares_buffer = hidden_TH.new_empty((0 if in_place else rows, V), dtype=torch.float32)
        soft_buffer = torch.empty_like(shares_buffer) if lesson is not None and lesson.temperature != 1 else shares_buffer
        for start in range(0, T, rows):
            hidden_CH, targets_C1 = hidden_TH[start : start + rows], targets_T[start : start + rows, None]
            out_CV = None if logits_buffer is None else logits_buffer[: len(hidden_CH)]
            logits_CV = linear(hidden_CH, weight_VH, bias_V, out_CV)
            shares_CV = logits_CV if in_place else shares_buffer[: len(hidden_CH)]
            soft_CV = shares_CV if in_place else soft_buffer[: len(hidden_CH)]
            if soft_CV is not shares_CV and lesson is not None:
                torch.softmax(shares_CV.copy_(logits_CV).div_(lesson.temperature), -1, out=soft_CV)
            if in_place:
                torch.softmax(logits_CV, -1, out=shares_CV)
                total += _from_shares(shares_CV.gather(1, targets_C1), hidden_CH, weight_VH, bias_V, targets_C1)
            else:
                largest_C1, of_targets_C1 = logits_CV.amax(-1, keepdim=True), logits_CV.gather(1, targets_C1).float()
                torch.softmax(logits_CV, -1, dtype=torch.float32, out=shares_CV)
                # no further pass that writes (C, V)
                total += (log_sum(largest_C1, shares_CV) - of_targets_C1).sum()
            if lesson is not None:
                divergence += _mix(lesson, start, logits_CV, shares_CV, soft_CV, targets_C1)
            elif grad_TH is not None:
                shares_CV.scatter_add_(1, targets_C1, torch.full_like(targets_C1, -1.0, dtype=torch.float32))  # less one-hot
            if grad_TH is not None:
                if not in_place:
                    logits_CV.copy_(shares_CV)  # in the weights' dtype
                grad_TH[start : start + rows] = product(logits_CV, weight_VH)
            del logits_CV, shares_CV, soft_CV  # before the next chunk's are made
        ctx.save_for_backward(grad_TH)
        ctx.dtype = hidden_TH.dtype
        return total if lesson is None else lesson.note(total, divergence)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, scale: Tensor) -> tuple[Tensor | None, ...]:
        (grad_TH,) = ctx.saved_tensors
        return (grad_TH * scale).to(ctx.dtype), None, None, None, None, None


def _from_shares(shares_C1: Tensor, hidden_CH: Tensor, weight_VH: Tensor, bias_V: Tensor | None, targets_C1: Tensor) -> Tensor:
    """A chunk's cross-entropy by the shares of its targets, which spares two passes over logits; logits of tokens whose share float32 has no
    room for are made again."""
    losses_C1 = -shares_C1.log()
    tiny_C = (shares_C1 < SMALLEST).squeeze(1)
    if not tiny_C.is_meta and tiny_C.any():
        logits_NV = linear(hidden_CH[tiny_C], weight_VH, bias_V)
        losses_C1[tiny_C] = logits_NV.logsumexp(-1, keepdim=True) - logits_NV.gather(1, targets_C1[tiny_C])
    return losses_C1.sum()


def _mix(lesson: Lesson, start: int, logits_CV: Tensor, shares_CV: Tensor, soft_CV: Tensor, targets_C1: Tensor) -> Tensor:
    """A chunk's divergence; in the place of its shares, the gradient of the mixed loss by its logits."""
    alpha, T = lesson.alpha, lesson.temperature
    if soft_CV.data_ptr() == shares_CV.data_ptr():  # one softmax serves both
        divergence = lesson.take(start, logits_CV, soft_CV, alpha)
    else:
        divergence = lesson.take(start, logits_CV, soft_CV, 1.0)
        shares_CV.mul_(1 - alpha).add_(soft_CV, alpha=alpha * T)
    shares_CV.scatter_add_(1, targets_C1, torch.full_like(targets_C1, alpha - 1, dtype=torch.float32))
    return divergence


class ChunkedHead(nn.Linear):
    """A language model's head, (V, H), that gives a summed loss where labels have been handed to it (`scoring`), and logits elsewhere."""

    chunked: bool
    """whether losses may be taken from it"""
    chunk_bytes: int | None
    """of a chunk's logits in float32; None: by the device"""
    _labels_BL: Tensor | None
    _lesson: Lesson | None
    _heard: list[Tensor] | None

    @classmethod
    def of(cls, head: nn.Linear) -> ChunkedHead:
        """One with the same parameters, the very objects, so that ties hold."""
        with torch.device("meta"):
            made = cls(head.in_features, head.out_features, bias=head.bias is not None)
        made.weight, made.bias = head.weight, head.bias
        made.train(head.training)
        made.chunked, made.chunk_bytes, made._labels_BL, made._lesson, made._heard = False, None, None, None, None
        return made

    @contextmanager
    def scoring(self, labels_BL: Tensor, lesson: Lesson | None = None) -> Iterator[None]:
        """Within: the forward pass gives the cross-entropy of the next tokens, or the lesson's mixed loss, summed, as a float32 scalar.
        Labels may be on the host."""
        self._labels_BL, self._lesson = labels_BL, lesson
        try:
            yield
        finally:
            self._labels_BL = self._lesson = None

    @contextmanager
    def listening(self) -> Iterator[list[Tensor]]:
        """Within: a forward pass makes no logits; the hidden states that it would have made them of are put into the list."""
        self._heard = []
        try:
            yield self._heard
        finally:
            self._heard = None

    def forward(self, hidden_BLH: Tensor) -> Tensor:
        if self._heard is not None:
            self._heard.append(hidden_BLH)
            return hidden_BLH[..., :1]
        if self._labels_BL is None:
            return super().forward(hidden_BLH)
        targets_T = self._labels_BL[:, 1:].reshape(-1)
        counted = (targets_T != IGNORE).nonzero().squeeze(1)  # waits for the device, unless labels are on the host
        hidden_TH, total_T = hidden_BLH[:, :-1].reshape(-1, hidden_BLH.shape[-1]), len(targets_T)
        if len(counted) < len(targets_T):
            targets_T = targets_T[counted]
            hidden_TH = hidden_TH.index_select(0, counted.to(hidden_TH.device, non_blocking=True))
        if self._lesson is not None:
            self._lesson.select(counted, total_T)
        targets_T = targets_T.to(hidden_TH.device, non_blocking=True)
        chunk_bytes = self.chunk_bytes or CHUNK_BYTES.get(hidden_TH.device.type, 2**26)
        total = _ChunkedSum.apply(hidden_TH, self.weight, self.bias, targets_T, chunk_bytes, self._lesson)
        assert isinstance(total, Tensor)
        return total


def put_chunked_head(model: Any) -> bool:
    """Replace the head of a causal language model, whose weights are frozen, by one that can do without logits; whether there is a plain one.

    Call it before adapters are put on the model and before it is cut.
    """
    head = model.get_output_embeddings()
    if type(head) is not nn.Linear:
        return False
    model.set_output_embeddings(ChunkedHead.of(head))
    return type(model.get_output_embeddings()) is ChunkedHead


def chunked_head(model: nn.Module) -> ChunkedHead | None:
    """The head that is there and not trained, under whatever wraps the model."""
    found = [(name, module) for name, module in model.named_modules() if isinstance(module, ChunkedHead)]
    if len(found) != 1 or found[0][0].endswith("base_layer") or any(weight.requires_grad for weight in found[0][1].parameters()):
        return None
    return found[0][1]
