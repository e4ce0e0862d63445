"""What a run must remember to go on as if it had never stopped: `TrainState`, the content of a checkpoint's `state.json`; and the names
in a run's folder that others than the run itself look for.

Plain numbers and strings only. `TrainState` is written by `engine/checkpoint.py`, read and advanced by `engine/loop.py`; the names are
`engine/`'s, `operations/attempts.py`'s and `monitor/runs.py`'s.
"""

from __future__ import annotations

import dataclasses
import re
from dataclasses import dataclass, field
from typing import Any

STATE_VERSION = 1
RUN = "run.json"
"""who the run is"""
STATUS = "status.json"
"""how the run stands"""
ATTEMPTS = "attempts"
"""folder of one record a start"""
METRICS, LOG, CONFIG = "metrics.jsonl", "train.log", "run_config.yaml"
PATTERN = "pattern.json"
"""picture of the pattern, coarse, for reports; the pattern itself is in the mask file"""
POST_MORTEM = "post-mortem"
"""folder of one record a step that was not taken"""
CHECKPOINT_NAME = re.compile(r"checkpoint-([0-9]+)")
"""a published checkpoint's folder, and its step"""


@dataclass
class TrainState:
    """Progress of a run, after a whole number of optimizer steps.

    Randomness is counted, not carried: data order and dropout follow from `seed` and `cursor`, so there is no generator state.
    """

    version: int = STATE_VERSION
    step: int = 0
    """optimizer steps done, skipped ones (fp16 overflow) included"""
    cursor: int = 0
    """samples passed since the run began, over all epochs and ranks, those of dropped incomplete steps included"""
    tokens: int = 0
    """label tokens trained on, all ranks"""
    seed: int = 0
    num_samples: int = 0
    """samples in one epoch; with `data_digest`, what the cursor counts in"""
    data_digest: str = ""
    teacher: str | None = None
    """fingerprint of train.distill_from; None: nobody teaches"""
    train_time_s: float = 0.0
    """wall time spent in the loop, earlier attempts included"""
    loss_window_sum: float = 0.0
    """sum of the step losses since the last logged step"""
    loss_window_steps: int = 0
    parts_window: dict[str, float] = field(default_factory=dict)
    """of what the losses are made of, likewise, by name"""
    last_train_loss: float | None = None
    first_eval_loss: float | None = None
    """of the pruned model, at step 0"""
    best_metric: float | None = None
    best_step: int = -1
    evals_without_improvement: int = 0
    loss_scale: float | None = None
    """fp16 only"""
    loss_scale_good_steps: int = 0
    skipped_steps: int = 0
    """fp16 overflows"""
    tracker_run_id: str | None = None
    evaluated_step: int = -1
    """the last step that was evaluated: a run that was stopped between a step and its evaluation makes up for it"""
    global_batch: int = 0
    """windows an optimizer step takes over all processes; 0: written before this was kept"""
    micro_batch: int = 0
    """train.per_device_train_batch_size as configured, not as adapted to the number of processes"""
    accumulation: int = 0
    """train.gradient_accumulation_steps, likewise"""
    processes: int = 0
    group_by_length: bool = False
    """train.group_by_length: the order of the samples then depends on global_batch too"""
    skipped_batches: int = 0
    """left out by health.non_finite skip, in the whole run"""
    rollbacks: int = 0
    """by health.non_finite rollback and health.spike_nats, in the whole run"""
    recent_losses: list[float] = field(default_factory=list)
    """of the last steps that moved the optimizer, oldest first"""
    recent_grad_norms: list[float] = field(default_factory=list)
    """of the same steps"""
    correct_window: int = 0
    """rows classified rightly since the last logged step"""
    rows_window: int = 0
    """of so many"""
    tally_epoch: int = -1
    """the epoch, counted from 0, that the next five are sums over (`engine/tally.py`); -1: none yet"""
    tally_steps: int = 0
    tally_loss: float = 0.0
    """of the steps' mean losses, each times what it was divided by"""
    tally_counts: float = 0.0
    """what these were divided by"""
    tally_correct: int = 0
    tally_rows: int = 0
    """rows that were, or were not, classified rightly"""
    told_signs: list[str] = field(default_factory=list)
    """what the diagnosis has told of the run, each once"""
    extra: dict[str, Any] = field(default_factory=dict)
    """room for later versions"""

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> TrainState:
        """Rebuild from `state.json`; keys of a later minor version are kept in `extra`.

        Raises:
            ValueError: if the version is newer than this code reads.
        """
        version = data.get("version", 0)
        if version > STATE_VERSION:
            raise ValueError(f"state.json has version {version}, this lora_dist reads up to {STATE_VERSION}: update lora_dist")
        names = {f.name for f in dataclasses.fields(cls)}
        known = {k: v for k, v in data.items() if k in names}
        unknown = {k: v for k, v in data.items() if k not in names}
        state = cls(**known)
        if "evaluated_step" not in data:
            state.evaluated_step = state.step  # written before runs could stop in between
        state.extra = {**state.extra, **unknown}
        return state
