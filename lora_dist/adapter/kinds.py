"""The kinds of adapter, by `adapter.type` or (`sparse_full`) `train.mode`: PEFT's config for each, with and without a pattern, and what
tells them apart in files.

IA3 multiplies outputs or inputs of a linear, so it keeps every zero by itself and is a plain PEFT file on any base. Called by
`adapter/attach.py`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from peft import AdaLoraConfig, IA3Config, LoraConfig, PeftConfig
from peft.utils.constants import TRANSFORMERS_MODELS_TO_IA3_FEEDFORWARD_MODULES_MAPPING
from torch import nn

from lora_dist.adapter.adalora import BlockAdaLoraConfig
from lora_dist.adapter.config import BlockLoraConfig, PatternConfig
from lora_dist.adapter.sparse import SparseFullConfig
from lora_dist.blocks import Pattern, find_linears
from lora_dist.log import UserError

ADAPTER_TYPES = ("lora", "dora", "adalora", "ia3", "sparse_full")


def adapter_type(config: PeftConfig) -> str:
    """Which of `ADAPTER_TYPES` a config is of."""
    if isinstance(config, IA3Config):
        return "ia3"
    if isinstance(config, SparseFullConfig):
        return "sparse_full"
    if isinstance(config, AdaLoraConfig):
        return "adalora"
    return "dora" if getattr(config, "use_dora", False) else "lora"


def respects_pattern(config: PeftConfig) -> bool:
    """Whether an adapter of this config keeps the zeros of the base it was trained on."""
    return isinstance(config, PatternConfig | IA3Config)


def describe(config: Any) -> str:
    """A line for users."""
    names = {"lora": "LoRA", "dora": "DoRA", "adalora": "AdaLoRA", "ia3": "IA3"}
    kind = adapter_type(config)
    if kind == "ia3":
        return "IA3, which keeps any pattern"
    beside = getattr(config, "whole_parameters", [])
    whole = f", {len(beside)} tensors of the base trained whole" if beside else ""
    if kind == "sparse_full":
        return f"sparse full fine-tuning of the kept weights ({config.pattern.kind} pattern){whole}"
    rank = f"rank {config.init_r} to {config.target_r} on average" if kind == "adalora" else f"rank {config.r}"
    masked = ("block-masked" if config.pattern.kind == "block" else "masked") if isinstance(config, PatternConfig) else "plain"
    return f"{rank}, alpha {config.lora_alpha:g}, {masked} {names[kind]}{whole}"


def make_config(
    model: nn.Module,
    kind: str,
    pattern: Pattern | None,
    common: Mapping[str, Any],
    *,
    lora: Mapping[str, Any],
    adalora: Mapping[str, Any],
    feedforward_modules: Sequence[str],
    form: str,
    base_fingerprint: str,
) -> PeftConfig:
    """PEFT's config of a new adapter.

    Args:
        common: target_modules, task_type, modules_to_save.
        lora: r, lora_alpha and what else LoRA and DoRA take.
        adalora: what AdaLoRA takes beside alpha and dropout.
        feedforward_modules: of IA3; empty takes what PEFT knows for this architecture, `none` none.
    """
    # PEFT asks for the flag where the base stores weights as (I, O), and warns otherwise.
    transposed = any(linear.transposed for linear in find_linears(model))
    if kind == "ia3":
        targets = common["target_modules"]
        return IA3Config(
            **common, feedforward_modules=_feedforward(model, targets, feedforward_modules), fan_in_fan_out=transposed
        )
    if kind == "sparse_full":
        if pattern is None:
            raise UserError(
                "train.mode: found sparse_full, but the base has no pattern to keep; prune it first (lora-dist prune), or set train.mode lora"
            )
        return SparseFullConfig(**common, base_fingerprint=base_fingerprint).with_pattern(pattern)
    masked: dict[str, Any] = {"form": form, "base_fingerprint": base_fingerprint}
    if kind == "adalora":
        # The number of steps is known once the data is: `Allocation` sets it.
        steps = adalora.get("tinit", 0) + adalora.get("tfinal", 0) + 1
        shared = {k: lora[k] for k in ("lora_alpha", "lora_dropout")} | dict(adalora) | {"total_step": steps}
        if pattern is None:
            return AdaLoraConfig(**common, **shared, fan_in_fan_out=transposed)
        return BlockAdaLoraConfig(**common, **shared, **masked).with_pattern(pattern)
    if pattern is None:
        return LoraConfig(**common, **lora, use_dora=kind == "dora", fan_in_fan_out=transposed)
    return BlockLoraConfig(**common, **lora, use_dora=kind == "dora", **masked).with_pattern(pattern)


def _feedforward(model: nn.Module, targets: str | list[str], asked: Sequence[str]) -> list[str]:
    """Modules whose input IA3 scales; of those that are targets."""
    if asked:
        return [] if list(asked) == ["none"] else list(asked)
    kind = getattr(getattr(model, "config", None), "model_type", "")
    known = TRANSFORMERS_MODELS_TO_IA3_FEEDFORWARD_MODULES_MAPPING.get(kind, [])
    return [name for name in known if targets == "all-linear" or name in targets]
