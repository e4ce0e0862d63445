"""wandb: online, or offline into `wandb/` of the run folder. A run's id is its own from the start and travels in its checkpoints, so a
resumed run goes on in the same wandb run. Made by `engine/tracking.py`, run by `monitor/trackers.py`.

The optimizer step is wandb's step, one row each. Online, wandb's server says which step comes next; offline, the folders of the attempts
before are read back (`.wandb` files: a 7-byte head, then LevelDB's log format).
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from lora_dist.monitor.trackers import Row

GLOBAL_STEP = "train/global_step"
_HEAD, _BLOCK = 7, 32768


class WandbSink:
    """One wandb run.

    Args:
        folder: run folder; wandb writes to `folder/wandb`.
        mode: online, offline, or None for wandb's own settings.
    """

    name = "wandb"

    def __init__(self, *, project: str, name: str, folder: Path, run_id: str, mode: str | None, config: Mapping[str, Any]):
        self._project, self._name, self._folder, self._id, self._mode = project, name, folder, run_id, mode
        self._config = dict(config)
        self._run: Any = None

    def start(self) -> set[int]:
        import wandb

        there = {
            step for folder in sorted(self._folder.glob(f"wandb/offline-run-*-{self._id}")) for step in offline_steps(folder)
        }
        self._run = wandb.init(
            project=self._project, name=self._name, dir=str(self._folder), id=self._id, resume="allow", mode=self._mode,  # type: ignore[arg-type]
            config=self._config, settings=wandb.Settings(console="off"),
        )  # fmt: skip
        self._run.define_metric(GLOBAL_STEP)
        self._run.define_metric("*", step_metric=GLOBAL_STEP)
        return there | set(range(int(self._run.step)))  # offline, wandb itself begins at 0

    def write(self, step: int, row: Row) -> None:
        self._run.log({GLOBAL_STEP: step, **row}, step=step, commit=True)

    def keep(self, files: Sequence[Path]) -> None:
        import wandb

        artifact = wandb.Artifact(f"run-{self._id}", type="adapter")
        for file in files:
            artifact.add_file(str(file), name=file.name)
        self._run.log_artifact(artifact)

    def finish(self, exit_code: int) -> None:
        self._run.finish(exit_code=exit_code)


def offline_steps(folder: Path) -> set[int]:
    """Steps of the rows in one offline folder, as far as they were written."""
    from wandb.proto import wandb_internal_pb2

    steps = set()
    for file in folder.glob("run-*.wandb"):
        for message in _messages(file.read_bytes()):
            record = wandb_internal_pb2.Record()
            record.ParseFromString(message)
            if record.WhichOneof("record_type") == "history":
                steps.add(int(record.history.step.num))
    return steps


def _messages(data: bytes) -> Iterator[bytes]:
    """Records of a .wandb file: blocks of 32 KiB; crc32, length and type before each piece; pieces of type 1 are whole, 2, 3 and 4 first,
    middle and last. A piece that a kill cut off ends it."""
    position, parts = _HEAD, b""
    while position + _HEAD <= len(data):
        if _BLOCK - position % _BLOCK < _HEAD:
            position += _BLOCK - position % _BLOCK
            continue
        _, length, kind = struct.unpack("<IHB", data[position : position + _HEAD])
        piece = data[position + _HEAD : position + _HEAD + length]
        position += _HEAD + length
        if kind == 0 or len(piece) < length:
            return
        parts += piece
        if kind in (1, 4):
            yield parts
            parts = b""
