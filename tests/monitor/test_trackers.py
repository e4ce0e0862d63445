"""wandb for real, offline: what was logged is read back from its file, across a kill and a resume."""

from __future__ import annotations

import json
import re
import struct
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from lora_dist.engine.tracking import wanted_trackers
from lora_dist.log import UserError
from lora_dist.monitor.accelerate_sink import AccelerateSink
from lora_dist.monitor.trackers import Trackers
from lora_dist.parallel import World
from lora_dist.parallel.accelerate_state import prepare_accelerate
from tests.runs import options, records, run, run_killed

pytest.importorskip("wandb", reason="wandb is not installed (extra: trackers)")

BLOCK, HEADER = 32768, 7


def messages(file: Path) -> Iterator[bytes]:
    """Records of a .wandb file: a 7-byte head, then LevelDB's log format (blocks of 32 KiB; crc32, length and type before each
    piece; pieces of type 1 are whole, 2, 3, 4 first, middle, last). A piece cut off by a kill ends it."""
    data, position, parts = file.read_bytes(), HEADER, b""
    assert data[:4] == b":W&B"
    while position + HEADER <= len(data):
        if BLOCK - position % BLOCK < HEADER:
            position += BLOCK - position % BLOCK
            continue
        _, length, kind = struct.unpack("<IHB", data[position : position + HEADER])
        piece = data[position + HEADER : position + HEADER + length]
        position += HEADER + length
        if kind == 0 or len(piece) < length:
            return
        parts += piece
        if kind in (1, 4):
            yield parts
            parts = b""


def offline_records(folder: Path) -> tuple[str, list[dict[str, float]]]:
    """Run id (the folder's name ends in it) and history rows of one offline folder."""
    from wandb.proto import wandb_internal_pb2

    (file,) = folder.glob("run-*.wandb")
    run_id, rows = folder.name.rsplit("-", 1)[1], []
    for message in messages(file):
        record = wandb_internal_pb2.Record()
        record.ParseFromString(message)
        if record.WhichOneof("record_type") == "run":
            assert record.run.run_id == run_id
        elif record.WhichOneof("record_type") == "history":
            rows.append({item.key or ".".join(item.nested_key): json.loads(item.value_json) for item in record.history.item})
    return run_id, rows


def artifact_files(folder: Path) -> set[str]:
    """Of all artifacts in one offline folder."""
    from wandb.proto import wandb_internal_pb2

    names: set[str] = set()
    for message in messages(next(folder.glob("run-*.wandb"))):
        record = wandb_internal_pb2.Record()
        record.ParseFromString(message)
        if record.WhichOneof("record_type") == "artifact":
            names.update(entry.path for entry in record.artifact.manifest.contents)
    return names


SERIES = {
    "loss", "learning_rate", "grad_norm", "tokens", "tokens_per_s", "padding_share", "step_time_s", "data_time_s", "forward_time_s",
    "backward_time_s", "optimizer_time_s", "save_time_s", "tflops_per_device", "mfu", "peak_mem_gib", "peak_mem_gib/rank0", "sparsity",
}  # fmt: skip


@pytest.mark.long
@pytest.mark.distributed
def test_an_offline_run_holds_every_series_and_goes_on_in_the_same_run_after_a_kill(tiny_base, tiny_text, tmp_path):
    out, steps = tmp_path / "out", 200
    arguments = [
        "train",
        *options(
            tiny_base, tiny_text, out, max_steps=steps, eval_steps=40, save_steps=40, guard__every=10, tracker__report_to="wandb",
            tracker__wandb_mode="offline", tracker__peak_tflops=1.0, tracker__log_artifacts="true",
        ),
        "--resume",
        "auto",
    ]  # fmt: skip

    def rows_behind_a_checkpoint() -> bool:
        """A row stands in wandb's file that a resumed run takes anew."""
        folders = list((out / "wandb").glob("offline-run-*"))
        saved = [int(p.parent.name.split("-")[1]) for p in out.glob("checkpoint-*/manifest.json")]
        if not folders or not saved or not list(folders[0].glob("*.wandb")):
            return False
        rows = offline_records(folders[0])[1]
        return bool(rows) and max(row["train/global_step"] for row in rows) > max(saved)

    run_killed(1, rows_behind_a_checkpoint, *arguments)
    run(1, *arguments)
    folders = sorted((out / "wandb").glob("offline-run-*"), key=lambda p: p.stat().st_mtime)
    assert len(folders) == 2
    (first_id, first), (second_id, second) = map(offline_records, folders)
    assert first_id == second_id == json.loads((out / f"checkpoint-{steps}" / "state.json").read_text())["tracker_run_id"]
    rows = [*first, *second]
    assert sorted(row["train/global_step"] for row in rows) == list(range(steps + 1))  # none twice, none missing
    assert all(row["_step"] == row["train/global_step"] for row in rows)
    keys = set().union(*rows)
    assert {f"train/{name}" for name in SERIES} <= keys
    assert {"eval/eval_loss", "eval/perplexity", "guard/check_time_s", "save/save_time_s", "final/perplexity"} <= keys
    by_step = {row["train/global_step"]: row for row in rows}
    kept = {"adapter_config.json", "adapter_model.safetensors", "block_mask.safetensors", "metrics.jsonl", "report.html"}
    assert artifact_files(folders[0]) == set() and artifact_files(folders[1]) == kept
    for record in records(out, "train"):  # across the kill: what was taken anew has the values that were sent before it
        assert by_step[record["step"]]["train/loss"] == pytest.approx(record["loss"], abs=1e-12)


class Slow:
    """A tracker that takes its time, or never comes back, or fails."""

    name = "slow"

    def __init__(self, start_s: float = 0.0, write_s: float = 0.0, there: set[int] | None = None, fails: bool = False):
        self.start_s, self.write_s, self.there, self.fails = start_s, write_s, there or set(), fails
        self.rows: list[tuple[int, dict]] = []
        self.kept: list[Path] = []
        self.code: int | None = None

    def start(self) -> set[int]:
        time.sleep(self.start_s)
        return self.there

    def write(self, step: int, row: dict) -> None:
        time.sleep(self.write_s)
        if self.fails:
            raise ConnectionError("no route to host")
        self.rows.append((step, row))

    def keep(self, files: Sequence[Path]) -> None:
        self.kept += files

    def finish(self, exit_code: int) -> None:
        self.code = exit_code


def test_a_row_is_sent_whole_once_the_run_has_passed_its_step():
    sink, warned = Slow(), []
    trackers = Trackers([sink], warn=warned.append)
    trackers.log(0, "eval", {"eval_loss": 3.0})
    trackers.log(1, "train", {"loss": 2.0, "peak_mem_gib_by_rank": [1.0, 2.0], "mfu": None})
    trackers.log(1, "eval", {"eval_loss": 1.5})
    trackers.passed(1)
    trackers.log(1, "save", {"save_time_s": 0.1})  # told late: goes with the next row
    trackers.log(2, "warning", {"sign": "slow", "text": "rate up"})
    trackers.log(1, "train", {"loss": 9.0})  # after a rollback
    trackers.log(3, "train", {"loss": 1.0})
    trackers.finish(completed=True, exit_code=0, artifacts=[Path("a")])
    assert sink.rows == [
        (0, {"eval/eval_loss": 3.0}),
        (1, {"train/loss": 2.0, "train/peak_mem_gib/rank0": 1.0, "train/peak_mem_gib/rank1": 2.0, "eval/eval_loss": 1.5}),
        (2, {"save/save_time_s": 0.1, "warning/slow": "rate up"}),
        (3, {"train/loss": 1.0}),
    ]
    assert sink.code == 0 and sink.kept == [Path("a")] and warned == []


def test_after_a_resume_what_stands_there_is_left_out_and_what_was_lost_is_sent():
    history = [{"step": n, "event": "train", "loss": float(n)} for n in (1, 2, 3, 4)]
    sink = Slow(there={1, 2, 5})  # 3 was lost with the process, 4 had not been passed, 5 is behind the checkpoint
    trackers = Trackers([sink], warn=print, history=history)
    trackers.log(4, "eval", {"eval_loss": 0.5})  # made up for
    for n in (5, 6, 7):
        trackers.log(n, "train", {"loss": float(n)})
    trackers.finish(completed=False)
    assert [step for step, _ in sink.rows] == [3, 4, 6]  # 7 waits for the attempt that goes on
    assert sink.rows[1][1] == {"train/loss": 4.0, "eval/eval_loss": 0.5}


@pytest.mark.parametrize(
    ("sink", "timeout_s", "says"),
    [
        (Slow(start_s=3600), 0.3, "has not ended after 0.3 s"),
        (Slow(write_s=3600), 0.3, "rows are left out"),
        (Slow(fails=True), 60, "failed \\(ConnectionError: no route to host\\)"),
    ],
)
def test_a_tracker_that_hangs_or_fails_costs_no_time_and_is_told_of_once(sink, timeout_s, says):
    """Half a minute is no time here: these trackers take an hour a row, or would be waited for for a minute."""
    warned: list[str] = []
    trackers = Trackers([sink], warn=warned.append, timeout_s=timeout_s, queue_rows=10 if sink.write_s else 1000)
    start = time.perf_counter()
    for n in range(500):
        trackers.log(n, "train", {"loss": 1.0})
    trackers.finish(completed=True)
    assert time.perf_counter() - start < 30
    (line,) = warned
    assert re.search(says, line) and "metrics.jsonl has every number" in line


@pytest.mark.parametrize("name", ["wandb", "mlflow"])
def test_a_missing_tracker_is_one_clear_line(monkeypatch, name):
    monkeypatch.setitem(sys.modules, name, None)  # what python does for a package that is not installed
    with pytest.raises(UserError, match=rf"{name} is not installed; pip install"):
        wanted_trackers([name])


def test_tensorboard_goes_on_in_its_folder_without_a_step_twice(tmp_path):
    """Real event files, read back by TensorBoard itself, across an end without a word and a resume."""
    pytest.importorskip("tensorboard", reason="tensorboard is not installed (extra: trackers)")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    prepare_accelerate(World())

    def sink(resumed_at: int) -> AccelerateSink:
        return AccelerateSink("tensorboard", project="run", folder=tmp_path, resumed_at=resumed_at, config={"a": {"b": [1]}})

    first = sink(0)
    assert first.start() == set()
    for step in range(1, 8):
        first.write(step, {"train/loss": 10.0 - step, "warning/slow": "rate up"})
    second = sink(4)  # nobody has ended the first
    there = second.start()
    assert there == {1, 2, 3, 4}
    for step in range(5, 10):
        second.write(step, {"train/loss": 10.5 - step})
    second.finish(0)
    read = EventAccumulator(str(tmp_path / "run"))
    read.Reload()
    found = [(event.step, event.value) for event in read.Scalars("train/loss")]
    assert found == [(n, 10.0 - n) for n in range(1, 5)] + [(n, 10.5 - n) for n in range(5, 10)]
