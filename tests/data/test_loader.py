"""Batches: contents, resume, workers that change nothing, survive a preemption signal and never outlive the run."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from itertools import islice
from pathlib import Path

import pytest
import torch

from lora_dist.data.loader import StepBatch, StepLoader, eval_batches
from lora_dist.data.sampler import epoch_order
from lora_dist.data.windows import Windows
from lora_dist.log import UserError

REPO = Path(__file__).parents[2]


def loader(windows: Windows, split: tuple[int, int, int] = (2, 2, 1), rank: int = 0, **options) -> StepLoader:
    micro_batch, accumulation, world = split
    shape = {"global_batch": micro_batch * accumulation * world, "micro_batch": micro_batch}
    return StepLoader(windows, **{**shape, **options}, rank=rank, world=world, seed=5)


def samples(batch: StepBatch) -> list[int]:
    """Numbers of the windows in a step; the first token is the number."""
    rows = [row for m in batch.micro_batches for row in zip(m.input_ids_BL, m.labels_BL, strict=True)]
    return [int(ids[0]) for ids, labels in rows if labels[0] != -100]


def assert_same(ours: list[StepBatch], theirs: list[StepBatch]) -> None:
    assert len(ours) == len(theirs)
    for a, b in zip(ours, theirs, strict=True):
        head = (a.epoch, a.cursor_after, a.samples_global, a.label_tokens)
        assert head == (b.epoch, b.cursor_after, b.samples_global, b.label_tokens)
        for m, n in zip(a.micro_batches, b.micro_batches, strict=True):
            assert torch.equal(m.input_ids_BL, n.input_ids_BL)
            assert torch.equal(m.labels_BL, n.labels_BL)
            assert (m.dropout_seed, m.windows) == (n.dropout_seed, n.windows)


def test_steps_follow_the_epoch_order(windows_of: Callable[[int], Windows]):
    steps = list(islice(loader(windows_of(11)), 6))
    for epoch in range(2):
        taken = [number for step in steps if step.epoch == epoch for number in samples(step)]
        assert taken == epoch_order(11, 5, epoch).tolist()
    assert [step.cursor_after for step in steps] == [4, 8, 11, 15, 19, 22]
    assert steps[0].micro_batches[0].input_ids_BL.shape == (2, 5)
    assert torch.equal(steps[0].micro_batches[0].labels_BL, steps[0].micro_batches[0].input_ids_BL)
    assert steps[0].micro_batches[0].input_ids_BL.dtype == torch.int64


def test_micro_batches_carry_the_numbers_of_their_windows(windows_of: Callable[[int], Windows]):
    last = list(islice(loader(windows_of(11), (4, 1, 1)), 3))[-1].micro_batches[0]
    assert last.windows == (*epoch_order(11, 5, 0).tolist()[8:], -1)
    assert last.input_ids_BL[:3, 0].tolist() == list(last.windows[:3])  # the first token is the number


def test_filler_rows_count_no_labels(windows_of: Callable[[int], Windows]):
    last = list(islice(loader(windows_of(11), (4, 1, 1)), 3))[-1]
    (micro,) = last.micro_batches
    assert (last.samples_global, last.label_tokens) == (3, 3 * 4)  # five tokens have four next tokens
    assert micro.labels_BL[3].tolist() == [-100] * 5
    assert micro.input_ids_BL[3].tolist() == [0] * 5
    # One row for four ranks: three of them have nothing but fillers, and still take part.
    rows = [next(loader(windows_of(9), (1, 1, 4), rank).steps_from(8)) for rank in range(4)]
    assert [len(row.micro_batches) for row in rows] == [1] * 4
    assert [row.label_tokens for row in rows] == [4, 0, 0, 0]


@pytest.mark.parametrize("split", [(4, 1, 1), (1, 4, 1), (2, 1, 2), (1, 2, 2)])
def test_ranks_together_see_the_samples_of_the_step(windows_of: Callable[[int], Windows], split: tuple[int, int, int]):
    windows = windows_of(11)
    ranks = [list(islice(loader(windows, split, rank), 6)) for rank in range(split[2])]
    for one, *steps in zip(islice(loader(windows), 6), *ranks, strict=True):
        assert sorted(n for step in steps for n in samples(step)) == sorted(samples(one))
        assert sum(step.label_tokens for step in steps) == one.label_tokens


@pytest.mark.parametrize("drop_last", [False, True])
def test_resume_equals_uninterrupted(windows_of: Callable[[int], Windows], drop_last: bool):
    windows = windows_of(11)
    whole = list(islice(loader(windows, drop_last=drop_last), 8))
    for k, step in enumerate(whole[:-1]):
        assert_same(list(islice(loader(windows, drop_last=drop_last).steps_from(step.cursor_after), 7 - k)), whole[k + 1 :])


def test_dropout_seeds_differ_and_depend_on_the_position(windows_of: Callable[[int], Windows]):
    ranks = [list(islice(loader(windows_of(12), (1, 2, 2), rank), 6)) for rank in range(2)]
    seeds = [m.dropout_seed for steps in ranks for step in steps for m in step.micro_batches]
    assert len(set(seeds)) == len(seeds) == 24
    assert all(0 <= seed < 1 << 63 for seed in seeds)


def test_drop_last_without_a_whole_step(windows_of: Callable[[int], Windows]):
    with pytest.raises(UserError, match=r"train\.dataloader_drop_last"):
        loader(windows_of(3), drop_last=True)


def test_workers_change_nothing(windows_of: Callable[[int], Windows]):
    windows = windows_of(11)
    before = torch.get_rng_state()
    ours = list(islice(loader(windows, num_workers=2).steps_from(4), 7))
    assert torch.equal(torch.get_rng_state(), before)  # else dropout would depend on the number of workers
    assert_same(ours, list(islice(loader(windows).steps_from(4), 7)))
    for a, b in zip(
        eval_batches(windows, batch_size=2, rank=1, world=2, num_workers=2),
        eval_batches(windows, batch_size=2, rank=1, world=2),
        strict=True,
    ):
        assert torch.equal(a[0], b[0]) and torch.equal(a[1], b[1])


@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.parametrize("count", [1, 4, 7, 12])
def test_evaluation_covers_each_sample_once(windows_of: Callable[[int], Windows], world: int, count: int):
    windows = windows_of(count)
    ranks = [list(eval_batches(windows, batch_size=2, rank=rank, world=world)) for rank in range(world)]
    assert {len(batches) for batches in ranks} == {-(-count // (2 * world))}
    in_order = [batch for round_ in zip(*ranks, strict=True) for batch in round_]
    rows = [(ids, labels) for batch in in_order for ids, labels in zip(*batch, strict=True)]
    real = [ids for ids, labels in rows if labels[0] != -100]
    assert torch.equal(torch.stack(real), windows.gather(range(count)))
    fillers = [(ids.tolist(), labels.tolist()) for ids, labels in rows if labels[0] == -100]
    assert fillers == [([0] * 5, [-100] * 5)] * (len(rows) - count)
    assert all(ids.shape == labels.shape == (2, 5) for ids, labels in in_order)


MAIN = """
import multiprocessing, os, signal, sys, time
import numpy as np
from lora_dist.data.loader import StepLoader
from lora_dist.data.windows import Windows

signal.signal(signal.SIGTERM, lambda *_: print("main decides", flush=True))
windows = Windows(np.zeros((64, 8), np.uint16))
steps = StepLoader(windows, global_batch=2, micro_batch=2, rank=0, world=1, seed=0, num_workers=2).steps_from(0)
next(steps), next(steps)
print(*(p.pid for p in multiprocessing.active_children()), flush=True)
sys.stdin.readline()
for _ in range(30):
    cursor = next(steps).cursor_after
print(cursor, *(p.pid for p in multiprocessing.active_children()), flush=True)
sys.stdin.readline()
"""


def start_main() -> tuple[subprocess.Popen, list[int]]:
    """A run of its own process group, and the ids of its two workers."""
    main = subprocess.Popen(
        [sys.executable, "-c", MAIN],
        cwd=REPO,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    workers = [int(pid) for pid in main.stdout.readline().split()]
    assert len(workers) == 2
    return main, workers


def still_there(pids: list[int], limit_s: float) -> list[int]:
    """Those of the processes that have not ended after `limit_s`; returns as soon as all have."""
    end = time.monotonic() + limit_s
    while (
        left := [pid for pid in pids if Path(f"/proc/{pid}/stat").exists() and not _is_zombie(pid)]
    ) and time.monotonic() < end:
        time.sleep(0.05)
    return left


def _is_zombie(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] == "Z"
    except OSError:
        return True


def test_workers_survive_the_signals_of_a_preemption_and_end_with_the_run():
    main, workers = start_main()
    os.killpg(main.pid, signal.SIGTERM)
    assert main.stdout.readline() == "main decides\n"
    for pid in workers:
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2):
            os.kill(pid, number)
    print(file=main.stdin, flush=True)
    cursor, *still = map(int, main.stdout.readline().split())
    assert cursor == 64  # 32 steps of 2
    assert sorted(still) == sorted(workers)
    # The iterator is still open: leaving must not wait for workers that ignore SIGTERM.
    assert main.communicate("\n", timeout=20)[0] == ""
    assert main.returncode == 0
    assert still_there(workers, 1.0) == []


def test_no_worker_outlives_a_killed_run():
    main, workers = start_main()
    main.kill()
    main.wait()
    main.stdin.close(), main.stdout.close()
    assert still_there(workers, 15.0) == []
