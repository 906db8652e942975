"""Metrics on predictions whose score is known, by hand or from the definition's own examples."""

import math

import numpy as np
import pytest

from propulsion.data.metrics import METRICS, answer_scores, entity_scores, rouge_scores

LABELS = np.array([0, 0, 1, 1, 1])
GUESSES = np.array([0, 1, 1, 1, 0])  # True negatives 1, false positives 1, false negatives 1, true positives 2.


@pytest.mark.parametrize(
    ("metric", "expected"),
    [("accuracy", 3 / 5), ("f1", 2 * 2 / (2 * 2 + 1 + 1)), ("matthews", (2 * 1 - 1 * 1) / math.sqrt(3 * 3 * 2 * 2))],
)
def test_classification_metrics(metric, expected):
    assert METRICS[metric](GUESSES, LABELS) == pytest.approx(expected, rel=1e-12)


def test_correlations():
    predictions, labels = np.array([0.0, 1.0, 2.0, 10.0]), np.array([1.0, 2.0, 3.0, 2.5])
    centred = [values - values.mean() for values in (predictions, labels)]
    by_hand = (centred[0] @ centred[1]) / np.sqrt((centred[0] @ centred[0]) * (centred[1] @ centred[1]))
    assert METRICS["pearson"](predictions, labels) == pytest.approx(by_hand, rel=1e-12)
    # Ranks 1 2 3 4 against 1 2 4 3: 1 - 6 * (1 + 1) / (4 * 15).
    assert METRICS["spearman"](predictions, labels) == pytest.approx(0.8, rel=1e-12)


@pytest.mark.parametrize("metric", ["pearson", "spearman"])
@pytest.mark.parametrize("constant", ["predictions", "labels"])
def test_a_correlation_with_a_constant_is_undefined_not_zero(metric, constant):
    varied, flat = np.arange(4.0), np.full(4, 2.0)
    value = METRICS[metric](flat, varied) if constant == "predictions" else METRICS[metric](varied, flat)
    assert math.isnan(value)


def test_one_class_predicted_throughout():
    ones = np.ones(5, dtype=int)
    assert METRICS["matthews"](ones, LABELS) == 0
    assert METRICS["f1"](np.zeros(5, dtype=int), LABELS) == 0


def test_entities_count_whole():
    labels = [["B-PER", "I-PER", "O", "B-LOC"], ["O", "B-ORG", "O"]]
    # Of three entities one is found, one has a wrong end, one is missed; and one prediction is no entity.
    predictions = [["B-PER", "O", "O", "B-LOC"], ["B-LOC", "O", "O"]]
    assert entity_scores(predictions, labels) == pytest.approx({"precision": 1 / 3, "recall": 1 / 3, "f1": 1 / 3})
    assert entity_scores(labels, labels) == {"precision": 1, "recall": 1, "f1": 1}
    assert entity_scores([["O"]], [["O"]]) == {"precision": 0, "recall": 0, "f1": 0}


def test_rouge_by_hand():
    # Unigrams: 5 of 6 on either side ("police killed the gunman" and the like). Longest common subsequence: 5.
    found = rouge_scores(["the cat sat on the mat"], ["the cat lay on the mat"])
    assert found["rouge1"] == pytest.approx(5 / 6)
    assert found["rouge2"] == pytest.approx(3 / 5)
    assert found["rougeL"] == pytest.approx(5 / 6)
    assert rouge_scores(["a b", "c"], ["a b", "d"])["rouge1"] == pytest.approx(0.5)


def test_squad_by_hand():
    found = answer_scores(["the Eiffel tower!", "in old Paris"], [["Eiffel Tower"], ["London", "Paris"]])
    # The first is exact up to case, article and punctuation; the second has one of three words right.
    assert found == pytest.approx({"exact_match": 1 / 2, "f1": (1 + 2 * (1 / 3) * 1 / (1 / 3 + 1)) / 2})


def test_questions_without_an_answer():
    found = answer_scores(["", "something", "", "yes"], [[], [], ["yes"], ["yes"]])
    assert found["exact_match"] == found["f1"] == 0.5
    assert found["no_answer_f1"] == found["has_answer_f1"] == 0.5
    assert "no_answer_f1" not in answer_scores(["yes"], [["yes"]])
    assert answer_scores([""], [["the"]])["exact_match"] == 1  # An answer of only an article counts as empty.
