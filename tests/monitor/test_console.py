"""Small facts of the console, the metrics file and the advice."""

from __future__ import annotations

import io
import json

import pytest

from lora_dist.monitor.advice import out_of_memory, perplexity_band
from lora_dist.monitor.console import Console, clock, short_rate
from lora_dist.monitor.metrics import MetricsFile
from tests.runs import read_metrics


@pytest.mark.parametrize("seconds,text", [(0, "0:00:00"), (3723.9, "1:02:03"), (360000, "100:00:00")])
def test_clock(seconds, text):
    assert clock(seconds) == text


@pytest.mark.parametrize("rate,text", [(1e-4, "1e-04"), (9.5e-5, "9.5e-05"), (0.0, "0e+00"), (1 / 3, "3.333e-01")])
def test_rates_are_short_and_read_back(rate, text):
    assert short_rate(rate) == text and float(text) == pytest.approx(rate, rel=1e-3)


def test_lines_printed_before_there_is_a_log_end_up_in_it(tmp_path):
    stream = io.StringIO()
    console = Console(stream=stream)
    console.line("before")
    console.open_log(tmp_path / "log")
    console.line("")
    console.line("")
    console.line("after")
    console.close()
    assert stream.getvalue() == "before\n\nafter\n" == (tmp_path / "log").read_text()


def test_other_ranks_print_nothing(tmp_path, capsys):
    console = Console(enabled=False)
    console.open_log(tmp_path / "log")
    console.line("x")
    bar = console.bar(3, "Evaluating")
    bar.update()
    bar.close()
    assert capsys.readouterr() == ("", "") and not (tmp_path / "log").exists()


def test_a_worse_result_is_not_called_an_improvement():
    stream = io.StringIO()
    Console(stream=stream).final_results(
        loss=2, figures={"perplexity": 7.39}, runtime_s=1, samples=1, steps=1, epoch=1, first=5.0
    )
    assert "(Worsened from 5.00 → 7.39, rise: 47.80%)" in stream.getvalue()


def test_metrics_after_the_resumed_step_are_dropped_with_a_cut_off_line(tmp_path):
    metrics = MetricsFile(tmp_path / "m.jsonl")
    for step in (1, 2, 3):
        metrics.write(step, "train", {"loss": float("inf") if step == 1 else 1.5})
    metrics.write(2, "final", {"eval_loss": 1.0})
    with metrics.file.open("a") as handle:
        handle.write('{"step": 1, "ev')
    assert metrics.drop_after(2) == 3
    assert [(r["step"], r["loss"]) for r in read_metrics(metrics.file)] == [(1, None), (2, 1.5)]
    assert all(json.loads(line) for line in metrics.file.read_text().splitlines())


def test_an_evaluation_that_is_made_again_does_not_stand_twice(tmp_path):
    metrics = MetricsFile(tmp_path / "m.jsonl")
    for step in (1, 2):
        metrics.write(step, "train", {"loss": 1.5})
        metrics.write(step, "eval", {"eval_loss": 1.0})
    assert metrics.drop_after(2, evaluated=False) == 1
    assert [(r["step"], r["event"]) for r in read_metrics(metrics.file)] == [(1, "train"), (1, "eval"), (2, "train")]


def test_out_of_memory_advice_names_this_runs_own_options():
    common = {"block_size": 1024, "accumulation": 1, "rank": 8, "where": "while training", "peak_gib": 79.0}
    text = out_of_memory(**common, gradient_checkpointing=False, micro_batch=4)
    assert (
        "--data.block_size 512" in text and "--train.per_device_train_batch_size 2 --train.gradient_accumulation_steps 2" in text
    )
    assert "--adapter.r 4" in text and "--train.gradient_checkpointing true" in text and "peak 79.0 GiB" in text
    text = out_of_memory(**{**common, "rank": 4}, gradient_checkpointing=True, micro_batch=1)
    layers = out_of_memory(**common, gradient_checkpointing=True, checkpointing_layers="12", micro_batch=1)
    assert "--train.gradient_checkpointing_layers all      (now 12)" in layers
    assert "context 128 -> 64:  --data.block_size 64" in out_of_memory(
        **{**common, "block_size": 128}, gradient_checkpointing=True, micro_batch=1
    )
    assert "gradient_checkpointing" not in text and "per_device_train_batch_size" not in text and "--adapter.r" not in text


@pytest.mark.parametrize("perplexity,band", [(6.7, "ideal"), (7.3, "good"), (30, "fair"), (8000, "poor")])
def test_bands(perplexity, band):
    assert perplexity_band(perplexity, [7, 10, 50]) == band
