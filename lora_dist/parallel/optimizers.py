"""The AdamWs that adapters are trained with: torch's, or bitsandbytes' with 8-bit or paged state; LoRA+ rates; state by key.

LoRA+ (Hayou et al. 2024) trains `lora_B` with a multiple of `lora_A`'s rate: two groups of parameters, as PEFT's
`create_loraplus_optimizer` makes them. Called by the strategies.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lora_dist.log import UserError

STEP = "step"
_SCALES = ("absmax1", "absmax2")  # one a block of 256 elements
_MAPS = ("qmap1", "qmap2")  # what 8-bit numbers stand for: always the same, so not saved


@dataclass(frozen=True)
class AdamWArgs:
    """AdamW; the rate is given with every step."""

    betas: tuple[float, float]
    eps: float
    weight_decay: float
    kind: str = "adamw_torch"
    """as `train.optim` names it"""
    loraplus_lr_ratio: float | None = None
    """rate of lora_B over that of lora_A; None: one rate for all"""


def parameter_groups(trainable: Mapping[str, nn.Parameter], args: AdamWArgs) -> list[dict[str, Any]]:
    """Groups for a torch optimizer, each with `rate_factor`, what `set_rate` multiplies the rate by.

    Args:
        trainable: by name.

    Raises:
        UserError: LoRA+ for an adapter without lora_B.
    """
    if args.loraplus_lr_ratio is None:
        return [{"params": list(trainable.values()), "rate_factor": 1.0}]
    fast = {name for name, p in trainable.items() if "lora_B" in name or len(p.shape) == 1}
    if not any("lora_B" in name for name in trainable):
        raise UserError(
            f"train.loraplus_lr_ratio: found {args.loraplus_lr_ratio:g}, but this adapter has no lora_B; leave it out, or set "
            "adapter.type lora or dora"
        )
    biases = {name for name in fast if name.endswith("bias")}
    wanted: list[tuple[list[str], dict[str, float]]] = [
        ([name for name in trainable if name not in fast], {"rate_factor": 1.0}),
        ([name for name in trainable if name in fast - biases], {"rate_factor": args.loraplus_lr_ratio}),
        ([name for name in trainable if name in biases], {"rate_factor": args.loraplus_lr_ratio, "weight_decay": 0.0}),
    ]
    return [{"params": [trainable[name] for name in names], **options} for names, options in wanted if names]


def make_optimizer(trainable: Mapping[str, nn.Parameter], args: AdamWArgs) -> torch.optim.Optimizer:
    """The optimizer, without state yet.

    Raises:
        UserError: as `parameter_groups`; bitsandbytes is not installed.
    """
    groups = parameter_groups(trainable, args)
    common: dict[str, Any] = {"lr": 0.0, "betas": args.betas, "eps": args.eps, "weight_decay": args.weight_decay}
    if args.kind == "adamw_torch":
        return torch.optim.AdamW(groups, **common, fused=True)
    from bitsandbytes.optim import AdamW, AdamW8bit

    paged = args.kind.startswith("paged_")
    optimizer: torch.optim.Optimizer = (AdamW8bit if args.kind.endswith("8bit") else AdamW)(groups, **common, is_paged=paged)
    return optimizer


def set_rate(optimizer: Any, rate: float) -> None:
    """Of the next step, for every group."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group["rate_factor"]


def state_tensors(optimizer: torch.optim.Optimizer, parameter: nn.Parameter) -> dict[str, Tensor]:
    """What has to be kept of a parameter's state, by key; empty before a first step."""
    state = optimizer.state.get(parameter, {})
    return {
        key: value.detach() if isinstance(value, Tensor) else torch.tensor(float(value))
        for key, value in state.items()
        if key not in _MAPS
    }


def is_scale(key: str) -> bool:
    """Whether a state tensor is of other shape than its parameter."""
    return key == STEP or key in _SCALES


def check_state_keys(tensors: Mapping[str, Tensor], args: AdamWArgs) -> None:
    """Raises UserError where the state of a parameter is of another optimizer."""
    expected = {"exp_avg", "exp_avg_sq"} if args.kind == "adamw_torch" else {"state1", "state2"}
    if set(tensors) - {STEP, *_SCALES} != expected:
        found = "bitsandbytes" if "state1" in tensors else "torch"
        raise UserError(
            f"train.optim: found {args.kind}, but the checkpoint was written with an AdamW of {found}, whose state is another: set "
            "train.optim as it was"
        )


@torch.no_grad()
def load_bitsandbytes_state(optimizer: Any, parameter: nn.Parameter, tensors: Mapping[str, Tensor]) -> None:
    """Inverse of `state_tensors` for bitsandbytes' optimizers, which make their own buffers (paged ones too).

    Raises:
        UserError: state of 8 bits for 32, or the other way round.
    """
    for group_index, group in enumerate(optimizer.param_groups):
        for index, candidate in enumerate(group["params"]):
            if candidate is parameter:
                optimizer.init_state(group, parameter, group_index, index)
    state = optimizer.state[parameter]
    for key, tensor in tensors.items():
        if key == STEP:
            state[key] = int(tensor)
            continue
        if key not in state or state[key].dtype != tensor.dtype:
            raise UserError(
                f"train.optim: the checkpoint's state {key} is of {tensor.dtype}, this optimizer's of "
                f"{state[key].dtype if key in state else 'no such key'}: set train.optim as it was"
            )
        state[key].copy_(tensor)
