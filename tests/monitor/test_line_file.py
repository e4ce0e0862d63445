"""Lines that cannot be written wait, and come out in order; neither a full disk nor a closed terminal ends a run. One second."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from lora_dist.monitor.console import Console
from lora_dist.monitor.line_file import LineFile
from lora_dist.monitor.metrics import MetricsFile
from tests.runs import read_metrics

FULL = Path("/dev/full")  # takes no byte


@pytest.fixture
def warnings(caplog):
    return lambda: [record.getMessage() for record in caplog.records]


def test_lines_wait_while_the_folder_is_gone_and_come_out_in_order(tmp_path, warnings):
    folder = tmp_path / "run"
    folder.mkdir()
    file = LineFile(folder / "log")
    file.write("one")
    shutil.rmtree(folder)
    file.write("two")
    file.write("three")
    assert [w for w in warnings() if "cannot be written (No such file or directory)" in w] == warnings() and len(warnings()) == 1
    folder.mkdir()
    file.write("four")
    assert (folder / "log").read_text() == "two\nthree\nfour\n"
    assert len(warnings()) == 2 and warnings()[1].endswith("can be written again")


def test_what_waits_is_bounded_and_losses_are_told(tmp_path, warnings):
    file = LineFile(tmp_path / "run" / "log", waiting_lines=3)
    for n in range(10):
        file.write(str(n))
    assert file.lost == 7 and file.close() == 10 and warnings()[-1].endswith("lacks 10 lines: it could not be written")
    (tmp_path / "run").mkdir()
    assert file.flush() == 0
    assert (tmp_path / "run/log").read_text() == "7\n8\n9\n" and warnings()[-1].endswith("; 7 lines were lost")


def test_a_disk_that_takes_half_a_line_keeps_none_of_it(tmp_path):
    """A small tmpfs: what fits of the line that fills it is taken back."""
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16k", "tmpfs", str(tmp_path)], capture_output=True, text=True)
    if done.returncode != 0:
        pytest.skip(f"cannot mount a tmpfs here: {done.stderr.strip()}")
    try:
        file = LineFile(tmp_path / "log")
        (tmp_path / "filler").write_bytes(bytes(8192))
        lines = [str(n) * 500 for n in range(10)] * 4
        for line in lines:
            file.write(line)
        written = (tmp_path / "log").read_text()
        assert 0 < len(written) < 8192 and written == "".join(f"{line}\n" for line in lines[: written.count("\n")])
        (tmp_path / "filler").unlink()
        (tmp_path / "log").rename(tmp_path / "first")
        assert file.flush() > 0  # 20 kB of lines do not fit yet
        subprocess.run(["mount", "-o", "remount,size=64k", str(tmp_path)], check=True)
        assert file.flush() == 0
        assert written + (tmp_path / "log").read_text() == "".join(f"{line}\n" for line in lines)
    finally:
        subprocess.run(["umount", "-l", str(tmp_path)], check=True)


def test_lines_of_several_threads_stay_whole(tmp_path):
    file = LineFile(tmp_path / "log")
    threads = [threading.Thread(target=lambda c=c: [file.write(c * 50) for _ in range(100)]) for c in "abcd"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    lines = (tmp_path / "log").read_text().splitlines()
    assert sorted(lines) == sorted(c * 50 for c in "abcd" for _ in range(100))


def test_metrics_are_kept_through_a_time_without_a_folder(tmp_path):
    metrics = MetricsFile(tmp_path / "run" / "metrics.jsonl")
    for step in (1, 2):
        metrics.write(step, "train", {"loss": 1.0})
    (tmp_path / "run").mkdir()
    assert metrics.close() == 0
    assert [row["step"] for row in read_metrics(metrics.file)] == [1, 2]


def test_records_that_are_none_are_dropped_on_resuming(tmp_path):
    metrics = MetricsFile(tmp_path / "metrics.jsonl")
    metrics.write(1, "train", {"loss": 1.0})
    with metrics.file.open("ab") as handle:
        handle.write(b"\xff\xfe\n[1]\n3\n{}\n" + json.dumps({"step": "x", "event": "train"}).encode() + b"\n")
    assert metrics.drop_after(5) == 5
    assert [row["step"] for row in read_metrics(metrics.file)] == [1]


@pytest.mark.skipif(not FULL.exists(), reason="needs /dev/full")
def test_a_console_on_a_full_disk_still_logs(tmp_path):
    with FULL.open("w") as stream:
        console = Console(stream=stream)
        console.open_log(tmp_path / "a", tmp_path / "b")
        for n in range(3000):  # more than any buffer
            console.line(f"line {n}")
        console.close()
    log = (tmp_path / "a").read_text().splitlines()
    assert log == (tmp_path / "b").read_text().splitlines()
    assert [line for line in log if line.startswith("line")] == [f"line {n}" for n in range(3000)]
    assert [line for line in log if not line.startswith("line")] == [
        "the console's output cannot be written (No space left on device): the run goes on"
    ]


@pytest.mark.parametrize("where", ["full", "closed pipe"])
def test_a_process_whose_output_goes_nowhere_ends_with_its_own_code(where):
    code = (
        "import sys\nfrom lora_dist.monitor.console import Console\nc = Console()\n"
        "for n in range(3000): c.line(f'line {n}')\nc.close()\nsys.exit(7)"
    )
    if where == "full":
        with FULL.open("w") as stream:
            done = subprocess.run([sys.executable, "-c", code], stdout=stream, stderr=subprocess.PIPE, text=True)
    else:
        reader, writer = os.pipe()
        os.close(reader)
        done = subprocess.run([sys.executable, "-c", code], stdout=writer, stderr=subprocess.PIPE, text=True)
        os.close(writer)
    assert done.returncode == 7 and done.stderr == ""
