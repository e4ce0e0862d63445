"""Rates against transformers' own schedules of the same names."""

from __future__ import annotations

import pytest
import torch
from transformers import get_scheduler

from lora_dist.engine.schedule import learning_rate, warmup_steps


@pytest.mark.parametrize("kind", ["linear", "cosine", "constant"])
@pytest.mark.parametrize("warmup", [0, 7])
def test_rates_equal_transformers(kind, warmup):
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.3)
    name = "constant_with_warmup" if kind == "constant" else kind
    scheduler = get_scheduler(name, optimizer, num_warmup_steps=warmup, num_training_steps=40)
    for step in range(40):
        assert learning_rate(step, 40, peak=0.3, warmup=warmup, kind=kind) == pytest.approx(scheduler.get_last_lr()[0], abs=1e-12)
        optimizer.step()
        scheduler.step()


def test_a_step_count_wins_over_the_ratio_which_rounds_up():
    assert warmup_steps(100, 0, 0.031) == 4
    assert warmup_steps(100, 9, 0.5) == 9
