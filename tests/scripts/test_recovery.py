"""scripts/bench/recovery.py: the grid, the share that came back, and going on from what is done."""

import json
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "scripts" / "bench"))

import recovery  # noqa: E402


def test_share_in_log_perplexity():
    assert recovery.recovery(400.0, 400.0, 4.0) == 0
    assert recovery.recovery(4.0, 400.0, 4.0) == 1
    assert recovery.recovery(40.0, 400.0, 4.0) == pytest.approx(0.5)


def test_what_is_done_is_not_done_again(tmp_path, monkeypatch, capsys):
    """With every figure there, the table and the picture are written and no command is run."""
    monkeypatch.setenv("LORA_DIST_DATA", str(tmp_path))
    monkeypatch.setattr(recovery.Measurement, "command", lambda *args, **kw: pytest.fail(f"ran {args}"))
    out = tmp_path / "out"
    (out / "stories").mkdir(parents=True)
    (out / "stories" / "dense.json").write_text(json.dumps({"perplexity": 4.0}))
    plain = recovery.Row("stories", 0.5, "wanda", "none", 0)
    trained = recovery.Row("stories", 0.5, "obs", "distil-r32", 300)
    curve = [[0, 100.0], [300, 40.0]]
    figures = {"perplexity": 40.0, "zero_tiles": 450, "parameters": 184960, "tokens": 1228800, "curve": curve}
    done = {
        plain.name: {"perplexity": 400.0, "parameters": 0, "tokens": 0},
        trained.name: figures,
    }
    (out / "results.json").write_text(json.dumps(done))
    argv = ["recovery.py", str(out), "--only", "stories", "--sparsity", "0.5", "--bases", "obs", "--methods", "distil-r32"]
    monkeypatch.setattr(sys, "argv", argv)
    assert recovery.main() == 0
    assert "| stories | 50% | obs | distil-r32 | 300 | 184,960 | 40.00 | 50.0% |" in capsys.readouterr().out
    assert (out / "recovery.png").stat().st_size > 10_000
    monkeypatch.setattr(sys, "argv", [*argv, "--steps", "150", "300", "--list"])
    assert recovery.main() == 0
    assert capsys.readouterr().out.splitlines() == [
        "done stories-50-wanda-none-0",
        "     stories-50-obs-distil-r32-150",
        "done stories-50-obs-distil-r32-300",
    ]
