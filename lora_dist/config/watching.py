"""`guard.*`, `health.*` and `tracker.*`: what watches a run, and who is told."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal

from lora_dist.config.checks import positive


@dataclass
class GuardArgs:
    """What watches that base and pattern stay what they were."""

    every: int = 100
    """Check pruned tiles and a sample of kept chunks every so many steps; the whole base is checked at start and end."""
    sample_chunks: int = 8
    """Kept chunks compared with their digests at each check, rotating through the base."""

    def problems(self) -> Iterator[str]:
        yield from positive("guard", self, "every", "sample_chunks")


@dataclass
class HealthArgs:
    """What to do when numbers go wrong or a process hangs."""

    non_finite: Literal["stop", "skip", "rollback"] = "stop"
    """A step whose loss or gradients are not finite: stop (saved at the step before), skip (leave its batch out) or rollback (go back to
    the newest checkpoint and on behind the batch). Every time, what was found is written to post-mortem/ in the run folder."""
    max_skips: int = 10
    """Batches left out in the whole run before it stops."""
    max_rollbacks: int = 3
    """Rollbacks in the whole run before it stops."""
    spike_nats: float | None = None
    """Roll back a step whose loss is so many nats above the median of the last 32 (16 at least); default: never."""
    hang_timeout_s: float = 600.0
    """End the run, saying which process hangs and where, when none has made progress for so long (a micro-batch, an evaluation batch, a
    save); 0: wait for ever."""

    def problems(self) -> Iterator[str]:
        yield from positive("health", self, "spike_nats")
        for name in ("max_skips", "max_rollbacks", "hang_timeout_s"):
            if getattr(self, name) < 0:
                yield f"health.{name}: found {getattr(self, name)}, expected 0 or more"


@dataclass
class TrackerArgs:
    """Where curves go besides the console, train.log and metrics.jsonl."""

    report_to: list[
        Literal["wandb", "tensorboard", "mlflow", "comet_ml", "aim", "clearml", "dvclive", "swanlab", "trackio", "all"]
    ] = field(default_factory=list)
    """Trackers, each a package of its own; wandb and tensorboard come with the extra lora-dist[trackers]; all: those that are installed."""
    wandb_project: str = "lora_dist"
    """Project (experiment, repository) of the run, whatever the tracker."""
    run_name: str | None = None
    """Name of the tracker's run; default: the name of the run folder."""
    wandb_mode: Literal["online", "offline"] | None = None
    """offline writes a folder that `wandb sync` uploads later; default: what wandb's own settings say."""

    diagnosis: bool = True
    """Tell, once each, what the curves say is wrong with the run (loss does not fall, over-fitting, slow data, ...) and what to change."""
    log_artifacts: bool = False
    """Store the final adapter, the report (written for it) and metrics.jsonl with wandb (or MLflow) when the run is complete."""
    timeout_s: float = 60.0
    """How long the end of the run waits for trackers, and after how long one that has not started is told of."""
    peak_tflops: float | None = None
    """What one device computes at most in the run's precision, TFLOP/s, for MFU; default: known GPUs' data sheets, in half precision."""

    def problems(self) -> Iterator[str]:
        yield from positive("tracker", self, "timeout_s", "peak_tflops")
