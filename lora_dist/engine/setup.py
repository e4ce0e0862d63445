"""From the configuration to the parts of a run: the last place that sees `RunConfig`. Everything below takes plain values.

Order: cheap checks first (folder, checkpoint, format of the data), then base, guard, adapter, data, optimizer, and last the resumed state.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lora_dist.adapter import (
    Allocation,
    count_parameters,
    load_adapter_tensors,
    make_allocation,
    read_quantisation,
    split_allocation,
)
from lora_dist.blocks import Guard, Pattern
from lora_dist.config import RunConfig
from lora_dist.data.loader import StepLoader
from lora_dist.data.rows import Rows
from lora_dist.engine.adapting import check_adapter, refuse_strategy, with_adapter
from lora_dist.engine.attempts import Attempt
from lora_dist.engine.base import BaseAndPattern, base_pieces, load_for, make_guard, quantised_weights, require_finite
from lora_dist.engine.batch import BatchPlan, plan_batch
from lora_dist.engine.checkpoint import Checkpoint, Identity, load_checkpoint
from lora_dist.engine.data import RunData, data_kind, head_for, run_data
from lora_dist.engine.held import HeldFolder
from lora_dist.engine.opening import Opening, versions
from lora_dist.engine.packing import require_separate
from lora_dist.engine.pattern import FoundPattern, adapter_pattern
from lora_dist.engine.schedule import warmup_steps
from lora_dist.engine.step import Stepper
from lora_dist.engine.task import Task
from lora_dist.engine.wrap import StrategyPlan, plan_strategy, wrap
from lora_dist.log import GuardError, UserError
from lora_dist.models.loading import BaseSource, LoadedBase
from lora_dist.models.quantised import Quantisation, quantisation_of
from lora_dist.monitor.console import Console
from lora_dist.monitor.metrics import MetricsFile
from lora_dist.monitor.trackers import WandbSink
from lora_dist.parallel import LossScale, Strategy, World
from lora_dist.state import TrainState


@dataclass
class Parts:
    """What `engine/loop.py` runs on."""

    config: RunConfig
    world: World
    console: Console
    base: LoadedBase
    pattern: Pattern | None
    guard: Guard
    model: Any
    """the PEFT model"""
    strategy: Strategy
    stepper: Stepper
    task: Task
    allocation: Allocation | None
    """of AdaLoRA's ranks"""
    loader: StepLoader
    train_rows: Rows
    eval_rows: Rows | None
    state: TrainState
    identity: Identity
    output_dir: Path
    total_steps: int
    warmup: int
    metrics: MetricsFile
    tracker: WandbSink | None
    versions: dict[str, str]
    run_id: str
    attempt_number: int
    """starts of this run, this one included"""
    folder: HeldFolder | None
    """on rank 0"""
    attempt: Attempt | None
    """on rank 0"""


def build(config: RunConfig, world: World, console: Console, *, argv: Sequence[str] = ()) -> Parts:
    """Make everything a run needs, or stop with one clear line before anything is written or lost.

    Args:
        argv: command line, for the record.

    Raises:
        UserError, GuardError: on every rank.
    """
    opening = Opening(config, world, console)
    try:
        return _build(config, world, console, opening, argv)
    except BaseException as error:
        opening.refuse(error)
        raise


def _build(config: RunConfig, world: World, console: Console, opening: Opening, argv: Sequence[str]) -> Parts:
    plan = opening.plan
    output_dir = plan.folder
    checkpoint = load_checkpoint(plan.checkpoint) if plan.checkpoint is not None else None
    batch = _batch(config, world, checkpoint)
    strategy_plan = plan_strategy(config, world, batch)
    refuse_strategy(config.adapter.type, strategy_plan.name)
    kind = data_kind(config, world)
    opened = _base(config, world, console, strategy_plan)
    base, pattern = opened.base, _adapter_pattern(config, console, opened.found)
    identity = Identity(base.fingerprint, pattern.digest if pattern is not None else None)
    if checkpoint is not None:
        _check_identity(checkpoint, identity)
        _check_quantisation(checkpoint, base)
    model = with_adapter(config, opened, pattern)
    console.adapter_applied(*count_parameters(model))
    if pattern is not None:
        console.pattern(pattern.kind, pattern.block, pattern.sparsity, len(pattern), pattern.digest)
    data = run_data(config, world, console, base, kind)
    if checkpoint is not None:
        check_adapter(checkpoint, config)
        load_adapter_tensors(model, checkpoint.adapter)  # before wrapping (design section 7)
    strategy = _strategy(config, world, console, strategy_plan, model, opened, checkpoint, data.task)
    pieces = base_pieces(base.model, strategy.piece)
    require_finite(world, pieces)
    guard = make_guard(
        world,
        pieces,
        opened.found.pattern,
        opened.linears,
        sample_chunks=config.guard.sample_chunks,
        codes=quantised_weights(base.model, pieces),
    )
    if config.data.packing:  # behind the guard: a forward pass leaves some of what FSDP cut in one piece
        require_separate(
            strategy.module,
            world,
            vocab_size=base.model.config.get_text_config().vocab_size,
            max_length=config.data.block_size,
            rows=batch.micro_batch,
            kernel=base.model.config._attn_implementation,
        )
    loader = _loader(config, world, console, batch, data)
    train = config.train
    total_steps = train.max_steps if train.max_steps > 0 else math.ceil(loader.steps_per_epoch * train.num_train_epochs)
    allocation = make_allocation(model, total_steps)
    state = TrainState(seed=train.seed, num_samples=len(data.train), data_digest=data.train.digest)
    state.group_by_length = train.group_by_length
    if checkpoint is not None:
        state = _resume(checkpoint, state, strategy, data, batch, allocation)
        if plan.best_lost or not plan.own:
            state.best_metric, state.best_step, state.evals_without_improvement = None, -1, 0  # its files are in another folder
    train_batch = (batch.global_batch, train.per_device_train_batch_size, train.gradient_accumulation_steps, world.size)
    state.global_batch, state.micro_batch, state.accumulation, state.processes = train_batch
    # Nothing was written before this line.
    opening.claim(argv, first_step=state.step, total_steps=total_steps, resumed=checkpoint is not None)
    if checkpoint is not None:
        console.resumed(checkpoint.path, state.step, world.size)
        if state.step > total_steps:
            console.note(f"it is past the {total_steps} steps that are asked for: nothing is trained")
    for note in batch.notes:
        console.note(note)
    return Parts(
        config=config,
        world=world,
        console=console,
        base=base,
        pattern=pattern,
        guard=guard,
        model=model,
        strategy=strategy,
        stepper=Stepper(strategy, world, allocation, data.task),
        task=data.task,
        allocation=allocation,
        loader=loader,
        train_rows=data.train,
        eval_rows=data.evaluation,
        state=state,
        identity=identity,
        output_dir=output_dir,
        total_steps=total_steps,
        warmup=warmup_steps(total_steps, train.warmup_steps, train.warmup_ratio),
        metrics=opening.metrics,
        tracker=_tracker(config, world, output_dir, state),
        versions=versions(),
        run_id=opening.run_id,
        attempt_number=opening.attempt_number,
        folder=opening.folder,
        attempt=opening.attempt,
    )


def _strategy(
    config: RunConfig,
    world: World,
    console: Console,
    plan: StrategyPlan,
    model: Any,
    opened: BaseAndPattern,
    checkpoint: Checkpoint | None,
    task: Task,
) -> Strategy:
    """The wrapped model, in force, with what each process holds on the console."""
    loss_scale = LossScale() if config.train.fp16 else None
    if loss_scale is not None and checkpoint is not None and checkpoint.state.loss_scale is not None:
        loss_scale = LossScale(checkpoint.state.loss_scale, checkpoint.state.loss_scale_good_steps)
    strategy, notes = wrap(config, world, plan, model, opened, loss_scale, task)
    for note in notes:
        console.note(note)
    if strategy.name != "ddp":
        held = strategy.placement()
        console.placement(
            strategy.name,
            world.size,
            base_elements=held.base_elements,
            base_elements_total=held.base_elements_total,
            base_bytes=held.base_bytes,
            trainable_elements=held.trainable_elements,
        )
    return strategy


def _batch(config: RunConfig, world: World, checkpoint: Checkpoint | None) -> BatchPlan:
    return plan_batch(
        micro_batch=config.train.per_device_train_batch_size,
        accumulation=config.train.gradient_accumulation_steps,
        world=world.size,
        wanted=config.train.global_batch_size,
        before=checkpoint.state if checkpoint is not None else None,
    )


def _loader(config: RunConfig, world: World, console: Console, batch: BatchPlan, data: RunData) -> StepLoader:
    loader = StepLoader(
        data.train,
        global_batch=batch.global_batch,
        micro_batch=batch.micro_batch,
        rank=world.rank,
        world=world.size,
        seed=config.train.seed,
        drop_last=config.train.dataloader_drop_last,
        group_by_length=config.train.group_by_length,
        num_workers=config.data.dataloader_num_workers,
        pin_memory=world.device.type == "cuda",
    )
    if data.train.lengths is not None:
        console.padding(loader.expected_padding(), grouped=config.train.group_by_length)
    return loader


def compute_dtype(dtype: str, bf16: bool, fp16: bool) -> torch.dtype:
    """Precision of the frozen base (`model.dtype`, `train.bf16`, `train.fp16`)."""
    if dtype != "auto":
        return getattr(torch, dtype)
    return torch.bfloat16 if bf16 else torch.float16 if fp16 else torch.float32


def _base(config: RunConfig, world: World, console: Console, plan: StrategyPlan) -> BaseAndPattern:
    """The base, whole or in placeholders, and its pattern."""
    args = config.model

    def check(source: BaseSource) -> None:
        if source.context is not None and config.data.block_size > source.context:
            raise UserError(
                f"data.block_size: found {config.data.block_size}, expected at most the model's context of {source.context}"
            )

    opened = load_for(
        world,
        args.name_or_path,
        sharded=plan.sharded_base,
        block=config.adapter.block,
        config_name=args.config_name,
        dtype=compute_dtype(args.dtype, config.train.bf16, config.train.fp16),
        attn_implementation=args.attn_implementation,
        trust_remote_code=args.trust_remote_code,
        quantisation=quantisation_of(
            args.load_in_4bit, args.load_in_8bit, args.bnb_4bit_quant_type, args.bnb_4bit_use_double_quant
        ),
        head=head_for(config),
        check=check,
    )
    base = opened.base
    console.model_loaded()
    if base.labels_before is not None:
        console.warning(
            f"model.num_labels: the base has a head of {base.labels_before} labels, {base.model.config.num_labels} are asked for: it gets "
            "a new one, drawn by train.seed"
        )
    if base.config_from != args.name_or_path or base.tokenizer_from != args.name_or_path:
        console.note(f"config from {base.config_from}, tokenizer from {base.tokenizer_from}")
    return opened


def _adapter_pattern(config: RunConfig, console: Console, found: FoundPattern) -> Pattern | None:
    """The pattern that the update is to respect."""
    pattern = adapter_pattern(found, config.adapter.mask, block=config.adapter.block, model_name=config.model.name_or_path)
    if pattern is None and found.pattern is not None:
        console.warning("adapter.mask none: the update is dense; merging it would destroy the base's sparsity pattern")
    elif pattern is None:
        console.note("the base has no sparsity pattern: plain LoRA")
    return pattern


def _check_quantisation(checkpoint: Checkpoint, base: LoadedBase) -> None:
    """The base is held as it was: its values are part of what was trained on."""
    now = getattr(base.model.config, "quantization_config", None)
    described = [
        "none" if config is None else str(Quantisation.from_dict(config))
        for config in (read_quantisation(checkpoint.adapter), now)
    ]
    if described[0] != described[1]:
        raise GuardError(
            f"model.load_in_4bit, model.load_in_8bit: the base's quantisation was {described[0]} when {checkpoint.path.name} was written, "
            f"found {described[1]}: set them as they were"
        )


def _check_identity(checkpoint: Checkpoint, now: Identity) -> None:
    """The base and the pattern are those that the checkpoint was trained on."""
    then = checkpoint.identity
    if then.base_fingerprint != now.base_fingerprint:
        raise GuardError(
            f"model.name_or_path: the base changed since {checkpoint.path.name} was written (fingerprint {then.base_fingerprint[:12]}, "
            f"found {now.base_fingerprint[:12]}); give the base it was trained on"
        )
    if then.pattern_digest != now.pattern_digest:
        described = [(d[:12] if d else "none (plain LoRA)") for d in (then.pattern_digest, now.pattern_digest)]
        raise GuardError(
            f"adapter.mask, adapter.block: the pattern changed since {checkpoint.path.name} was written (digest {described[0]}, "
            f"found {described[1]}); set them as they were"
        )


def _resume(
    checkpoint: Checkpoint,
    fresh: TrainState,
    strategy: Strategy,
    data: RunData,
    batch: BatchPlan,
    allocation: Allocation | None,
) -> TrainState:
    """The checkpoint's state, with the optimizer put back."""
    state = checkpoint.state
    written = f"when {checkpoint.path.name} was written"
    source = "text" if data.noun == "windows" else "records"
    if state.seed != fresh.seed:
        raise UserError(f"train.seed: found {fresh.seed}, expected {state.seed} as {written}: the order of the data would change")
    if state.num_samples != fresh.num_samples:
        raise UserError(
            f"{data.content_keys}, data.max_train_samples: found {fresh.num_samples} training {data.noun}, expected {state.num_samples} as "
            f"{written}: the order of the data would change; set back what was changed of these, of the {source} or of the tokenizer"
        )
    if state.data_digest != fresh.data_digest:
        raise UserError(
            f"{data.content_keys}: found as many training {data.noun} as {written} ({state.num_samples}), but not the same content, expected "
            f"the same {source}, tokenizer and packing; set back what was changed of these, of the {source} or of the tokenizer"
        )
    if state.group_by_length != fresh.group_by_length:
        raise UserError(
            f"train.group_by_length: found {str(fresh.group_by_length).lower()}, expected {str(state.group_by_length).lower()} as "
            f"{written}: the order of the data would change"
        )
    if state.group_by_length and state.global_batch != batch.global_batch:
        raise UserError(
            f"train.global_batch_size: found {batch.global_batch} {data.noun} a step with train.group_by_length, expected "
            f"{state.global_batch} as {written}: the order of the data would change"
        )
    optimizer, ranks = split_allocation(checkpoint.optimizer)
    strategy.load_optimizer_tensors(optimizer)
    if allocation is not None:
        allocation.load(ranks)
    return state


def _tracker(config: RunConfig, world: World, output_dir: Path, state: TrainState) -> WandbSink | None:
    args = config.tracker
    if "wandb" not in args.report_to or not world.is_main:
        return None
    tracker = WandbSink(
        project=args.wandb_project,
        name=args.run_name or output_dir.name,
        folder=output_dir,
        run_id=state.tracker_run_id,
        mode=args.wandb_mode,
        config=dataclasses.asdict(config),
    )
    state.tracker_run_id = tracker.run_id
    return tracker
