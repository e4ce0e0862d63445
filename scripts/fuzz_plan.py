"""What scripts/fuzz_kills.py draws: the settings of a life, and of each attempt, whom to kill when.

Draws depend on their key (seed, life, attempt) only; they are then scaled to what is left of the run, so that nearly every aim is
reached however fast the machine is.
"""

from __future__ import annotations

import random
import signal
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

RANKS = 2
AIMS = {"time": 0.40, "save": 0.20, "save operation": 0.25, "operation": 0.15}
VICTIMS = {(0, 1): 0.75, (0,): 0.15, (1,): 0.10}
STOPS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2)
"""signals that ask a run to stop: one rank gets one of them"""
SAVES_AHEAD = 3
"""a kill aimed at a save takes one of this many next ones"""


@dataclass(frozen=True)
class Setting:
    """What varies from life to life."""

    strategy: str
    steps: int
    save_steps: int
    save_total_limit: int
    eval_steps: int
    accumulation: int
    workers: int
    dropout: float

    def __str__(self) -> str:
        return (
            f"{self.strategy}, save every {self.save_steps} keep {self.save_total_limit}, evaluate every {self.eval_steps}, "
            f"accumulation {self.accumulation}, data workers {self.workers}, dropout {self.dropout}"
        )

    def argv(self, base: Path, run: Path) -> list[str]:
        """The command of this run, the same for its first start and every restart."""
        options = {
            "model.name_or_path": base, "adapter.mask": "block", "adapter.r": 4, "adapter.lora_dropout": self.dropout,
            "data.dataset_name": base / "text.txt", "data.block_size": 32, "data.holdout_windows": 24,
            "data.cache_dir": base.parent / "cache", "data.dataloader_num_workers": self.workers,
            "train.output_dir": run, "train.max_steps": self.steps, "train.learning_rate": 3e-3, "train.logging_steps": 1,
            "train.per_device_train_batch_size": 2, "train.gradient_accumulation_steps": self.accumulation,
            "train.eval_steps": self.eval_steps, "train.save_steps": self.save_steps,
            "train.save_total_limit": self.save_total_limit, "guard.every": 5, "parallel.strategy": self.strategy,
        }  # fmt: skip
        return ["train", *(f"--{name}={value}" for name, value in options.items()), "--resume=auto"]


def draw_settings(seed: int, count: int, strategies: Sequence[str], steps: int) -> list[Setting]:
    """`count` settings; strategies in turn, the rest at random."""
    draw = random.Random(f"{seed}:settings")
    return [
        Setting(
            strategy=strategies[n % len(strategies)],
            steps=steps,
            save_steps=draw.choice((2, 3, 5, 7)),
            save_total_limit=draw.choice((2, 2, 3, 4)),
            eval_steps=draw.choice((3, 5, 8)),
            accumulation=draw.choice((1, 2)),
            workers=n % 2,
            dropout=draw.choice((0.1, 0.3)),
        )
        for n in range(count)
    ]


@dataclass(frozen=True)
class Reference:
    """The uninterrupted run of a setting, and what it took."""

    run: Path
    loading_s: float
    step_s: float
    """mean, with its share of evaluations and saves"""
    end_s: float
    """from the last step to the exit"""
    save_s: float
    """from a staging folder to its renaming, median"""
    saved_steps: tuple[int, ...]
    operations: int
    """file operations in the run folder"""
    save_operations: int
    """those of one save on checkpoints, its part of retention included"""


@dataclass(frozen=True)
class Plan:
    """When to kill whom."""

    aim: str = "none"
    """time: `delay_s` after `after_step` (0: after the start); save: `delay_s` after the `save`-th staging folder appeared; operation, save
    operation: before the `operation`-th file operation, of any file or on checkpoints; none: let it run to its end"""
    victims: tuple[int, ...] = tuple(range(RANKS))
    torchrun: bool = False
    after_step: int = 0
    delay_s: float = 0.0
    operation: int = 0
    save: int = 0
    signal: signal.Signals = signal.SIGKILL

    @property
    def stop(self) -> bool:
        """Whether the run is asked to stop instead of killed."""
        return self.signal != signal.SIGKILL

    def __str__(self) -> str:
        when = {
            "time": f"{self.delay_s:.2f} s after {f'step {self.after_step}' if self.after_step else 'the start'}",
            "save": f"{1000 * self.delay_s:.1f} ms into save {self.save}",
            "operation": f"before file operation {self.operation}",
            "save operation": f"before operation {self.operation} on checkpoints",
            "none": "not at all",
        }[self.aim]
        who = "both" if len(self.victims) == RANKS else f"rank {self.victims[0]}"
        return f"{f'{self.signal.name} ' if self.stop else ''}{when}, {who}{', torchrun' if self.torchrun else ''}"


def draw_plan(key: str, reference: Reference, steps: int, done: int, *, torchrun_every: int, stop_share: float) -> Plan:
    """When to kill whom, by a key of (seed, life, attempt).

    Args:
        steps: of the whole run.
        done: the step it goes on from.
        torchrun_every: one start in so many, on average; 0 for none.
        stop_share: of attempts that are asked to stop, once training has begun.
    """
    draw = random.Random(key)
    aim = draw.choices(list(AIMS), list(AIMS.values()))[0]
    victims = draw.choices(list(VICTIMS), list(VICTIMS.values()))[0]
    where, share = draw.random(), draw.random()
    torchrun = bool(torchrun_every) and draw.random() < 1 / torchrun_every
    if torchrun:
        aim, victims = "time" if draw.random() < 0.5 else "save", tuple(range(RANKS))
    left = steps - done
    if draw.random() < stop_share and left and not torchrun:
        at_s = where * left * reference.step_s
        after = done + max(1, int(at_s / reference.step_s))
        return Plan("time", (draw.randrange(RANKS),), False, after, share * reference.step_s, signal=draw.choice(STOPS))
    saves = min(SAVES_AHEAD, sum(step > done for step in reference.saved_steps))
    if aim in ("save", "save operation") and saves == 0:
        aim = "time"  # only the end is left
    if aim == "save":
        return Plan(aim, victims, torchrun, save=1 + int(where * saves), delay_s=share * 1.4 * reference.save_s)
    if aim == "save operation":
        return Plan(aim, victims, torchrun, operation=1 + int(where * saves * reference.save_operations))
    if aim == "operation":
        return Plan(aim, victims, torchrun, operation=1 + int(where * reference.operations * (left + 1) / (steps + 1)))
    loading_s = 0.0 if torchrun else reference.loading_s  # which would be mostly imports
    at_s = where * (loading_s + left * reference.step_s + reference.end_s) - loading_s
    if at_s < 0 or left == 0:
        return Plan(aim, victims, torchrun, delay_s=at_s + loading_s)
    after = done + max(1, min(left, int(at_s / reference.step_s)))
    return Plan(aim, victims, torchrun, after_step=after, delay_s=max(0.0, at_s - (after - done) * reference.step_s))
