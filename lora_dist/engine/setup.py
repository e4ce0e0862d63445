"""From the configuration to the parts of a run: the last place that sees `RunConfig`. Everything below takes plain values.

Order: cheap checks first (folder, checkpoint, format of the data), then base, guard, adapter, data, optimizer, and last the resumed state.
"""

from __future__ import annotations

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
    read_adapter_tensors,
)
from lora_dist.blocks import Guard, Pattern
from lora_dist.config import RunConfig
from lora_dist.data.loader import StepLoader
from lora_dist.data.rows import Rows
from lora_dist.engine.adapting import check_adapter, compile_layers, refuse_strategy, use_liger_kernel, with_adapter
from lora_dist.engine.attempts import Attempt
from lora_dist.engine.base import (
    BaseAndPattern,
    base_pieces,
    compute_dtype,
    load_for,
    make_guard,
    quantised_weights,
    require_finite,
    tile_places,
)
from lora_dist.engine.batch import BatchPlan, plan_batch
from lora_dist.engine.checkpoint import Checkpoint, Identity, load_checkpoint
from lora_dist.engine.cross_entropy import choose_cross_entropy
from lora_dist.engine.data import RunData, data_kind, head_for, run_data
from lora_dist.engine.distill import with_teacher
from lora_dist.engine.held import HeldFolder
from lora_dist.engine.opening import Opening, versions
from lora_dist.engine.packing import require_separate
from lora_dist.engine.pattern import FoundPattern, adapter_pattern
from lora_dist.engine.picture import keep_picture
from lora_dist.engine.resuming import check_identity, check_quantisation, resume_state
from lora_dist.engine.schedule import warmup_steps
from lora_dist.engine.step import Stepper
from lora_dist.engine.task import Task
from lora_dist.engine.teacher import check_teacher
from lora_dist.engine.tracking import make_trackers, wanted_trackers
from lora_dist.engine.wrap import StrategyPlan, plan_strategy, wrap
from lora_dist.log import UserError
from lora_dist.models.architecture import decoder_layers, matrix_elements
from lora_dist.models.chunked import put_chunked_head
from lora_dist.models.loading import BaseSource, LoadedBase
from lora_dist.models.quantised import quantisation_of
from lora_dist.monitor.console import Console
from lora_dist.monitor.metrics import MetricsFile
from lora_dist.monitor.trackers import Trackers
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
    tracker: Trackers | None
    """on rank 0"""
    matrix_elements: int
    """of all weight matrices that tokens are multiplied with"""
    compute_dtype: str
    device_name: str
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
    wanted_trackers(list(config.tracker.report_to))
    plan = opening.plan
    output_dir = plan.folder
    checkpoint = load_checkpoint(plan.checkpoint) if plan.checkpoint is not None else None
    batch = _batch(config, world, checkpoint)
    strategy_plan = plan_strategy(config, world, batch)
    refuse_strategy(config.adapter_kind, strategy_plan.name)
    kind = data_kind(config, world)
    opened = _base(config, world, console, strategy_plan)
    base, pattern = opened.base, _adapter_pattern(config, console, opened.found)
    identity = Identity(base.fingerprint, pattern.digest if pattern is not None else None)
    if checkpoint is not None:
        check_identity(checkpoint, identity)
        check_quantisation(checkpoint, base)
    elements = matrix_elements(opened.base.model)
    model = _adapted(config, console, opened, pattern, kind)
    data = run_data(config, world, console, base, kind)
    dtype = compute_dtype(config.model.dtype, config.train.bf16, config.train.fp16)
    data = with_teacher(
        config, world, console, base, data, sharded=strategy_plan.sharded_base, dtype=dtype, rows=batch.micro_batch
    )
    if checkpoint is not None:
        check_adapter(checkpoint, config)
        hollow = any(p.requires_grad and not p.is_contiguous() for p in model.parameters())
        if not hollow:
            load_adapter_tensors(model, checkpoint.adapter)  # before wrapping (design section 7)
    strategy = _strategy(config, world, console, strategy_plan, model, opened, checkpoint, data.task)
    if checkpoint is not None and hollow:
        strategy.load_trainable(read_adapter_tensors(model, checkpoint.adapter, strategy.shapes))
    pieces = base_pieces(base.model, strategy.piece)
    require_finite(world, pieces)
    guard = make_guard(
        world,
        pieces,
        opened.found.pattern,
        opened.linears,
        sample_chunks=config.guard.sample_chunks,
        codes=quantised_weights(base.model, pieces),
        tiles=tile_places(base.model),
    )
    _check_losses(config, world, console, base, strategy, kind, rows=batch.micro_batch)
    strategy.settle()
    loader = _loader(config, world, console, batch, data)
    train = config.train
    total_steps = train.max_steps if train.max_steps > 0 else math.ceil(loader.steps_per_epoch * train.num_train_epochs)
    allocation = make_allocation(model, total_steps)
    state = _state(config, world, opening, checkpoint, strategy, data, batch, allocation)
    # Nothing was written before this line.
    opening.claim(argv, first_step=state.step, total_steps=total_steps, resumed=checkpoint is not None)
    if opening.folder is not None and opened.found.pattern is not None:
        keep_picture(opening.folder, opened.found.pattern)
    if checkpoint is not None:
        console.resumed(checkpoint.path, state.step, world.size)
        if state.step > total_steps:
            console.note(f"it is past the {total_steps} steps that are asked for: nothing is trained")
    for note in batch.notes:
        console.note(note)
    facts = {
        "pattern_digest": identity.pattern_digest,
        "base_fingerprint": identity.base_fingerprint,
        "strategy": strategy.name,
        "processes": world.size,
        "versions": versions(),
    }
    tracker = make_trackers(config, world, console, opening.metrics, output_dir, state, facts)
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
        tracker=tracker,
        matrix_elements=elements,
        compute_dtype=str(compute_dtype(config.model.dtype, config.train.bf16, config.train.fp16)).removeprefix("torch."),
        device_name=torch.cuda.get_device_name(world.device) if world.device.type == "cuda" else "cpu",
        versions=versions(),
        run_id=opening.run_id,
        attempt_number=opening.attempt_number,
        folder=opening.folder,
        attempt=opening.attempt,
    )


def _adapted(config: RunConfig, console: Console, opened: BaseAndPattern, pattern: Pattern | None, kind: str) -> Any:
    """The base with its adapter, as the user is told about it."""
    base = opened.base.model
    if config.train.use_liger_kernel:
        use_liger_kernel(base)
        console.note("Liger's kernels compute norms, rotation and feed-forward")
    if kind != "classification" and config.train.cross_entropy != "logits":
        put_chunked_head(base)
    model = with_adapter(config, opened, pattern)
    if config.train.torch_compile:
        compile_layers(base)
        console.note("torch.compile: every decoder layer is compiled when it is first called, which takes its time")
    if config.train.gradient_checkpointing_layers != "all":
        layers = len(decoder_layers(base)[1])
        console.note(
            f"gradient checkpointing: the first {config.train.gradient_checkpointing_layers} of {layers} layers are computed again"
        )
    if config.without_effect():
        console.note(f"{', '.join(config.without_effect())}: without effect with train.mode {config.train.mode}")
    console.adapter_applied(
        *count_parameters(model), *(["Sparse full fine-tuning"] if config.train.mode == "sparse_full" else [])
    )
    if pattern is not None:
        console.pattern(
            "mixed" if pattern.is_mixed else pattern.kind, pattern.block, pattern.sparsity, len(pattern), pattern.digest
        )
    return model


def _check_losses(
    config: RunConfig, world: World, console: Console, base: LoadedBase, strategy: Strategy, kind: str, *, rows: int
) -> None:
    """Collective. How the loss is taken from this model, and that packed rows are separate in it. Behind the guard: a forward pass leaves some
    of what FSDP cut in one piece.

    Args:
        rows: of a micro-batch.
    """
    vocab_size = base.model.config.get_text_config().vocab_size
    if kind != "classification":
        reason = choose_cross_entropy(
            strategy.module, world, config.train.cross_entropy, vocab_size=vocab_size, key="train.cross_entropy"
        )
        if reason is not None:
            console.note(f"train.cross_entropy auto: from whole logits ({reason})")
    if config.data.packing:
        require_separate(
            strategy.module,
            world,
            vocab_size=vocab_size,
            max_length=config.data.block_size,
            rows=rows,
            kernel=base.model.config._attn_implementation,
        )


def _state(
    config: RunConfig,
    world: World,
    opening: Opening,
    checkpoint: Checkpoint | None,
    strategy: Strategy,
    data: RunData,
    batch: BatchPlan,
    allocation: Allocation | None,
) -> TrainState:
    """That of a fresh start, or the checkpoint's."""
    train = config.train
    state = TrainState(seed=train.seed, num_samples=len(data.train), data_digest=data.train.digest)
    state.group_by_length, state.teacher = train.group_by_length, data.teacher
    if checkpoint is not None:
        state = resume_state(checkpoint, state, strategy, data, batch, allocation)
        if opening.plan.best_lost or not opening.plan.own:
            state.best_metric, state.best_step, state.evals_without_improvement = None, -1, 0  # its files are in another folder
    train_batch = (batch.global_batch, train.per_device_train_batch_size, train.gradient_accumulation_steps, world.size)
    state.global_batch, state.micro_batch, state.accumulation, state.processes = train_batch
    return state


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


def _base(config: RunConfig, world: World, console: Console, plan: StrategyPlan) -> BaseAndPattern:
    """The base, whole or in placeholders, and its pattern."""
    args = config.model

    def check(source: BaseSource) -> None:
        check_teacher(config, source)
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
        storage=args.storage,
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
    if pattern is None and found.pattern is not None and config.adapter.type == "ia3":
        console.note("adapter.mask none: IA3 scales outputs and inputs, and keeps the base's zeros all the same")
    elif pattern is None and found.pattern is not None:
        console.warning("adapter.mask none: the update is dense; merging it would destroy the base's sparsity pattern")
    elif pattern is None:
        console.note("the base has no sparsity pattern: plain LoRA")
    return pattern
