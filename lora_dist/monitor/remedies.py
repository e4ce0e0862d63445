"""What to change about each sign of `monitor/diagnosis.py`, as this run's own options with the values they have now."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Options:
    """What a remedy may be about; names as in the configuration."""

    learning_rate: float
    r: int
    lora_dropout: float
    micro_batch: int
    accumulation: int
    num_train_epochs: float
    max_steps: int
    """0 or less: not given"""
    total_steps: int
    warmup_steps: int
    max_grad_norm: float
    dataloader_num_workers: int
    block_size: int
    gradient_checkpointing: bool
    max_train_samples: int | None
    early_stopping_patience: int | None
    target_modules: tuple[str, ...]
    classifies: bool = False
    """labels or numbers are learnt: a line's loss is of some dozens of rows, not of thousands of tokens"""


def rate_text(rate: float) -> str:
    """5e-4, as people write it."""
    mantissa, exponent = f"{rate:.1e}".split("e")
    return f"{mantissa.removesuffix('.0')}e{int(exponent)}"


def remedy(sign: str, options: Options) -> str:
    """One line of options to change, the likeliest first."""
    return _REMEDIES[sign](options)


def _rate(options: Options, factor: float) -> str:
    return f"--train.learning_rate {rate_text(options.learning_rate * factor)} (now {rate_text(options.learning_rate)})"


def _rank(options: Options) -> str:
    return f"--adapter.r {2 * options.r} (now {options.r})"


def _accumulate(options: Options) -> str:
    more = max(4, 2 * options.accumulation)
    return f"--train.gradient_accumulation_steps {more} (now {options.accumulation})"


def _no_fall(options: Options) -> str:
    targets = ",".join(options.target_modules)
    return (
        f"{_rate(options, 5)}, {_rank(options)}; look at the data, and at what is trained (adapter.target_modules is {targets})"
    )


def _slow(options: Options) -> str:
    return _rate(options, 5)


def _plateau(options: Options) -> str:
    stop = "" if options.early_stopping_patience is not None else ", or --train.early_stopping_patience 3 (now off) to end here"
    wider = "" if "all-linear" in options.target_modules else ", --adapter.target_modules '[all-linear]'"
    return f"{_rank(options)}{wider}{stop}"


def _oscillation(options: Options) -> str:
    return f"{_rate(options, 0.5)}, {_accumulate(options)}"


def _divergence(options: Options) -> str:
    clip = "" if 0 < options.max_grad_norm <= 1 else f", --train.max_grad_norm 1 (now {options.max_grad_norm:g})"
    warmup = "" if options.warmup_steps > 0 else f", --train.warmup_steps {max(1, options.total_steps // 20)} (now 0)"
    return f"{_rate(options, 0.2)}{clip}{warmup}; go on from a checkpoint before it, or start anew"


def _overfitting(options: Options) -> str:
    dropout = f"--adapter.lora_dropout {min(0.5, max(0.1, 2 * options.lora_dropout)):g} (now {options.lora_dropout:g})"
    if options.max_steps > 0:
        shorter = f"--train.max_steps {max(1, options.max_steps // 2)} (now {options.max_steps})"
    else:
        shorter = f"--train.num_train_epochs {options.num_train_epochs / 2:g} (now {options.num_train_epochs:g})"
    samples = options.max_train_samples
    more = "more data" if samples is None else f"more data (data.max_train_samples is {samples})"
    return f"{dropout}, {shorter}, {more}"


def _dead_gradients(options: Options) -> str:
    return (
        f"leave them out of adapter.target_modules (now {','.join(options.target_modules)}), or see whether the pattern prunes them, or what "
        "is behind them, altogether (lora-dist inspect)"
    )


def _starvation(options: Options) -> str:
    workers = options.dataloader_num_workers
    return f"--data.dataloader_num_workers {max(2, 2 * workers)} (now {workers}), or data.cache_dir on a local disk"


def _slow_rank(options: Options) -> str:
    return "look at that machine (lora-dist doctor): another program on it, a GPU that is throttled, a slow disk"


def _memory(options: Options) -> str:
    remedies = [] if options.gradient_checkpointing else ["--train.gradient_checkpointing true (now off)"]
    if options.micro_batch > 1:
        remedies.append(
            f"--train.per_device_train_batch_size {options.micro_batch // 2} (now {options.micro_batch}) "
            f"--train.gradient_accumulation_steps {2 * options.accumulation} (now {options.accumulation})"
        )
    remedies.append(f"--data.block_size {max(1, options.block_size // 2)} (now {options.block_size})")
    return ", ".join(remedies)


_REMEDIES = {
    "no_fall": _no_fall,
    "slow": _slow,
    "plateau": _plateau,
    "oscillation": _oscillation,
    "divergence": _divergence,
    "overfitting": _overfitting,
    "dead_gradients": _dead_gradients,
    "data_starvation": _starvation,
    "slow_rank": _slow_rank,
    "memory": _memory,
}
SIGNS = tuple(_REMEDIES)
