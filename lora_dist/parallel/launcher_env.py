"""What `accelerate launch` was asked for, against what the run is configured to do: the YAML rules, and a conflict is an error.

`accelerate launch` (and the file that `accelerate config` writes) hands its choices to the processes as environment variables.
lora-dist takes processes, ranks and addresses from it and nothing else, so a choice that the run does not make as well would be
dropped in silence. Called by `engine/wrap.py` for `engine/setup.py`.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from lora_dist.log import UserError
from lora_dist.parallel.ds_config import stage_of

SHARDING = ("FULL_SHARD", "SHARD_GRAD_OP", "NO_SHARD", "HYBRID_SHARD", "HYBRID_SHARD_ZERO2")  # accelerate takes 1 to 5 as well


def check_accelerate_environment(
    environ: Mapping[str, str],
    *,
    strategy: str,
    ds_stage: int | None,
    bf16: bool,
    fp16: bool,
    accumulation: int,
    ds_config: str | Path | None = None,
    offload_optimizer: str | None = None,
    offload_param: str | None = None,
    max_grad_norm: float | None = None,
    gradient_checkpointing: bool | None = None,
    hybrid_shard: bool | None = None,
    device: str | None = None,
) -> list[str]:
    """Problems, one line each: the variable, the run's own value, and what to change. Defaults that accelerate sets are no request.

    Args:
        environ: the process's environment.
        strategy: ddp, fsdp2, zero1, zero2 or zero3, resolved.
        ds_stage: stage of the zero strategy; None: what the strategy's name says.
        ds_config: parallel.ds_config; "": the run has none; None: not known, and only the stage of a file is compared.
        offload_optimizer: where it is in force: none, cpu or nvme. This and the following are not compared where None (or auto).
    """
    request = _Request(environ)
    stage = ds_stage if ds_stage is not None else int(strategy[-1]) if strategy.startswith("zero") else None
    checks = [
        _kind(request, strategy, stage),
        _precision(request, bf16=bf16, fp16=fp16),
        _numbers(request, accumulation, max_grad_norm),
        _unsupported(request),
    ]
    if strategy == "fsdp2":
        checks.append(_fsdp(request, gradient_checkpointing, hybrid_shard))
    if stage is not None:
        checks.append(_deepspeed(request, stage, ds_config, {"optimizer": offload_optimizer, "param": offload_param}))
    if request.on("ACCELERATE_USE_CPU") and device not in (None, "cpu"):
        checks.append(iter([_line("ACCELERATE_USE_CPU", "true", f"parallel.device {device}", "parallel.device cpu", "--cpu")]))
    return [problem for check in checks for problem in check]


def launch_problems(**run: Any) -> list[str]:
    """`check_accelerate_environment` of this process, with the same keywords."""
    return check_accelerate_environment(os.environ, **run)


class _Request:
    """The environment as accelerate reads it."""

    def __init__(self, environ: Mapping[str, str]):
        self.environ = environ

    def text(self, name: str) -> str:
        return self.environ.get(name, "").strip()

    def on(self, name: str) -> bool:
        return self.text(name).lower() in ("true", "1")

    def number(self, name: str) -> float | None:
        """None for what is not there, "none" and "auto"."""
        try:
            return float(self.text(name))
        except ValueError:
            return None


def _line(variable: str, asked: str, ours: str, remedy: str, flag: str) -> str:
    return (
        f"{variable}: accelerate launch asks for {asked}, the run has {ours}, and the run's options rule: "
        f"set {remedy}, or take {flag} off accelerate launch"
    )


def _kind(request: _Request, strategy: str, stage: int | None) -> Iterator[str]:
    """Which library shards. A launch without either flag only starts processes, which goes with any strategy.

    FSDP_VERSION is not looked at: 1 is what accelerate sets where nobody asked, and fsdp2 shards as version 1 does.
    """
    ours = f"parallel.strategy {strategy}"
    if request.on("ACCELERATE_USE_FSDP") and strategy != "fsdp2":
        yield _line("ACCELERATE_USE_FSDP", "FSDP", ours, "parallel.strategy fsdp2", "--use_fsdp")
    if request.on("ACCELERATE_USE_DEEPSPEED") and stage is None:
        asked = request.number("ACCELERATE_DEEPSPEED_ZERO_STAGE")
        remedy = f"zero{asked:.0f}" if asked in (1, 2, 3) else "zero1, zero2 or zero3"
        yield _line("ACCELERATE_USE_DEEPSPEED", "DeepSpeed", ours, f"parallel.strategy {remedy}", "--use_deepspeed")
    if request.on("ACCELERATE_USE_MEGATRON_LM"):
        yield _line("ACCELERATE_USE_MEGATRON_LM", "Megatron-LM", ours, "another launch (lora-dist has none)", "--use_megatron_lm")


def _precision(request: _Request, *, bf16: bool, fp16: bool) -> Iterator[str]:
    asked = request.text("ACCELERATE_MIXED_PRECISION").lower()
    ours = "bf16" if bf16 else "fp16" if fp16 else "no"
    if asked in ("", "no", ours):
        return
    remedy = f"train.{asked} true" if asked in ("bf16", "fp16") else "train.bf16 true"
    yield _line(
        "ACCELERATE_MIXED_PRECISION", asked, f"train.bf16 {bf16}, train.fp16 {fp16}".lower(), remedy, f"--mixed_precision {asked}"
    )


def _numbers(request: _Request, accumulation: int, max_grad_norm: float | None) -> Iterator[str]:
    asked = request.number("ACCELERATE_GRADIENT_ACCUMULATION_STEPS")
    if asked is not None and asked > 1 and asked != accumulation:
        yield _line(
            "ACCELERATE_GRADIENT_ACCUMULATION_STEPS",
            f"{asked:g} micro-batches a step",
            f"train.gradient_accumulation_steps {accumulation}",
            f"train.gradient_accumulation_steps {asked:g}",
            "--gradient_accumulation_steps",
        )
    clip = request.number("ACCELERATE_GRADIENT_CLIPPING")
    if clip is not None and max_grad_norm is not None and clip != max_grad_norm:
        ours, remedy = f"train.max_grad_norm {max_grad_norm:g}", f"train.max_grad_norm {clip:g}"
        yield _line("ACCELERATE_GRADIENT_CLIPPING", f"clipping at {clip:g}", ours, remedy, "--gradient_clipping")


def _unsupported(request: _Request) -> Iterator[str]:
    backend = request.text("ACCELERATE_DYNAMO_BACKEND")
    if backend.upper() not in ("", "NO"):
        yield f"ACCELERATE_DYNAMO_BACKEND: accelerate launch asks for {backend}, but lora-dist does not compile: take --dynamo_backend off"
    for name, what in (("TP", "tensor"), ("CP", "context"), ("SP", "sequence")):
        size = request.number(f"PARALLELISM_CONFIG_{name}_SIZE")
        if size is not None and size > 1:
            flag = f"--parallelism_config_{name.lower()}_size"
            yield (
                f"PARALLELISM_CONFIG_{name}_SIZE: accelerate launch asks for {what} parallelism over {size:g} processes, "
                f"but lora-dist splits data only: take {flag} off"
            )


def _fsdp(request: _Request, gradient_checkpointing: bool | None, hybrid_shard: bool | None) -> Iterator[str]:
    """What goes with --use_fsdp, under a strategy that is FSDP."""
    if not request.on("ACCELERATE_USE_FSDP"):
        return
    if request.on("FSDP_OFFLOAD_PARAMS"):
        yield _line(
            "FSDP_OFFLOAD_PARAMS", "offload", "parallel.strategy fsdp2, which has none",
            "parallel.strategy zero3 and parallel.offload_param cpu", "--fsdp_offload_params",
        )  # fmt: skip
    if request.on("FSDP_ACTIVATION_CHECKPOINTING") and gradient_checkpointing is False:
        remedy = "train.gradient_checkpointing true"
        yield _line(
            "FSDP_ACTIVATION_CHECKPOINTING",
            "recomputation",
            "train.gradient_checkpointing false",
            remedy,
            "--fsdp_activation_checkpointing",
        )
    asked = request.text("FSDP_SHARDING_STRATEGY").upper()
    asked = SHARDING[int(asked) - 1] if asked in ("1", "2", "3", "4", "5") else asked
    groups = request.number("PARALLELISM_CONFIG_DP_REPLICATE_SIZE")
    if asked in ("SHARD_GRAD_OP", "NO_SHARD"):
        other = "ddp" if asked == "NO_SHARD" else "zero2"
        yield _line(
            "FSDP_SHARDING_STRATEGY", asked, "parallel.strategy fsdp2, which shards all", f"parallel.strategy {other}",
            "--fsdp_sharding_strategy",
        )  # fmt: skip
    if hybrid_shard is False and (asked.startswith("HYBRID") or (groups is not None and groups > 1)):
        variable, flag = "FSDP_SHARDING_STRATEGY", "--fsdp_sharding_strategy"
        if not asked.startswith("HYBRID"):
            variable, flag = "PARALLELISM_CONFIG_DP_REPLICATE_SIZE", "--parallelism_config_dp_replicate_size"
        yield _line(variable, "sharding inside groups", "parallel.hybrid_shard false", "parallel.hybrid_shard true", flag)


def _deepspeed(request: _Request, stage: int, ds_config: str | Path | None, offload: Mapping[str, str | None]) -> Iterator[str]:
    """What goes with --use_deepspeed, under a zero strategy."""
    if not request.on("ACCELERATE_USE_DEEPSPEED"):
        return
    asked = request.number("ACCELERATE_DEEPSPEED_ZERO_STAGE")
    if asked is not None and asked != stage:
        yield _line(
            "ACCELERATE_DEEPSPEED_ZERO_STAGE", f"stage {asked:g}", f"parallel.strategy zero{stage}", f"parallel.strategy zero{asked:g}",
            "--zero_stage",
        )  # fmt: skip
    file = request.text("ACCELERATE_DEEPSPEED_CONFIG_FILE")
    if file not in ("", "none"):
        yield from _config_file(file, stage, ds_config)
    for name, ours in offload.items():
        place = request.text(f"ACCELERATE_DEEPSPEED_OFFLOAD_{name.upper()}_DEVICE").lower()
        if place in ("cpu", "nvme") and ours not in (None, "auto", place):
            option = f"parallel.offload_{name}"
            yield _line(
                f"ACCELERATE_DEEPSPEED_OFFLOAD_{name.upper()}_DEVICE", place, f"{option} {ours}", f"{option} {place}",
                f"--offload_{name}_device",
            )  # fmt: skip


def _config_file(file: str, stage: int, ds_config: str | Path | None) -> Iterator[str]:
    variable, flag = "ACCELERATE_DEEPSPEED_CONFIG_FILE", "--deepspeed_config_file"
    if ds_config is not None:
        if not ds_config:
            yield _line(variable, file, "no parallel.ds_config", f"parallel.ds_config {file}", flag)
        elif Path(file).resolve() != Path(ds_config).resolve():
            yield _line(variable, file, f"parallel.ds_config {ds_config}", f"parallel.ds_config {file}", flag)
        return
    try:
        asked = stage_of(file)
    except UserError as error:
        yield from error.renamed({"parallel.ds_config": variable}).problems
        return
    if asked != stage:
        yield _line(variable, f"stage {asked} ({file})", f"parallel.strategy zero{stage}", f"parallel.ds_config {file}", flag)
