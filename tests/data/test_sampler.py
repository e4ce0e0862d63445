"""The sampler against its definition: which samples a step has, from any cursor, on any number of processes."""

from __future__ import annotations

import pytest
import torch

from lora_dist.data.sampler import StepSlice, epoch_order, stable_permutation, stable_seed, step_at, steps_per_epoch
from lora_dist.log import UserError

SPLITS = [(4, 1, 1), (2, 2, 1), (1, 4, 1), (2, 1, 2), (1, 2, 2), (1, 1, 4)]  # micro-batch, accumulation, world: always 4


UNEVEN = [(3, 2, 1), (1, 2, 3), (2, 1, 3), (3, 1, 2), (1, 1, 4)]  # rounds that a global batch of 4 does not fill, or just fills


def slices(
    cursor: int, num_samples: int, split: tuple[int, int, int], drop_last: bool = False, global_batch: int | None = None
) -> list[StepSlice]:
    micro_batch, accumulation, world = split
    return [
        step_at(
            cursor,
            num_samples=num_samples,
            global_batch=global_batch or micro_batch * accumulation * world,
            micro_batch=micro_batch,
            rank=rank,
            world=world,
            drop_last=drop_last,
        )
        for rank in range(world)
    ]


def real(step: list[StepSlice]) -> list[int]:
    return sorted(p for s in step for row in s.positions for p in row if p is not None)


def walk(
    cursor: int,
    num_samples: int,
    split: tuple[int, int, int],
    steps: int,
    drop_last: bool = False,
    global_batch: int | None = None,
) -> list[tuple]:
    """(cursor before, epoch, positions) of a number of steps."""
    seen = []
    for _ in range(steps):
        step = slices(cursor, num_samples, split, drop_last, global_batch)
        seen.append((cursor, step[0].epoch, real(step)))
        cursor = step[0].cursor_after
    return seen


def test_order_is_a_permutation_of_seed_and_epoch_only():
    order = epoch_order(1000, 7, 3)
    assert order.dtype == torch.int64
    assert sorted(order.tolist()) == list(range(1000))
    assert torch.equal(order, epoch_order(1000, 7, 3))
    for seed, epoch in [(7, 4), (8, 3), (3, 7)]:
        assert (order == epoch_order(1000, seed, epoch)).sum() < 20


def test_order_is_frozen():
    """A run may be resumed under newer libraries: these values must never change."""
    assert stable_seed("dropout", 42, 0, 0) == 3659082695531234100
    assert epoch_order(10, 42, 0).tolist() == [4, 7, 9, 2, 5, 8, 6, 0, 1, 3]
    assert stable_permutation(6, "hold_out", 0).tolist() == [5, 4, 3, 2, 0, 1]


def test_permutation_is_uniform_enough():
    first = torch.stack([stable_permutation(8, "t", seed) for seed in range(4000)])
    counts = torch.stack([(first == value).sum(0) for value in range(8)])
    assert (counts - 500).abs().max() < 110  # five standard deviations


@pytest.mark.parametrize(("num", "drop", "steps"), [(10, False, 3), (10, True, 2), (8, False, 2), (8, True, 2), (3, False, 1)])
def test_steps_per_epoch(num: int, drop: bool, steps: int):
    assert steps_per_epoch(num, 4, drop) == steps
    taken = walk(0, num, (4, 1, 1), steps + 1, drop)
    assert [epoch for _, epoch, _ in taken] == [0] * steps + [1]


@pytest.mark.parametrize("drop_last", [False, True])
@pytest.mark.parametrize("split", SPLITS)
def test_samples_of_a_step_do_not_depend_on_the_split(split: tuple[int, int, int], drop_last: bool):
    assert walk(0, 11, split, 9, drop_last) == walk(0, 11, (4, 1, 1), 9, drop_last)


@pytest.mark.parametrize("drop_last", [False, True])
@pytest.mark.parametrize("split", UNEVEN)
def test_a_global_batch_that_fills_no_whole_rounds_is_exact(split: tuple[int, int, int], drop_last: bool):
    """The same samples in each step as on one process, no rank more than a row ahead within a round, fillers in the last one only."""
    assert walk(0, 11, split, 9, drop_last, 4) == walk(0, 11, (4, 1, 1), 9, drop_last)
    micro_batch, _, world = split
    step = slices(0, 11, split, drop_last, 4)
    assert all(s.samples_global == 4 and s.cursor_after == 4 for s in step)
    assert all(len(s.positions) == -(-4 // (micro_batch * world)) for s in step)
    filled = [p is not None for number in range(len(step[0].positions)) for s in step for p in s.positions[number]]
    last_round = micro_batch * world
    assert all(filled[:-last_round])
    assert sum(filled) == 4


def test_every_epoch_visits_every_sample_once():
    for split in SPLITS:
        taken = walk(0, 11, split, 9)
        for epoch in range(3):
            assert sorted(p for _, e, positions in taken if e == epoch for p in positions) == list(range(11))


def test_drop_last_leaves_out_the_tail_and_counts_it_as_passed():
    taken = walk(0, 11, (2, 1, 2), 5, drop_last=True)
    assert [(cursor, epoch) for cursor, epoch, _ in taken] == [(0, 0), (4, 0), (11, 1), (15, 1), (22, 2)]
    assert taken[1][2] == [4, 5, 6, 7]
    assert all(s.samples_global == 4 for cursor, _, _ in taken for s in slices(cursor, 11, (2, 1, 2), True))


@pytest.mark.parametrize("drop_last", [False, True])
def test_resume_from_every_cursor_equals_going_on(drop_last: bool):
    whole = walk(0, 11, (2, 2, 1), 9, drop_last)
    for k, (cursor, _, _) in enumerate(whole):
        for split in SPLITS:
            assert walk(cursor, 11, split, 9 - k, drop_last) == whole[k:]


@pytest.mark.parametrize("drop_last", [False, True])
@pytest.mark.parametrize("split", [(3, 1, 1), (1, 1, 3), (2, 3, 1), (1, 1, 1)])
def test_another_global_batch_goes_on_where_the_run_stopped(split: tuple[int, int, int], drop_last: bool):
    """No sample of the epoch twice, and without drop_last none left out, whatever global batch takes over at any cursor."""
    for cursor, epoch, _ in walk(0, 11, (4, 1, 1), 6, drop_last):
        done = cursor % 11
        later = [p for _, e, positions in walk(cursor, 11, split, 12, drop_last) if e == epoch for p in positions]
        assert later == list(range(done, done + len(later)))
        left_out = 11 - done - len(later)
        assert left_out < split[0] * split[1] * split[2] if drop_last else left_out == 0


@pytest.mark.parametrize("split", SPLITS)
def test_short_steps_are_filled_so_that_ranks_stay_in_step(split: tuple[int, int, int]):
    micro_batch, _, world = split
    for cursor, _, _ in walk(0, 11, split, 6):
        step = slices(cursor, 11, split)
        samples = step[0].samples_global
        assert samples == len(real(step)) == (3 if cursor % 11 == 8 else 4)
        for s in step:
            assert len(s.positions) == len(s.first_positions) == -(-samples // (micro_batch * world))
            assert all(len(row) == micro_batch for row in s.positions)
        per_rank = [sum(p is not None for row in s.positions for p in row) for s in step]
        assert max(per_rank) - min(per_rank) <= 1


def test_first_positions_are_unique_within_an_epoch():
    firsts = [
        f for cursor, epoch, _ in walk(0, 11, (1, 2, 2), 3) for s in slices(cursor, 11, (1, 2, 2)) for f in s.first_positions
    ]
    assert len(set(firsts)) == len(firsts) == 12


def test_too_few_samples_for_one_whole_step():
    with pytest.raises(UserError, match=r"train\.dataloader_drop_last: found 3 samples, expected 4"):
        steps_per_epoch(3, 4, drop_last=True)
    with pytest.raises(UserError, match="dataloader_drop_last"):
        slices(0, 3, (4, 1, 1), drop_last=True)
