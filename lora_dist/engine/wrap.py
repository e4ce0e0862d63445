"""From the configuration to a strategy that is in force: which one is meant, what it needs, and the wrapped model.

`plan_strategy` runs before anything is loaded and says what cannot work; `wrap` cuts the model and checks that it is cut.
Called by `engine/setup.py`.
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from typing import Any

import torch

from lora_dist.adapter.tiles import kernel_fits
from lora_dist.config import ModelArgs, RunConfig, TrainArgs
from lora_dist.engine.base import BaseAndPattern
from lora_dist.engine.batch import BatchPlan
from lora_dist.engine.task import Task
from lora_dist.engine.teacher import quantised_teacher_problems
from lora_dist.log import UserError
from lora_dist.models.architecture import shard_units
from lora_dist.parallel import AdamWArgs, LossScale, Replicated, Strategy, World, launch_problems
from lora_dist.parallel.ds_config import RunFacts, resolve_strategy, zero_config

SHARDED_BASE = ("fsdp2", "zero3")


@dataclass(frozen=True)
class StrategyPlan:
    """A strategy by name, found possible, and the batch that it trains on."""

    name: str
    batch: BatchPlan

    @property
    def sharded_base(self) -> bool:
        return self.name in SHARDED_BASE

    @property
    def stage(self) -> int | None:
        """DeepSpeed's, of a zero strategy."""
        return int(self.name[-1]) if self.name.startswith("zero") else None


def plan_strategy(config: RunConfig, world: World, batch: BatchPlan) -> StrategyPlan:
    """Which strategy is meant, or why it cannot be had here.

    Raises:
        UserError: all problems together, before anything is loaded.
    """
    args, train = config.parallel, config.train
    plan = StrategyPlan(resolve_strategy(args.strategy, args.ds_config), batch)
    problems: list[str] = []
    if args.hybrid_shard and (world.size % world.local_size or world.size == world.local_size):
        problems.append(
            f"parallel.hybrid_shard: found {world.size} processes with {world.local_size} on this machine, expected two machines or "
            "more with as many processes each; leave it out to shard over all of them"
        )
    problems += quantised_problems(config.model, plan.name)
    problems += optimizer_problems(train, plan.name, world.device)
    problems += quantised_teacher_problems(train.distill_load_in_4bit)
    problems += compile_problems(config, plan.name)
    problems += kernel_problems(config, world)
    problems += liger_problems(config, world)
    offload: dict[str, str] = {}
    if plan.stage is not None:
        if importlib.util.find_spec("deepspeed") is None:
            problems.append(
                f"parallel.strategy: found {plan.name}, but deepspeed is not installed: pip install 'lora-dist[deepspeed]'"
            )
        try:
            engine_config, _ = ds_config(config, world, plan, hidden_size=1)
            zero = engine_config["zero_optimization"]
            offload = {key: zero.get(key, {}).get("device", "none") for key in ("offload_optimizer", "offload_param")}
            if offload["offload_param"] == "nvme":
                problems.append(
                    "parallel.offload_param: found nvme, expected none or cpu: the guard watches each process's part of the base, and does "
                    "not read it back from disk (parallel.offload_optimizer can go to nvme)"
                )
            if not problems:
                from lora_dist.parallel.zero import check_config

                check_config(world, engine_config, args.ds_config or plan.name)
        except UserError as error:
            problems += error.problems
    problems += launch_problems(
        strategy=plan.name,
        ds_stage=plan.stage,
        bf16=train.bf16,
        fp16=train.fp16,
        accumulation=train.gradient_accumulation_steps,
        ds_config=args.ds_config or "",
        max_grad_norm=train.max_grad_norm,
        gradient_checkpointing=train.gradient_checkpointing,
        hybrid_shard=args.hybrid_shard,
        device=args.device,
        **offload,
    )
    if problems:
        raise UserError(problems)
    return plan


def quantised_problems(model: ModelArgs, strategy: str) -> list[str]:
    """What a quantised base cannot have."""
    keys = [key for key in ("load_in_4bit", "load_in_8bit") if getattr(model, key)]
    found = "".join(f"model.{key}" for key in keys)
    if not keys:
        return []
    if importlib.util.find_spec("bitsandbytes") is None:
        return [f"{found}: found true, but bitsandbytes is not installed: pip install bitsandbytes"]
    if strategy == "zero3":
        return [
            f"{found}: found true with parallel.strategy zero3, expected ddp, zero1, zero2 or (4 bits) fsdp2: DeepSpeed cuts weights into "
            "flat pieces and hands them back without the scales that belong to packed ones"
        ]
    if strategy == "fsdp2" and keys == ["load_in_8bit"]:
        return [
            f"{found}: found true with parallel.strategy fsdp2, expected ddp, zero1, zero2, or model.load_in_4bit: torch's fully_shard makes "
            "parameters of its shards, which cannot be of int8, and bitsandbytes can hold only 4 bits in another dtype"
        ]
    return []


def optimizer_problems(train: TrainArgs, strategy: str, device: torch.device) -> list[str]:
    """What bitsandbytes' optimizers, and groups of parameters with rates of their own, cannot have."""
    optim, problems = train.optim, []
    if train.loraplus_lr_ratio is not None and strategy.startswith("zero"):
        problems.append(
            f"train.loraplus_lr_ratio: found {train.loraplus_lr_ratio:g} with parallel.strategy {strategy}, expected ddp or fsdp2: DeepSpeed "
            "0.19 does not hand back the optimizer state of a second group of parameters in stages 1 and 2, and trains it otherwise in stage 3"
        )
    if optim == "adamw_torch":
        return problems
    if importlib.util.find_spec("bitsandbytes") is None:
        problems.append(f"train.optim: found {optim}, but bitsandbytes is not installed: pip install bitsandbytes")
    if strategy != "ddp":
        problems.append(
            f"train.optim: found {optim} with parallel.strategy {strategy}, expected adamw_torch: its state is cut over the processes there, "
            "which blocks of 256 elements with one scale cannot be; what is trained is small, so little is lost"
        )
    if optim.startswith("paged_") and device.type != "cuda":
        unpaged = "adamw_8bit" if optim.endswith("8bit") else "adamw_torch"
        problems.append(f"train.optim: found {optim} on {device.type}, expected a GPU, whose memory it pages; set {unpaged}")
    return problems


def compile_problems(config: RunConfig, strategy: str) -> list[str]:
    """What torch.compile of a layer does not go with."""
    model = config.model
    found = {
        "parallel.strategy zero3": strategy == "zero3",
        "model.storage blocks": model.storage == "blocks",
        "model.load_in_4bit": model.load_in_4bit,
        "model.load_in_8bit": model.load_in_8bit,
        f"the training of {config.adapter_kind}": config.adapter_kind != "lora",
        "adapter.form triton": config.adapter.form == "triton",
        "train.use_liger_kernel": config.train.use_liger_kernel,
    }
    return [
        f"train.torch_compile: found true with {other}, whose layers torch.compile cannot take in one piece: leave one of the two out"
        for other, is_so in found.items()
        if is_so and config.train.torch_compile
    ]


def liger_problems(config: RunConfig, world: World) -> list[str]:
    """What stands against `train.use_liger_kernel` before the model is known."""
    if not config.train.use_liger_kernel:
        return []
    missing = []
    if world.device.type != "cuda":
        missing.append(f"a GPU (this run computes on {world.device.type})")
    if importlib.util.find_spec("liger_kernel") is None:
        missing.append("the package liger-kernel (pip install 'lora-dist[liger]')")
    return [f"train.use_liger_kernel: found true, which needs {', '.join(missing)}: leave it out"] if missing else []


def kernel_problems(config: RunConfig, world: World) -> list[str]:
    """What stands against `adapter.form triton`."""
    adapter, missing = config.adapter, []
    if adapter.form != "triton":
        return []
    if world.device.type != "cuda":
        missing.append(f"a GPU (this run computes on {world.device.type})")
    if importlib.util.find_spec("triton") is None:
        missing.append("the package triton (pip install triton)")
    if config.adapter_kind not in ("lora", "adalora"):
        missing.append(f"adapter.type lora or adalora (this run trains {config.adapter_kind})")
    if not kernel_fits(adapter.block, adapter.r):
        missing.append(f"tiles of 16, 32 or 64 and a rank of 64 or less (found {adapter.block} and {adapter.r})")
    return [f"adapter.form: found triton, which needs {', '.join(missing)}: leave it at auto"] if missing else []


def ds_config(config: RunConfig, world: World, plan: StrategyPlan, *, hidden_size: int) -> tuple[dict[str, Any], list[str]]:
    """DeepSpeed's complete configuration for this run, and notes. Raises UserError where it contradicts the run's."""
    args, train = config.parallel, config.train
    assert plan.stage is not None
    facts = RunFacts(
        micro_batch=plan.batch.micro_batch,
        accumulation=plan.batch.accumulation,
        global_batch=plan.batch.global_batch,
        batch_follows=plan.batch.follows,
        configured_micro_batch=train.per_device_train_batch_size,
        world_size=world.size,
        max_grad_norm=train.max_grad_norm,
        bf16=train.bf16,
        fp16=train.fp16,
        learning_rate=train.learning_rate,
        betas=(train.adam_beta1, train.adam_beta2),
        eps=train.adam_epsilon,
        weight_decay=train.weight_decay,
        warmup_steps=train.warmup_steps if train.warmup_steps > 0 or train.warmup_ratio == 0 else -1,
        max_steps=train.max_steps,
        hidden_size=hidden_size,
    )
    return zero_config(
        plan.stage,
        args.ds_config,
        facts,
        offload_optimizer=args.offload_optimizer,
        offload_param=args.offload_param,
        nvme_path=args.nvme_path,
    )


def wrap(
    config: RunConfig,
    world: World,
    plan: StrategyPlan,
    model: Any,
    opened: BaseAndPattern,
    loss_scale: LossScale | None,
    task: Task,
) -> tuple[Strategy, list[str]]:
    """Collective. The PEFT model under its strategy, checked to be in force, and notes for the console.

    Raises:
        UserError: the strategy is not in force, or cannot be.
    """
    train = config.train
    adamw = AdamWArgs(
        (train.adam_beta1, train.adam_beta2), train.adam_epsilon, train.weight_decay, train.optim, train.loraplus_lr_ratio
    )
    common: dict[str, Any] = {"adamw": adamw, "max_grad_norm": train.max_grad_norm, "loss_scale": loss_scale}
    strategy: Strategy
    notes: list[str] = []
    if plan.name == "ddp":
        strategy = Replicated(model, world, **common)
    elif plan.name == "fsdp2":
        from lora_dist.parallel.fully_sharded import FullySharded

        strategy = FullySharded(
            model,
            opened.base.model,
            shard_units(opened.base.model),
            world,
            reader=opened.reader,
            hybrid=config.parallel.hybrid_shard,
            **common,
        )
    else:
        from lora_dist.parallel.zero import Zero

        assert plan.stage is not None
        engine_config, notes = ds_config(config, world, plan, hidden_size=getattr(opened.base.model.config, "hidden_size", 1024))
        strategy = Zero(
            model,
            world,
            stage=plan.stage,
            config=engine_config,
            reader=opened.reader,
            prime=lambda module: task.smallest_loss(module, world.device),
            **common,
        )
    strategy.check_in_force()
    return strategy, notes
