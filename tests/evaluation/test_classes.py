"""Metrics by name, against values that are known."""

from __future__ import annotations

import numpy as np
import pytest

from lora_dist.evaluation.classes import measure

TARGETS, FOUND = np.array([0, 0, 1, 1, 1]), np.array([0, 1, 1, 1, 0])


@pytest.mark.parametrize(("name", "expected"), [("accuracy", 0.6), ("f1", 2 / 3), ("matthews_correlation", 1 / 6)])
def test_metrics_of_labels(name, expected):
    assert measure(name, TARGETS, FOUND) == pytest.approx(expected)


def test_correlations_and_predictions_that_are_all_equal():
    numbers = np.array([1.0, 2.0, 3.0, 5.0])
    assert measure("spearmanr", numbers, numbers**3) == pytest.approx(1.0)
    assert measure("pearson", numbers, -numbers) == pytest.approx(-1.0)
    assert measure("pearson", numbers, np.ones(4)) == 0.0
