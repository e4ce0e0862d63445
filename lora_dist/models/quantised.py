"""Quantised bases: the linears of the decoder layers in 4 bits (NF4, FP4) or in int8, by bitsandbytes, on CPU and GPU.

A weight is quantised from the tensor as it is stored, in float32, one at a time as it is read, so no process ever holds the whole
model in full precision as well, and the quantised weights depend on the stored ones only, not on the precision that is computed in.
Pruned weights are given the code of 0.0 (bitsandbytes divides by a block's largest value: what it writes for a block of zeros depends
on the device), which makes them exactly 0 after de-quantising, whatever the block's scale, double quantisation included.
Why not transformers' own quantised loading: it holds the whole model on each process, where fsdp2 wants a part, and knows no pattern.
Its `BitsAndBytesConfig` is what an adapter remembers of its base. Called by `engine/base.py`.
"""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import BitsAndBytesConfig

from lora_dist.blocks import BlockLinear, BlockMask, Mask, NamedLinear, Pattern, Piece, Scratch, pack, tile_count
from lora_dist.log import GuardError, UserError
from lora_dist.models.streaming import TensorReader, fill_from

BLOCK = 64
"""4-bit weights that share a scale, as in QLoRA; none crosses a row (`padded.py`)"""
OUTLIER_THRESHOLD = 6.0
"""LLM.int8()'s, as in transformers: columns of the input with larger values are multiplied in half precision"""

_TILES_KEY = "lora_dist_kept_tiles"


@dataclass(frozen=True)
class Quantisation:
    """How a base is quantised."""

    bits: int
    """4 or 8"""
    quant_type: str = "nf4"
    """of 4 bits: nf4 or fp4"""
    double: bool = True
    """of 4 bits: whether the blocks' scales are quantised too"""
    tiles: bool = False
    """of 4 bits: whether of pruned linears only the kept tiles are held (`block_quantised.py`)"""

    def __str__(self) -> str:
        if self.bits == 8:
            return "int8 (LLM.int8)"
        of_tiles = " of kept tiles (storage blocks)" if self.tiles else ""
        return f"{self.quant_type.upper()}{' with double quantisation' if self.double else ''}{of_tiles}"

    def to_dict(self) -> dict[str, Any]:
        """As transformers writes it into a config.json."""
        if self.bits == 8:
            return BitsAndBytesConfig(load_in_8bit=True, llm_int8_threshold=OUTLIER_THRESHOLD).to_dict()
        config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type=self.quant_type, bnb_4bit_use_double_quant=self.double)
        return config.to_dict() | ({_TILES_KEY: True} if self.tiles else {})

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> Quantisation:
        """Inverse of `to_dict`. Raises UserError for anything else."""
        if config.get("load_in_8bit"):
            return cls(8)
        if config.get("load_in_4bit"):
            double, tiles = bool(config.get("bnb_4bit_use_double_quant")), bool(config.get(_TILES_KEY))
            return cls(4, str(config.get("bnb_4bit_quant_type")), double, tiles)
        raise UserError(f"quantization: found {dict(config)}, expected load_in_4bit or load_in_8bit, as bitsandbytes has them")


def quantisation_of(
    load_in_4bit: bool, load_in_8bit: bool, bnb_4bit_quant_type: str = "nf4", bnb_4bit_use_double_quant: bool = True
) -> Quantisation | None:
    """By transformers' names; None for a base as it is stored."""
    if load_in_8bit:
        return Quantisation(8)
    return Quantisation(4, bnb_4bit_quant_type, bnb_4bit_use_double_quant) if load_in_4bit else None


def import_bitsandbytes() -> Any:
    """bitsandbytes, silent about what users can do nothing about.

    Raises:
        UserError: it is not installed.
    """
    if importlib.util.find_spec("bitsandbytes") is None:
        raise UserError(
            "model.load_in_4bit, model.load_in_8bit: need bitsandbytes, which is not installed: pip install bitsandbytes"
        )
    import bitsandbytes

    # int8 products take float16 inputs; it says so for every layer at every step.
    logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)
    return bitsandbytes


def _empty_layer(linear: NamedLinear, quantisation: Quantisation, compute_dtype: torch.dtype, storage: torch.dtype) -> Any:
    """bitsandbytes' layer in the place of a linear, its weight on the meta device, the linear's own bias."""
    bnb, module = import_bitsandbytes(), linear.module
    O, I = linear.weight_OI.shape
    with torch.device("meta"):
        if quantisation.bits == 8:
            layer = bnb.nn.Linear8bitLt(I, O, bias=False, has_fp16_weights=False, threshold=OUTLIER_THRESHOLD)
        else:
            from lora_dist.models.padded import PaddedLinear4bit

            layer = PaddedLinear4bit(
                I,
                O,
                bias=False,
                compute_dtype=compute_dtype,
                compress_statistics=quantisation.double,
                quant_type=quantisation.quant_type,
                quant_storage=storage,
            )
            # It would repack the weight in place for inference on some CPUs: the guard could not tell what it was.
            layer.support_avx512bf16_for_cpu = False
    layer.bias = module.bias
    layer.requires_grad_(False)
    return layer.train(module.training)


def _unpacked(packed: Tensor) -> Tensor:
    """Flat uint8 codes of 4-bit data, in the order of the weight; the first is in a byte's high half."""
    data = packed.detach().contiguous().view(-1).view(torch.uint8)
    return torch.stack([data >> 4, data & 15], dim=1).view(-1)


def _zero_code(state: Any) -> int:
    """The 4-bit code of 0.0."""
    return int((state.code == 0).nonzero()[0])


def pack_4bit(weight_OI: Tensor, quantisation: Quantisation, storage: torch.dtype, zero_OI: Tensor | None) -> tuple[Tensor, Any]:
    """Packed data and bitsandbytes' state of a float32 weight, its rows filled up to whole blocks.

    Args:
        zero_OI: what is to be exactly 0 after de-quantising, bool on the weight's device.
    """
    functional = import_bitsandbytes().functional
    padding = (0, -weight_OI.shape[1] % BLOCK)
    padded = nn.functional.pad(weight_OI, padding).contiguous()
    packed, state = functional.quantize_4bit(
        padded, blocksize=BLOCK, compress_statistics=quantisation.double, quant_type=quantisation.quant_type
    )
    if zero_OI is not None:
        pruned = nn.functional.pad(zero_OI, padding)
        codes = _unpacked(packed).masked_fill_(pruned.view(-1), _zero_code(state))
        packed = (codes[::2] << 4) | codes[1::2]
    return packed.view(-1).view(storage).view(-1, 1), state


def _quantise_into(layer: Any, weight_OI: Tensor, quantisation: Quantisation, mask: Mask | None) -> None:
    """Give a layer of `_empty_layer` its weight, from a float32 one on the device where it is to be."""
    bnb = import_bitsandbytes()
    if quantisation.bits == 8:
        data, scale_O, _ = bnb.functional.int8_vectorwise_quant(weight_OI.contiguous().to(torch.float16))
        if mask is not None:
            data.masked_fill_(~mask.expand(data.device), 0)
        layer.weight = bnb.nn.Int8Params(data, requires_grad=False, has_fp16_weights=False, CB=data, SCB=scale_O)
        return
    pruned_OI = None if mask is None else ~mask.expand(weight_OI.device)
    packed, state = pack_4bit(weight_OI, quantisation, layer.quant_storage, pruned_OI)
    state.dtype = layer.compute_dtype
    layer.weight = bnb.nn.Params4bit(
        packed,
        requires_grad=False,
        quant_state=state,
        blocksize=BLOCK,
        compress_statistics=quantisation.double,
        quant_type=quantisation.quant_type,
        quant_storage=layer.quant_storage,
        bnb_quantized=True,
        module=layer,
    )
    layer.quant_state = state


def _scale(layer: Any) -> Tensor:
    """int8's scale of each row; the layer moves it from its weight at the first forward pass."""
    scale = layer.state.SCB
    return scale if scale is not None else layer.weight.SCB


def dequantised_OI(layer: Any) -> Tensor:
    """The weight that a quantised layer stands for, float32 (O, I)."""
    functional = import_bitsandbytes().functional
    if hasattr(layer, "state"):
        return functional.int8_vectorwise_dequant(layer.weight.data, _scale(layer))
    state = layer.quant_state
    dtype, state.dtype = state.dtype, torch.float32
    try:
        return functional.dequantize_4bit(layer.weight.data, state)[:, : layer.in_features]
    finally:
        state.dtype = dtype


def dequantised(weight_OI: Tensor, quantisation: Quantisation, mask: Mask | None) -> Tensor:
    """dequantise(quantise(W)), float32: what a run on the quantised base computes with."""
    if _as_tiles(quantisation, mask):
        from lora_dist.models.block_quantised import dequantised_tiles

        assert isinstance(mask, BlockMask)
        return dequantised_tiles(weight_OI, quantisation, mask)
    linear = NamedLinear("", nn.Linear(weight_OI.shape[1], weight_OI.shape[0], bias=False, device="meta"), False)
    layer = _empty_layer(linear, quantisation, torch.float32, torch.uint8)
    _quantise_into(layer, weight_OI.float(), quantisation, mask)
    return dequantised_OI(layer)


def _as_tiles(quantisation: Quantisation, mask: Mask | None) -> bool:
    """Whether a weight is held as its kept tiles."""
    return quantisation.tiles and isinstance(mask, BlockMask) and not mask.keeps_all


def _empty_tiles(
    linear: NamedLinear, mask: Any, scratch: Scratch, compute_dtype: torch.dtype, storage: torch.dtype, device: torch.device
) -> Any:
    """As `_empty_layer`, of kept tiles. Raises UserError where a tile is no whole number of blocks."""
    from lora_dist.models.block_quantised import BlockLinear4bit, require_whole_blocks

    require_whole_blocks(mask, linear.name)
    old: Any = linear.module
    layer = BlockLinear4bit(mask, old.bias, scratch, compute_dtype=compute_dtype, storage=storage, device=device)
    return layer.requires_grad_(False).train(old.training)


class QuantisedReader:
    """Reads a base in placeholders (`streaming.load_empty`), the linears of its decoder layers quantised on the way.

    Args:
        model: in placeholders; its linears are replaced at once, by bitsandbytes' layers without weights.
        linears: to quantise; as they were before.
        pattern: of the base: pruned weights are given the code of 0.0.
        storage: dtype that 4-bit data is held in; a sharded strategy wants a floating-point one.
    """

    def __init__(
        self,
        model: nn.Module,
        reader: TensorReader,
        linears: Sequence[NamedLinear],
        pattern: Pattern | None,
        quantisation: Quantisation,
        *,
        compute_dtype: torch.dtype,
        device: torch.device,
        storage: torch.dtype = torch.uint8,
    ):
        self._reader, self._pattern, self._quantisation, self._device = reader, pattern, quantisation, device
        self._stands_for = DequantisedReader(reader, linears, pattern, quantisation)
        self._layers: dict[nn.Module, NamedLinear] = {}
        scratch = Scratch()
        for linear in linears:
            mask = None if pattern is None else pattern.get(linear.name)
            if _as_tiles(quantisation, mask):
                layer = _empty_tiles(linear, mask, scratch, compute_dtype, storage, device)
            else:
                layer = _empty_layer(linear, quantisation, compute_dtype, storage)
                self._place(layer)
            model.set_submodule(linear.name, layer)
            self._layers[layer] = linear

    def _place(self, layer: Any) -> None:
        """A placeholder that takes no memory, of the class that adapters look for; uint8, which says nothing of a precision."""
        bnb = import_bitsandbytes()
        if self._quantisation.bits == 8:
            zero = torch.zeros((), dtype=torch.int8, device=self._device).expand(layer.weight.shape)
            layer.weight = bnb.nn.Int8Params(zero, requires_grad=False, has_fp16_weights=False)
            return
        zero = torch.zeros((), dtype=torch.uint8, device=self._device).expand(
            layer.out_features * (layer.in_features + layer.padding) // 2, 1
        )
        layer.weight = bnb.nn.Params4bit(
            zero,
            requires_grad=False,
            compress_statistics=self._quantisation.double,
            quant_type=self._quantisation.quant_type,
            bnb_quantized=True,
            module=layer,
        )

    def __contains__(self, name: object) -> bool:
        quantised = {f"{linear.name}.weight" for linear in self._layers.values()}
        return name in self._reader and name not in quantised

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        return self._reader.rows(name, start, stop)

    def whole(self, name: str) -> Tensor:
        """A parameter; of a quantised linear what it stands for, float32."""
        return self._stands_for.whole(name)

    @torch.no_grad()
    def fill_quantised(self, unit: nn.Module) -> None:
        """Read and quantise the layers inside `unit`, one at a time, whole.

        Raises:
            GuardError: a pruned tile that is not exactly zero after de-quantising.
        """
        for layer in unit.modules():
            if layer not in self._layers:
                continue
            linear = self._layers[layer]
            if isinstance(layer, BlockLinear):
                self._fill_tiles(layer, linear)
                continue
            stored = self._reader.whole(f"{linear.name}.weight").to(self._device, torch.float32)
            mask = None if self._pattern is None else self._pattern.get(linear.name)
            weight_OI = stored.T if linear.transposed else stored
            _quantise_into(layer, weight_OI, self._quantisation, mask)
            prove(linear.name, weight_OI, dequantised_OI(layer), mask, self._quantisation)

    def _fill_tiles(self, layer: Any, linear: NamedLinear) -> None:
        name, count = f"{linear.name}.weight", tile_count(layer.mask)
        tiles = self._reader.tiles(name, 0, count)
        if tiles is None:
            stored = self._reader.whole(name)
            tiles = pack(stored.T if linear.transposed else stored, layer.mask)
        layer.fill(tiles.to(self._device, torch.float32), self._quantisation, linear.name)

    def fill(self, model: Any) -> None:
        """Everything: quantised layers, and the other parameters in the precision of their placeholders."""
        self.fill_quantised(model)
        fill_from(model, self)


def prove(name: str, weight_OI: Tensor, found_OI: Tensor, mask: Mask | None, quantisation: Quantisation) -> None:
    """What was quantised comes back: pruned weights as exact zeros, the others within the spacing of the codes. Waits for the device.

    Raises:
        GuardError: naming layer and tile; or a device that gives back other values, which bitsandbytes' kernels have done.
    """
    violation = None if mask is None else mask.first_violation(found_OI)
    if violation is not None:
        assert mask is not None
        raise GuardError(f"guard after quantising: {violation[0].describe(name, mask.kind, violation[1])}")
    block = weight_OI.shape[1] if quantisation.bits == 8 else BLOCK
    error, value = (
        nn.functional.pad(t, (0, -t.shape[1] % block)).view(-1, block).abs().amax(1) for t in (found_OI - weight_OI, weight_OI)
    )
    spacing = 0.01 if quantisation.bits == 8 else 0.2  # half of the widest gap of NF4 is 0.15 of the largest value, of FP4 0.17
    if bool((error > spacing * value + 0.02 * value.max()).any()):  # the second: scales that are quantised themselves
        raise GuardError(
            f"guard after quantising: layer {name}: bitsandbytes gives back weights that are wrong by up to {float(error.max()):.2g} "
            f"(largest weight {float(value.max()):.2g}) on this device; try another version of it, or load the base unquantised"
        )


class DequantisedReader:
    """Reads a base whose linears are to be dequantise(quantise(W)). Arguments as `QuantisedReader`."""

    def __init__(self, reader: TensorReader, linears: Sequence[NamedLinear], pattern: Pattern | None, quantisation: Quantisation):
        self._reader, self._pattern, self._quantisation = reader, pattern, quantisation
        self._linears = {f"{linear.name}.weight": linear for linear in linears}

    def __contains__(self, name: object) -> bool:
        return name in self._reader

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        return self.whole(name)[start:stop] if name in self._linears else self._reader.rows(name, start, stop)

    def whole(self, name: str) -> Tensor:
        stored = self._reader.whole(name)
        linear = self._linears.get(name)
        if linear is None:
            return stored
        mask = None if self._pattern is None else self._pattern.get(linear.name)
        found_OI = dequantised(stored.T if linear.transposed else stored, self._quantisation, mask)
        return found_OI.T.contiguous() if linear.transposed else found_OI

    def fill_quantised(self, unit: nn.Module) -> None:
        """Nothing: no layer is quantised."""

    def fill(self, model: Any) -> None:
        """Every parameter, in the precision of its placeholder."""
        fill_from(model, self)


def quantised_layers(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """(name, layer) of every quantised linear, without loading bitsandbytes."""
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and type(module).__name__ in ("PaddedLinear4bit", "Linear8bitLt", "BlockLinear4bit"):
            yield name, module


def state_tensors(layer: Any) -> dict[str, Tensor]:
    """What belongs to a quantised weight beside its packed data, by name: scales, and scales of scales."""
    if hasattr(layer, "state"):
        return {"SCB": _scale(layer)}
    state = layer.quant_state
    found = {"absmax": state.absmax, "quant_map": state.code}
    if state.nested:
        found |= {"nested_absmax": state.state2.absmax, "nested_quant_map": state.state2.code, "offset": state.offset.reshape(1)}
    return found


def codes(layer: Any, packed: Piece) -> Piece:
    """A quantised weight as small numbers that are 0 exactly where the weight is.

    Args:
        packed: this process's part of the layer's packed data.
    """
    O, I = layer.out_features, layer.in_features
    if hasattr(layer, "state"):
        return Piece(packed.tensor, (O, I), packed.start)
    flat = _unpacked(packed.tensor) ^ _zero_code(layer.quant_state)
    width, start = I + layer.padding, packed.start * packed.tensor.element_size() * 2
    if flat.numel() == O * width:
        return Piece(flat.view(O, width)[:, :I], (O, I))
    if layer.padding:
        column = torch.arange(start, start + flat.numel(), device=flat.device) % width
        flat, start = flat[column < I], start // width * I + min(start % width, I)
    return Piece(flat, (O, I), start)
