"""The trackers of a run, from its configuration and the checkpoint it goes on from. Called by `engine/setup.py`."""

from __future__ import annotations

import dataclasses
import importlib.util
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lora_dist.config import RunConfig
from lora_dist.log import UserError
from lora_dist.monitor.accelerate_sink import PACKAGES, AccelerateSink
from lora_dist.monitor.console import Console
from lora_dist.monitor.metrics import MetricsFile
from lora_dist.monitor.trackers import Sink, Trackers
from lora_dist.monitor.wandb_sink import WandbSink
from lora_dist.parallel import World
from lora_dist.parallel.accelerate_state import prepare_accelerate
from lora_dist.state import TrainState


def _installed(name: str) -> bool:
    try:
        return importlib.util.find_spec({"wandb": "wandb", **PACKAGES}[name]) is not None
    except ValueError:  # taken out of sys.modules by hand
        return False


def wanted_trackers(report_to: list[str]) -> list[str]:
    """Names without repeats; `all` are those that are installed.

    Raises:
        UserError: one that is not installed.
    """
    names = [name for name in ("wandb", *PACKAGES) if _installed(name)] if "all" in report_to else list(dict.fromkeys(report_to))
    missing = [name for name in names if not _installed(name)]
    if missing:
        how = (
            "pip install 'lora_dist[trackers]'"
            if set(missing) <= {"wandb", "tensorboard"}
            else f"pip install {' '.join(missing)}"
        )
        raise UserError(f"tracker.report_to: {', '.join(missing)} is not installed; {how}, or leave it out")
    return names


def make_trackers(
    config: RunConfig,
    world: World,
    console: Console,
    metrics: MetricsFile,
    output_dir: Path,
    state: TrainState,
    facts: Mapping[str, Any],
) -> Trackers | None:
    """On rank 0, where any are asked for. Gives the state a tracker run id if it has none.

    Args:
        facts: to stand beside the configuration: pattern digest, base fingerprint and the like.

    Raises:
        UserError: one that is not installed.
    """
    args = config.tracker
    names = wanted_trackers(list(args.report_to))
    if not names or not world.is_main:
        return None
    if state.tracker_run_id is None:
        state.tracker_run_id = secrets.token_hex(4)
    if names != ["wandb"]:
        prepare_accelerate(world)
    shown = {**dataclasses.asdict(config), **facts}
    name = args.run_name or output_dir.name
    sinks: list[Sink] = []
    for each in names:
        if each == "wandb":
            sinks.append(
                WandbSink(
                    project=args.wandb_project,
                    name=name,
                    folder=output_dir,
                    run_id=state.tracker_run_id,
                    mode=args.wandb_mode,
                    config=shown,
                )
            )
        else:
            project = name if each == "tensorboard" else args.wandb_project
            folder = output_dir / each
            sinks.append(AccelerateSink(each, project=project, folder=folder, resumed_at=state.step, config=shown))
    return Trackers(sinks, warn=console.warning, history=metrics.records(), timeout_s=args.timeout_s)
