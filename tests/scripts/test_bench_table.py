"""The bench's tables: what is asked of a ratio or of one way, and whether it is met."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts" / "bench"))

import bench_table
import pytest
import run


def figures(tokens_per_s: float, peak_gib: float, **more: float | None) -> dict:
    return {
        "tokens_per_s": tokens_per_s, "step_s": 1e4 / tokens_per_s, "peak_bytes": peak_gib * 2**30, "losses": [3.0, 2.5],
        "phases_s": {"forward": 0.1, "backward": 0.2, "optimizer": 0.01}, **more,
    }  # fmt: skip


def lines(preset: str, case: str, *rounds: dict) -> list[str]:
    kept = {"case": {"name": case, "ways": list(rounds[0])}, "rounds": list(rounds)}
    return bench_table.table({preset: {case: kept}}).splitlines()


def test_what_is_asked_of_a_gpu():
    first = {"plain": figures(14000, 40, mfu=0.51), "masked": figures(12900, 41, mfu=0.49)}
    second = {"plain": figures(13800, 40, mfu=0.5), "masked": figures(12800, 41, mfu=0.47)}
    found = lines("h200", "7B", first, second)
    assert "| 7B | plain | 13,900 (13,800-14,000) | 40,960 | 0.100, 0.200, 0.010 | 2.5000 | 50.5% |" in found
    assert "| 7B | tokens/s, plain | at least 13,700 | 13,900.00 (13,800.00-14,000.00) | yes |" in found
    assert "| 7B | tokens/s, masked | at least 13,000 | 12,850.00 (12,800.00-12,900.00) | no |" in found
    assert "| 7B | MFU, masked | at least 0.5 | 0.48 (0.47-0.49) | no |" in found
    assert "| 7B | step time, masked over plain | at most 1.08 | 1.08 (1.08-1.09) | no |" in found
    nf4 = lines("h200", "7B, NF4 blocks", {"masked": figures(5000, 5.5)})
    assert "| 7B, NF4 blocks | peak memory, GiB, masked | at most 6 | 5.50 | yes |" in nf4
    assert not any("tokens/s, masked" in line for line in nf4)


def test_ratios_are_taken_within_a_round():
    slow = {"trainer": figures(100, 2), "plain": figures(180, 1)}
    fast = {"trainer": figures(1000, 2), "plain": figures(1600, 1)}
    found = lines("cpu", "vocabulary 32,000", slow, fast)
    assert "| vocabulary 32,000 | tokens/s, plain over trainer | at least 1.7 | 1.70 (1.60-1.80) | yes |" in found
    assert any(line.startswith("| vocabulary 32,000 | trainer |") and line.endswith("|  |") for line in found)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--repeats", "0"], "--repeats: found 0, expected 1 or more"),
        (["--table"], "--table: found no results.json in "),
        (["--only", "nope"], "--only: found 'nope', expected part of one of: vocabulary 32,000; vocabulary 4,096; "),
    ],
)
def test_bad_arguments_are_one_line_and_leave_nothing(arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["run.py", str(tmp_path / "out"), *arguments])
    with pytest.raises(SystemExit, match="2"):
        run.main()
    assert message in capsys.readouterr().err and not (tmp_path / "out").exists()
