"""What befalls the run folder while a run is at work: disk full, read-only, removed, moved. The run ends like the undisturbed one.

Real file systems (tmpfs, a read-only bind mount), through the command. About 60 s.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
import torch

from lora_dist.cli import train as train_verb
from lora_dist.cli.options import parse
from lora_dist.config import RunConfig
from lora_dist.engine.checkpoint import list_checkpoints, verify
from lora_dist.engine.folder import publish_files
from lora_dist.log import UserError
from tests.runs import ROOT, adapter, assert_identical, command, environment, losses, options, records

LONG = {
    "max_steps": 240, "save_steps": 20, "eval_steps": 40, "eval_on_start": False, "save_total_limit": 3, "learning_rate": 0.1,
    "lr_scheduler_type": "constant", "max_failed_saves": 1000,
}  # fmt: skip
BROKEN_FROM = 130
"""the step to break something at, behind the best adapter of such a run"""


def mounted(*argv: str, tries: int = 1) -> None:
    for _ in range(tries):
        done = subprocess.run(["mount", *argv], capture_output=True, text=True)
        if done.returncode == 0:
            return
    pytest.skip(f"cannot mount here: {done.stderr.strip()}")


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """An empty tmpfs of 2 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted("-t", "tmpfs", "-o", "size=2m", "tmpfs", str(folder))
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


@pytest.fixture(scope="module")
def undisturbed(tiny_base, tiny_text, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("undisturbed") / "out"
    assert train_verb.run(parse(RunConfig, options(tiny_base, tiny_text, out, **LONG), train_verb.VERB)) == 0
    assert best_step(out) < BROKEN_FROM  # so that its checkpoint is needed at the end
    return out


def best_step(out: Path) -> int:
    """Of so high a rate, an early one; which, differs from CPU to CPU."""
    return min(records(out, "eval"), key=lambda row: row["eval_loss"])["step"]


@contextmanager
def at_work(log: Path, *argv: str) -> Iterator[subprocess.Popen]:
    """A run in the background, its output in `log`; ended, if need be, when the test ends."""
    with log.open("w") as handle:
        process = subprocess.Popen(
            command(1, "train", *argv), cwd=ROOT, env=environment(), stdout=handle, stderr=subprocess.STDOUT
        )
        try:
            yield process
        finally:
            process.kill()
            process.wait()


def wait_for(what: Callable[[], bool], process: subprocess.Popen, log: Path, *, timeout_s: float = 120) -> None:
    deadline = time.monotonic() + timeout_s
    while not what():
        if process.poll() is not None or time.monotonic() > deadline:
            raise AssertionError(
                f"the run ended (exit {process.poll()}) or hung before it came so far\n{log.read_text()[-3000:]}"
            )
        time.sleep(0.005)


def fill(disk: Path) -> None:
    with suppress(OSError), (disk / "filler").open("wb", buffering=0) as handle:
        while handle.write(bytes(4096)):
            pass


def step_of(log: Path) -> int:
    """The last step that the console told of."""
    return max(
        (int(line.split()[1].split("/")[0]) for line in log.read_text().splitlines() if line.startswith("Step ")), default=0
    )


def finish(process: subprocess.Popen, log: Path) -> str:
    assert process.wait(timeout=240) == 0, log.read_text()[-3000:]
    return log.read_text()


def assert_whole(out: Path, undisturbed: Path) -> None:
    assert all(verify(path) is None for _, path in list_checkpoints(out)) and not list(out.glob(".saving-*"))
    assert {best_step(undisturbed), 240} <= {step for step, _ in list_checkpoints(out)}
    status = json.loads((out / "status.json").read_text())
    assert (status["state"], status["step"]) == ("completed", 240)


@pytest.mark.long
def test_a_disk_that_is_full_for_a_while(disk, undisturbed, tiny_base, tiny_text, tmp_path):
    """Saves fail and are told of, lines wait in memory; once there is room again, all of it is written."""
    out, log = disk / "out", tmp_path / "console"
    with at_work(log, *options(tiny_base, tiny_text, out, **LONG)) as process:
        wait_for(lambda: step_of(log) >= BROKEN_FROM, process, log)
        fill(disk)
        # The page that a file ends in takes some more lines of it.
        wait_for(lambda: "was not saved (1 of at most 1000 in a row)" in log.read_text(), process, log)
        wait_for(lambda: "metrics.jsonl cannot be written" in log.read_text(), process, log)
        (disk / "filler").unlink()
        text = finish(process, log)
    assert "No space left on device" in text and text.count("metrics.jsonl cannot be written") == 1
    assert "metrics.jsonl can be written again" in text and "Traceback" not in text
    assert_identical(out, undisturbed)  # every step's loss is in metrics.jsonl too
    assert_whole(out, undisturbed)
    assert "was not saved" in (out / "train.log").read_text() and records(out, "save_failed")


def test_a_folder_that_becomes_read_only_for_a_while(undisturbed, tiny_base, tiny_text, tmp_path):
    out, log = tmp_path / "out", tmp_path / "console"
    with at_work(log, *options(tiny_base, tiny_text, out, **LONG)) as process:
        wait_for(lambda: step_of(log) >= BROKEN_FROM, process, log)
        mounted("--bind", str(out), str(out))  # a mount of its own: files that are open for writing would forbid it
        try:
            mounted("-o", "remount,bind,ro", str(out), tries=200)  # busy whenever the run has a file of it open for writing
            wait_for(lambda: "was not saved (1 of at most 1000 in a row)" in log.read_text(), process, log)
        finally:
            subprocess.run(["umount", "-l", str(out)], check=True)
        text = finish(process, log)
    assert "Read-only file system" in text and "Traceback" not in text
    assert_identical(out, undisturbed)
    assert_whole(out, undisturbed)


@pytest.mark.parametrize("how", ["removed", pytest.param("moved", marks=pytest.mark.long)])
def test_a_folder_that_is_gone(how, undisturbed, tiny_base, tiny_text, tmp_path):
    """After the best step: its adapter is in the new folder again, and is what the run ends with."""
    out, log = tmp_path / "out", tmp_path / "console"
    with at_work(log, *options(tiny_base, tiny_text, out, **LONG)) as process:
        wait_for(lambda: step_of(log) >= BROKEN_FROM, process, log)
        if how == "moved":
            out.rename(tmp_path / "elsewhere")
        else:
            while out.exists():
                with suppress(OSError):  # the run may write a file into it meanwhile
                    shutil.rmtree(out)
                    break
        text = finish(process, log)
    words = "was removed while" if how == "removed" else f"was moved to {tmp_path / 'elsewhere'} while"
    assert text.count(f"the run folder {out} {words} the run was at work; made anew") == 1 and "Traceback" not in text
    assert_whole(out, undisturbed)
    x, y = adapter(out), adapter(undisturbed)
    assert x.keys() == y.keys() and all(torch.equal(x[k], y[k]) for k in x)
    expected = losses(undisturbed)
    assert losses(out) == {step: expected[step] for step in losses(out)} and 240 in losses(out)
    for name in ("run.json", "run_config.yaml", "train.log", "attempts/attempt-1.json", "attempts/attempt-1.log", ".lock"):
        assert (out / name).exists(), name
    if how == "moved":
        assert best_step(undisturbed) in {step for step, path in list_checkpoints(tmp_path / "elsewhere") if verify(path) is None}


def test_a_final_adapter_that_cannot_be_written(tiny_base, tiny_text, tmp_path):
    out = tmp_path / "out"
    (out / "adapter_config.json").mkdir(parents=True)  # in the way of the file
    values = options(tiny_base, tiny_text, out, max_steps=2, eval_strategy="no")
    with pytest.raises(UserError, match="could not be written .*the checkpoints are whole: free space and resume"):
        train_verb.run(parse(RunConfig, values, train_verb.VERB))
    assert verify(out / "checkpoint-2") is None and not list(out.glob(".saving-*"))
    status = json.loads((out / "status.json").read_text())
    assert (status["state"], status["step"], status["exit_code"]) == ("failed", 2, 2) and "could not be written" in status[
        "reason"
    ]


def test_publishing_on_a_full_disk_leaves_the_files_before(disk):
    publish_files(disk, lambda folder: (folder / "a").write_text("old"))
    fill(disk)
    with pytest.raises(UserError, match="No space left on device"):
        publish_files(disk, lambda folder: (folder / "a").write_bytes(os.urandom(1 << 20)))
    with pytest.raises(UserError, match="it is wrong"):
        (disk / "filler").unlink()
        publish_files(disk, lambda folder: (folder / "a").write_text("new"), lambda folder: "it is wrong")
    assert (disk / "a").read_text() == "old" and not list(disk.glob(".saving-*"))
