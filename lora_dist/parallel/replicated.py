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

from lora_dist.blocks import Piece
from lora_dist.parallel.launch import World
from lora_dist.parallel.loss_scale import LossScale
from lora_dist.parallel.optimizers import AdamWArgs
from lora_dist.parallel.strategy import StrategyError, TorchStrategy, all_reduce_sum


class Replicated(TorchStrategy):
    """A model whose base every process holds."""

    name = "ddp"

    def __init__(
        self,
        model: nn.Module,
        world: World,
        *,
        adamw: AdamWArgs,
        max_grad_norm: float = 0.0,
        loss_scale: LossScale | None = None,
    ):
        """Collective: every process starts from rank 0's trainable parameters."""
        super().__init__(world, max_grad_norm=max_grad_norm, loss_scale=loss_scale)
        self.model = self.module = model
        self.trainable = {n: p for n, p in model.named_parameters() if p.requires_grad}
        self.shapes = {n: p.shape for n, p in self.trainable.items()}
        self._flats = self._flatten()
        self._own_norm = torch.zeros(())  # of the gradients before they were summed
        if world.size > 1:
            for parameter in self.trainable.values():
                dist.broadcast(parameter.data, src=0)
        self._make_optimizer(adamw)

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

    def zero_grad(self) -> None:
        for flat in self._flats:
            flat.zero_()

    def _sum_gradients(self) -> None:
        self._own_norm = self._norm()  # stays on the device until it is asked for
        for flat in self._flats:
            all_reduce_sum(flat, self.world)

    def _norm(self) -> Tensor:
        norms = [torch.linalg.vector_norm(flat, dtype=torch.float32) for flat in self._flats]
        return torch.linalg.vector_norm(torch.stack(norms))

    def own_gradients_finite(self) -> bool:
        return bool(torch.isfinite(self._own_norm))

    def _gradients(self) -> list[Tensor]:
        return self._flats

    def _local(self, tensor: Tensor) -> Tensor:
        return tensor

    def _full(self, tensor: Tensor) -> Tensor:
        return tensor

    def _cut(self, name: str, full: Tensor) -> Tensor:
        return full.to(self.trainable[name].device, copy=True)

    def piece(self, parameter: nn.Parameter) -> Piece:
        return Piece.whole(parameter)

    def check_in_force(self) -> None:
        """There is no wrapper to look at: the gradients must be the buffers that are summed."""
        for name, parameter in self.trainable.items():
            flat = next(f for f in self._flats if f.dtype == parameter.dtype)
            if parameter.grad is None or parameter.grad.untyped_storage().data_ptr() != flat.untyped_storage().data_ptr():
                raise StrategyError(f"parallel.strategy: asked for ddp, but the gradient of {name} is not in the summed buffer")
