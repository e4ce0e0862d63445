"""Whole runs with real processes: splits of a batch, kills and resumes, everything compared with the uninterrupted run."""

from __future__ import annotations

import json
import os
import random
import subprocess
import time
from pathlib import Path

import pytest
import torch

from tests.runs import (
    ROOT,
    adapter,
    assert_identical,
    command,
    descendants,
    environment,
    largest_relative_difference,
    losses,
    options,
    records,
    run,
    run_killed,
)

pytestmark = pytest.mark.distributed

STEPS = 12
SPLITS = [(1, 4, 1), (1, 2, 2), (1, 1, 4), (2, 2, 1), (2, 1, 2)]


@pytest.fixture(scope="module")
def runs_by_split(groups, tiny_base, tiny_text, tmp_path_factory):
    """The same global batch, split over processes, micro-batches and accumulation in every way."""
    folder = tmp_path_factory.mktemp("splits")
    for processes, micro, accumulation in SPLITS:
        out = folder / f"{processes}-{micro}-{accumulation}"
        groups[processes].run(
            *options(
                tiny_base,
                tiny_text,
                out,
                max_steps=STEPS,
                per_device_train_batch_size=micro,
                gradient_accumulation_steps=accumulation,
                adapter__lora_dropout=0,
                eval_steps=6,
                warmup_steps=2,
            ),
        )
    return {split: folder / "-".join(map(str, split)) for split in SPLITS}


@pytest.mark.parametrize("split", SPLITS[1:], ids=lambda s: f"{s[0]} processes, {s[1]} x {s[2]}")
def test_how_a_batch_is_split_changes_nothing(runs_by_split, split):
    reference, other = runs_by_split[SPLITS[0]], runs_by_split[split]
    a, b = losses(reference), losses(other)
    assert list(a) == list(b) == list(range(1, STEPS + 1))
    worst = max(abs(b[step] - a[step]) / a[step] for step in a)
    difference = largest_relative_difference(adapter(reference), adapter(other))
    print(f"losses differ by {worst:.1e} relative at most, adapter tensors by {difference:.1e} of their norm")
    assert worst < 1e-5 and difference < 1e-5
    evaluations = [[row["eval_loss"] for row in records(d, "eval")] for d in (reference, other)]
    assert evaluations[1] == pytest.approx(evaluations[0], rel=1e-5)
    assert evaluations[0][-1] < evaluations[0][0]


KILLED = [
    (1, "ddp"),
    # The kill fuzzer of tests/faults has two processes under ddp, killed more often and inside saves.
    *(pytest.param(2, strategy, marks=pytest.mark.matrix) for strategy in ("ddp", "fsdp2", "zero1", "zero2", "zero3")),
]


@pytest.mark.parametrize(("processes", "strategy"), KILLED)
def test_killed_at_a_random_step_and_resumed_is_bit_identical(processes, strategy, tiny_base, tiny_text, tmp_path):
    seed = random.randrange(2**31)
    print(f"seed {seed}")
    draw = random.Random(seed)

    def arguments(out):
        return [
            "train",
            *options(
                tiny_base,
                tiny_text,
                out,
                max_steps=20,
                per_device_train_batch_size=2,
                gradient_accumulation_steps=2,
                save_steps=3,
                eval_steps=5,
                adapter__lora_dropout=0.1,
                lr_scheduler_type="cosine",
                data__dataloader_num_workers=draw.choice([0, 1]),
                logging_steps=2,
                gradient_checkpointing=draw.choice([True, False]),
                parallel__strategy=strategy,
            ),
        ]

    whole, killed = tmp_path / "whole", tmp_path / "killed"
    draw_state = draw.getstate()
    run(processes, *arguments(whole))
    draw.setstate(draw_state)
    killed_arguments = arguments(killed)
    for _ in range(2):
        last = max([0, *losses(killed)])
        step = draw.randrange(last + 2, 20) if last < 17 else 18
        run_killed(processes, lambda step=step: max([0, *losses(killed)]) >= step - 1, *killed_arguments, "--resume", "auto")
    done = run(processes, *killed_arguments, "--resume", "auto")
    assert "Resuming from" in done.stdout
    assert_identical(whole, killed)
    assert [row["eval_loss"] for row in records(whole, "eval")] == [row["eval_loss"] for row in records(killed, "eval")]


def test_a_rank_that_finds_a_changed_base_stops_all_before_anything_is_written(tiny_base, tiny_text, tmp_path):
    """One pruned weight of the stored base is set: refused at load, on both ranks, with layer and tile named."""
    import shutil

    from safetensors.torch import load_file, save_file

    from lora_dist.blocks import Pattern

    broken = tmp_path / "broken"
    shutil.copytree(tiny_base, broken)
    name, mask = next((n, m) for n, m in Pattern.load(broken).items() if not m.keeps_all)
    p, q = (~mask.kept_PQ).nonzero()[0].tolist()
    tensors = load_file(broken / "model.safetensors")
    tensors[f"{name}.weight"][p * mask.block, q * mask.block] = 1.0
    save_file(tensors, broken / "model.safetensors", metadata={"format": "pt"})
    done = run(2, "train", *options(broken, tiny_text, tmp_path / "out", max_steps=2), check=False)
    assert done.returncode != 0
    assert f"layer {name}, tile ({p}, {q})" in done.stderr
    assert not (tmp_path / "out").exists()


def test_workers_end_with_a_launcher_that_was_killed(tiny_base, tiny_text, tmp_path):
    """SIGKILL reaches torchrun alone; its workers must not go on writing into the run folder."""
    out = tmp_path / "out"
    values = options(tiny_base, tiny_text, out, max_steps=100000, eval_strategy="no", save_steps=50)
    launcher = subprocess.Popen(
        command(2, "train", *values), cwd=ROOT, env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    deadline = time.monotonic() + 120
    while not losses(out) and time.monotonic() < deadline:
        time.sleep(0.1)
    workers = descendants(launcher.pid)
    assert len(workers) >= 2
    launcher.kill()
    launcher.wait()
    deadline = time.monotonic() + 20
    while any(Path(f"/proc/{pid}").exists() for pid in workers) and time.monotonic() < deadline:
        time.sleep(0.1)
    left = [pid for pid in workers if Path(f"/proc/{pid}").exists()]
    for pid in left:
        os.kill(pid, 9)
    assert not left


def test_both_processes_end_with_the_same_adapter_and_rank_0_alone_prints(tiny_base, tiny_text, tmp_path):
    done = run(2, "train", *options(tiny_base, tiny_text, tmp_path / "out", max_steps=3, eval_steps=3))
    assert done.stdout.count("***** Running training *****") == 1
    assert done.stdout.count("LoRA Fine-tuning Complete!") == 1
    state = json.loads((tmp_path / "out" / "checkpoint-3" / "state.json").read_text())
    assert state["step"] == 3 and state["cursor"] == 6
    assert all(torch.isfinite(t).all() for t in adapter(tmp_path / "out").values())
