"""AdaLoRA on a pruned base, and the allocation of ranks while training: dW = mask . (P diag(L) Q) * lora_alpha / r.

PEFT calls P, L, Q `lora_B`, `lora_E`, `lora_A`. Its `RankAllocator` scores the singular values by smoothed gradients times weights
and zeroes those beyond a budget that shrinks with the steps; `Allocation` runs it from `engine/step.py`, adds PEFT's orthogonal
regularisation, and hands out what a resumed run needs. Files keep all `init_r` rows, with zeros in `lora_E` for those that were
dropped: what plain PEFT computes from them is exactly what was trained.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from peft import AdaLoraConfig, AdaLoraModel, PeftModel
from peft.tuners._buffer_dict import BufferDict
from peft.tuners.adalora.layer import SVDLinear
from torch import Tensor, nn

from lora_dist.adapter.config import PatternConfig
from lora_dist.adapter.layer import is_factorised, is_fused, kept_of, layer_mask
from lora_dist.adapter.product import masked_delta, masked_product
from lora_dist.adapter.whole import TrainsWhole
from lora_dist.blocks import Mask, is_transposed
from lora_dist.log import UserError

ADALORA_TYPE = "BLOCK_ADALORA"
IMPORTANCE = ("exp_avg_ipt", "exp_avg_unc")
RANK_PATTERN = "rank_pattern"
_PREFIX = "base_model.model."


@dataclass
class BlockAdaLoraConfig(PatternConfig, AdaLoraConfig):
    """`peft.AdaLoraConfig` with a pattern."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = ADALORA_TYPE


class BlockSVDLinear(SVDLinear):
    """AdaLoRA on `nn.Linear` or `Conv1D` whose update respects a mask. Built by `BlockAdaLoraModel`."""

    other_param_names = (*SVDLinear.other_param_names, "lora_kept")

    def __init__(self, base_layer: nn.Module, adapter_name: str, config: Any, mask: Mask | None, **kwargs: Any) -> None:
        super().__init__(base_layer, adapter_name, config=config, **kwargs)
        self.fan_in_fan_out = bool(is_transposed(base_layer))
        self.lora_kept = BufferDict({}, persistent=False)
        self.lora_mask: dict[str, Mask | None] = {}
        self.lora_form: dict[str, str] = {}
        self.set_mask(adapter_name, mask, config.form)

    def set_mask(self, adapter_name: str, mask: Mask | None, form: str) -> None:
        """Give an adapter of this layer its mask."""
        self.lora_mask[adapter_name], self.lora_form[adapter_name] = mask, form
        if mask is not None:
            self.lora_kept[adapter_name] = kept_of(mask).to(self.lora_A[adapter_name].device)

    def get_delta_weight(self, adapter: str) -> Tensor:
        """The update as the base stores its weight, float32."""
        mask = self.lora_mask[adapter]
        if mask is None:
            return super().get_delta_weight(adapter)
        A_RI = self.lora_A[adapter].float() * self.lora_E[adapter].float()
        delta_OI = masked_delta(A_RI, self.lora_B[adapter].float(), self.lora_kept[adapter], mask.block, 1.0)
        delta_OI = delta_OI * (self.scaling[adapter] / (self.ranknum[adapter] + 1e-5))
        return delta_OI.T if self.fan_in_fan_out else delta_OI

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if self.disable_adapters or self.merged or all(self.lora_mask.get(a) is None for a in self.active_adapters):
            return super().forward(x, *args, **kwargs)
        result = self.base_layer(x, *args, **kwargs)
        dtype = result.dtype
        for adapter in self.active_adapters:
            if adapter not in self.lora_A:
                continue
            mask, x_dropped = self.lora_mask[adapter], self.lora_dropout[adapter](x.to(dtype))
            A_RI, B_OR = self.lora_A[adapter] * self.lora_E[adapter], self.lora_B[adapter]
            if mask is None:
                update = x_dropped @ A_RI.T.to(dtype) @ B_OR.T.to(dtype)
            else:
                form, rank = self.lora_form[adapter], A_RI.shape[0]
                update = masked_product(
                    x_dropped,
                    A_RI,
                    B_OR,
                    self.lora_kept[adapter],
                    mask.block,
                    1.0,
                    factorised=is_factorised(form, mask, rank, x_dropped),
                    fused=is_fused(form, mask, rank, x_dropped),
                )
            result = result + update * (self.scaling[adapter] / (self.ranknum[adapter] + 1e-5))
        return result.to(dtype)


class BlockAdaLoraModel(TrainsWhole, AdaLoraModel):
    """PEFT's AdaLoRA tuner with masked layers."""

    def _create_and_replace(
        self, lora_config: Any, adapter_name: str, target: Any, target_name: str, parent: nn.Module, current_key: str
    ) -> None:
        base = target.get_base_layer() if isinstance(target, BlockSVDLinear) else target
        weight = base.weight
        # A quantised weight is packed: its linear knows the shape.
        shape = (weight.shape[1], weight.shape[0]) if is_transposed(base) else (base.out_features, base.in_features)
        mask = layer_mask(lora_config.pattern, current_key, shape)
        if isinstance(target, BlockSVDLinear):
            target.update_layer(adapter_name, lora_config.init_r, lora_config.lora_alpha, config=lora_config)
            target.set_mask(adapter_name, mask, lora_config.form)
            return
        options = {"r": lora_config.init_r, "lora_alpha": lora_config.lora_alpha, "config": lora_config}
        layer = BlockSVDLinear(target, adapter_name, mask=mask, **options)
        if adapter_name not in self.active_adapters:
            layer.requires_grad_(False)
        self._replace_module(parent, target_name, layer, target)


class Allocation:
    """AdaLoRA's ranks while they are trained. Every process holds all of it and decides alike.

    Args:
        model: with a trainable AdaLoRA adapter called default, whose gradients are whole on every process.
        total_steps: of the run; the last `tfinal` of them leave the ranks as they are.

    Raises:
        UserError: no steps are left between `tinit` and `tfinal`.
    """

    def __init__(self, model: PeftModel, total_steps: int):
        self._config: Any = model.peft_config["default"]
        tinit, tfinal = self._config.tinit, self._config.tfinal
        if tinit >= total_steps - tfinal:
            raise UserError(
                f"adapter.tinit, adapter.tfinal: found {tinit} and {tfinal} in a run of {total_steps} steps, expected less than that "
                "together: the ranks are reduced in between; lower them or train longer (train.max_steps)"
            )
        self._config.total_step = total_steps
        self._inner: Any = model.base_model.model
        self._ranks: Any = model.base_model.rankallocator
        self._kept: dict[str, list[bool]] = {}
        """singular values that are still in use, by the name of `lora_E`"""

    def after_update(self, step: int, applied: bool) -> None:
        """Score and allocate, as PEFT's `update_and_allocate`. Called with the gradients of `step` (from 1) still there."""
        final = self._config.total_step - self._config.tfinal
        if step < final:
            if applied:  # else the gradients are not finite
                self._kept = self._ranks.update_and_allocate(self._inner, step)[1] or self._kept
        elif self._ranks.exp_avg_ipt:
            self._kept = self._ranks.update_and_allocate(self._inner, step, force_mask=True)[1]
            self._ranks.reset_ipt()
        elif self._kept:
            self._ranks.mask_using_rank_pattern(self._inner, self._kept)

    def penalty(self) -> Tensor:
        """Orthogonal regularisation of P and Q, weighted, as PEFT's `AdaLoraModel.forward` adds it to the loss."""
        terms = []
        for name, p in self._inner.named_parameters():
            if "lora_A" in name or "lora_B" in name:
                gram = p @ p.T if "lora_A" in name else p.T @ p
                terms.append(torch.linalg.norm(gram - torch.eye(gram.shape[0], dtype=gram.dtype, device=gram.device)))
        return self._config.orth_reg_weight * torch.stack(terms).mean()

    @property
    def ranks(self) -> dict[str, int]:
        """Singular values in use, by layer."""
        kept = {name: sum(flags) for name, flags in self._kept.items()}
        named = ((n, p) for n, p in self._inner.named_parameters() if ".lora_E." in n)
        return {name.split(".lora_E")[0]: kept.get(name, p.shape[0]) for name, p in named}

    def tensors(self) -> dict[str, Tensor]:
        """`{parameter name}.{key}` -> CPU tensor: what `load` needs to go on as if never stopped."""
        found = {
            f"{_PREFIX}{name}.{key}": tensor.detach().to("cpu", copy=True).contiguous()
            for key in IMPORTANCE
            for name, tensor in getattr(self._ranks, key).items()
        }
        return found | {f"{_PREFIX}{n}.{RANK_PATTERN}": torch.tensor(k, dtype=torch.uint8) for n, k in self._kept.items()}

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Inverse of `tensors`."""
        self._ranks.reset_ipt()
        self._kept = {}
        parameters = dict(self._inner.named_parameters())
        for full_name, tensor in tensors.items():
            name, key = full_name.removeprefix(_PREFIX).rsplit(".", 1)
            if key == RANK_PATTERN:
                self._kept[name] = [bool(flag) for flag in tensor.tolist()]
                continue
            getattr(self._ranks, key)[name] = tensor.to(parameters[name].device, copy=True)
            self._ranks.ipt.setdefault(name, torch.zeros_like(parameters[name]))


def split_allocation(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """A checkpoint's optimizer tensors without `Allocation.tensors`, and these."""
    own = {name: t for name, t in tensors.items() if name.rsplit(".", 1)[-1] in (*IMPORTANCE, RANK_PATTERN)}
    return {name: t for name, t in tensors.items() if name not in own}, own


def make_allocation(model: PeftModel, total_steps: int) -> Allocation | None:
    """What `engine/step.py` is to run with every step; None for an adapter without ranks to allocate."""
    return Allocation(model, total_steps) if isinstance(model.peft_config["default"], AdaLoraConfig) else None
