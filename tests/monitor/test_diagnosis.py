"""The diagnosis on the recorded curves of real runs (`scripts/measure_diagnosis.py --record`), and on small made-up ones."""

from __future__ import annotations

import dataclasses
import json
import random
import re
from pathlib import Path

import pytest

from lora_dist.config import RunConfig
from lora_dist.monitor.diagnosis import Diagnosis, Notice, replay
from lora_dist.monitor.remedies import SIGNS, Options, remedy

RECORDED = json.loads((Path(__file__).parents[1] / "golden" / "diagnosis.json").read_text())
OPTIONS = Options(
    learning_rate=1e-4, r=8, lora_dropout=0.05, micro_batch=4, accumulation=1, num_train_epochs=3, max_steps=-1, total_steps=1000,
    warmup_steps=0, max_grad_norm=1.0, dataloader_num_workers=0, block_size=1024, gradient_checkpointing=False, max_train_samples=30000,
    early_stopping_patience=None, target_modules=("q_proj", "v_proj"),
)  # fmt: skip


def told(run: dict) -> list[Notice]:
    found: list[Notice] = []
    diagnosis = Diagnosis(Options(**run["options"]), gaps=run["gaps"])
    replay(run["records"], diagnosis, lambda step, notice: found.append(notice))
    return found


HEALTHY = [run for run in RECORDED if not run["expected"]]
SICK = [run for run in RECORDED if run["expected"]]


def test_there_are_enough_runs_of_every_kind():
    assert len(HEALTHY) >= 20
    assert {sign for run in SICK for sign in run["expected"]} == set(SIGNS) - {"memory"}


@pytest.mark.parametrize("run", HEALTHY, ids=lambda run: run["name"])
def test_nothing_is_told_of_a_healthy_run(run):
    assert told(run) == []


@pytest.mark.parametrize("run", SICK, ids=lambda run: run["name"])
def test_a_sick_run_is_told_what_is_wrong_with_it_once(run):
    signs = [notice.sign for notice in told(run)]
    assert set(signs) & set(run["expected"]) and len(signs) == len(set(signs))


def test_what_was_told_before_is_not_told_again_after_a_resume():
    run = next(run for run in SICK if "slow" in run["expected"])
    signs = [notice.sign for notice in told(run)]
    middle = len(run["records"]) // 2
    found: list[Notice] = []
    diagnosis = Diagnosis(Options(**run["options"]), told=signs, gaps=run["gaps"])
    replay(run["records"][:middle], diagnosis, lambda step, notice: found.append(notice))
    replay(run["records"][middle:], diagnosis, lambda step, notice: found.append(notice))
    assert found == []


def test_a_classifier_that_learns_in_its_warm_up_and_errs_on_single_rows_is_healthy():
    generator = random.Random(0)
    losses = [0.70, 0.69, 0.62, 0.5, 0.3] + [0.15 + generator.choice((-0.05, -0.02, 0.02, 0.05)) for _ in range(60)]
    options = dataclasses.replace(OPTIONS, warmup_steps=50, total_steps=650)
    lines = [
        {"step": 10 * i, "event": "train", "loss": loss, "learning_rate": 1e-4 * min(1, i / 5)}
        for i, loss in enumerate(losses[:40], 1)
    ]

    def signs(records: list[dict], **changes) -> list[str]:
        found: list[Notice] = []
        replay(records, Diagnosis(dataclasses.replace(options, **changes)), lambda step, notice: found.append(notice))
        return [notice.sign for notice in found]

    assert signs(lines, classifies=True) == [] and signs(lines) == ["oscillation"]
    wild = [{**line, "loss": 0.7 + (0.4 if i % 2 else -0.1)} for i, line in enumerate(lines)]
    assert "oscillation" in signs(wild, classifies=True)


def test_memory_near_the_limit():
    record = {"step": 1, "event": "train", "loss": 2.0, "learning_rate": 1e-4}
    diagnosis = Diagnosis(OPTIONS, memory_gib=80.0)
    assert diagnosis.see({**record, "peak_mem_gib": 70.0}) == []
    (notice,) = diagnosis.see({**record, "step": 2, "peak_mem_gib": 75.0})
    assert notice.sign == "memory" and "peak 75.0 of 80.0 GiB" in notice.text
    assert "--train.gradient_checkpointing true (now off)" in notice.text
    assert "--train.per_device_train_batch_size 2 (now 4) --train.gradient_accumulation_steps 2 (now 1)" in notice.text
    assert diagnosis.see({**record, "step": 3, "peak_mem_gib": 76.0}) == []


@pytest.mark.parametrize(
    ("sign", "says"),
    [
        ("no_fall", ["--train.learning_rate 5e-4 (now 1e-4)", "--adapter.r 16 (now 8)", "q_proj,v_proj"]),
        ("slow", ["--train.learning_rate 5e-4 (now 1e-4)"]),
        ("oscillation", ["--train.learning_rate 5e-5 (now 1e-4)", "--train.gradient_accumulation_steps 4 (now 1)"]),
        ("overfitting", ["--adapter.lora_dropout 0.1 (now 0.05)", "--train.num_train_epochs 1.5 (now 3)", "30000"]),
    ],
)
def test_remedies_are_those_of_the_workflow_with_this_runs_values(sign, says):
    text = remedy(sign, OPTIONS)
    assert all(each in text for each in says), text


@pytest.mark.parametrize("sign", SIGNS)
def test_every_option_that_a_remedy_names_exists(sign):
    sections = {f.name: f for f in dataclasses.fields(RunConfig)}
    config = RunConfig()
    for section, name in re.findall(r"\b(model|data|train|adapter)\.(\w+)", remedy(sign, OPTIONS)):
        assert section in sections and hasattr(getattr(config, section), name), f"{section}.{name}"
