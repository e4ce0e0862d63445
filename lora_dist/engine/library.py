"""lora_dist as a library: the masked adapter and the guard inside transformers' `Trainer`, TRL, or a loop of your own.

from lora_dist import GuardCallback, attach_block_lora
model = attach_block_lora(AutoModelForCausalLM.from_pretrained(pruned), r=8, lora_alpha=16)
Trainer(model, args, train_dataset=data, callbacks=[GuardCallback(model)]).train()
model.save_pretrained("adapter")
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import nn
from transformers import TrainerCallback

from lora_dist.adapter import PatternConfig, attach_adapter
from lora_dist.blocks import Guard, Pattern
from lora_dist.engine.pattern import adapter_pattern, base_pattern
from lora_dist.log import GuardError
from lora_dist.models.architecture import prunable_linears


def attach_block_lora(
    model: nn.Module,
    pattern: Pattern | str | Path | None = None,
    *,
    r: int = 8,
    lora_alpha: float = 16,
    lora_dropout: float = 0.0,
    target_modules: Sequence[str] = ("all-linear",),
    use_rslora: bool = False,
    block: int = 16,
    form: str = "auto",
) -> Any:
    """Put a LoRA on a block-pruned model whose update is exactly zero on pruned tiles.

    Args:
        model: a causal language model of transformers, pruned.
        pattern: the pattern, or the directory (or file) of its mask; None finds the tiles of zeros in the weights.
        r, lora_alpha, lora_dropout, target_modules, use_rslora: as in `peft.LoraConfig`.
        block: side of the tiles to look for.
        form: factorised, triton, dense or auto; how the update is computed.

    Returns:
        A `peft.PeftModel`, base frozen. `save_pretrained` writes the mask beside the adapter; `merge_and_unload` keeps the zeros.

    Raises:
        UserError: no tiles of zeros, or target modules that match nothing.
        GuardError: a given pattern that the weights do not have.
    """
    if isinstance(pattern, str | Path):
        pattern = Pattern.load(pattern)
    if pattern is None:
        found = base_pattern(model, None, block=block)
        pattern = adapter_pattern(found, "block", block=block, model_name=type(model).__name__)
        assert pattern is not None  # block asked for: raised otherwise
    for linear in prunable_linears(model):
        violation = pattern[linear.name].first_violation(linear.weight_OI) if linear.name in pattern else None
        if violation is not None:
            raise GuardError("attach_block_lora: " + violation[0].describe(linear.name, pattern.kind, violation[1]))
    return attach_adapter(
        model,
        pattern,
        r=r,
        lora_alpha=lora_alpha,
        lora_dropout=lora_dropout,
        target_modules=target_modules,
        use_rslora=use_rslora,
        form=form,
    )


class GuardCallback(TrainerCallback):
    """The guard for transformers' `Trainer`: stops training when the base or its pattern changes.

    Args:
        model: from `attach_block_lora`.
        every: steps between checks; the whole base is compared at the end.

    Raises (from the trainer's loop):
        GuardError: naming layer and tile, or the parameter.
    """

    def __init__(self, model: Any, every: int = 100, sample_chunks: int = 8):
        config = model.peft_config[model.active_adapter]
        pattern = config.pattern if isinstance(config, PatternConfig) else None
        inner = model.get_base_model()
        transposed = {_plain(linear.name) for linear in prunable_linears(inner) if linear.transposed}
        base = {_plain(name): p for name, p in inner.named_parameters() if not p.requires_grad}
        self.guard = Guard(base, pattern, transposed=transposed, sample_chunks=sample_chunks)
        self.every = every

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step % self.every == 0:
            self.guard.check(f"at step {state.global_step}")

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.guard.check(f"at the save of step {state.global_step}")

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.guard.check_all("at the end")


def _plain(name: str) -> str:
    """A name in the base as it was before PEFT wrapped its linears."""
    return name.replace(".base_layer", "")
