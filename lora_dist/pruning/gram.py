"""Sums over the calibration tokens of what linears see: H = X^T X and the sum of X, once for linears that share an input.

    tokens N, sum_I = sum of x, products_II = sum of x x^T

Products of a micro-batch are made in float32 on a GPU and in float64 on a CPU, and added up in float64. With several processes
each has its own micro-batches, and the sums are added over all of them. Called by `prune.py`; used up by `solve.py` and `obs.py`.

Shapes: I in features. Memory: one I x I matrix in float64 a distinct input.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol, TypeVar

import torch
from torch import Tensor

from lora_dist.blocks import NamedLinear
from lora_dist.log import UserError

T = TypeVar("T")


class Peers(Protocol):
    """The processes that prune together; `parallel.World` is one."""

    @property
    def rank(self) -> int: ...

    @property
    def size(self) -> int: ...

    def add(self, tensor: Tensor) -> None:
        """Collective: the tensor becomes the sum of all ranks' tensors, in place."""

    def gather(self, value: T) -> list[T]:
        """Collective: every rank's value (picklable), by rank."""


class Alone:
    """One process."""

    rank, size = 0, 1

    def add(self, tensor: Tensor) -> None:
        pass

    def gather(self, value: T) -> list[T]:
        return [value]


@dataclass
class Gram:
    """What is known of one input.

    Attributes:
        products_II: float64 (I, I), sum of x x^T.
        sum_I: float64 (I,), sum of x.
        tokens: how many.
    """

    products_II: Tensor
    sum_I: Tensor
    tokens: float

    @classmethod
    def empty(cls, features: int, device: torch.device) -> Gram:
        zeros = torch.zeros(features + 1, features, dtype=torch.float64, device=device)
        return cls(zeros[:-1], zeros[-1], 0.0)

    def add(self, x: Tensor) -> None:
        """One input (..., I) of any dtype."""
        x_TI = x.detach().flatten(0, -2)
        self.products_II += product(x_TI, x_TI)
        self.sum_I += x_TI.sum(0, dtype=torch.float64)
        self.tokens += x_TI.shape[0]

    def gather(self, peers: Peers) -> None:
        """Collective: the sums of all processes."""
        if peers.size > 1:
            count = torch.tensor([self.tokens], dtype=torch.float64, device=self.sum_I.device)
            for part in (self.products_II, self.sum_I, count):
                peers.add(part)
            self.tokens = float(count)

    @property
    def norm_I(self) -> Tensor:
        """||x_I||_2, float32 (I,)."""
        return self.products_II.diagonal().clamp_min(0).sqrt().float()

    @property
    def mean_I(self) -> Tensor:
        return self.sum_I / self.tokens

    def centred(self) -> Gram:
        """Sums of x - mean: what a linear whose bias follows its weights has to answer for."""
        products_II = self.products_II.addr(self.sum_I, self.mean_I, alpha=-1)
        return Gram(products_II, torch.zeros_like(self.sum_I), self.tokens)


def product(a_TN: Tensor, b_TM: Tensor) -> Tensor:
    """a^T b over the tokens of a micro-batch: (N, M), in float32 on a GPU, in float64 on a CPU."""
    work = torch.float32 if a_TN.device.type == "cuda" else torch.float64
    with _full_float32(a_TN.device):
        wide_TN = a_TN.to(work)
        return wide_TN.T @ (wide_TN if b_TM is a_TN else b_TM.to(work))


@contextmanager
def _full_float32(device: torch.device) -> Iterator[None]:
    """Products in float32 as it is written, not in the ten bits of TensorFloat-32 that a caller may have allowed."""
    if device.type != "cuda":
        yield
        return
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


class GramSums:
    """Grams of all inputs of a layer's linears, filled while the layer runs; linears that get the same tensor share one."""

    def __init__(self, linears: Sequence[NamedLinear], device: torch.device):
        self._linears, self._device = linears, device
        self._leader: dict[str, str] = {}
        """by linear: the first one that got the same input"""
        self._grams: dict[str, Gram] = {}
        """by leader"""
        self._last: tuple[Tensor, str] | None = None

    def next_batch(self) -> None:
        """Forget the newest input, so that it is neither held nor mistaken for another."""
        self._last = None

    def _note(self, name: str, x: Tensor) -> None:
        if self._last is None or self._last[0] is not x:
            self._last = (x, name)
        leader = self._leader.setdefault(name, self._last[1])
        if leader == name:
            self._grams.setdefault(name, Gram.empty(x.shape[-1], self._device)).add(x)

    @contextmanager
    def watching(self) -> Iterator[None]:
        handles = [
            linear.module.register_forward_pre_hook(lambda _module, args, name=linear.name: self._note(name, args[0]))
            for linear in self._linears
        ]
        try:
            yield
        finally:
            self.next_batch()
            for handle in handles:
                handle.remove()

    def grams(self, peers: Peers) -> dict[str, Gram]:
        """Collective: each linear's, over all processes, by name; those that share an input share the object.

        Raises:
            UserError: if a linear was never run.
        """
        leaders: dict[str, str] = {}
        for theirs in peers.gather(self._leader):
            for name, leader in theirs.items():
                leaders.setdefault(name, leader)
        require_seen([linear.name for linear in self._linears if linear.name not in leaders])
        found: dict[str, Gram] = {}
        for linear in self._linears:
            if leaders[linear.name] == linear.name:
                gram = self._grams.get(linear.name) or Gram.empty(linear.weight_OI.shape[1], self._device)
                gram.gather(peers)
                found[linear.name] = gram
        return {linear.name: found[leaders[linear.name]] for linear in self._linears}


def require_seen(unused: Sequence[str]) -> None:
    """Raises UserError if there is a linear that no calibration token reached."""
    if unused:
        raise UserError(
            f"layer {unused[0]}: no calibration token reached it ({len(unused)} such linears); use more calibration text, "
            "or score=magnitude without reconstruct, which needs none"
        )
