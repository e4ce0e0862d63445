"""Sparse full fine-tuning: the kept weights themselves are trained, as `W + delta` with a delta on kept tiles only.

The base stays frozen and untouched, so guard, fingerprint, checkpoints and strategies are those of any adapter; `lora_delta` is what
is trained, float32, zero at the start:

    a mask of tiles       (n, b, b)   the n kept tiles, as `blocks/tiles.py` packs them
    a mask of elements    (n,)        the n kept weights in row-major order
    nothing pruned        (O, I)

Pruned weights have no element in it, no gradient and no optimizer state; they are zero by construction. The sum is made in float32 and
cast to the dtype of the base once, so a 16-bit base loses no small update. Between forward and backward pass nothing of O x I is kept:
the sum is made again. Every AdamW step on delta is the same step on the weights, where weight_decay is 0; otherwise decay pulls
towards the base and not towards zero. Shapes: T tokens, I/O in/out features, P/Q block rows/columns, b block side.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from peft import LoraModel
from peft.tuners._buffer_dict import BufferDict
from peft.tuners.lora.layer import Linear as LoraLinear
from peft.tuners.lora.layer import LoraLayer
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from lora_dist.adapter.config import PatternConfig
from lora_dist.adapter.layer import layer_mask
from lora_dist.adapter.product import without_autocast
from lora_dist.adapter.whole import TrainsWhole, layer_bias
from lora_dist.blocks import BlockMask, Mask, is_transposed, unpack_bits
from lora_dist.blocks.tiles import gather_tiles, places, scatter_tiles
from lora_dist.gemm import linear, matmul, product

SPARSE_TYPE = "BLOCK_FULL"


@dataclass
class SparseFullConfig(PatternConfig):
    """What an adapter folder says of a sparse full fine-tuning. Of `peft.LoraConfig` only target_modules and the like count."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = SPARSE_TYPE


def kept_places(mask: Mask | None) -> Tensor:
    """Where the elements of a delta belong: at_2n (int64) of tiles, packed bits (uint8) of elements, an empty tensor for all of them."""
    if mask is None:
        return torch.empty(0)
    return places(mask.kept_PQ) if isinstance(mask, BlockMask) else mask.bits


def delta_shape(mask: Mask | None, shape: tuple[int, int]) -> tuple[int, ...]:
    """Of what is trained of a matrix of `shape` (O, I)."""
    if mask is None:
        return shape
    if isinstance(mask, BlockMask):
        return (int(mask.kept_PQ.sum()), mask.block, mask.block)
    return (mask.kept_elements(),)


def gather_kept(weight_OI: Tensor, kept: Tensor, block: int) -> Tensor:
    """A matrix's kept weights in a delta's form, copied."""
    if not kept.numel():
        return weight_OI.contiguous()
    if kept.dtype == torch.uint8:
        return weight_OI[unpack_bits(kept, weight_OI.numel()).view_as(weight_OI)]
    return gather_tiles(weight_OI, kept, block)


def scatter_kept(delta: Tensor, kept: Tensor, block: int, shape: tuple[int, int]) -> Tensor:
    """(O, I): a delta as a matrix, exactly +0 where nothing is kept."""
    if not kept.numel():
        return delta
    if kept.dtype == torch.uint8:
        flat = torch.zeros(shape[0] * shape[1], dtype=delta.dtype, device=delta.device)
        return flat.masked_scatter_(unpack_bits(kept, len(flat)), delta).view(shape)
    return scatter_tiles(delta, kept, block, shape)


def kept_sum(stored: Tensor, delta: Tensor, kept: Tensor, block: int, shape: tuple[int, int], transposed: bool) -> Tensor:
    """(O, I): W + delta, made in delta's float32, in the weight's dtype; the weight is taken to be zero where nothing is kept.

    Args:
        stored: as the base holds it: (O, I), (I, O) where `transposed`, or its kept tiles (`blocks/block_linear.py`).
        shape: (O, I).
    """
    held = stored if stored.ndim == 3 else gather_kept(stored.T if transposed else stored, kept, block)
    return scatter_kept((held.to(delta.dtype) + delta).to(stored.dtype), kept, block, shape)


class _SparseFull(torch.autograd.Function):
    """x @ (W + delta)^T + bias. Inputs: x_TI, weight as stored, bias_O or None, delta, and of `kept_sum` kept, block, shape, transposed.

    Saves x and parameters only: those that are sharded come back whole for the backward pass, and a sum would keep O x I.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x_TI: Tensor,
        stored: Tensor,
        bias_O: Tensor | None,
        delta: Tensor,
        kept: Tensor,
        block: int,
        shape: tuple[int, int],
        transposed: bool,
    ) -> Tensor:
        ctx.save_for_backward(x_TI, stored, delta, kept)
        ctx.form = block, shape, transposed
        return linear(x_TI, kept_sum(stored, delta, kept, *ctx.form), bias_O)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g_TO: Tensor) -> tuple[Tensor | None, ...]:
        x_TI, stored, delta, kept = ctx.saved_tensors
        need_x, _, need_bias, need_delta = ctx.needs_input_grad[:4]
        dx = dbias = ddelta = None
        if need_x:
            dx = product(g_TO, kept_sum(stored, delta, kept, *ctx.form))
        if need_bias:
            dbias = g_TO.sum(0)
        if need_delta:
            ddelta = gather_kept(matmul(g_TO.T, x_TI), kept, ctx.form[0]).to(delta.dtype)
        return dx, None, dbias, ddelta, None, None, None, None


class SparseFullLinear(LoraLinear):
    """`nn.Linear`, `Conv1D` or `BlockLinear` whose kept weights are trained. Built by `SparseFullModel`."""

    adapter_layer_names = ("lora_delta",)
    other_param_names = ("lora_kept",)

    def __init__(self, base_layer: nn.Module, adapter_name: str, mask: Mask | None, *, hollow: bool = False) -> None:
        nn.Module.__init__(self)
        LoraLayer.__init__(self, base_layer)
        self.fan_in_fan_out = bool(is_transposed(base_layer))
        self.lora_delta = nn.ParameterDict({})
        self.lora_kept = BufferDict({}, persistent=False)
        self.lora_mask: dict[str, Mask | None] = {}
        self._active_adapter = adapter_name
        self.add(adapter_name, mask, hollow=hollow)

    def add(self, adapter_name: str, mask: Mask | None, *, hollow: bool = False) -> None:
        """A delta of zeros; where it is `hollow` and so is the base's weight, a placeholder of its shape (`models/streaming.py`)."""
        held = self.get_base_layer().weight
        device = held.device
        shape = delta_shape(mask, (self.out_features, self.in_features))
        self.lora_mask[adapter_name] = mask
        placeholder = hollow and not held.is_contiguous()
        zeros = torch.zeros((), device=device).expand(shape) if placeholder else torch.zeros(shape, device=device)
        self.lora_delta[adapter_name] = nn.Parameter(zeros)
        self.lora_kept[adapter_name] = kept_places(mask).to(device)
        self.set_adapter(self.active_adapters)

    def idle_elements(self, adapter_name: str) -> int:
        """Of its delta, those that fill edge tiles up, and never move."""
        mask = self.lora_mask[adapter_name]
        return 0 if mask is None else self.lora_delta[adapter_name].numel() - mask.kept_elements()

    def get_delta_weight(self, adapter: str) -> Tensor:
        """The update as the base stores its weight, float32."""
        delta_OI = scatter_kept(
            self.lora_delta[adapter], self.lora_kept[adapter], self._block(adapter), (self.out_features, self.in_features)
        )
        return delta_OI.T if self.fan_in_fan_out else delta_OI

    def _delta_as_held(self, adapter: str) -> Tensor:
        """In the form of the base layer's `weight`, which is the kept tiles where it holds no others."""
        tiles = self.get_base_layer().weight.ndim == 3
        return (self.lora_delta[adapter] if tiles else self.get_delta_weight(adapter)).detach()

    def _block(self, adapter: str) -> int:
        mask = self.lora_mask[adapter]
        return 1 if mask is None else mask.block

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Make the trained weights the base's own."""
        base = self.get_base_layer()
        for adapter in adapter_names or self.active_adapters:
            if adapter not in self.lora_delta or adapter in self.merged_adapters:
                continue
            merged = (base.weight.data + self._delta_as_held(adapter)).to(base.weight.dtype)
            if safe_merge and not torch.isfinite(merged).all():
                raise ValueError(f"NaNs detected in the merged weights. The adapter {adapter} seems to be broken")
            base.weight.data = merged
            self.merged_adapters.append(adapter)

    def unmerge(self) -> None:
        """Inverse of `merge`, to rounding."""
        base = self.get_base_layer()
        while self.merged_adapters:
            delta = self._delta_as_held(self.merged_adapters.pop())
            base.weight.data = (base.weight.data - delta).to(base.weight.dtype)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if kwargs.get("adapter_names") is not None:
            raise ValueError("adapter_names: found a mixed batch, expected one adapter's rows: each has weights of its own")
        active = [adapter for adapter in self.active_adapters if adapter in self.lora_delta]
        if self.disable_adapters and self.merged:
            self.unmerge()
        if self.disable_adapters or self.merged or not active:
            return self.base_layer(x, *args, **kwargs)
        if len(active) > 1:
            raise ValueError(f"sparse full fine-tuning: found {', '.join(active)} active together, expected one")
        base, adapter = self.get_base_layer(), active[0]
        weight, kept = base.weight, self.lora_kept[adapter]
        form = self._block(adapter), (self.out_features, self.in_features), self.fan_in_fan_out
        bias_O = layer_bias(self)
        x_TI = x.reshape(-1, x.shape[-1]).to(weight.dtype)
        with without_autocast(x):
            y_TO = _SparseFull.apply(x_TI, weight, bias_O, self.lora_delta[adapter], kept, *form)
        return y_TO.view(*x.shape[:-1], -1)

    def __repr__(self) -> str:
        return "lora_dist." + super().__repr__()


class SparseFullModel(TrainsWhole, LoraModel):
    """PEFT's tuner whose layers are `SparseFullLinear`."""

    def _create_and_replace(
        self, lora_config: Any, adapter_name: str, target: Any, target_name: str, parent: nn.Module, current_key: str, **_: Any
    ) -> None:
        base = target.get_base_layer() if isinstance(target, SparseFullLinear) else target
        weight, transposed = base.weight, is_transposed(base)
        if transposed is None:
            raise ValueError(f"{current_key}: found {type(base).__name__}, expected a linear")
        shape = (weight.shape[1], weight.shape[0]) if transposed else (base.out_features, base.in_features)
        mask = layer_mask(lora_config.pattern, current_key, shape)
        if mask is not None and not mask.kept_elements():
            return  # all of it is pruned: there is nothing to train
        if isinstance(target, SparseFullLinear):
            target.add(adapter_name, mask)
            return
        layer = SparseFullLinear(target, adapter_name, mask, hollow=not lora_config.inference_mode)
        if adapter_name not in self.active_adapters:
            layer.requires_grad_(False)
        self._replace_module(parent, target_name, layer, target)
