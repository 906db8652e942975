"""The task table and its metrics, each on predictions whose score is known by hand."""

import math

import numpy as np
import pytest

from propulsion.errors import UserError
from propulsion.metrics import METRICS
from propulsion.tasks import KINDS, TASKS, get_task

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


def test_degrees_are_those_of_the_paper():
    paper = {"sst2": 15, "rte": 15, "cola": 20, "stsb": 20, "mrpc": 55, "qqp": 15, "mnli": 20, "qnli": 55,
             "squad": 35, "squad_v2": 35, "xsum": 35, "cnn_dailymail": 25, "gsm8k": 15, "boolq": 15}  # fmt: skip
    assert {name: TASKS[name].degree for name in paper} == paper


@pytest.mark.parametrize("task", TASKS.values(), ids=lambda task: task.name)
def test_entries_are_consistent(task):
    assert task.kind in KINDS
    assert task.is_regression == (task.kind == "regression")
    assert task.num_labels == (len(task.label_names) or 1)
    assert (task.exchange is not None) == (task.kind == "instruction")
    if task.kind in ("classification", "regression"):
        assert set(task.metrics) <= METRICS.keys()


def test_unknown_task_lists_the_known():
    with pytest.raises(UserError, match=r"unknown task 'sst'.*sst2, rte"):
        get_task("sst")
