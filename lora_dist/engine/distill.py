"""Learning from the dense model beside the text: the task, and where its lessons come from. Called by `engine/setup.py`.

    loss = (1 - alpha) CE + alpha T^2 KL + weight * distance of hidden states,    summed over label tokens (design section 6)

Evaluations are those of the plain task: cross-entropy.
"""

from __future__ import annotations

import dataclasses
import gc
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from lora_dist.config import RunConfig
from lora_dist.data.loader import MicroBatch
from lora_dist.data.rows import Rows
from lora_dist.data.soft_labels import SoftLabels, SoftLabelsOf
from lora_dist.engine.base import compute_dtype
from lora_dist.engine.data import RunData, data_kind, run_data
from lora_dist.engine.soft_labels import CachedLessons, fill, open_soft_labels
from lora_dist.engine.task import CausalTask
from lora_dist.engine.teacher import (
    Hidden,
    Said,
    Teacher,
    check_teacher,
    hidden_states,
    load_teacher,
    quantised_teacher_problems,
    teacher_fingerprint,
    teacher_source,
)
from lora_dist.log import UserError
from lora_dist.models.chunked import chunked_head
from lora_dist.models.lesson import distance
from lora_dist.models.loading import LoadedBase, open_base
from lora_dist.models.loss import causal_loss_sum
from lora_dist.monitor.console import Console
from lora_dist.parallel import World
from lora_dist.parallel.ds_config import resolve_strategy


class Lessons(Protocol):
    """Where lessons come from."""

    fingerprint: str
    """of the teacher"""

    def of(
        self, batch: MicroBatch, ids_BL: Tensor, positions_BL: Tensor | None, *, chunked: bool
    ) -> AbstractContextManager[Said]:
        """Within: what the teacher says of a micro-batch.

        Args:
            ids_BL, positions_BL: the batch's, ids on the device.
            chunked: whether the student's loss is computed chunk by chunk.
        """


class LiveLessons:
    """By a teacher that computes beside the student."""

    def __init__(self, teacher: Teacher, *, alpha: float, temperature: float, hidden: Hidden | None):
        self.teacher, self.fingerprint = teacher, teacher.fingerprint
        self._how: dict[str, Any] = {"alpha": alpha, "temperature": temperature, "hidden": hidden}

    @contextmanager
    def of(self, batch: MicroBatch, ids_BL: Tensor, positions_BL: Tensor | None, *, chunked: bool) -> Iterator[Said]:
        with self.teacher.asked(ids_BL, positions_BL, chunked=chunked and self.teacher.chunked, **self._how) as said:
            yield said


class DistillTask(CausalTask):
    """Predict the next token, and what the teacher would have predicted.

    Args:
        base: the student's causal language model, inside of whatever wraps it.
        hidden, weight: hidden states to match; None: none.
    """

    def __init__(self, lessons: Lessons, base: Any, *, hidden: Hidden | None = None, weight: float = 0.0):
        self.lessons, self._base, self._hidden, self._weight = lessons, base, hidden, weight
        self._sums: dict[str, Tensor] = {}

    def loss_sum(self, module: nn.Module, batch: MicroBatch, device: torch.device) -> tuple[Tensor, Tensor | None]:
        ids_BL, labels_BL = batch.input_ids_BL.to(device, non_blocking=True), batch.labels_BL
        positions_BL = batch.position_ids_BL
        head = chunked_head(module)
        with self.lessons.of(batch, ids_BL, positions_BL, chunked=head is not None and head.chunked) as said:
            with hidden_states(self._base, self._hidden) as states:
                loss = causal_loss_sum(module, ids_BL, labels_BL, positions_BL, said.lesson)
        parts = {"ce_loss": said.lesson.ce, "kl_loss": said.lesson.kl}
        if self._hidden is not None:
            parts["hidden_loss"] = distance(states, said.states, labels_BL)
            loss = loss + self._weight * parts["hidden_loss"]
        for name, value in parts.items():
            self._sums[name] = self._sums.get(name, torch.zeros((), dtype=torch.float64, device=device)) + value.detach().double()
        return loss, None

    def take_parts(self) -> dict[str, Tensor]:
        found, self._sums = self._sums, {}
        return found


def with_teacher(
    config: RunConfig,
    world: World,
    console: Console,
    base: LoadedBase,
    data: RunData,
    *,
    sharded: bool,
    dtype: torch.dtype,
    rows: int,
) -> RunData:
    """The data with a task that learns from a teacher as well, where one is asked for. Collective.

    Args:
        sharded: cut the teacher over the processes.
        dtype: precision to hold it and compute in.
        rows: of a micro-batch.

    Raises:
        UserError: a teacher that cannot be loaded.
    """
    train = config.train
    if train.distill_from is None:
        return data
    hidden: Hidden | None = train.distill_hidden if train.distill_hidden_weight > 0 else None
    how: dict[str, Any] = {"sharded": sharded, "dtype": dtype, "rows": rows}
    lessons: Lessons
    if train.distill_cache is not None:
        labels = cached_labels(config, world, console, data.train, **how)
        lessons = CachedLessons(labels, alpha=train.distill_alpha)
    else:
        teacher = load_teacher(config, world, console, **how)
        lessons = LiveLessons(teacher, alpha=train.distill_alpha, temperature=train.distill_temperature, hidden=hidden)
    if lessons.fingerprint == base.fingerprint:
        console.warning("train.distill_from: it is the pruned model itself, which has nothing to teach: give the dense one")
    task = DistillTask(lessons, base.model, hidden=hidden, weight=train.distill_hidden_weight)
    return dataclasses.replace(data, task=task, teacher=lessons.fingerprint)


def cached_labels(
    config: RunConfig, world: World, console: Console, rows_to_learn: Rows, *, sharded: bool, dtype: torch.dtype, rows: int
) -> SoftLabels:
    """Collective. The teacher's largest probabilities of all rows to train on, computed where they are missing; it is let go of again.

    Raises:
        UserError: a teacher that cannot be loaded, a folder that cannot be used.
    """
    train = config.train
    assert train.distill_cache is not None
    precision = str(dtype).removeprefix("torch.")
    of = SoftLabelsOf(
        teacher=teacher_fingerprint(config, world),
        precision=f"nf4 {precision}" if train.distill_load_in_4bit else precision,
        rows=rows_to_learn.digest,
        count=len(rows_to_learn),
        temperature=train.distill_temperature,
        k=train.distill_top_k,
        vocabulary=teacher_source(config).config.get_text_config().vocab_size,
        half=dtype != torch.float32,
    )
    labels, missing = open_soft_labels(train.distill_cache, of, rows_to_learn, world)
    if missing:
        teacher = load_teacher(config, world, console, sharded=sharded, dtype=dtype, rows=rows)
        fill(labels, missing, teacher, rows_to_learn, world, batch=rows, sharded=sharded)
        del teacher
        gc.collect()
        if world.device.type == "cuda":
            torch.cuda.empty_cache()
    found = f"{len(missing)} of {labels.shards} shards computed" if missing else f"found, all {labels.shards} shards whole"
    console.note(f"predictions of {train.distill_from} in {labels.folder}: {found}, {of.token_bytes} bytes a label token")
    return labels


def cache_only(config: RunConfig, world: World, console: Console) -> SoftLabels:
    """Collective: what a run by this configuration would have cached at its start, without the pruned model's weights.

    Raises:
        UserError: as a run.
    """
    args, train = config.model, config.train
    if train.distill_from is None or train.distill_cache is None:
        raise UserError("train.distill_from, train.distill_cache: found nothing, expected a dense model and a folder to cache in")
    strategy = resolve_strategy(config.parallel.strategy, config.parallel.ds_config)
    problems = quantised_teacher_problems(train.distill_load_in_4bit)
    if problems:
        raise UserError(problems)
    kind = data_kind(config, world)
    with world.main_first():
        source = open_base(args.name_or_path, config_name=args.config_name, trust_remote_code=args.trust_remote_code)
        check_teacher(config, source)
    tokens = LoadedBase(
        None, source.tokenizer, source.source_dir, "", source.config_from, source.tokenizer_from, torch.float32, use_cache=False
    )
    data = run_data(config, world, console, tokens, kind)
    dtype = compute_dtype(args.dtype, train.bf16, train.fp16)
    rows = train.per_device_train_batch_size
    return cached_labels(config, world, console, data.train, sharded=strategy in ("fsdp2", "zero3"), dtype=dtype, rows=rows)
