"""What a strategy is: how one model is spread over processes. The engine talks to this class only.

`Strategy` wraps the model, runs the backward pass, sums gradients, clips and updates, and hands out what is trained as full named
tensors, whatever way it is cut. `TorchStrategy` is the part that `ddp` and `fsdp2` share: torch's AdamW over gradients that this
process holds (or its shards of them). Methods marked "collective" must be called by all processes.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lora_dist.blocks import Piece
from lora_dist.log import UserError
from lora_dist.parallel.launch import World
from lora_dist.parallel.loss_scale import LossScale
from lora_dist.parallel.optimizers import (
    AdamWArgs,
    check_state_keys,
    is_scale,
    load_bitsandbytes_state,
    make_optimizer,
    set_rate,
    state_tensors,
)  # fmt: skip


class StrategyError(UserError):
    """A strategy that was asked for is not in force."""


class Reader(Protocol):
    """Reads the weights of a base that is in placeholders (`models/streaming.py`), by their names in the base."""

    def __contains__(self, name: object) -> bool: ...

    def rows(self, name: str, start: int, stop: int) -> Tensor: ...

    def whole(self, name: str) -> Tensor: ...

    def fill_quantised(self, unit: nn.Module) -> None:
        """Give the quantised layers inside `unit`, which no other method reads, their weights; whole, before the unit is cut."""


def plain_name(name: str) -> str:
    """A parameter's name in the base as it was before PEFT wrapped its linears."""
    return name.removeprefix("base_model.model.").replace(".base_layer", "")


@dataclass(frozen=True)
class Update:
    """What became of an optimizer step; equal on all processes."""

    applied: bool
    """False where the gradients were not finite, and nothing moved"""
    grad_norm: float
    """global 2-norm before clipping"""


@dataclass(frozen=True)
class Placement:
    """What this process holds, counted on the wrapped model itself."""

    base_elements: int
    base_bytes: int
    base_elements_total: int
    trainable_elements: int
    """whose optimizer state this process holds"""
    trainable_elements_total: int


class Strategy(ABC):
    """A model spread over processes.

    Attributes:
        name: as in `parallel.strategy`.
        model: the PEFT model.
        module: what to call for a forward pass.
        trainable: parameters that get gradients, by name in `model`.
        shapes: full shapes of the trainable parameters, by name.
        sharded_base: whether a process holds only part of the base; then every forward pass is a collective.
        loss_scale: for fp16, else None.
    """

    name: str
    model: nn.Module
    module: nn.Module
    trainable: dict[str, nn.Parameter]
    shapes: dict[str, torch.Size]
    sharded_base: bool = False

    def __init__(self, world: World, *, max_grad_norm: float, loss_scale: LossScale | None):
        self.world = world
        self.max_grad_norm = max_grad_norm
        self.loss_scale = loss_scale

    @abstractmethod
    def zero_grad(self) -> None: ...

    @abstractmethod
    def backward(self, loss: Tensor, *, last: bool) -> None:
        """Collective. Add the gradients of `loss`, which is this process's share of the step's mean loss.

        Args:
            last: whether this is the step's last micro-batch; gradients are summed over processes then.
        """

    @abstractmethod
    def update(self, rate: float) -> Update:
        """Collective. Clip, and take the optimizer step unless the gradients are not finite."""

    @abstractmethod
    def discard(self) -> None:
        """Collective, in place of `update` after the step's last backward pass: drop its gradients, finite or not. The steps after it are
        those of a run in which it never was. (An `update` that did not apply has dropped its gradients itself.)"""

    @abstractmethod
    def non_finite(self) -> list[str]:
        """Trainable parameters whose gradient on this process was not finite in the last step. Waits for the device."""

    def settle(self) -> None:  # noqa: B027 - most leave nothing
        """After forward passes outside of a step: let go of what they left gathered."""

    def own_gradients_finite(self) -> bool | None:
        """Whether what this process's own micro-batches gave to the last step's gradients was finite; None where that cannot be told
        from their sum. Waits for the device."""
        return None

    @abstractmethod
    def trainable_tensors(self) -> dict[str, Tensor]:
        """Collective: full float32 trainable tensors by name, on CPU; on rank 0, empty elsewhere."""

    @abstractmethod
    def load_trainable(self, tensors: Mapping[str, Tensor]) -> None:
        """Collective: put full tensors back, into all copies there are. Every process gives the same."""

    @abstractmethod
    def optimizer_tensors(self) -> dict[str, Tensor]:
        """Collective: `{parameter name}.{state key}` -> full tensor on CPU; on rank 0, empty elsewhere. Empty before a first step."""

    @abstractmethod
    def load_optimizer_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Collective: inverse of `optimizer_tensors`; every process gives the same. See `check_optimizer_tensors`."""

    @abstractmethod
    def piece(self, parameter: nn.Parameter) -> Piece:
        """This process's part of a parameter."""

    @abstractmethod
    def check_in_force(self) -> None:
        """Raises StrategyError where the wrapped model is not what was asked for."""

    @abstractmethod
    def trainable_elements(self) -> int:
        """Elements whose optimizer state this process holds."""

    def trainable_norms(self) -> dict[str, float]:
        """Collective: 2-norm of every trainable parameter by name, of the copies that the forward pass uses; on every process.

        Counted on each process's own pieces, without gathering anything: an independent check of what `trainable_tensors` gathered.
        Elements that several processes hold are counted as often as they are held, which the count of elements takes out again.
        """
        pieces = {name: self.piece(p).tensor.detach() for name, p in self.trainable.items()}
        squares = [float(piece.double().square().sum()) for piece in pieces.values()]  # waits for the device
        totals = self.world.sum([*squares, *(float(piece.numel()) for piece in pieces.values())])
        norms = {}
        for name, square, held in zip(pieces, totals, totals[len(pieces) :], strict=False):
            copies = held / self.shapes[name].numel()
            norms[name] = math.sqrt(square / copies)
        return norms

    def placement(self) -> Placement:
        """Counted on the wrapped model."""
        pieces = [self.piece(p) for p in self.model.parameters() if not p.requires_grad]
        return Placement(
            sum(piece.tensor.numel() for piece in pieces),
            sum(piece.tensor.numel() * piece.tensor.element_size() for piece in pieces),
            sum(torch.Size(piece.shape).numel() for piece in pieces),
            self.trainable_elements(),
            sum(shape.numel() for shape in self.shapes.values()),
        )


def check_optimizer_tensors(
    shapes: Mapping[str, torch.Size], tensors: Mapping[str, Tensor], args: AdamWArgs
) -> dict[str, dict[str, Tensor]]:
    """Saved optimizer state by parameter: `{name: {state key: full tensor}}`.

    Raises:
        UserError: state of another optimizer; a tensor that belongs to no trainable parameter or has another shape; a parameter without
            state.
    """
    state: dict[str, dict[str, Tensor]] = {}
    for full_name, tensor in tensors.items():
        name, key = full_name.rsplit(".", 1)
        if name not in shapes:
            raise UserError(
                f"checkpoint: optimizer state of {name} belongs to no trainable parameter of this run; check adapter.*"
            )
        if not is_scale(key) and tensor.shape != shapes[name]:
            raise UserError(
                f"checkpoint: optimizer state of {name} has shape {tuple(tensor.shape)}, expected {tuple(shapes[name])}"
            )
        state.setdefault(name, {})[key] = tensor
    missing = [name for name in shapes if name not in state]
    if missing and tensors:
        raise UserError(f"checkpoint: no optimizer state for {missing[0]} ({len(missing)} such); check adapter.target_modules")
    for entries in state.values():
        check_state_keys(entries, args)
    return state


class TorchStrategy(Strategy):
    """What `ddp` and `fsdp2` share: gradients in `p.grad`, an AdamW on the parameters as they are cut."""

    optimizer: torch.optim.Optimizer

    def _make_optimizer(self, args: AdamWArgs) -> None:
        self._adamw, self.optimizer = args, make_optimizer(self.trainable, args)

    @abstractmethod
    def _local(self, tensor: Tensor) -> Tensor:
        """This process's elements, as a view."""

    @abstractmethod
    def _full(self, tensor: Tensor) -> Tensor:
        """Collective: the whole tensor."""

    @abstractmethod
    def _cut(self, name: str, full: Tensor) -> Tensor:
        """This process's part of a full tensor, in the form of parameter `name`, on its device."""

    @abstractmethod
    def _sum_gradients(self) -> None:
        """Collective: what is left of summing gradients after the backward passes."""

    @abstractmethod
    def _norm(self) -> Tensor:
        """Collective: global 2-norm of the gradients, a float32 scalar on the device, the same on every process."""

    def _gradients(self) -> list[Tensor]:
        return [self._local(p.grad) for p in self.trainable.values() if p.grad is not None]

    def backward(self, loss: Tensor, *, last: bool) -> None:
        (loss if self.loss_scale is None else loss * self.loss_scale.scale).backward()

    def update(self, rate: float) -> Update:
        self._sum_gradients()
        scale = 1.0 if self.loss_scale is None else self.loss_scale.scale
        norm = float(self._norm()) / scale  # a wait for the device: the number is needed before the optimizer may move
        finite = norm - norm == 0.0
        if finite:
            factor = 1.0 / scale
            if self.max_grad_norm > 0:
                factor *= min(1.0, self.max_grad_norm / (norm + 1e-6))
            if factor != 1.0:
                torch._foreach_mul_(self._gradients(), factor)
            set_rate(self.optimizer, rate)
            self.optimizer.step()
        if self.loss_scale is not None:
            self.loss_scale.update(overflow=not finite)
        return Update(finite, norm)

    def discard(self) -> None:
        self.zero_grad()

    def non_finite(self) -> list[str]:
        return [
            name
            for name, p in self.trainable.items()
            if p.grad is not None and not bool(torch.isfinite(self._local(p.grad)).all())
        ]

    def trainable_tensors(self) -> dict[str, Tensor]:
        return self._gathered({name: p.detach() for name, p in self.trainable.items()})

    def _gathered(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        full = {}
        for name, tensor in tensors.items():
            whole = self._full(tensor)  # one at a time: the others wait in it, and keep nothing
            if self.world.is_main:
                full[name] = whole.to("cpu", copy=True).contiguous()
        return full

    @torch.no_grad()
    def load_trainable(self, tensors: Mapping[str, Tensor]) -> None:
        for name, parameter in self.trainable.items():
            self._local(parameter).copy_(self._local(self._cut(name, tensors[name])))

    def optimizer_tensors(self) -> dict[str, Tensor]:
        return self._gathered(
            {
                f"{name}.{key}": value
                for name, parameter in self.trainable.items()
                for key, value in state_tensors(self.optimizer, parameter).items()
            }
        )

    def load_optimizer_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        for name, entries in check_optimizer_tensors(self.shapes, tensors, self._adamw).items():
            parameter = self.trainable[name]
            if self._adamw.kind != "adamw_torch":
                load_bitsandbytes_state(self.optimizer, parameter, entries)
                continue
            self.optimizer.state[parameter] = {
                # fused AdamW keeps `step` on the device too
                key: tensor.to(parameter.device, copy=True) if key == "step" else self._cut(name, tensor)
                for key, tensor in entries.items()
            }

    def trainable_elements(self) -> int:
        return sum(self._local(p.detach()).numel() for p in self.trainable.values())


def all_reduce_sum(tensor: Tensor, world: World, group: dist.ProcessGroup | None = None) -> Tensor:
    """Collective, in place: the sum over processes."""
    if world.size > 1:
        dist.all_reduce(tensor, group=group)
    return tensor
