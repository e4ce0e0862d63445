"""Experiment trackers. Rank 0 only; wandb is imported here and nowhere else.

A run's tracker id travels in its checkpoints, so a resumed run goes on in the same wandb run. The step is lora_dist's own axis
(`train/global_step`), so an offline run resumed after a kill holds no step twice under one id once both folders are synced.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lora_dist.log import UserError


class WandbSink:
    """One wandb run.

    Args:
        folder: run folder; wandb writes to `folder/wandb`.
        run_id: of the run to go on with, from a checkpoint; None starts a new one.
        mode: online, offline, or None for wandb's own settings.

    Raises:
        UserError: wandb is not installed, or refuses to start.
    """

    def __init__(self, *, project: str, name: str, folder: Path, run_id: str | None, mode: str | None, config: Mapping[str, Any]):
        try:
            import wandb
        except ImportError as error:
            raise UserError(
                "tracker.report_to: wandb is not installed; pip install 'lora_dist[trackers]', or leave it out"
            ) from error
        try:
            self._run = wandb.init(
                project=project, name=name, dir=str(folder), id=run_id, resume="allow" if run_id else None, mode=mode,  # type: ignore[arg-type]
                config=dict(config),
            )  # fmt: skip
        except Exception as error:  # wandb raises many kinds; all mean the same to the user
            raise UserError(
                f"tracker.report_to: wandb could not start ({error}); `wandb login`, or set tracker.wandb_mode offline"
            ) from error
        self._run.define_metric("train/global_step")
        self._run.define_metric("*", step_metric="train/global_step")

    @property
    def run_id(self) -> str:
        return str(self._run.id)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log({"train/global_step": step, **values})

    def finish(self, exit_code: int = 0) -> None:
        self._run.finish(exit_code=exit_code)
