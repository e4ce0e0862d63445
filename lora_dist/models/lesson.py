"""What a teacher says of the tokens that count, and how far a student is from it: forward KL at a temperature.

    loss of a token = (1 - alpha) CE(s, label) + alpha T^2 KL(p || q),    p = softmax(t / T), q = softmax(s / T)

of the teacher's logits t and the student's s. Its gradient by s is (1 - alpha) (softmax(s) - one-hot) + alpha T (q - p). A lesson gives KL
and q - p chunk by chunk of tokens (`chunked.py`), or KL of whole logits through autograd (`loss.py`).

Of a teacher's top-k probabilities on disk the others are one outcome, "another token": KL over k + 1 outcomes, which is the whole one where k
is the vocabulary and never more than it. In its gradient the rest of p is spread as the student spreads its own.

Letters for shapes: `N` tokens that count, `C` tokens of a chunk, `V` vocabulary, `H` width, `K` kept probabilities.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

SMALLEST = 1e-30
"""of a probability whose logarithm is taken"""


class Lesson(ABC):
    """What a teacher says of one micro-batch.

    Args:
        alpha: share of the divergence in the loss, 0 to 1.
        temperature: T.

    Attributes:
        ce, kl: of the student, summed over its label tokens, float32 scalars; after its forward pass.
        chunked: whether it can be taken chunk by chunk.
    """

    ce: Tensor
    kl: Tensor
    chunked = True

    def __init__(self, alpha: float, temperature: float):
        self.alpha, self.temperature = alpha, temperature

    def note(self, ce: Tensor, kl: Tensor) -> Tensor:
        """Keep the parts; the loss that they make."""
        self.ce, self.kl = ce.detach(), kl.detach()
        return (1 - self.alpha) * ce + self.alpha * self.temperature**2 * kl

    @abstractmethod
    def select(self, counted_N: Tensor, total: int) -> None:
        """Told before anything is asked: which of `total` tokens (rows x (length - 1), in order) have labels. On the host or the device."""

    @abstractmethod
    def take(self, start: int, logits_CV: Tensor, q_CV: Tensor, share: float) -> Tensor:
        """Of the tokens from `start` on: KL(p || q), summed, float32; in the place of q_CV is left q - share * p.

        Args:
            logits_CV: the student's, in its precision.
            q_CV: softmax(logits / T), float32.
        """

    @abstractmethod
    def divergence(self, logits_NV: Tensor) -> Tensor:
        """KL(p || q) of the student's whole logits, summed, float32, with a gradient."""


def log_sum(largest_C1: Tensor, shares_CV: Tensor, temperature: float = 1.0) -> Tensor:
    """(C, 1): log of the sum of exp(logits / T), given the largest logit and the softmax: by the largest share, which is 1 / V at least."""
    return largest_C1.float() / temperature - shares_CV.amax(-1, keepdim=True).log()


class WholeLesson(Lesson):
    """By the teacher's logits of every token: whole, or from its hidden states a chunk at a time.

    Args:
        said_BL: the teacher's logits (B, L, V), or the hidden states (B, L, H) that its head is given.
        weight_VH, bias_V: of its head; None: `said_BL` are logits.
    """

    def __init__(self, said_BL: Tensor, weight_VH: Tensor | None, bias_V: Tensor | None, alpha: float, temperature: float):
        super().__init__(alpha, temperature)
        self._said_N = said_BL[:, :-1].flatten(0, 1)
        self._weight_VH, self._bias_V, self.chunked = weight_VH, bias_V, weight_VH is not None
        self._buffers: tuple[Tensor, Tensor, Tensor] | None = None

    def select(self, counted_N: Tensor, total: int) -> None:
        assert len(self._said_N) == total, "teacher and student have seen other tokens"
        if len(counted_N) < total:
            self._said_N = self._said_N.index_select(0, counted_N.to(self._said_N.device, non_blocking=True))

    @torch.no_grad()
    def take(self, start: int, logits_CV: Tensor, q_CV: Tensor, share: float) -> Tensor:
        assert self._weight_VH is not None, "a lesson from whole logits is not taken in chunks"
        C, T = len(logits_CV), self.temperature
        if self._buffers is None:  # as the student's, kept from chunk to chunk
            said_CV = torch.empty_like(q_CV)
            self._buffers = (said_CV, torch.empty_like(q_CV), said_CV)
            if self._said_N.dtype != torch.float32:
                self._buffers = (said_CV, torch.empty_like(q_CV), self._said_N.new_empty(q_CV.shape))
        scaled_CV, p_CV, said_CV = (buffer[:C] for buffer in self._buffers)
        torch.mm(self._said_N[start : start + C], self._weight_VH.T, out=said_CV)
        if self._bias_V is not None:
            said_CV += self._bias_V
        if self._said_N.dtype != torch.float32:
            scaled_CV.copy_(said_CV)
        if T != 1:
            scaled_CV.div_(T)
        torch.softmax(scaled_CV, -1, out=p_CV)
        kl = (log_sum(logits_CV.amax(-1, keepdim=True), q_CV, T) - log_sum(scaled_CV.amax(-1, keepdim=True), p_CV)).sum()
        q_CV.sub_(p_CV, alpha=share)
        return kl + scaled_CV.sub_(logits_CV, alpha=1 / T).mul_(p_CV).sum()

    def divergence(self, logits_NV: Tensor) -> Tensor:
        log_p_NV = F.log_softmax(self._logits(slice(None)).detach().float() / self.temperature, -1)
        log_q_NV = F.log_softmax(logits_NV.float() / self.temperature, -1)
        return F.kl_div(log_q_NV, log_p_NV, reduction="sum", log_target=True)

    def _logits(self, part: slice) -> Tensor:
        said_NH = self._said_N[part]
        return said_NH if self._weight_VH is None else F.linear(said_NH, self._weight_VH, self._bias_V)

    @torch.no_grad()
    def largest(self, k: int, tokens: int) -> tuple[Tensor, Tensor, Tensor]:
        """What a `TopLesson` takes: token ids (N, K), log-probabilities (N, K), and the log of the others' sum (N,).

        Args:
            tokens: logits of so many are made at a time.
        """
        N = len(self._said_N)
        parts = [largest(self._logits(slice(i, i + tokens)), k, self.temperature) for i in range(0, max(N, 1), tokens)]
        index_NK, log_p_NK, log_rest_N = (torch.cat(each) for each in zip(*parts, strict=True))
        return index_NK, log_p_NK, log_rest_N


class TopLesson(Lesson):
    """By the teacher's largest probabilities of the label tokens, in order, and what is left of it.

    Args:
        index_NK: int64 token ids.
        log_p_NK: log-probabilities at the temperature.
        log_rest_N: log of the others' sum; -inf where there are none.
    """

    def __init__(self, index_NK: Tensor, log_p_NK: Tensor, log_rest_N: Tensor, alpha: float, temperature: float):
        super().__init__(alpha, temperature)
        # Stored in 16 bits they do not add up to 1, which would push every logit the same way.
        log_p_NO = torch.cat([log_p_NK.float(), log_rest_N.float()[:, None]], 1).log_softmax(1)
        self._index_NK, self._log_p_NK, self._log_rest_N1 = index_NK, log_p_NO[:, :-1], log_p_NO[:, -1:]

    def select(self, counted_N: Tensor, total: int) -> None:
        assert len(counted_N) == len(self._index_NK), f"{len(self._index_NK)} tokens are cached, {len(counted_N)} have labels"

    @torch.no_grad()
    def take(self, start: int, logits_CV: Tensor, q_CV: Tensor, share: float) -> Tensor:
        part = slice(start, start + len(logits_CV))
        index_CK, log_p_CK, log_rest_C1 = self._index_NK[part], self._log_p_NK[part], self._log_rest_N1[part]
        p_CK, rest_C1 = log_p_CK.exp(), log_rest_C1.exp()
        total_C1 = log_sum(logits_CV.amax(-1, keepdim=True), q_CV, self.temperature)
        log_q_CK = logits_CV.gather(1, index_CK).float() / self.temperature - total_C1
        q_CK = q_CV.gather(1, index_CK)
        q_CV.scatter_(1, index_CK, 0.0)
        q_rest_C1 = q_CV.sum(-1, keepdim=True).clamp_min(SMALLEST)  # not 1 less the others, which would cancel
        kl = (p_CK * (log_p_CK - log_q_CK)).sum() + torch.where(rest_C1 > 0, rest_C1 * (log_rest_C1 - q_rest_C1.log()), 0.0).sum()
        q_CV.mul_(1 - share * rest_C1 / q_rest_C1)
        q_CV.scatter_(1, index_CK, q_CK - share * p_CK)
        return kl

    def divergence(self, logits_NV: Tensor) -> Tensor:
        log_q_NV = F.log_softmax(logits_NV.float() / self.temperature, -1)
        known = (self._log_p_NK.exp() * (self._log_p_NK - log_q_NV.gather(1, self._index_NK))).sum()
        if self._index_NK.shape[1] == logits_NV.shape[1]:
            return known
        log_q_rest_N1 = log_q_NV.scatter(1, self._index_NK, -torch.inf).logsumexp(-1, keepdim=True).clamp_min(-1e4)
        rest_N1 = self._log_rest_N1.exp()
        # 0 log 0 is 0, and has no gradient
        return known + torch.where(rest_N1 > 0, rest_N1 * (self._log_rest_N1.clamp_min(-1e4) - log_q_rest_N1), 0.0).sum()


def distance(own: Sequence[Tensor], other: Sequence[Tensor], labels_BL: Tensor) -> Tensor:
    """Squared distance of hidden states over the teacher's squared norm, mean over the pairs, summed over label tokens; float32, with a
    gradient by the student's.

    Args:
        own, other: (B, L, H) each, of student and teacher; those that the labels' predictions are made of count.
    """
    assert own and len(own) == len(other), f"{len(own)} hidden states of the student, {len(other)} of the teacher"
    counted_N = (labels_BL[:, 1:].reshape(-1) != -100).nonzero().squeeze(1).to(own[0].device, non_blocking=True)
    total = torch.zeros((), dtype=torch.float32, device=own[0].device)
    for s_BLH, t_BLH in zip(own, other, strict=True):
        s_NH, t_NH = (x[:, :-1].flatten(0, 1).index_select(0, counted_N).float() for x in (s_BLH, t_BLH))
        total = total + ((s_NH - t_NH).square().sum(-1) / t_NH.square().sum(-1).clamp_min(SMALLEST)).sum()
    return total / len(own)


@torch.no_grad()
def largest(logits_NV: Tensor, k: int, temperature: float) -> tuple[Tensor, Tensor, Tensor]:
    """What `TopLesson` takes, of whole logits."""
    log_p_NV = F.log_softmax(logits_NV.float() / temperature, -1)
    log_p_NK, index_NK = log_p_NV.topk(k, dim=-1)
    # Summed, not 1 less the others: small rests matter to their logarithm.
    return index_NK, log_p_NK, log_p_NV.scatter_(1, index_NK, -torch.inf).logsumexp(-1)
