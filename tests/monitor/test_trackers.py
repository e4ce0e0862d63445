"""wandb for real, offline: what was logged is read back from its file, across a kill and a resume."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.runs import options, run, run_killed

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


@pytest.mark.distributed
def test_an_offline_run_holds_every_series_and_goes_on_in_the_same_run_after_a_kill(tiny_base, tiny_text, tmp_path):
    out = tmp_path / "out"
    arguments = [
        "train",
        *options(
            tiny_base,
            tiny_text,
            out,
            max_steps=12,
            eval_steps=4,
            save_steps=4,
            tracker__report_to="wandb",
            tracker__wandb_mode="offline",
        ),
        "--resume",
        "auto",
    ]
    run_killed(
        1,
        lambda: (out / "checkpoint-4" / "manifest.json").exists() and '"step": 6, ' in (out / "metrics.jsonl").read_text(),
        *arguments,
    )
    run(1, *arguments)
    folders = sorted((out / "wandb").glob("offline-run-*"), key=lambda p: p.stat().st_mtime)
    assert len(folders) == 2
    read = [offline_records(folder) for folder in folders]
    assert read[0][0] == read[1][0]
    rows = read[1][1]
    resumed_at = min(row["train/global_step"] for row in rows) - 1
    assert resumed_at in (4, 8) and max(row["train/global_step"] for row in rows) == 12
    keys = set().union(*rows)
    assert {
        "train/loss",
        "train/learning_rate",
        "train/tokens_per_s",
        "train/grad_norm",
        "eval/eval_loss",
        "eval/perplexity",
    } <= keys
    state = json.loads((out / "checkpoint-12" / "state.json").read_text())
    assert state["tracker_run_id"] == read[0][0]


def test_a_missing_wandb_is_one_clear_line(tmp_path, monkeypatch):
    import sys

    from lora_dist.log import UserError
    from lora_dist.monitor.trackers import WandbSink

    monkeypatch.setitem(sys.modules, "wandb", None)  # what python does for a package that is not installed
    with pytest.raises(UserError, match=r"wandb is not installed; pip install 'lora_dist\[trackers\]'"):
        WandbSink(project="p", name="n", folder=tmp_path, run_id=None, mode="offline", config={})
