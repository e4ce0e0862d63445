"""`train.profile`: the steps that were asked for, and no others, in a trace that the field's viewers read."""

from __future__ import annotations

import gzip
import json

import pytest

from lora_dist.__main__ import main
from tests.runs import options


@pytest.mark.parametrize(("steps", "traced"), [("2:3", 2), ("4:9", 1)])
def test_the_steps_asked_for_are_traced(steps, traced, tiny_base, tiny_text, tmp_path, capfd):
    out = tmp_path / "out"
    values = options(
        tiny_base, tiny_text, out, max_steps=4, gradient_accumulation_steps=2, eval_strategy="no", save_strategy="no"
    )
    assert main(["train", *values, "--profile", steps]) == 0
    folder = out / "profile" / "attempt-1"
    assert f"traced steps {steps}: {folder}" in capfd.readouterr().out
    with gzip.open(folder / "rank-0.json.gz", "rt") as file:
        names = [event.get("name") for event in json.load(file)["traceEvents"] if event.get("ph") == "X"]
    assert names.count("forward") == names.count("backward") == 2 * traced and names.count("optimizer") == traced
    assert "aten::mm" in names and "aten::mm" in (folder / "rank-0.txt").read_text()


@pytest.mark.parametrize("steps", ["3", "0:2", "5:4", "a:b"])
def test_steps_that_are_none(steps, tiny_base, tiny_text, tmp_path, capsys):
    assert main(["train", *options(tiny_base, tiny_text, tmp_path / "out"), f"--profile={steps}"]) == 2
    assert f"train.profile: found {steps}, expected FIRST:LAST" in capsys.readouterr().err
