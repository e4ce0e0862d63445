"""A teacher's largest probabilities, computed once for all training rows, and lessons made of them. Called by `distill.py`.

Shards are dealt over the processes; one that is killed leaves whole ones, and the next start computes what is missing. A teacher that is cut
over processes is asked by all of them the same number of times.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from lora_dist.data.loader import MicroBatch
from lora_dist.data.rows import IGNORE_LABEL, Rows
from lora_dist.data.soft_labels import SoftLabels, SoftLabelsOf, Top
from lora_dist.engine.teacher import Said, Teacher
from lora_dist.log import UserError
from lora_dist.models.chunked import CHUNK_BYTES
from lora_dist.models.lesson import TopLesson, WholeLesson
from lora_dist.parallel import World


def open_soft_labels(folder: str, of: SoftLabelsOf, rows: Rows, world: World) -> tuple[SoftLabels, list[int]]:
    """Collective. The cache of these rows, and its shards that are missing or damaged. Each process reads its part of what is there."""
    longest = rows.batch([0]).input_ids_BL.shape[1] if rows.lengths is None else int(rows.lengths.max())
    with world.main_first():
        labels = SoftLabels(Path(folder).expanduser(), of, longest=longest)
    own = labels.whole(range(world.rank, labels.shards, world.size))
    whole = {shard for each in world.gather(own) for shard in each}
    return labels, [shard for shard in range(labels.shards) if shard not in whole]


def fill(
    labels: SoftLabels, missing: list[int], teacher: Teacher, rows: Rows, world: World, *, batch: int, sharded: bool
) -> None:
    """Collective: compute shards that are missing.

    Args:
        batch: rows that the teacher sees at once.
        sharded: it is cut over the processes.

    Raises:
        UserError: on every process, where one cannot write, or does not see what another wrote.
    """
    problem = None
    bar = tqdm(total=len(missing), desc="Caching the dense model's predictions", unit="shard", disable=not world.is_main)
    for start in range(0, len(missing), world.size):
        mine = missing[start + world.rank : start + world.rank + 1]
        numbers = list(labels.rows_of(mine[0])) if mine else []
        tops: list[Top] = []
        for first in range(0, labels.rows_a_shard, batch):
            tops += _ask(teacher, rows, numbers[first : first + batch], labels.of, world.device, always=sharded)
        try:
            if mine and problem is None:
                labels.write(mine[0], tops)
        except UserError as error:
            problem = error
        world.agree(problem)
        bar.update(min(world.size, len(missing) - start))
    bar.close()
    unseen = [shard for shard in missing if not labels.file(shard).exists()]
    if unseen:
        problem = UserError(
            f"train.distill_cache: rank {world.rank} does not see {labels.file(unseen[0])}, which another process wrote, expected a folder "
            "that all machines share"
        )
    world.agree(problem)


def _ask(teacher: Teacher, rows: Rows, numbers: list[int], of: SoftLabelsOf, device: torch.device, *, always: bool) -> list[Top]:
    """What is kept of these rows, row by row; `always`: ask the teacher something even without any."""
    if not numbers:
        if always:
            nothing_BL = torch.zeros((1, 2), dtype=torch.long, device=device)
            with teacher.asked(nothing_BL, None, chunked=teacher.chunked, alpha=1.0, temperature=1.0, hidden=None):
                pass
        return []
    batch = rows.batch(numbers)
    targets_BL = batch.labels_BL[:, 1:] != IGNORE_LABEL
    asked = teacher.asked(
        batch.input_ids_BL.to(device),
        batch.position_ids_BL,
        chunked=teacher.chunked,
        alpha=1.0,
        temperature=of.temperature,
        hidden=None,
    )
    tokens = max(1, CHUNK_BYTES.get(device.type, CHUNK_BYTES["cpu"]) // (8 * of.vocabulary))
    with asked as said:
        assert isinstance(said.lesson, WholeLesson)
        said.lesson.select(targets_BL.reshape(-1).nonzero().squeeze(1), targets_BL.numel())
        found = [tensor.cpu().numpy() for tensor in said.lesson.largest(of.k, tokens)]
    tops, start = [], 0
    for count in targets_BL.sum(1).tolist():
        tops.append(Top(*(array[start : start + count] for array in found)))
        start += count
    return tops


class CachedLessons:
    """Of the rows that were cached."""

    def __init__(self, labels: SoftLabels, *, alpha: float):
        self.labels, self.fingerprint, self._alpha = labels, labels.of.teacher, alpha

    @contextmanager
    def of(self, batch: MicroBatch, ids_BL: Tensor, positions_BL: Tensor | None, *, chunked: bool) -> Iterator[Said]:
        top = self.labels.read([row for row in batch.windows if row >= 0])
        index_NK, log_p_NK, log_rest_N = (torch.from_numpy(array).to(ids_BL.device, non_blocking=True) for array in top)
        yield Said(TopLesson(index_NK, log_p_NK, log_rest_N, self._alpha, self.labels.of.temperature), [])
