"""LoRA by hand, under the names of the usual guide, over PEFT's layers: `from lora_linear import LinearWithLoRA, apply_lora_to_model`.

For reading and trying out. Training with masks, checkpoints and several processes is `lora-dist train`'s.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from peft import LoraConfig
from peft.tuners.lora import Linear
from torch import Tensor, nn

from lora_dist.adapter.heads import class_targets

NAME = "default"


class LoRALayer(nn.Module):
    """The update alone: x A^T B^T * alpha / rank, for x of shape (..., in_features)."""

    def __init__(self, in_features: int, out_features: int, rank: int = 8, alpha: float = 16, dropout: float = 0.0):
        super().__init__()
        self._over_zeros = LinearWithLoRA(nn.Linear(in_features, out_features, bias=False), rank, alpha, dropout)
        nn.init.zeros_(self._over_zeros.base_layer.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self._over_zeros(x)


class LinearWithLoRA(Linear):
    """PEFT's LoRA on a frozen `nn.Linear`."""

    def __init__(self, linear: nn.Linear, rank: int = 8, alpha: float = 16, dropout: float = 0.0):
        super().__init__(
            linear, NAME, config=LoraConfig(r=rank, lora_alpha=alpha, lora_dropout=dropout), r=rank, lora_alpha=alpha
        )
        linear.requires_grad_(False)

    def merge_weights(self) -> None:
        """Add the update to the weight; a second call does nothing."""
        if not self.merged:
            self.merge(safe_merge=True)

    def unmerge_weights(self) -> None:
        """Take the update out again."""
        if self.merged:
            self.unmerge()


def apply_lora_to_model(
    model: nn.Module, target_modules: Sequence[str] = ("query", "value"), rank: int = 8, alpha: float = 16, dropout: float = 0.0
) -> nn.Module:
    """Put a LoRA on every linear whose name ends with one of `target_modules` (whole parts of it), in place. `dense` is the attention's
    output, as in the guide's config.yaml, where a model has one.

    Raises:
        ValueError: no linear matches.
    """
    linears = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    targets = set(class_targets(linears, target_modules))
    found = [name for name in linears if name in targets]
    if not found:
        raise ValueError(f"target_modules: {', '.join(target_modules)} match no linear of this model")
    for name in found:
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, LinearWithLoRA(model.get_submodule(name), rank, alpha, dropout))
    return model


def mark_only_lora_as_trainable(model: nn.Module) -> None:
    """Freeze everything but the LoRAs."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad = "lora_" in name


def count_lora_parameters(model: nn.Module) -> dict[str, int]:
    """`total`, `trainable`, `frozen` and `lora` parameters."""
    total = sum(p.numel() for p in model.parameters())
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    lora = sum(p.numel() for name, p in model.named_parameters() if "lora_" in name)
    return {"total": total, "trainable": trainable, "frozen": total - trainable, "lora": lora}


def get_lora_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """The LoRAs' tensors by parameter name, on CPU."""
    return {name: p.detach().cpu().clone() for name, p in model.named_parameters() if "lora_" in name}


@torch.no_grad()
def load_lora_state_dict(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Inverse of `get_lora_state_dict`.

    Raises:
        ValueError: tensors that are missing, unknown, or of another shape.
    """
    live = {name: p for name, p in model.named_parameters() if "lora_" in name}
    odd = sorted(live.keys() ^ state.keys()) or sorted(name for name in live if live[name].shape != state[name].shape)
    if odd:
        raise ValueError(f"state: {odd[0]} does not fit this model's LoRAs ({len(odd)} such)")
    for name, parameter in live.items():
        parameter.copy_(state[name])


def merge_lora_weights(model: nn.Module) -> nn.Module:
    """Add every LoRA to its weight and put the plain linears back, in place."""
    for name, module in list(model.named_modules()):
        if isinstance(module, LinearWithLoRA):
            module.merge_weights()
            parent, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(parent), leaf, module.base_layer)
    return model
