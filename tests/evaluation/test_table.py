"""The table, recovery, and JSON that is valid whatever the figures are."""

from __future__ import annotations

import json
import math

import pytest

from lora_dist.evaluation.table import add_recovery, conditions, errors, finite, markdown_table


def text(loss):
    return {"loss": loss, "perplexity": math.exp(loss), "word_perplexity": math.exp(2 * loss), "bits_per_byte": loss / 4}


def reports():
    return [
        {"name": "dense", "perplexity": {"stories": text(1.0)}},
        {"name": "pruned", "perplexity": {"stories": text(5.0)}},
        {"name": "masked", "perplexity": {"stories": text(2.0), "ptb": {"error": "no hub"}}},
        {"name": "gone", "error": "MODEL: found nothing"},
    ]


def test_recovery_is_in_log_perplexity():
    rows = reports()
    add_recovery(rows)
    pruned, now, dense = (rows[i]["perplexity"]["stories"]["perplexity"] for i in (1, 2, 0))
    assert rows[2]["recovery"] == {
        "stories": pytest.approx((math.log(pruned) - math.log(now)) / (math.log(pruned) - math.log(dense)))
    }
    assert all("recovery" not in row for row in (rows[0], rows[1], rows[3]))
    add_recovery(only := reports()[1:])
    assert all("recovery" not in row for row in only)  # one end is missing


def test_the_table_shows_every_figure_and_what_failed():
    rows = reports()
    add_recovery(rows)
    lines = markdown_table(rows).split("\n")
    cells = {line.split("|")[1].strip(): [cell.strip() for cell in line.split("|")[2:-1]] for line in lines}
    assert cells[""] == ["dense", "pruned", "masked", "gone"]
    assert cells["perplexity, stories"] == ["2.72", "148.41", "7.39", "failed"]
    assert cells["perplexity, ptb"] == ["", "", "failed", "failed"]
    assert cells["recovery, stories"] == ["", "", "75.0%", "failed"]
    assert len({len(line) for line in lines}) == 1 and "decode, tokens/s" not in cells
    assert (
        errors(rows[2]) == ["perplexity, ptb: no hub"] and errors(rows[3]) == ["MODEL: found nothing"] and errors(rows[0]) == []
    )
    assert conditions(rows[3]) == []


def test_zero_shot_cells_carry_their_error():
    task = {"acc": 0.5, "acc_stderr": 0.1, "acc_norm": 0.25, "acc_norm_stderr": 0.05}
    table = markdown_table([{"name": "m", "zeroshot": {"tasks": {"piqa": task}, "mean_acc": 0.5, "mean_acc_norm": 0.25}}])
    assert "50.0 ± 10.0" in table and "25.0 ± 5.0" in table and "mean acc %" in table


def test_json_has_no_infinity():
    content = finite({"a": math.inf, "b": [math.nan, 1.5, {"c": -math.inf}], "d": None, "e": (1, True)})
    assert json.loads(json.dumps(content, allow_nan=False)) == {
        "a": "inf",
        "b": ["nan", 1.5, {"c": "-inf"}],
        "d": None,
        "e": [1, True],
    }
