"""Strategy `ddp`: the whole base on every process, the adapter's gradients summed once an optimizer step.

The gradients of all trainable parameters are views of one flat buffer a dtype, so an optimizer step needs one all-reduce, and
accumulated micro-batches need none. Why not torch's `DistributedDataParallel`: it lays its buckets out anew after the first step,
so a resumed run would sum in another order than the uninterrupted one, and be equal to rounding only. An adapter's gradients are
small (megabytes), so there is little to overlap with the backward pass.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lora_dist.parallel.launch import World


class Replicated:
    """A model whose base every process holds.

    Attributes:
        module: what to call for a forward pass.
        trainable: parameters that get gradients, by name.
    """

    def __init__(self, module: nn.Module, world: World):
        self.module = module
        self.world = world
        self.trainable: dict[str, nn.Parameter] = {n: p for n, p in module.named_parameters() if p.requires_grad}
        self._flats = self._flatten()
        self._equalise()

    def _flatten(self) -> list[Tensor]:
        flats = []
        for dtype in dict.fromkeys(p.dtype for p in self.trainable.values()):
            group = [p for p in self.trainable.values() if p.dtype == dtype]
            flat = torch.zeros(sum(p.numel() for p in group), dtype=dtype, device=group[0].device)
            start = 0
            for parameter in group:
                parameter.grad = flat[start : start + parameter.numel()].view_as(parameter)
                start += parameter.numel()
            flats.append(flat)
        return flats

    def _equalise(self) -> None:
        """Collective: every process starts from rank 0's trainable parameters."""
        if self.world.size > 1:
            for parameter in self.trainable.values():
                dist.broadcast(parameter.data, src=0)

    def zero_grad(self) -> None:
        for flat in self._flats:
            flat.zero_()

    def reduce_gradients(self) -> None:
        """Collective: sum the gradients over all processes. Once an optimizer step, after the last micro-batch."""
        if self.world.size > 1:
            for flat in self._flats:
                dist.all_reduce(flat)

    def grad_norm(self) -> Tensor:
        """Global 2-norm of the gradients, a float32 scalar on the device; the same on every process after `reduce_gradients`."""
        norms = [torch.linalg.vector_norm(flat, dtype=torch.float32) for flat in self._flats]
        return torch.linalg.vector_norm(torch.stack(norms))

    def scale_gradients(self, factor: Tensor) -> None:
        for flat in self._flats:
            flat.mul_(factor)

    def non_finite(self) -> list[str]:
        """Names of trainable parameters whose gradient is not finite. Waits for the device."""
        return [n for n, p in self.trainable.items() if p.grad is not None and not bool(torch.isfinite(p.grad).all())]
