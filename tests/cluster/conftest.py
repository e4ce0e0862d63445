"""The cluster, and the run that every job has to equal."""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml

from tests.cluster.slurm import Cluster, missing
from tests.runs import records, run

Figures = dict[str, dict[str, float]]
FIGURES = pytest.StashKey[Figures]()


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    reason = missing()
    if reason:
        pytest.skip(reason)
    one = Cluster(tmp_path_factory.mktemp("slurm"))
    try:
        one.start()
        yield one
    finally:
        one.stop()


@pytest.fixture(scope="session")
def config(tiny_base: Path, tiny_text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose steps take long enough (0.2 to 0.4 s) to be met in the middle, saved every 5 steps; dropout is on."""
    folder = tmp_path_factory.mktemp("cluster")
    values = {
        "model": {"name_or_path": str(tiny_base)},
        "data": {"dataset_name": str(tiny_text), "block_size": 64, "holdout_windows": 16, "cache_dir": str(folder / "cache")},
        "train": {
            "output_dir": str(folder / "reference"),
            "max_steps": 40,
            "gradient_accumulation_steps": 12,
            "learning_rate": 3e-3,
            "logging_steps": 1,
            "eval_steps": 20,
            "save_steps": 5,
        },
    }
    file = folder / "run.yaml"
    file.write_text(yaml.safe_dump(values))
    return file


@pytest.fixture(scope="session")
def reference(config: Path) -> Path:
    """Run folder of the uninterrupted run on two processes."""
    run(2, "train", "--config", str(config))
    return config.parent / "reference"


@dataclass(frozen=True)
class Pace:
    """How fast this machine is at present."""

    start_s: float
    """from a command to its first step"""
    step_s: float


@pytest.fixture(scope="session")
def pace(config: Path) -> Pace:
    out = config.parent / "pace"
    began_s = time.monotonic()
    run(2, "train", "--config", str(config), "--train.output_dir", str(out), "--train.max_steps=10")
    steps_s = [row["step_time_s"] for row in records(out, "train")]
    return Pace(time.monotonic() - began_s - sum(steps_s), statistics.median(steps_s))


@pytest.fixture(scope="session")
def note(pytestconfig: pytest.Config) -> Figures:
    """What each fault cost; shown after the tests, and written to `--cluster-figures FILE`."""
    return pytestconfig.stash.setdefault(FIGURES, {})


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    figures = config.stash.get(FIGURES, {})
    for fault, values in figures.items():
        terminalreporter.write_line(f"{fault}: " + ", ".join(f"{name} {value}" for name, value in values.items()))
    file = config.getoption("--cluster-figures")
    if file and figures:
        Path(file).write_text(json.dumps(figures, indent=1) + "\n")
