"""A run's model on the meta device, as training would make it: what it holds, and what a step allocates.

Called by `choice.py`, and by whoever asks what would have fitted.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor, nn

from lora_dist.adapter import attach_adapter
from lora_dist.adapter.heads import class_targets, float_heads
from lora_dist.blocks import BlockMask, NamedLinear, Pattern, grid
from lora_dist.config import RunConfig
from lora_dist.gemm import meta_is
from lora_dist.models.architecture import decoder_layers, prunable_linears, shard_units
from lora_dist.models.block_storage import put_tiles
from lora_dist.models.blueprint import Blueprint, read_blueprint
from lora_dist.models.chunked import CHUNK_BYTES, chunk_rows, chunked_head, put_chunked_head
from lora_dist.models.loss import causal_loss_sum, class_losses
from lora_dist.operations.plan.quantised import QuantisedLinear
from lora_dist.operations.plan.trace import DeviceKernels, Peak, Phase, gives_out_as_computed, trace

PRECISIONS = ("fp32", "bf16", "fp16", "int8", "nf4")
"""what the base is held in; int8 and nf4 compute in bf16"""
_QUANTISED_BITS = {"int8": 8, "nf4": 4}
_TRACED_LAYERS = 1
_TRACED_ROWS = (2, 4)
_ONE_CHUNK = 2**62


def compute_dtype(precision: str) -> torch.dtype:
    return {"fp32": torch.float32, "fp16": torch.float16}.get(precision, torch.bfloat16)


@dataclass(frozen=True)
class Parameter:
    """One of the wrapped model's."""

    shape: tuple[int, ...]
    bytes: int
    """whole; scales included where it is quantised"""
    trainable: bool
    unit: int
    """which unit of `shard_units` it is in; -1: none of them"""

    @property
    def elements(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True)
class Shapes:
    """Plain numbers of a wrapped model, which the arithmetic of memory and traffic needs."""

    parameters: tuple[Parameter, ...]
    buffer_bytes: int
    hidden: int
    layers: int
    head_width: int
    """attention heads x their width"""
    vocabulary: int
    layer_products: int
    """weights of the layers that a token is multiplied with"""
    head_products: int
    """of the language model's head"""

    @property
    def base(self) -> list[Parameter]:
        return [p for p in self.parameters if not p.trainable]

    @property
    def trainable(self) -> list[Parameter]:
        return [p for p in self.parameters if p.trainable]


class Rehearsal:
    """A configuration's model on the meta device, and steps of it.

    Args:
        config: of the run. Its own precision and checkpointing are not looked at: they are arguments here.
        cuda: planned for GPUs, else for CPUs.

    Raises:
        UserError: no configuration of a model, or one that cannot be built without weights.
    """

    def __init__(self, config: RunConfig, *, cuda: bool):
        self._config, self._cuda = config, cuda
        model = config.model
        self.blueprint: Blueprint = read_blueprint(
            model.name_or_path,
            config_name=model.config_name,
            attn_implementation=model.attn_implementation,
            trust_remote_code=model.trust_remote_code,
            classifier=model.task_type == "SEQ_CLS",
            num_labels=model.num_labels,
        )
        self._models: dict[tuple[Any, ...], Any] = {}
        self._found: dict[str, Shapes] = {}
        self._peaks: dict[tuple[Any, ...], dict[str, dict[Phase, Peak]]] = {}

    @cached_property
    def length(self) -> int:
        """Tokens of a row."""
        data = self._config.data
        return (data.packing_length or data.block_size) if data.packing else data.block_size

    def shapes(self, precision: str) -> Shapes:
        """What the whole wrapped model holds."""
        kind = "bf16" if precision == "fp16" else precision
        if kind not in self._found:
            self._found[kind] = self._shapes(self._model(kind, None), self.blueprint.layers)
        return self._found[kind]

    def _shapes(self, wrapped: Any, layers: int) -> Shapes:
        base = wrapped.get_base_model()
        unit_of = {id(p): i for i, unit in enumerate(shard_units(base)) for p in unit.parameters()}
        double = self._config.model.bnb_4bit_use_double_quant
        packed = {id(m.weight): m.held_bytes(double) for m in base.modules() if isinstance(m, QuantisedLinear)}
        found = tuple(
            Parameter(tuple(p.shape), packed.get(id(p), p.numel() * p.element_size()), p.requires_grad, unit_of.get(id(p), -1))
            for p in wrapped.parameters()
        )
        text = base.config.get_text_config()
        hidden, heads, vocabulary = int(text.hidden_size), int(text.num_attention_heads), self.blueprint.vocabulary
        return Shapes(
            parameters=found,
            buffer_bytes=sum(b.numel() * b.element_size() for b in wrapped.buffers()),
            hidden=hidden,
            layers=layers,
            head_width=heads * int(getattr(text, "head_dim", None) or hidden // heads),
            vocabulary=vocabulary,
            layer_products=sum(linear.weight_OI.numel() for linear in prunable_linears(base)),
            head_products=0 if self.blueprint.head is not None else hidden * vocabulary,
        )

    @torch.no_grad()
    def one_layer(self, precision: str, device: torch.device) -> tuple[Any, Shapes]:
        """The wrapped model with one layer, on a device, small random weights in it: to time."""
        base = self.blueprint.build(compute_dtype(precision), layers=1 if self.blueprint.shortable else None)
        linears = prunable_linears(base)
        model = _with_adapter(self._config, self.blueprint, base, self._pattern(linears), [linear.name for linear in linears])
        shapes = self._shapes(model, len(decoder_layers(base)[1]))
        model.to_empty(device=device)
        for parameter in model.parameters():
            parameter.normal_(0, 0.02)
        for buffer in model.buffers():
            buffer.zero_()
        return model, shapes

    def peaks(
        self, precision: str, *, checkpointing: float, rows: int, train: bool = True, gather: str = "none", exact: bool = False
    ) -> dict[Phase, Peak]:
        """Peak bytes of a micro-batch (train) or of a batch of an evaluation, by phase.

        Args:
            precision: one of `PRECISIONS`.
            checkpointing: share of the layers, the first ones, that is computed again.
            gather: what a sharded strategy makes whole at a time: none, units (fsdp2) or leaves (zero3).
            exact: with so many rows; else by a line through two numbers of rows, which is high by some MiB for a single one.
        """
        kind = "bf16" if precision == "fp16" else precision
        if train and 0 < checkpointing < 1:
            # What the layers keep is all there when the backward pass begins, and the layers are alike: a line, which all but the last end.
            layers = self.blueprint.layers
            none, all_ = (self.peaks(precision, checkpointing=on, rows=rows, gather=gather, exact=exact) for on in (0, 1))
            share = min(1.0, checkpointing * layers / max(1, layers - 1))
            return {phase: _extended(none[phase], all_[phase], share) for phase in none}
        if exact or rows in _TRACED_ROWS:
            peaks = self._exact(kind, bool(checkpointing) and train, rows, train, gather)
        else:
            few, more = (self._exact(kind, bool(checkpointing) and train, n, train, gather) for n in _TRACED_ROWS)
            between = _TRACED_ROWS[1] - _TRACED_ROWS[0]
            peaks = {phase: _extended(few[phase], more[phase], (rows - _TRACED_ROWS[0]) / between) for phase in few}
        return {phase: self._in_chunks(kind, peak, rows) for phase, peak in peaks.items()}

    def _in_chunks(self, kind: str, peak: Peak, rows: int) -> Peak:
        """What was traced with the logits of all tokens as one chunk, with chunks as they are."""
        head = chunked_head(self._model(kind, _TRACED_LAYERS if self.blueprint.shortable else None))
        if head is None or not head.chunked:
            return peak
        device = "cuda" if self._cuda else "cpu"
        hidden_TH = torch.empty((rows * (self.length - 1), 1), dtype=compute_dtype(kind), device="meta")
        with meta_is(device):
            share = chunk_rows(hidden_TH, self.blueprint.vocabulary, CHUNK_BYTES[device]) / len(hidden_TH)
        logits = round(peak.logits * share)
        return Peak(peak.total - peak.logits + logits, logits, peak.gathered)

    def _exact(self, precision: str, checkpointing: bool, rows: int, train: bool, gather: str) -> dict[Phase, Peak]:
        """Where all layers are alike, traced with one and with two."""
        key = (precision, checkpointing, rows, train, gather == "leaves")
        if key not in self._peaks:
            layers = self.blueprint.layers
            if not self.blueprint.shortable or layers <= _TRACED_LAYERS + 1:
                self._peaks[key] = self._trace(precision, None, *key[1:])
            else:
                few, more = (self._trace(precision, _TRACED_LAYERS + n, *key[1:]) for n in (0, 1))
                self._peaks[key] = {
                    way: {phase: _extended(few[way][phase], more[way][phase], layers - _TRACED_LAYERS) for phase in few[way]}
                    for way in few
                }
        return self._peaks[key][gather]

    def _trace(
        self, precision: str, layers: int | None, checkpointing: bool, rows: int, train: bool, leaves: bool
    ) -> dict[str, dict[Phase, Peak]]:
        model = self._model(precision, layers)
        model.train(train)
        base = model.get_base_model()
        kernels = partial(DeviceKernels, self._cuda, saving_linear=leaves)
        _set_checkpointing(model, checkpointing, kernels)
        double = self._config.model.bnb_4bit_use_double_quant
        return trace(
            model,
            self._loss(model, rows),
            layers=list(decoder_layers(base)[1]),
            vocabulary=self.blueprint.vocabulary,
            train=train,
            padded=self._config.data.packing or self.blueprint.head is not None,
            kernels=kernels(),
            gathered={way: _gathered(base, way, double) for way in (("leaves",) if leaves else ("none", "units"))},
        )

    def _loss(self, model: Any, rows: int) -> Callable[[], Tensor]:
        ids_BL = torch.zeros((rows, self.length), dtype=torch.long, device="meta")
        if self.blueprint.head is None:
            return partial(causal_loss_sum, model, ids_BL, ids_BL, ids_BL if self._config.data.packing else None)
        targets_B = torch.zeros(rows, dtype=torch.float32 if self.blueprint.config.num_labels == 1 else torch.long, device="meta")

        def loss() -> Tensor:
            logits_BC = model(input_ids=ids_BL, attention_mask=torch.ones_like(ids_BL)).logits
            return class_losses(logits_BC, targets_B).sum()

        return loss

    def _model(self, precision: str, layers: int | None) -> Any:
        """The wrapped model, its linears quantised where that is asked for."""
        kind = "bf16" if precision == "fp16" else precision
        key = (kind, layers)
        if key not in self._models:
            base = self.blueprint.build(compute_dtype(kind), layers=layers)
            linears = prunable_linears(base)
            pattern = self._pattern(linears)
            tiles = self._masks(linears) if self._config.model.storage == "blocks" else {}
            if isinstance(tiles, Pattern) and kind not in _QUANTISED_BITS:
                put_tiles(base, linears, tiles)
            if kind in _QUANTISED_BITS:
                for linear in linears:
                    layer = QuantisedLinear(linear, _QUANTISED_BITS[kind], tiles.get(linear.name))
                    base.set_submodule(linear.name, layer)
            if self.blueprint.head is None and self._config.train.cross_entropy != "logits":
                put_chunked_head(base)
            model = _with_adapter(self._config, self.blueprint, base, pattern, [linear.name for linear in linears])
            _choose_cross_entropy(model, self._cuda)
            self._models[key] = model
        return self._models[key]

    def _pattern(self, linears: list[NamedLinear]) -> Pattern | None:
        """The base's own mask where it lies beside the configuration, else one of half of the tiles, which costs as much as any."""
        return None if self._config.adapter.mask == "none" else self._masks(linears)

    def _masks(self, linears: list[NamedLinear]) -> Pattern:
        stored: Mapping[str, Any] = self.blueprint.pattern or {}
        block = self._config.adapter.block
        return Pattern({linear.name: stored.get(linear.name) or _half(linear, block) for linear in linears})


def _half(linear: NamedLinear, block: int) -> BlockMask:
    O, I = linear.weight_OI.shape
    P, Q = grid((O, I), block)
    return BlockMask((torch.arange(P)[:, None] + torch.arange(Q)) % 2 == 0, (O, I), block)


def _with_adapter(config: RunConfig, blueprint: Blueprint, base: Any, pattern: Pattern | None, linears: list[str]) -> Any:
    args, targets = config.adapter, config.adapter.target_modules
    task: dict[str, Any] = {}
    heads = blueprint.heads(base)
    if heads:
        task, targets = {"task_type": "SEQ_CLS", "modules_to_save": heads}, class_targets(linears, targets)
    model = attach_adapter(
        base,
        pattern,
        r=args.r,
        lora_alpha=args.lora_alpha,
        lora_dropout=args.lora_dropout,
        target_modules=targets,
        use_rslora=args.use_rslora,
        form=args.form,
        adapter_type=config.adapter_kind,
        adalora=args.adalora,
        feedforward_modules=args.feedforward_modules,
        whole_modules=args.modules_to_save,
        bias=args.bias,
        **task,
    )
    if heads:
        float_heads(model)
    return model.to("meta")


def _choose_cross_entropy(model: Any, cuda: bool) -> None:
    """By chunks where a run would: where the model gives out what its head computed, as it is."""
    head = chunked_head(model)
    if head is None:
        return
    head.chunk_bytes = _ONE_CHUNK
    head.chunked = gives_out_as_computed(model, head, DeviceKernels(cuda))


def _set_checkpointing(model: Any, on: bool, kernels: Callable[[], DeviceKernels]) -> None:
    with warnings.catch_warnings():  # transformers 5.23 renames these, 5.17 has these names only
        warnings.filterwarnings("ignore", message=".*gradient_checkpointing_", category=FutureWarning)
        if not on:
            model.gradient_checkpointing_disable()
            return
        # Autograd's engine leaves the mode that stands for the device's kernels: what is computed again enters it again.
        again: Callable[[], tuple[Any, Any]] = lambda: (nullcontext(), kernels())  # noqa: E731
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False, "context_fn": again})


def _gathered(base: Any, gather: str, double: bool) -> dict[nn.Module, int]:
    """Bytes of what is made whole, by module. `fully_shard` holds a unit twice: what was received beside what was copied out of it, or
    what is received ahead for the next."""

    def size(module: nn.Module) -> int:
        if isinstance(module, QuantisedLinear):
            return module.held_bytes(double)
        return sum(p.numel() * p.element_size() for p in module.parameters(recurse=False))

    if gather == "units":
        return {unit: 2 * sum(size(module) for module in unit.modules()) for unit in shard_units(base)}
    if gather == "leaves":
        return {module: size(module) for module in base.modules() if any(True for _ in module.parameters(recurse=False))}
    return {}


def _extended(few: Peak, more: Peak, extra: float) -> Peak:
    """The peak with `extra` layers or rows more than `few` has; `more` has one such more."""
    pairs = ((few.total, more.total), (few.logits, more.logits), (few.gathered, more.gathered))
    return Peak(*(max(0, round(a + extra * (b - a))) for a, b in pairs))
