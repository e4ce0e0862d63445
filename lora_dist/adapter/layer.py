"""Block-masked LoRA as a PEFT layer: `lora.Linear` whose update is exactly zero where the base is pruned.

`dW = s (BA) * (mask (x) 1_bxb)`. PEFT does the rest: names, saving, merging (`get_delta_weight`), several adapters on one layer.
A layer whose mask keeps everything, or that is not in the pattern, computes plain LoRA. With `use_dora`, rows of W + dW are scaled
as `adapter/dora.py` says.
"""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners._buffer_dict import BufferDict
from peft.tuners.lora.layer import Linear as LoraLinear
from torch import Tensor, nn

from lora_dist.adapter.dora import BlockDoraVariant
from lora_dist.adapter.linear import Adapted, adapted_linears
from lora_dist.adapter.product import masked_delta, masked_product, without_autocast
from lora_dist.adapter.siblings import Siblings
from lora_dist.adapter.tiles import kernel_fits
from lora_dist.blocks import BlockLinear, BlockMask, ElementMask, Mask, Pattern, is_transposed
from lora_dist.gemm import device_type


def factorised_is_cheaper(shape: tuple[int, int], block: int, rank: int, dtype: torch.dtype, device_type: str) -> bool:
    """Choose the form by a modelled cost, in multiply-adds a token of one large product.

    Factorised: three mixes of `R PQ` and some passes over `R (I + O)` numbers, which reach a fraction of a large product's speed (the factor
    below). Dense: about one `O I` product a token each for output, input gradient and weight gradient. So narrow layers with a high
    rank get the dense form, all others the factorised one. Factors fit what was measured on a CPU at widths 512 to 4,096 and ranks 8 to 64
    (docs/log.md); on a GPU they are a guess.
    """
    O, I = shape
    slow = 8.0 if device_type != "cpu" else 12.0 if dtype == torch.float32 else 25.0
    P, Q = -(-O // block), -(-I // block)
    return rank * (slow * (I + O) + 4.0 * P * Q) < 3.3 * O * I


def merged_is_cheaper(shape: tuple[int, int], tokens: int) -> bool:
    """Whether adding the update to the weight costs less than adding its share to the output.

    Some passes over O I numbers for some over T (I + O); measured in float32 at widths 512 to 4,096 and ranks 8 to 64 (docs/log.md).
    """
    return 4 * tokens >= shape[0]


def tiles_give_gradients(shape: tuple[int, int], block: int, rank: int) -> bool:
    """Whether a merged layer's gradients of A and B cost less by tiles (`tiles.py`) than by way of the weight's gradient.

    In multiply-adds a token of one large product: two mixes of `R PQ` and small products over `R (I + O)` numbers against one product of
    `O I` and what is made of it. Factors fit float32 on a CPU at widths 512 to 2,048 and ranks 8 to 128 (docs/log.md); on a GPU they are
    a guess.
    """
    O, I = shape
    P, Q = -(-O // block), -(-I // block)
    return rank * (7.5 * (I + O) + 1.7 * P * Q) < 1.1 * O * I


def is_factorised(form: str, mask: Mask, rank: int, x: Tensor) -> bool:
    """Which form of the product to take for `form` (factorised, triton, dense or auto)."""
    if form != "auto":
        return form in ("factorised", "triton")
    return isinstance(mask, BlockMask) and factorised_is_cheaper(mask.shape, mask.block, rank, x.dtype, device_type(x))


def is_fused(form: str, mask: Mask, rank: int, x: Tensor) -> bool:
    """Whether `triton` can be had for a layer. One whose sides are no whole tiles is computed without the kernel, as is every layer off a GPU:
    an adapter that was trained with it is evaluated and merged anywhere (a training run is refused there)."""
    if form != "triton" or not isinstance(mask, BlockMask) or x.device.type != "cuda":
        return False
    whole = mask.shape[0] % mask.block == 0 and mask.shape[1] % mask.block == 0
    return whole and kernel_fits(mask.block, rank)


def layer_mask(pattern: Pattern, name: str, shape: tuple[int, int]) -> Mask | None:
    """A layer's mask; None where nothing is pruned.

    Raises:
        ValueError: the pattern is of another model.
    """
    mask = pattern.get(name)
    if mask is not None and mask.shape != shape:
        raise ValueError(f"layer {name}: the pattern's mask is of shape {mask.shape}, the weight of {shape}")
    return None if mask is None or mask.keeps_all else mask


def kept_of(mask: Mask) -> Tensor:
    """What `adapter/product.py` takes: bool (P, Q) of tiles, or packed uint8 bits of single weights."""
    return mask.kept_PQ if isinstance(mask, BlockMask) else mask.bits


class BlockLoraLinear(LoraLinear):
    """LoRA on `nn.Linear` or `Conv1D` whose update respects a mask. Built by PEFT from a `BlockLoraConfig`."""

    adapter_layer_names = LoraLinear.adapter_layer_names
    other_param_names = (*LoraLinear.other_param_names, "lora_kept")

    def __init__(self, base_layer: nn.Module, adapter_name: str, config: Any, **kwargs: Any) -> None:
        kwargs["is_target_conv_1d_layer"] = bool(is_transposed(getattr(base_layer, "base_layer", base_layer)))
        super().__init__(base_layer, adapter_name, config=config, **kwargs)

    @property
    def lora_variants(self) -> dict[tuple[str, ...], Any]:
        """PEFT's table of what a layer can do beside plain LoRA."""
        return {(): None, ("use_dora",): BlockDoraVariant}

    def update_layer(self, adapter_name: str, r: int, lora_alpha: int, config: Any, **kwargs: Any) -> None:
        """Add an adapter; its mask comes from the config's pattern, under this layer's name."""
        if not hasattr(self, "lora_kept"):
            self.lora_kept = BufferDict({}, persistent=False)
            self.lora_mask: dict[str, Mask | None] = {}
            self.lora_form: dict[str, str] = {}
            self.lora_frozen: dict[str, int] = {}
            """how many of an adapter's last ranks get no gradient (`principal.py`)"""
            self.siblings: Siblings | None = None
            """what it is computed together with"""
        self.fan_in_fan_out = bool(is_transposed(self.get_base_layer()))
        pattern = getattr(config, "pattern", None)  # a plain config has none (`config.with_own_layers`)
        mask = None if pattern is None else layer_mask(pattern, kwargs["target_name"], (self.out_features, self.in_features))
        self.lora_mask[adapter_name] = mask
        self.lora_form[adapter_name] = getattr(config, "form", "auto")
        super().update_layer(adapter_name, r, lora_alpha=lora_alpha, config=config, **kwargs)
        if mask is not None:
            self.lora_kept[adapter_name] = kept_of(mask).to(self.lora_A[adapter_name].weight.device)

    def delete_adapter(self, adapter_name: str) -> None:
        super().delete_adapter(adapter_name)
        self.lora_mask.pop(adapter_name, None)
        self.lora_form.pop(adapter_name, None)

    def get_delta_weight(self, adapter: str) -> Tensor:
        """s * mask . BA as the base stores its weight ((O, I), or (I, O) for `Conv1D`), computed in float32."""
        mask = self.lora_mask[adapter]
        if mask is None:
            return super().get_delta_weight(adapter)
        A_RI, B_OR = self.lora_A[adapter].weight, self.lora_B[adapter].weight
        delta_OI = masked_delta(A_RI.float(), B_OR.float(), self.lora_kept[adapter], mask.block, self.scaling[adapter])
        return delta_OI.T if self.fan_in_fan_out else delta_OI

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if kwargs.get("adapter_names") is not None:
            raise ValueError("adapter_names: mixed batches would bypass the mask; run each adapter's rows as a batch of its own")
        if self.disable_adapters or self.merged:
            return super().forward(x, *args, **kwargs)
        if not args and not kwargs and (result := self._with_base(x)) is not None:
            return result
        result = self.base_layer(x, *args, **kwargs)
        dtype = result.dtype
        for adapter in self.active_adapters:
            if adapter in self.lora_variant:
                result = self.lora_variant[adapter].forward(self, active_adapter=adapter, x=x.to(dtype), result=result)
            elif adapter in self.lora_A:
                result = result + self.update(adapter, self.lora_dropout[adapter](x.to(dtype)))
        return result.to(dtype)

    def _with_base(self, x: Tensor) -> Tensor | None:
        """Base and update in one step (`linear.py`), where that can be."""
        if self.siblings is not None and (y := self.siblings.output(self, x)) is not None:
            return y
        adapted = self.prepared(x)
        if adapted is None:
            return None
        dropped = self.lora_dropout[self.active_adapters[0]](x) if self.drops_out else None
        return adapted_linears(x, [adapted], dropped)[0]

    @property
    def drops_out(self) -> bool:
        """Whether an update sees something else of x than the base does."""
        active = [self.lora_dropout[name] for name in self.active_adapters if name in self.lora_dropout]
        return self.training and not all(isinstance(dropout, nn.Identity) for dropout in active)

    def prepared(self, x: Tensor) -> Adapted | None:
        """For `adapted_linears`; None where it cannot be: it takes one adapter whose mask is of whole tiles, or none, on a plain frozen linear
        that nobody hooks into (DeepSpeed gathers its weight so), in the dtype of x."""
        base, active = self.base_layer, self.active_adapters
        if (
            type(base) not in (nn.Linear, BlockLinear)
            or len(active) != 1
            or active[0] not in self.lora_A
            or active[0] in self.lora_variant
        ):
            return None
        adapter = active[0]
        mask, form = self.lora_mask[adapter], self.lora_form[adapter]
        hooked = base._forward_pre_hooks or base._forward_hooks or base._backward_hooks or base._backward_pre_hooks
        trained = base.weight.requires_grad or (base.bias is not None and base.bias.requires_grad)
        autocast = not x.is_meta and torch.is_autocast_enabled(x.device.type)
        if hooked or trained or autocast or x.dtype != base.weight.dtype or isinstance(mask, ElementMask):
            return None
        A_RI, B_OR = self._factors(adapter)
        kept, block = (None, 1) if mask is None else (self.lora_kept[adapter], mask.block)
        unpack = getattr(base, "unpacked_OI", None)
        adapted = Adapted(base.weight, base.bias, A_RI, B_OR, kept, block, self.scaling[adapter], unpack=unpack)
        if mask is None:
            return adapted
        tokens = x.numel() // x.shape[-1]
        if form == "auto" and not self.drops_out and x.dtype.itemsize >= 4 and merged_is_cheaper(mask.shape, tokens):
            by_tiles = tiles_give_gradients(mask.shape, mask.block, self.r[adapter])
            return adapted._replace(form="merged", dense=not by_tiles)
        if is_fused(form, mask, self.r[adapter], x):
            return adapted._replace(form="kernel")
        return adapted if is_factorised(form, mask, self.r[adapter], x) else None

    def _factors(self, adapter: str) -> tuple[Tensor, Tensor]:
        """A (R, I) and B (O, R); frozen ranks without a gradient."""
        A_RI, B_OR = self.lora_A[adapter].weight, self.lora_B[adapter].weight
        trained = A_RI.shape[0] - self.lora_frozen.get(adapter, 0)
        if trained < A_RI.shape[0]:  # here and not by a hook on the parameter, which fully_shard puts another in the place of
            A_RI = torch.cat([A_RI[:trained], A_RI[trained:].detach()])
            B_OR = torch.cat([B_OR[:, :trained], B_OR[:, trained:].detach()], dim=1)
        return A_RI, B_OR

    def update(self, adapter: str, x: Tensor) -> Tensor:
        """x @ dW^T, in x's dtype; dropout is the caller's."""
        A_RI, B_OR = self._factors(adapter)
        mask, scale = self.lora_mask[adapter], self.scaling[adapter]
        if mask is None:
            with without_autocast(x):
                return nn.functional.linear(nn.functional.linear(x, A_RI.to(x.dtype)), B_OR.to(x.dtype)) * scale
        form = self.lora_form[adapter]
        factorised, fused = is_factorised(form, mask, self.r[adapter], x), is_fused(form, mask, self.r[adapter], x)
        return masked_product(x, A_RI, B_OR, self.lora_kept[adapter], mask.block, scale, factorised=factorised, fused=fused)

    def __repr__(self) -> str:
        return super().__repr__().replace("lora.", "lora_dist.", 1)
