"""Scores of methods on the same seeds and rows: their differences are paired, bounded and corrected."""

import math

import numpy as np
import pytest

from analyses.core.intervals import crossed_error, holm
from analyses.subjects.paired_scores import BEST_ANSWER, corrected, pairs_of, score_metrics, score_rows
from propulsion.data.metrics import METRICS

FULL, ALL = "full", "propulsion:positions=all"


@pytest.fixture
def answers():
    """Labels of 60 rows, and the predictions of three seeds by method: the first is right most often."""
    generator = np.random.default_rng(0)
    labels = (generator.random(60) < 0.6).astype(int)
    easy = generator.random(60)

    def predicted(share: float) -> np.ndarray:
        return np.where(easy + 0.1 * generator.random((3, 60)) < share, labels, 1 - labels)

    return labels, {FULL: predicted(0.9), ALL: predicted(0.85), "lora": predicted(0.6), "head": predicted(0.45)}


@pytest.mark.parametrize("metric", ["accuracy", "matthews", "f1"])
def test_the_mean_over_rows_is_the_score(metric, answers):
    labels, predictions = answers
    rows = score_rows(metric, predictions[FULL], labels)
    assert rows.mean(1) == pytest.approx([METRICS[metric](p, labels) for p in predictions[FULL]])


def test_differences_are_paired_within_seeds_and_rows(answers):
    labels, predictions = answers
    metrics, rows = score_metrics("sst2", predictions, labels, FULL)
    found = {(m.stage, m.left, m.right): m for m in metrics}
    right = (predictions[ALL] == labels).astype(float) - (predictions[FULL] == labels)
    row = rows[0]
    assert (row["left"], row["right"]) == (ALL, FULL)
    assert (row["value"], row["error"], row["degrees"]) == pytest.approx(crossed_error(right))
    assert row["low"] < row["value"] < row["high"]
    assert found["sst2, difference", ALL, FULL].low == row["low"]
    assert {(r["left"], r["right"]) for r in rows} == set(pairs_of(list(predictions), FULL))


def test_a_paired_difference_decides_where_overlapping_intervals_do_not(answers):
    labels, predictions = answers
    worse = np.where(np.cumsum(predictions[FULL] == labels, 1) <= 8, 1 - labels, predictions[FULL])
    metrics, (difference, *_) = score_metrics("sst2", {FULL: predictions[FULL], "lora": worse}, labels, FULL)
    full, lora = (m for m in metrics if m.stage == "sst2")
    assert full.low is not None
    assert lora.high is not None
    assert full.low < lora.high
    assert difference["high"] < 0


def test_the_best_single_answer_is_that_of_the_commonest_label(answers):
    labels, predictions = answers
    metrics, _ = score_metrics("sst2", predictions, labels, FULL)
    (found,) = (m for m in metrics if (m.left, m.right) == (FULL, BEST_ANSWER))
    assert found.value == pytest.approx((predictions[FULL] == labels).mean() - labels.mean())
    metrics, _ = score_metrics("cola", predictions, labels, FULL)
    own, over = (m for m in metrics if m.left == FULL)
    assert own.value == pytest.approx(over.value)  # A constant has a correlation of 0.


def test_holm_corrects_the_differences_from_one_side_together(answers):
    labels, predictions = answers
    _, rows = score_metrics("sst2", predictions, labels, FULL)
    family = [row for row in rows if row["right"] == FULL]
    assert [row["p_holm"] for row in family] == pytest.approx(holm([row["p"] for row in family]))
    assert corrected({"p_holm": 0.04, "value": -0.1}) == "lower, p = 0.04"
    assert corrected({"p_holm": 0.04, "value": 0.1}) == "higher, p = 0.04"
    assert corrected({"p_holm": 0.06, "value": 0.1}) == "open, p = 0.06"
    assert corrected({"p_holm": None, "value": 0.1}) == corrected({"p_holm": math.nan, "value": 0.1}) == "open"


def test_a_comparison_that_is_significant_alone_can_be_open_after_holm():
    # Five methods of six rows in common: one differs on few rows, at 2 to 5 % alone.
    generator = np.random.default_rng(1)
    labels = np.ones(200, dtype=int)
    base = (generator.random((3, 200)) < 0.7).astype(int)
    methods = {FULL: base}
    for i in range(5):
        changed = base.copy()
        changed[:, : 5 + i] = 1
        methods[f"lora:r={i + 1}"] = changed
    _, rows = score_metrics("sst2", methods, labels, FULL)
    alone = [row["p"] <= 0.05 for row in rows if row["right"] == FULL]
    together = [row["p_holm"] <= 0.05 for row in rows if row["right"] == FULL]
    assert any(alone)
    assert sum(together) < sum(alone)


def test_intervals_stay_within_the_possible_values(answers):
    _, predictions = answers
    for task in ("sst2", "cola"):
        few = {name: p[:2, :6] for name, p in predictions.items()}
        metrics, _ = score_metrics(task, few, np.array([0, 1, 1, 0, 1, 1]), FULL)
        for m in metrics:
            least = -2 if task == "cola" and "difference" in m.stage else -1
            assert m.low is not None
            assert m.high is not None
            assert least <= m.low <= m.value <= m.high <= -least


def test_one_seed_has_no_interval_and_an_undefined_correlation_none_either(answers):
    labels, predictions = answers
    metrics, rows = score_metrics("sst2", {name: p[:1] for name, p in predictions.items()}, labels, FULL)
    assert all(m.low is not None and math.isnan(m.low) for m in metrics)
    assert all(corrected(row) == "open" for row in rows)
    constant = {FULL: np.random.default_rng(0).normal(size=(2, 9)), "head": np.ones((2, 9))}
    metrics, _ = score_metrics("stsb", constant, np.arange(9.0), FULL)
    assert all(math.isnan(m.value) for m in metrics if "head" in (m.left, m.right))
