"""AdamW, and its state as named tensors: whole, on CPU, in its own dtype (design section 5)."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from lora_dist.log import UserError


def make_optimizer(
    trainable: Mapping[str, nn.Parameter], *, lr: float, betas: tuple[float, float], eps: float, weight_decay: float
) -> torch.optim.AdamW:
    """Fused AdamW over the trainable parameters, in the order of the mapping."""
    return torch.optim.AdamW(trainable.values(), lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, fused=True)


def optimizer_tensors(optimizer: torch.optim.Optimizer, trainable: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
    """`{parameter name}.{state key}` -> tensor on CPU. Empty before the first step."""
    return {
        f"{name}.{key}": value.detach().to("cpu", copy=True).contiguous()
        for name, parameter in trainable.items()
        for key, value in optimizer.state.get(parameter, {}).items()
    }


def load_optimizer_tensors(
    optimizer: torch.optim.Optimizer, trainable: Mapping[str, nn.Parameter], tensors: Mapping[str, Tensor]
) -> None:
    """Inverse of `optimizer_tensors`.

    Raises:
        UserError: a tensor that belongs to no trainable parameter, or a parameter without state.
    """
    state: dict[nn.Parameter, dict[str, Tensor]] = {}
    for full_name, tensor in tensors.items():
        name, key = full_name.rsplit(".", 1)
        if name not in trainable:
            raise UserError(
                f"checkpoint: optimizer state of {name} belongs to no trainable parameter of this run; check adapter.*"
            )
        parameter = trainable[name]
        if key != "step" and tensor.shape != parameter.shape:
            raise UserError(
                f"checkpoint: optimizer state of {name} has shape {tuple(tensor.shape)}, expected {tuple(parameter.shape)}"
            )
        state.setdefault(parameter, {})[key] = tensor.to(parameter.device, copy=True)  # fused AdamW keeps `step` there too
    missing = [name for name, parameter in trainable.items() if parameter not in state]
    if missing and tensors:
        raise UserError(f"checkpoint: no optimizer state for {missing[0]} ({len(missing)} such); check adapter.target_modules")
    for parameter, entries in state.items():
        optimizer.state[parameter] = entries
