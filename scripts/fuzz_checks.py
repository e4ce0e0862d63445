"""What a run folder must look like after any kill, and after the end: the judgements of scripts/fuzz_kills.py.

Reads folders only. `Folder` is what was there at one moment; `differences` compares a run that was killed and resumed with one that
never was.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from kill_moments import STAGING
from safetensors.torch import load_file

from lora_dist.engine.checkpoint import MANIFEST, SET_ASIDE, STATE, list_checkpoints, verify

RUNNING = "***** Running training *****"
"""the console's line that ends loading"""
EVALUATING, EVALUATED = re.compile(r"\*{5} Running Evaluation \*{5}"), re.compile(r"^Eval at step", re.M)
TRAINED = re.compile(r"^Training completed in", re.M)
RESUMING = re.compile(r"Resuming from (\S+) at step (\d+)")
MOMENTS = ("loading", "training", "evaluation", "inside a save", "the end")

_OF_THE_ATTEMPT = {"metrics.jsonl", "train.log", "run_config.yaml", ".lock", "run.json", "status.json"}
"""files of a run folder that say when and where, and differ from run to run"""
_TIMES = {"train_time_s", "tracker_run_id", "told_signs"}
"""of state.json"""
_COMPARED = {
    "train": ("loss", "learning_rate", "grad_norm", "epoch", "tokens"),
    "eval": ("eval_loss", "perplexity", "eval_tokens", "epoch"),
    "final": ("eval_loss", "perplexity", "eval_tokens", "epoch"),
}


@dataclass(frozen=True)
class Folder:
    """A run folder at one moment."""

    path: Path
    checkpoints: dict[int, Path] = field(default_factory=dict)
    """published, or set aside by a replacement that was killed, from which the next start puts it back"""
    staging: tuple[str, ...] = ()

    @classmethod
    def look(cls, path: Path) -> Folder:
        if not path.is_dir():
            return cls(path)
        aside = {int(p.name.rpartition("-")[2]): p for p in path.glob(f"{SET_ASIDE}checkpoint-*")}
        return cls(path, aside | dict(list_checkpoints(path)), tuple(sorted(p.name for p in path.glob(f"{STAGING}*"))))

    @property
    def newest(self) -> int:
        """Step of the newest checkpoint, 0 if there is none."""
        return max(self.checkpoints, default=0)

    def state(self) -> dict[str, Any]:
        """state.json of the newest checkpoint."""
        return json.loads((self.checkpoints[self.newest] / STATE).read_text())


def last_step(run: Path) -> int:
    """The last training step that the run has finished, by metrics.jsonl."""
    return max((row["step"] for row in records(run, "train")), default=0)


def records(run: Path, event: str) -> list[dict[str, Any]]:
    """Records of one event in metrics.jsonl; a last line that a kill cut off is left out."""
    rows = []
    if (run / "metrics.jsonl").exists():
        for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines():
            try:
                rows.append(json.loads(line))
            except json.JSONDecodeError:
                continue
    return [row for row in rows if row["event"] == event]


def damage(before: Folder, after: Folder, *, best_needed: bool) -> list[str]:
    """What a kill did that it must not be able to do: a published checkpoint that is not whole, one that is gone though no newer one
    stands, a best one that is gone though the newest goes back to it at the end."""
    found = []
    for path in after.checkpoints.values():
        reason = verify(path)
        if reason is not None:
            found.append(f"{path.name} is published, but {reason}")
    if after.newest < before.newest:
        found.append(f"the newest checkpoint was of step {before.newest} and is of step {after.newest}")
    if after.checkpoints and best_needed and not found:
        best = after.state()["best_step"]
        if best > 0 and best not in after.checkpoints:
            found.append(f"checkpoint-{best} is the best so far and gone")
    return found


def unfinished_save(before: Folder, after: Folder, limit: int | None) -> str | None:
    """How far a save had come that the kill interrupted, None if there was none. Staging is cleared as a run starts, so what lies there
    once training has begun is of the attempt that was killed.

    Args:
        before: as the killed attempt started.
    """
    stages = {"old-": "replacing an older one", "removing-": "removing old ones"}
    for name in after.staging:
        rest = name.removeprefix(STAGING)
        for prefix, stage in stages.items():
            if rest.startswith(prefix):
                return stage
        if rest.startswith("checkpoint-"):
            return "staged, not yet renamed" if (after.path / name / MANIFEST).exists() else "staging"
    if limit is not None and after.newest not in before.checkpoints and after.checkpoints:
        kept = set(sorted(after.checkpoints)[-2:]) | {after.state()["best_step"]} & set(after.checkpoints)
        if len(after.checkpoints) > max(limit, len(kept)):
            return "renamed, old ones not yet removed"
    return None


def moment(console: str, saving: bool) -> str:
    """Which of `MOMENTS` a run was in, by what it had printed last."""
    if RUNNING not in console:
        return "loading"
    if saving:
        return "inside a save"
    if TRAINED.search(console):
        return "the end"
    begun = [match.end() for match in EVALUATING.finditer(console)]
    return "evaluation" if begun and not EVALUATED.search(console, begun[-1]) else "training"


def resumed_step(console: str) -> int:
    """The step that an attempt went on from, 0 if it began anew."""
    match = RESUMING.search(console)
    return int(match[2]) if match else 0


def differences(reference: Path, run: Path) -> list[str]:
    """Where a finished run is not what the uninterrupted one is, bit for bit: losses by step, evaluations, final files, the last
    checkpoint; and what it left behind."""
    found = []
    for event, keys in _COMPARED.items():
        found += _different_records(event, keys, records(reference, event), records(run, event))
    for file in sorted(p for p in reference.iterdir() if p.is_file() and p.name not in _OF_THE_ATTEMPT):
        other = run / file.name
        if not other.exists():
            found.append(f"{file.name} is missing")
        elif file.suffix == ".safetensors":
            found += _different_tensors(file, other)
        elif file.read_bytes() != other.read_bytes():
            found.append(f"{file.name} differs")
    a, b = Folder.look(reference), Folder.look(run)
    if a.newest != b.newest:  # older ones may be others: a run that was asked to stop has saved where it stopped
        found.append(f"the last checkpoint is of step {b.newest}, expected {a.newest}")
    else:
        found += _different_checkpoints(a, b)
    if b.staging:
        found.append(f"left behind: {', '.join(b.staging)}")
    return found


def _different_records(
    event: str, keys: tuple[str, ...], expected: list[dict[str, Any]], rows: list[dict[str, Any]]
) -> list[str]:
    steps = [row["step"] for row in rows]
    if steps != [row["step"] for row in expected]:
        twice = sorted({step for step in steps if steps.count(step) > 1})
        absent = sorted({row["step"] for row in expected} - set(steps))
        return [
            f"metrics.jsonl, {event}: steps {twice} stand twice, {absent} are missing (of {len(expected)}, found {len(rows)})"
        ]
    return [
        f"metrics.jsonl, {event} at step {a['step']}: {key} is {b[key]!r}, expected {a[key]!r}"
        for a, b in zip(expected, rows, strict=True)
        for key in keys
        if a[key] != b[key]
    ][:3]


def _different_tensors(expected: Path, file: Path) -> list[str]:
    a, b = load_file(expected), load_file(file)
    if a.keys() != b.keys():
        return [f"{file.name} has other tensors"]
    changed = [name for name in a if not torch.equal(a[name], b[name])]
    return [f"{file.name}: {len(changed)} of {len(a)} tensors differ, first {changed[0]}"] if changed else []


def _different_checkpoints(a: Folder, b: Folder) -> list[str]:
    """Of the last checkpoints: every tensor, and of the state all but times."""
    found = []
    for file in sorted(a.checkpoints[a.newest].rglob("*.safetensors")):
        other = b.checkpoints[b.newest] / file.relative_to(a.checkpoints[a.newest])
        found += _different_tensors(file, other) if other.exists() else [f"{other.name} is missing in {other.parent.name}"]
    x, y = a.state(), b.state()
    return found + [
        f"{STATE}: {key} is {y.get(key)!r}, expected {x.get(key)!r}"
        for key in sorted(x.keys() | y.keys())
        if key not in _TIMES and x.get(key) != y.get(key)
    ]
