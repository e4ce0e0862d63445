"""The table of docs/quantisation.md is made end to end."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.runs import ROOT, environment

pytest.importorskip("bitsandbytes")


@pytest.mark.long
def test_quick_measures_every_kind_of_base(data_dir: Path, tmp_path: Path):
    command = [sys.executable, "scripts/measure_qlora.py", "--quick", "--out", str(tmp_path / "out")]
    done = subprocess.run(command, cwd=ROOT, env=environment(LORA_DIST_DATA=os.fspath(data_dir)), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    rows = json.loads((tmp_path / "out" / "qlora.json").read_text())["rows"]
    assert list(rows) == ["bf16", "NF4", "int8"]
    assert rows["NF4"]["layers"] < 0.3 * rows["bf16"]["layers"] < rows["int8"]["layers"] < 0.55 * rows["bf16"]["layers"]
    assert len({row["zero_tiles"] for row in rows.values()}) == 1 and rows["NF4"]["zero_tiles"] > 1000
    assert all(abs(rows[kind]["eval_loss"] - rows["bf16"]["eval_loss"]) < 0.3 for kind in rows)
    assert rows["NF4"]["logits_error"] < 1e-4
