"""TensorBoard, MLflow, Comet, Aim, ClearML, DVCLive, SwanLab and Trackio, through accelerate's tracker interface.

Made by `engine/tracking.py`, run by `monitor/trackers.py`. TensorBoard goes on in the same folder after a resume: its own purge mark
hides what a killed attempt wrote behind the checkpoint. The others begin a new run with every attempt.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lora_dist.monitor.trackers import Row

PACKAGES = {
    "tensorboard": "tensorboard", "mlflow": "mlflow", "comet_ml": "comet_ml", "aim": "aim", "clearml": "clearml", "dvclive": "dvclive",
    "swanlab": "swanlab", "trackio": "trackio",
}  # fmt: skip
"""tracker -> the package that has to be importable"""
_TEXTS = {"tensorboard", "clearml", "comet_ml"}
"""take texts as values"""


class AccelerateSink:
    """One tracker of accelerate's.

    Args:
        project: what accelerate calls the run name: a project, an experiment, or for TensorBoard a folder.
        folder: where those that write files do so.
        resumed_at: step of the checkpoint that the run goes on from; 0 for a new run.
    """

    def __init__(self, name: str, *, project: str, folder: Path, resumed_at: int, config: Mapping[str, Any]):
        self.name, self._project, self._folder, self._resumed_at = name, project, folder, resumed_at
        self._config = dict(_flat(config))
        self._tracker: Any = None

    def start(self) -> set[int]:
        from accelerate.tracking import LOGGER_TYPE_TO_CLASS

        kind: Any = LOGGER_TYPE_TO_CLASS[self.name]
        there: set[int] = set()
        if self.name == "tensorboard":
            there = {step for step in _tensorboard_steps(self._folder / self._project) if step <= self._resumed_at}
            purge = {"purge_step": self._resumed_at + 1} if self._resumed_at else {}
            self._tracker = kind(self._project, str(self._folder), **purge)
        elif kind.requires_logging_directory:
            self._tracker = kind(self._project, str(self._folder))
        else:
            self._tracker = kind(self._project)
        self._tracker.main_process_only = False  # this is the main process; accelerate would set up its own state to find out
        if hasattr(self._tracker, "start"):
            self._tracker.start()
        if not there:
            self._tracker.store_init_configuration(self._config)
        return there

    def write(self, step: int, row: Row) -> None:
        self._tracker.log({k: v for k, v in row.items() if not isinstance(v, str) or self.name in _TEXTS}, step=step)
        if self.name == "tensorboard":
            self._tracker.tracker.flush()  # or a kill would lose two minutes

    def keep(self, files: Sequence[Path]) -> None:
        if hasattr(self._tracker, "log_artifact"):
            for file in files:
                self._tracker.log_artifact(str(file))

    def finish(self, exit_code: int) -> None:
        self._tracker.finish()


def _tensorboard_steps(folder: Path) -> set[int]:
    """Steps with values in the event files right in a folder."""
    from tensorboard.backend.event_processing.event_file_loader import EventFileLoader

    files = sorted(folder.glob("events.out.tfevents.*"))
    return {event.step for file in files for event in EventFileLoader(str(file)).Load() if event.HasField("summary")}


def _flat(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested sections as dotted keys; what is no plain value as JSON."""
    values: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, Mapping):
            values |= _flat(value, f"{prefix}{key}.")
        else:
            values[f"{prefix}{key}"] = value if isinstance(value, bool | int | float | str) else json.dumps(value)
    return values
