"""Strategy `fsdp2`: torch's `fully_shard`, one unit a decoder layer, so that a process holds 1/N of the base and one whole layer
at a time.

Every parameter becomes a `DTensor` cut along its first dimension; a unit's parameters are gathered before its forward and backward
pass and freed after each, and the adapter's gradients are summed and scattered after the step's last micro-batch only. Parameters
keep their dtypes (half-precision base, float32 adapter): no mixed-precision policy is needed, because the adapter layer casts.
With `hybrid`, the mesh has two levels: sharded inside a machine, replicated across machines.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from lora_dist.blocks import Piece
from lora_dist.parallel.heap import return_freed_memory
from lora_dist.parallel.launch import World
from lora_dist.parallel.loss_scale import LossScale
from lora_dist.parallel.optimizers import AdamWArgs
from lora_dist.parallel.strategy import Reader, StrategyError, TorchStrategy, all_reduce_sum, plain_name


def make_mesh(world: World, *, hybrid: bool) -> DeviceMesh:
    """Collective: one dimension over all processes, or (machines, processes of a machine), equally many on each."""
    if not hybrid:
        return init_device_mesh(world.device.type, (world.size,), mesh_dim_names=("shard",))
    sizes = (world.size // world.local_size, world.local_size)
    return init_device_mesh(world.device.type, sizes, mesh_dim_names=("replicate", "shard"))


def _give_room(unit: nn.Module) -> None:
    """Turn placeholders into tensors, one unit at a time, which `fully_shard` cuts and lets go of: of uninitialised memory, or zeros where
    they are trained and nothing is read into them."""
    for parameter in unit.parameters():
        if not parameter.is_contiguous():
            make = torch.zeros if parameter.requires_grad else torch.empty
            parameter.data = make(parameter.shape, dtype=parameter.dtype, device=parameter.device)


class FullySharded(TorchStrategy):
    """A model whose base, adapter, gradients and optimizer state are cut over processes.

    Args:
        model: the PEFT model, its base in placeholders (`models/streaming.py`) or whole.
        root: the causal language model inside, whose forward pass every use of the model goes through.
        units: what is gathered and freed as one: decoder layers, and embedding and head where they are not tied.
        reader: reads the weights of a base in placeholders; None where the base is whole already.
        adamw: None for evaluation only.
    """

    name = "fsdp2"
    sharded_base = True

    def __init__(
        self,
        model: nn.Module,
        root: nn.Module,
        units: Sequence[nn.Module],
        world: World,
        *,
        reader: Reader | None,
        adamw: AdamWArgs | None,
        max_grad_norm: float = 0.0,
        loss_scale: LossScale | None = None,
        hybrid: bool = False,
    ):
        """Collective."""
        super().__init__(world, max_grad_norm=max_grad_norm, loss_scale=loss_scale)
        return_freed_memory(world.device)
        self.model = self.module = model
        self.mesh = make_mesh(world, hybrid=hybrid)
        self.shapes = {n: p.shape for n, p in model.named_parameters() if p.requires_grad}
        self._units = list(units)
        for unit in self._units:
            if reader is not None:
                reader.fill_quantised(unit)
            _give_room(unit)
            fully_shard(unit, mesh=self.mesh, reshard_after_forward=True)
        _give_room(root)
        self._root: Any = fully_shard(root, mesh=self.mesh)
        for part in root.modules():
            if isinstance(part, FSDPModule):
                part.set_gradient_divide_factor(1.0)  # sums: the loss is a share of the whole step's mean already
                part.set_force_sum_reduction_for_comms(True)  # gloo has no operation that also divides
        self.trainable = {n: p for n, p in model.named_parameters() if p.requires_grad}
        if reader is not None:
            self._fill(root, reader)
        if adamw is not None:
            self._make_optimizer(adamw)

    @torch.no_grad()
    def _fill(self, root: nn.Module, reader: Reader) -> None:
        """Read this process's rows of every base parameter into its shard."""
        for name, parameter in root.named_parameters():
            if plain_name(name) in reader:
                local, start = self._local(parameter), self._first_row(parameter)
                local.copy_(reader.rows(plain_name(name), start, start + local.shape[0]))

    def _first_row(self, parameter: Tensor) -> int:
        """Where this process's rows begin: the first dimension is cut as `torch.chunk` cuts it."""
        shards = self.mesh["shard"]
        height = -(-parameter.shape[0] // shards.size())
        return min(shards.get_local_rank() * height, parameter.shape[0])

    @contextmanager
    def gathered(self, unit: Any) -> Iterator[None]:
        """Collective: the unit's parameters whole on every process, for as long as the block lasts."""
        unit.unshard()
        try:
            yield
        finally:
            unit.reshard()

    def settle(self) -> None:
        self._root.reshard()  # the root stays whole behind a forward pass, for the backward pass to come

    def all_units(self) -> list[Any]:
        """The units, and the root with what is in none of them."""
        return [*self._units, self._root]

    @torch.no_grad()
    def add(self, parameter: nn.Parameter, full: Tensor) -> None:
        """Add this process's rows of a full tensor to its shard."""
        local, start = self._local(parameter), self._first_row(parameter)
        local += full[start : start + local.shape[0]]

    def whole(self, parameter: nn.Parameter) -> Tensor:
        """Collective: the full tensor of a parameter."""
        return self._full(parameter.detach())

    def zero_grad(self) -> None:
        self.optimizer.zero_grad(set_to_none=True)

    def backward(self, loss: Tensor, *, last: bool) -> None:
        self._root.set_requires_gradient_sync(last)
        self._root.set_is_last_backward(last)
        super().backward(loss, last=last)

    def _sum_gradients(self) -> None:
        """Nothing: the last micro-batch's backward pass has summed and scattered them."""

    def _norm(self) -> Tensor:
        norms = [torch.linalg.vector_norm(g, dtype=torch.float32) for g in self._gradients()]
        square = torch.stack(norms).square().sum() if norms else torch.zeros((), device=self.world.device)
        return all_reduce_sum(square, self.world, self.mesh["shard"].get_group()).sqrt()

    def _local(self, tensor: Tensor) -> Tensor:
        return tensor.to_local() if isinstance(tensor, DTensor) else tensor

    def _full(self, tensor: Tensor) -> Tensor:
        return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor

    def _cut(self, name: str, full: Tensor) -> Tensor:
        parameter = self.trainable[name]
        assert isinstance(parameter, DTensor)
        # Without a source rank nothing is sent: every process has the full tensor and keeps its part.
        return distribute_tensor(
            full.to(parameter.device), parameter.device_mesh, parameter.placements, src_data_rank=None
        ).clone()

    def piece(self, parameter: nn.Parameter) -> Piece:
        local, shape = self._local(parameter), tuple(parameter.shape)
        row = torch.Size(shape[1:]).numel()
        return Piece(local, shape, self._first_row(parameter) * row)

    def check_in_force(self) -> None:
        wanted = (Shard(0),) if self.mesh.ndim == 1 else (Replicate(), Shard(0))
        for unit in self.all_units():
            if not isinstance(unit, FSDPModule):
                raise StrategyError(f"parallel.strategy: asked for fsdp2, but {type(unit).__name__} is not a unit of fully_shard")
        for name, parameter in self.model.named_parameters():
            if not isinstance(parameter, DTensor) or tuple(parameter.placements) != wanted:
                found = f"placed as {parameter.placements}" if isinstance(parameter, DTensor) else "not a DTensor"
                raise StrategyError(f"parallel.strategy: asked for fsdp2, but {name} is {found}, expected {wanted}")
            if not dist.is_initialized() or parameter.device_mesh.size() != self.world.size:
                raise StrategyError(
                    f"parallel.strategy: asked for fsdp2, but {name} is not spread over {self.world.size} processes"
                )
