"""`train.profile`: the steps that were asked for, and no others, in a trace that the field's viewers read."""

from __future__ import annotations

import gzip
import json
from collections import Counter

import pytest

from lora_dist.__main__ import main
from lora_dist.models import chunked
from tests.instructions import write_instructions
from tests.runs import options

WAITING = ("aten::_local_scalar_dense", "aten::nonzero", "aten::masked_select", "aten::unique_consecutive", "aten::_unique2")
"""what Python, or the size of a result, waits for"""


@pytest.mark.parametrize(("steps", "traced"), [("2:3", 2), ("4:9", 1)])
def test_the_steps_asked_for_are_traced(steps, traced, tiny_base, tiny_text, tmp_path, capfd):
    out = tmp_path / "out"
    values = options(
        tiny_base, tiny_text, out, max_steps=4, gradient_accumulation_steps=2, eval_strategy="no", save_strategy="no"
    )
    assert main(["train", *values, "--profile", steps]) == 0
    folder = out / "profile" / "attempt-1"
    assert f"traced steps {steps}: {folder}" in capfd.readouterr().out
    names = [event["name"] for event in traced_events(folder)]
    assert names.count("forward") == names.count("backward") == 2 * traced and names.count("optimizer") == traced
    assert "aten::mm" in names and "aten::mm" in (folder / "rank-0.txt").read_text()


@pytest.mark.parametrize("way", ["masked", "plain", "packed"])
def test_no_forward_or_backward_pass_waits_for_what_it_computes(way, tiny_base, tiny_text, tmp_path, monkeypatch):
    """On a GPU until all that was asked of it is done; the loss and the gradients' norm it does wait for, behind them. The loss is taken as on
    a GPU: a CPU's looks at the shares of the targets."""
    monkeypatch.setattr(chunked, "shares_in_place", lambda hidden_TH: False)
    out, text, more = tmp_path / "out", tiny_text, {"adapter__mask": "none"} if way == "plain" else {}
    if way == "packed":
        text, template = write_instructions(tmp_path)
        more = {"data__format": "auto", "data__prompt_template": template, "data__packing": True, "data__block_size": 64}
    more |= {"max_steps": 2, "gradient_accumulation_steps": 3, "eval_strategy": "no", "save_strategy": "no"}
    assert main(["train", *options(tiny_base, text, out, **more), "--profile", "2:2"]) == 0
    events = traced_events(out / "profile" / "attempt-1")
    passes = [event for event in events if event["name"] in ("forward", "backward")]
    assert len(passes) == 2 * 3
    waits = [
        event["name"]
        for event in events
        for each in passes
        if event["name"] in WAITING and each["ts"] <= event["ts"] <= each["ts"] + each["dur"]
    ]
    on_the_host = {"aten::nonzero": 3}  # which labels count
    if way == "packed":
        on_the_host["aten::_local_scalar_dense"] = 3  # whether positions start anew
    assert Counter(waits) == on_the_host


def traced_events(folder):
    with gzip.open(folder / "rank-0.json.gz", "rt") as file:
        return [event for event in json.load(file)["traceEvents"] if event.get("ph") == "X"]


@pytest.mark.parametrize("steps", ["3", "0:2", "5:4", "a:b"])
def test_steps_that_are_none(steps, tiny_base, tiny_text, tmp_path, capsys):
    assert main(["train", *options(tiny_base, tiny_text, tmp_path / "out"), f"--profile={steps}"]) == 2
    assert f"train.profile: found {steps}, expected FIRST:LAST" in capsys.readouterr().err
