"""The report of real runs: its figures are those of metrics.jsonl, its curves their values, and Chromium opens it on any width."""

from __future__ import annotations

import json
import os
import re
import shutil
import time
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lora_dist.__main__ import main
from lora_dist.cli import train as train_verb
from lora_dist.cli.options import parse
from lora_dist.config import RunConfig
from lora_dist.monitor.charts import thinned, tick_text
from lora_dist.monitor.console import perplexity_text
from lora_dist.monitor.runs import read_run
from tests.chromium import chromium, opened
from tests.runs import options, records


@pytest.fixture(scope="module")
def trained(tiny_base: Path, tiny_text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 12 steps that ends with an evaluation, and was gone on with once."""
    folder = tmp_path_factory.mktemp("report") / "run"
    for steps, resume in ((6, {}), (12, {"resume_from_checkpoint": "auto"})):
        chosen: dict[str, Any] = {"max_steps": steps, "eval_steps": 3, "save_steps": 3, **resume}
        assert train_verb.run(parse(RunConfig, options(tiny_base, tiny_text, folder, **chosen), train_verb.VERB)) == 0
    return folder


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> Path:
    """A copy, as from another machine."""
    return Path(shutil.copytree(trained, tmp_path / "run"))


class _Tables(HTMLParser):
    """Rows of every table by its id, else its class; and all addresses that the page could fetch from."""

    def __init__(self, text: str):
        super().__init__()
        self.tables: dict[str, list[list[str]]] = {}
        self.fetched: list[str] = []
        self._rows: list[list[str]] = []
        self._inside = False
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        named = dict(attrs)
        if tag == "table":
            self._rows = self.tables.setdefault(named.get("id") or named.get("class") or "", [])
        elif tag == "tr":
            self._rows.append([])
        elif tag in ("td", "th"):
            self._rows[-1].append("")
            self._inside = True
        for key in ("src", "href", "xlink:href", "srcset", "data", "action"):
            if (value := named.get(key)) and not value.startswith(("#", "data:")):
                self.fetched.append(value)

    def handle_endtag(self, tag: str) -> None:
        if tag in ("td", "th"):
            self._inside = False

    def handle_data(self, data: str) -> None:
        if self._inside:
            self._rows[-1][-1] += data


def _report(*runs: Path, **options: str) -> tuple[str, _Tables]:
    output = runs[0].parent / "out" / "report.html"
    argv = [*map(str, runs), "--output", str(output), *(word for key, value in options.items() for word in (f"--{key}", value))]
    assert main(["report", *argv]) == 0
    text = output.read_text()
    return text, _Tables(text)


def _curve(text: str, gid: str) -> np.ndarray:
    """Corners (x, y) of a curve in the page's SVG, y downwards."""
    match = re.search(rf'<g id="{gid}">\s*<path d="([^"]+)"', text)
    assert match, f"no curve {gid}"
    return np.array(re.findall(r"[ML] ([-\d.]+) ([-\d.]+)", match[1]), float)


def _affine_error(drawn: np.ndarray, values: list[float]) -> float:
    """How far the drawn heights are from a linear picture of the values, as a share of their spread."""
    assert len(drawn) == len(values)
    slope, offset = np.polyfit(values, drawn, 1)
    return float(np.abs(slope * np.array(values) + offset - drawn).max() / np.ptp(drawn))


@pytest.fixture(scope="module")
def reported(trained: Path) -> tuple[str, _Tables]:
    return _report(trained)


def test_figures_and_curves_are_those_of_the_metrics(trained: Path, reported: tuple[str, _Tables]) -> None:
    run, (text, page) = trained, reported
    evaluations = records(run, "eval") + records(run, "final")
    rows = page.tables["all-evaluations"][1:]
    assert [row[:3] for row in rows] == [
        [str(e["step"]), f"{e['eval_loss']:.4f}", perplexity_text(e["perplexity"])] for e in evaluations
    ]
    before, after = page.tables["evaluations"][1], page.tables["evaluations"][-1]
    assert before[:2] == ["before training", "0"]
    assert after[3] == perplexity_text(records(run, "final")[0]["perplexity"])
    train = records(run, "train")
    drawn = _curve(text, "loss-train-0")
    assert _affine_error(drawn[:, 1], [record["loss"] for record in train]) < 1e-4
    assert _affine_error(drawn[:, 0], [record["step"] for record in train]) < 1e-4
    assert _affine_error(_curve(text, "eval_loss-0")[:, 1], [e["eval_loss"] for e in records(run, "eval")]) < 1e-4
    assert _affine_error(_curve(text, "learning-rate-0")[:, 1], [record["learning_rate"] for record in train]) < 1e-4


def test_events_and_pattern(trained: Path, reported: tuple[str, _Tables]) -> None:
    run, (text, page) = trained, reported
    kinds = [(row[0], row[1]) for row in page.tables["events"][1:]]
    assert ("0", "started") in kinds
    assert ("6", "resumed") in kinds
    assert kinds[-1] == ("12", "completed")
    linears = json.loads((run / "pattern.json").read_text())["linears"]
    shown = {float(cell) for row in page.tables["run1-sparsity"][1:] for cell in row[1:]}
    assert shown == {round(linear["sparsity"], 3) for linear in linears}
    assert len(page.tables["run1-sparsity"]) == 1 + 2  # layers
    for key in ("loss", "perplexity", "learning-rate", "throughput", "memory", "kept-tiles", "pattern"):
        assert (run.parent / "out" / f"report-{key}.png").read_bytes().startswith(b"\x89PNG")
        assert f'id="{"run1-" if key in ("kept-tiles", "pattern") else ""}chart-{key}"' in text


def test_the_page_asks_for_nothing(reported: tuple[str, _Tables]) -> None:
    text, page = reported
    assert page.fetched == []
    assert "<script" not in text
    assert not re.search(r"url\((?!#|data:)|@import", text)


def test_names_and_values_are_escaped(run: Path, tmp_path: Path) -> None:
    bad = tmp_path / "<img src=x onerror=alert(1)>&\"'"
    run.rename(bad)
    with (bad / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"step": 12, "event": "warning", "text": "<script>alert(2)</script>"}) + "\n")
    text, _ = _report(bad, bad)
    assert "<img" not in text
    assert "<script" not in text
    assert "&lt;script&gt;alert(2)" in text


def test_bands(run: Path) -> None:
    perplexity = records(run, "final")[0]["perplexity"]
    _, page = _report(run, bands=f"[{perplexity / 3},{perplexity / 2},{perplexity * 1.01}]")
    assert page.tables["evaluations"][-1][-1] == "fair"


def test_several_runs_and_their_differences(run: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(run, other)
    config = (other / "run_config.yaml").read_text()
    (other / "run_config.yaml").write_text(re.sub(r"learning_rate: \S+", "learning_rate: 0.5", config))
    rows = [json.loads(line) for line in (other / "metrics.jsonl").read_text().splitlines()]
    (other / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows if row["event"] not in ("eval", "final")))
    text, page = _report(run, other)
    differences = {row[0]: row[1:] for row in page.tables["results"] if row[0].startswith("train.")}
    assert differences == {"train.learning_rate": ["0.003", "0.5"]}
    results = {row[0]: row[1:] for row in page.tables["results"]}
    assert results["perplexity"][1] == "–"
    assert results["steps"] == ["12 of 12", "12 of 12"]
    assert re.fullmatch(r"[\d,]+ trained on", results["tokens"][0])
    assert re.fullmatch(r"[\d,]+ tokens/s, median", results["throughput"][0])
    assert np.array_equal(_curve(text, "loss-train-0"), _curve(text, "loss-train-1"))
    assert "digest" in text
    assert "the same as of run" in text  # its pictures are not drawn again
    assert 'id="run2-chart-pattern"' not in text


def test_classification_has_its_own_figure(run: Path) -> None:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    for row in rows:
        if "perplexity" in row:
            row["accuracy"] = 1 / row.pop("perplexity")
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    text, page = _report(run)
    assert page.tables["evaluations"][0] == ["", "step", "loss", "accuracy"]
    best = max((row for row in rows if row["event"] == "eval"), key=lambda row: row["accuracy"])
    assert page.tables["evaluations"][2][1] == str(best["step"])
    assert 'id="chart-accuracy"' in text


def test_norms_times_and_memory_by_rank(run: Path) -> None:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    for row in rows:
        if row["event"] == "train":
            row |= {"data_time_s": 0.1, "forward_time_s": 0.2, "backward_time_s": 0.4, "optimizer_time_s": 0.05}
            row["peak_mem_gib_by_rank"] = [1.0, 2.0]
    norms = {
        f"model.layers.{layer}.self_attn.{name}": layer + share
        for layer in (0, 1)
        for name, share in (("q_proj", 0.25), ("v_proj", 0.5))
    }
    rows.append({"step": 12, "event": "adapter_norms", **norms})
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    text, page = _report(run, bands="[]")
    assert "band" not in page.tables["evaluations"][0]
    assert page.tables["run1-norms"] == [["layer", "q_proj", "v_proj"], ["0", "0.25", "0.5"], ["1", "1.25", "1.5"]]
    assert "forward 0.2 s" in text
    assert "rank 1: 2 at step 1" in text


def test_what_is_not_finite_any_more_is_not_told_by_its_last_finite_value(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = [{"step": 12, "event": "train", "loss": None}, {"step": 12, "event": "eval", "eval_loss": None, "perplexity": None}]
    rows = [row for row in map(json.loads, (run / "metrics.jsonl").read_text().splitlines()) if row["event"] != "final"]
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in [*rows, *lines]))
    text, page = _report(run)
    assert re.findall(r"<dt>([\w ]+)</dt><dd>not finite<small>[\d.]+ at step (\d+)", text) == [
        ("perplexity", "12"), ("evaluation loss", "12"), ("train loss", "12"),
    ]  # fmt: skip
    assert page.tables["evaluations"][-1][2:4] == ["not finite", "not finite"]
    assert main(["watch", str(run)]) == 0
    assert "loss not finite  eval loss not finite  perplexity not finite" in " ".join(capsys.readouterr().out.splitlines())


def test_a_run_that_was_killed_and_says_that_it_runs(run: Path, tmp_path: Path) -> None:
    status = json.loads((run / "status.json").read_text())
    (run / "status.json").write_text(json.dumps({**status, "state": "running"}))
    assert "no sign of life" not in _report(run)[0]
    for name in ("metrics.jsonl", "status.json", "train.log"):
        os.utime(run / name, (time.time() - 7200,) * 2)
    text, _ = _report(run)
    assert re.search(r"no sign of life for 2:00:\d\d: killed, hanging", text)


def test_a_run_without_anything_but_a_status(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "status.json").write_text('{"state": "running", "step": 0, "total_steps": 10, "reason": "started"}')
    text, _ = _report(folder)
    assert "metrics.jsonl is missing: there are no curves" in text


def test_an_evaluation_is_shown_beside(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "figures.json"
    file.write_text('{"dense": 4.25, "pruned": 2164.5}')
    _, page = _report(run, evaluation=str(file))
    assert page.tables["measured"][1:] == [["dense", "4.25"], ["pruned", "2164.50"]]
    file.write_text("{}")
    assert main(["report", str(run), "--evaluation", str(file)]) == 2
    assert "evaluation: found no figures" in capsys.readouterr().err


def test_no_run_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", str(tmp_path / "gone"), str(tmp_path)]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2
    assert all(line.startswith("lora-dist report: RUN: found") for line in lines)
    assert main(["report"]) == 2
    assert main(["report", str(tmp_path), "--output", "page.txt", "--bands", "[3,2,1]"]) == 2
    assert {"output", "bands"} <= {line.split(": ")[1] for line in capsys.readouterr().err.splitlines()[1:]}


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.0, "0"), (5e-4, "0.0005"), (3e-5, "3e-05"), (3.1205, "3.1205"), (0.1 + 0.2, "0.3"), (125000.0, "125,000")],
)
def test_numbers_on_an_axis_stand_whole(value: float, text: str) -> None:
    assert tick_text(value) == text


def test_long_curves_keep_their_extremes() -> None:
    values = np.random.default_rng(0).standard_normal(100_000)
    values[77_777] = 50.0
    points = [(step, float(value)) for step, value in enumerate(values)]
    kept = thinned(points)
    assert len(kept) < 1600
    assert kept == sorted(set(kept))
    assert {points[0], points[-1], points[77_777], min(points, key=lambda p: p[1])} <= set(kept)


@pytest.mark.skipif(chromium() is None, reason="no chromium to open the report in (apt-get install chromium)")
def test_chromium_opens_it(trained: Path, reported: tuple[str, _Tables], run: Path, tmp_path: Path) -> None:
    """Nothing is fetched, nothing fails, nothing hangs over the edge: on a desk, on a phone, in the dark and on paper."""
    other = tmp_path / "a_rather_long_name_of_a_run_with_lr_3e-3_and_rank_16"
    shutil.copytree(run, other)
    _report(run, other)
    both = run.parent / "out" / "report.html"
    alone = trained.parent / "out" / "report.html"
    with opened(tmp_path / "profile") as page:
        for file in (both, alone):
            for width, scheme in ((390, "light"), (320, "light"), (1280, "light")):
                page.open(file, width=width, scheme=scheme)
                assert page.evaluate("document.documentElement.scrollWidth") <= width, (file.name, width)
                assert page.evaluate("[...document.images].every(i => i.complete && i.naturalWidth > 0)")
                charts = page.evaluate("[...document.querySelectorAll('figure svg')].map(s => s.getBoundingClientRect().width)")
                assert len(charts) >= 9
                assert min(charts) > 250, f"charts too small to read at {width}: {charts}"
            assert page.evaluate(
                "[...document.querySelectorAll('figure svg')].every(s => s.getAttribute('aria-label').length > 20)"
            )
            dark = page.evaluate("getComputedStyle(document.body).backgroundColor")
            page.open(file, width=1280, scheme="dark")
            assert page.evaluate("getComputedStyle(document.body).backgroundColor") != dark
        page.pdf(tmp_path / "report.pdf")
        urls = {event["request"]["url"] for event in page.of("Network.requestWillBeSent")}
        assert {url for url in urls if not url.startswith("data:")} == {both.as_uri(), alone.as_uri()}
        assert page.of("Runtime.exceptionThrown") == []
        assert page.of("Log.entryAdded") == []
    assert (tmp_path / "report.pdf").stat().st_size > 20_000


def test_read_run_of_the_real_log_alone(run: Path) -> None:
    """Figures as rounded on the console, but the same steps and evaluations."""
    from_log, whole = read_run(run / "train.log"), read_run(run)
    assert [step for step, _ in from_log.series("loss")] == [step for step, _ in whole.series("loss")]
    assert np.allclose([v for _, v in from_log.series("loss")], [v for _, v in whole.series("loss")], atol=6e-5)
    assert [round(v, 2) for _, v in from_log.series("perplexity", "eval")] == [
        round(v, 2) for _, v in whole.series("perplexity", "eval")
    ]
    assert (from_log.state, from_log.total_steps) == ("completed", 12)
