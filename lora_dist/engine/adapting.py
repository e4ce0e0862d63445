"""The adapter of a run: refused where its strategy cannot train it, put on the base, compared with a checkpoint's.

Called by `engine/setup.py`.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lora_dist.adapter import (
    ADAPTER_FILE,
    adapter_type,
    asked,
    attach_adapter,
    is_principal,
    read_adapter_config,
    read_frozen_rank,
)
from lora_dist.adapter.heads import class_targets, float_heads
from lora_dist.blocks import Pattern
from lora_dist.config import RunConfig
from lora_dist.engine.base import BaseAndPattern
from lora_dist.engine.checkpoint import Checkpoint
from lora_dist.log import UserError
from lora_dist.models.architecture import decoder_layers


def refuse_strategy(kind: str, strategy: str) -> None:
    """Before anything is loaded.

    Raises:
        UserError: a type of adapter that the strategy cannot train.
    """
    if kind == "adalora" and strategy != "ddp":
        raise UserError(
            f"adapter.type: found adalora under parallel.strategy {strategy}, expected ddp: its ranks are allocated by every gradient "
            "beside its parameter, both whole on every process"
        )
    if kind == "dora" and strategy == "zero3":
        raise UserError(
            "adapter.type: found dora under parallel.strategy zero3, expected ddp, fsdp2, zero1 or zero2: it needs the row norms of the "
            "base at every step, outside of the forward pass of the linear that zero3 gathers it for"
        )


def with_adapter(config: RunConfig, opened: BaseAndPattern, pattern: Pattern | None, **task: Any) -> Any:
    """The PEFT model; the same initial values on every process.

    Args:
        task: task_type and modules_to_save, as for `attach_adapter`.
    """
    args = config.adapter
    targets = args.target_modules
    if opened.base.heads:
        task = {"task_type": "SEQ_CLS", "modules_to_save": opened.base.heads, **task}
        targets = class_targets([linear.name for linear in opened.linears], targets)
    torch.manual_seed(config.train.seed)
    model = attach_adapter(
        opened.base.model,
        pattern,
        r=args.r,
        lora_alpha=args.lora_alpha,
        lora_dropout=args.lora_dropout,
        target_modules=targets,
        use_rslora=args.use_rslora,
        form=args.form,
        base_fingerprint=opened.base.fingerprint,
        adapter_type=config.adapter_kind,
        init_lora_weights=args.init_lora_weights,
        adalora=args.adalora,
        feedforward_modules=args.feedforward_modules,
        weight_OI=_weight_reader(opened),
        whole_modules=args.modules_to_save,
        bias=args.bias,
        **task,
    )
    if opened.base.heads:
        float_heads(model)
    if config.train.gradient_checkpointing:
        with warnings.catch_warnings():  # transformers 5.23 renames it, 5.17 has this name only
            warnings.filterwarnings("ignore", message=".*gradient_checkpointing_enable", category=FutureWarning)
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        if config.train.gradient_checkpointing_layers != "all":
            recompute_first(opened.base.model, config.train.gradient_checkpointing_layers)
    return model


def compile_layers(base: Any) -> None:
    """Each decoder layer by torch.compile, when it is first called; one that would have to be compiled again and again is an error.

    Layers of one class share what is compiled, and the limit: those whose linears differ (not pruned, pruned whole) are compiled apart.
    """
    layers = decoder_layers(base)[1]
    config = torch._dynamo.config
    config.fail_on_recompile_limit_hit = True
    config.recompile_limit = _RECOMPILED * len(layers)
    config.accumulated_recompile_limit = max(config.accumulated_recompile_limit, config.recompile_limit)
    layer: Any
    for layer in layers:
        layer.compile()


def use_liger_kernel(base: Any) -> None:
    """Liger's kernels in the place of the model's norms, rotation and feed-forward, for the whole process; not its losses.

    Raises:
        UserError: a family that it has none for, of which it says nothing itself.
    """
    from liger_kernel.transformers.monkey_patch import MODEL_TYPE_TO_APPLY_LIGER_FN
    from transformers.integrations.liger import apply_liger_kernel

    model_type = base.config.model_type
    if model_type not in MODEL_TYPE_TO_APPLY_LIGER_FN:
        known = ", ".join(sorted(MODEL_TYPE_TO_APPLY_LIGER_FN))
        raise UserError(
            f"train.use_liger_kernel: found true with a model of type {model_type}, expected one of those that Liger has kernels for "
            f"({known}): leave it out"
        )
    apply_liger_kernel(base, {"cross_entropy": False, "fused_linear_cross_entropy": False})


_RECOMPILED = 8
"""times a layer may be compiled: torch's own limit"""


def recompute_first(base: Any, layers: str) -> None:
    """Leave gradient checkpointing to the first so many layers, which the backward pass reaches last, when most memory is free again.

    Raises:
        UserError: `auto`, which `cli/train.py` turns into a number.
    """
    if not layers.isdigit():
        raise UserError(
            f"train.gradient_checkpointing_layers: found {layers}, expected all or a number outside of lora-dist train"
        )
    layer: Any
    for i, layer in enumerate(decoder_layers(base)[1]):
        layer.gradient_checkpointing = i < int(layers)


def _weight_reader(opened: BaseAndPattern) -> Callable[[str], Tensor] | None:
    """Reads a linear's weight by name, (O, I), where the model itself holds placeholders."""
    reader = opened.reader
    if reader is None:
        return None
    transposed = {linear.name for linear in opened.linears if linear.transposed}

    def weight_OI(name: str) -> Tensor:
        weight = reader.whole(f"{name}.weight")
        return weight.T if name in transposed else weight

    return weight_OI


def check_adapter(checkpoint: Checkpoint, config: RunConfig) -> None:
    """Scale, like shape, is part of what was trained: the same tensors under another are another adapter.

    Raises:
        UserError: naming the first option that is not as it was.
    """
    then: Any = read_adapter_config(checkpoint.adapter)
    args, kind = config.adapter, adapter_type(then)
    if "sparse_full" in (kind, config.adapter_kind) and kind != config.adapter_kind:
        modes = ["sparse_full" if each == "sparse_full" else "lora" for each in (kind, config.adapter_kind)]
        raise UserError(f"train.mode: was {modes[0]} when {checkpoint.path.name} was written, found {modes[1]}: set it as it was")
    pairs: list[tuple[str, Any, Any]] = [("type", kind, config.adapter_kind)]
    if kind in ("lora", "dora"):
        frozen, principal = read_frozen_rank(checkpoint.adapter / ADAPTER_FILE), is_principal(args.init_lora_weights)
        if bool(frozen) != principal:
            pairs += [("init_lora_weights", "pissa" if frozen else "true or gaussian", args.init_lora_weights)]
        r, alpha = asked(then, frozen)
        pairs += [("r", r, args.r), ("lora_alpha", alpha, args.lora_alpha), ("use_rslora", then.use_rslora, args.use_rslora)]
    elif kind == "adalora":
        defaults = type(then).__dataclass_fields__
        now = {key: args.adalora.get(key, defaults[key].default) for key in (*_ADALORA, "init_r")}
        pairs += [("lora_alpha", then.lora_alpha, args.lora_alpha)] + [(key, getattr(then, key), now[key]) for key in now]
    for key, before, now_ in pairs:
        if before != now_:
            raise UserError(
                f"adapter.{key}: was {before} when {checkpoint.path.name} was written, found {now_}: set it as it was"
            )


_ADALORA = ("target_r", "tinit", "tfinal", "deltaT", "beta1", "beta2", "orth_reg_weight")
