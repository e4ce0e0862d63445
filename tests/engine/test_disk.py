"""Full and read-only disks, on real small file systems; running out of memory, with a real limit. Nothing is lost."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from lora_dist.engine.checkpoint import list_checkpoints, verify
from tests.runs import ROOT, environment, options, run


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """An empty tmpfs of 400 kB: room for a checkpoint or two of the tiny model."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=400k", "tmpfs", str(folder)], capture_output=True, text=True)
    if mounted.returncode != 0:
        pytest.skip(f"cannot mount a tmpfs here: {mounted.stderr.strip()}")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_disk_that_fills_up_ends_the_run_with_one_line_and_keeps_the_checkpoints(small_disk, tiny_base, tiny_text):
    out = small_disk / "out"
    done = run(
        1,
        "train",
        *options(tiny_base, tiny_text, out, max_steps=40, save_steps=2, eval_strategy="no", save_total_limit=40),
        check=False,
    )
    assert done.returncode == 2 and "Traceback" not in done.stderr
    (line,) = [line for line in done.stderr.splitlines() if "train.max_failed_saves: 3 checkpoints in a row" in line]
    assert "No space left on device" in line and "earlier checkpoints are untouched" in line
    for n in (1, 2, 3):
        assert f"was not saved ({n} of at most 3 in a row)" in done.stdout
    kept = [path for _, path in list_checkpoints(out)]
    assert kept and all(verify(path) is None for path in kept)
    assert not list(out.glob(".saving-*"))


@pytest.mark.long
def test_a_read_only_place_is_refused_before_anything_is_loaded(small_disk, tiny_base, tiny_text, tmp_path):
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    done = run(1, "train", *options(tiny_base, tiny_text, small_disk / "out", max_steps=1), check=False)
    assert done.returncode == 2 and "train.output_dir" in done.stderr and "cannot be written" in done.stderr
    assert "Model loaded" not in done.stdout
    done = run(1, "prune", str(tiny_base), str(small_disk / "pruned"), "--score", "magnitude", check=False)
    assert done.returncode == 2 and done.stderr.startswith("lora-dist prune: OUT: ")


@pytest.mark.long
def test_out_of_memory_ends_in_advice_instead_of_a_traceback(tiny_base, tiny_text, tmp_path):
    """A real limit on the address space, and a batch that cannot fit in it."""
    values = options(
        tiny_base, tiny_text, tmp_path / "out", max_steps=1, eval_strategy="no", per_device_train_batch_size=60000, data__block_size=64,
        data__holdout_windows=1,
    )  # fmt: skip
    code = (
        "import resource, sys\nresource.setrlimit(resource.RLIMIT_AS, (6 << 30, 6 << 30))\n"
        "from lora_dist.__main__ import main\nsys.exit(main())"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, "train", *values], capture_output=True, text=True, cwd=ROOT, env=environment()
    )
    assert done.returncode == 1, done.stderr
    assert "❌ Out of memory in the forward pass of step 1 (peak" in done.stderr and "Traceback" not in done.stderr
    assert "--train.per_device_train_batch_size 30000" in done.stderr
    assert "❌ Out of memory" in (tmp_path / "out" / "train.log").read_text()
