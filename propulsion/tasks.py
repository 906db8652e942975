"""The tasks, as data: text columns, labels, metrics, where the data is, and the degree the paper uses."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from jaxtyping import Shaped
from scipy import stats
from sklearn import metrics as sklearn_metrics

from propulsion.errors import UserError

Values = Shaped[np.ndarray, "n"]


@dataclass(frozen=True)
class Task:
    """One classification or regression task.

    Attributes:
        name: Name on the command line.
        text_columns: One column, or the two of a sentence pair.
        label_names: Names of labels 0, 1, ...; empty for a regression.
        label_range: Smallest and largest label of a regression; None for a classification.
        metrics: Names in `METRICS`, the headline first.
        degree: Propulsion's degree for this task (Kowsher et al. 2024, Appendix E).
        hub_config: Configuration of `HUB_PATH` that holds the data; None if it is not on the hub.
        validation_split: Name of the labelled held-out split.
    """

    name: str
    text_columns: tuple[str, ...]
    label_names: tuple[str, ...]
    metrics: tuple[str, ...]
    degree: float
    label_range: tuple[float, float] | None = None
    hub_config: str | None = None
    validation_split: str = "validation"

    @property
    def is_regression(self) -> bool:
        """Whether labels are real numbers."""
        return self.label_range is not None

    @property
    def num_labels(self) -> int:
        """Number of model outputs: the classes, or 1 for a regression."""
        return len(self.label_names) or 1


def accuracy(predictions: Values, labels: Values) -> float:
    """Share of examples predicted right."""
    return float(sklearn_metrics.accuracy_score(labels, predictions))


def f1(predictions: Values, labels: Values) -> float:
    """F1 of label 1; 0 if it is neither predicted nor present."""
    return float(sklearn_metrics.f1_score(labels, predictions, zero_division=0))  # pyright: ignore[reportArgumentType]


def matthews(predictions: Values, labels: Values) -> float:
    """Matthews correlation; 0 if one class is never predicted."""
    return float(sklearn_metrics.matthews_corrcoef(labels, predictions))


def pearson(predictions: Values, labels: Values) -> float:
    """Pearson correlation; not-a-number if either side is constant, where it is undefined."""
    return _correlation(stats.pearsonr, predictions, labels)


def spearman(predictions: Values, labels: Values) -> float:
    """Spearman rank correlation; not-a-number if either side is constant, where it is undefined."""
    return _correlation(stats.spearmanr, predictions, labels)


def _correlation(function: Callable, predictions: Values, labels: Values) -> float:
    if np.ptp(predictions) == 0 or np.ptp(labels) == 0:
        return float("nan")
    return float(function(predictions, labels).statistic)


# A metric is one function (predictions, labels) -> float, larger is better.
METRICS: dict[str, Callable[[Values, Values], float]] = {
    "accuracy": accuracy,
    "f1": f1,
    "matthews": matthews,
    "pearson": pearson,
    "spearman": spearman,
}

HUB_PATH = "nyu-mll/glue"
_SENTIMENT = ("negative", "positive")
_ENTAILMENT = ("entailment", "not_entailment")
_DUPLICATE = ("not_equivalent", "equivalent")
_PAIR = ("sentence1", "sentence2")

_TASKS = (
    Task("demo", ("sentence",), _SENTIMENT, ("accuracy",), 15),
    Task("sst2", ("sentence",), _SENTIMENT, ("accuracy",), 15, hub_config="sst2"),
    Task("rte", _PAIR, _ENTAILMENT, ("accuracy",), 15, hub_config="rte"),
    Task("cola", ("sentence",), ("unacceptable", "acceptable"), ("matthews",), 20, hub_config="cola"),
    Task("stsb", _PAIR, (), ("pearson", "spearman"), 20, label_range=(0.0, 5.0), hub_config="stsb"),
    Task("mrpc", _PAIR, _DUPLICATE, ("accuracy", "f1"), 55, hub_config="mrpc"),
    Task("qqp", ("question1", "question2"), ("not_duplicate", "duplicate"), ("accuracy", "f1"), 15, hub_config="qqp"),
    Task(
        "mnli",
        ("premise", "hypothesis"),
        ("entailment", "neutral", "contradiction"),
        ("accuracy",),
        20,
        hub_config="mnli",
        validation_split="validation_matched",
    ),
    Task("qnli", ("question", "sentence"), _ENTAILMENT, ("accuracy",), 55, hub_config="qnli"),
)
TASKS: dict[str, Task] = {task.name: task for task in _TASKS}


def get_task(name: str) -> Task:
    """Return a task by name.

    Raises:
        UserError: If there is no such task; the message lists those there are.
    """
    if name not in TASKS:
        raise UserError(f"unknown task {name!r}: the tasks are {', '.join(TASKS)}")
    return TASKS[name]
