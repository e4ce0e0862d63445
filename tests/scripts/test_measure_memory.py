"""The memory measurement, on a base so small that its figures say nothing: that it runs, and what it writes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import measure_memory
import pytest
import random_llama

from tests.runs import ROOT, environment

SCRIPT = ROOT / "scripts" / "measure_memory.py"


def run(*argv: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, str(SCRIPT), *argv], capture_output=True, text=True, env=environment(), cwd=ROOT)


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    out = tmp_path_factory.mktemp("memory")
    done = run("--tiny", "--only", "fsdp2", "--out", str(out))
    assert done.returncode == 0, done.stdout + done.stderr
    return out, done.stdout


@pytest.mark.long
def test_each_row_says_what_its_ranks_held(measured):
    out, printed = measured
    report = json.loads((out / "memory.json").read_text())
    assert [(row["name"], row["processes"]) for row in report["rows"]] == [("one", 1), ("fsdp2", 2)]
    for row in report["rows"]:
        assert sorted(row["ranks"]) == [str(rank) for rank in range(row["processes"])]
        assert row["peak_gib"] == max(row["loading_gib"], row["training_gib"])
        assert row["peak_gib"] == max(held for rank in row["ranks"].values() for held in rank.values())
        assert 0 < row["peak_gib"] < 0.2 < row["baseline_gib"] < 1
        assert row["step_time_s"] > 0 and row["mapped_gib"] > 0
    assert "| `fsdp2` | 2 |" in printed and "Not checked" in printed
    assert not list((out / "runs").iterdir())


@pytest.mark.long
def test_the_base_is_reused_and_pruned_by_half(measured):
    from lora_dist.blocks import Pattern
    from lora_dist.models.loading import load_base

    folder = measured[0] / "llama-tiny-bfloat16"
    pattern, base = Pattern.load(folder), load_base(str(folder), progress=False)
    assert 0.4 < pattern.sparsity < 0.6
    assert sum(p.numel() for p in base.model.parameters()) == random_llama.count_parameters("tiny")
    for name, mask in pattern.items():
        assert mask.first_violation(base.model.get_submodule(name).weight) is None


def test_a_base_of_more_than_a_billion_parameters_is_meant():
    assert random_llama.count_parameters("1.1b") >= measure_memory.LARGE


def figures(name: str, peak_gib: float) -> measure_memory.Figures:
    row = measure_memory.ROWS[name]
    return measure_memory.Figures(name, row.strategy, row.processes, peak_gib, 0, peak_gib, 0, 1, 0, 0, 0, "", {})


def test_too_much_memory_is_a_failure(capsys):
    assert measure_memory.verdict([figures("one", 4.0), figures("ddp", 4.0), figures("fsdp2", 2.5)]) == 0
    assert measure_memory.verdict([figures("one", 4.0), figures("fsdp2", 2.6), figures("zero3", 2.5)]) == 1
    assert "found fsdp2 0.65 of one process's memory, expected under 0.65" in capsys.readouterr().err


def test_what_cannot_be_measured_is_said_at_once(tmp_path):
    done = run("--only", "zero4", "--out", str(tmp_path))
    assert done.returncode == 2
    assert done.stderr.strip().endswith("expected some of " + ", ".join(measure_memory.ROWS))
    with pytest.raises(SystemExit):
        measure_memory.check_room(tmp_path, [measure_memory.ROWS["ddp"]], 2**50, 0)
    assert not list(tmp_path.iterdir())
