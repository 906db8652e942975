"""Metrics of the predictions and of the trained networks: scores, agreement and correlation of logits."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from analyses.linearized_prediction.predictors import alikeness, classes
from analyses.subjects.training_run import scores

REGRESSION, FLOW = "kernel regression", "gradient flow"
WITH_HEAD, SIGN = "kernel regression + head", "sign kernel regression"
HIDDEN, HEAD, MAJORITY, START = "hidden states", "head", "majority class", "untrained network"
PERMUTED, AGAIN = "permuted labels", "trained again"
PREDICTORS = {REGRESSION: "kernel", FLOW: "flow", WITH_HEAD: "kernel + head", SIGN: "sign kernel"}
"""Predictors that use a method's own kernel, with the name that their scores have in a result."""
NULL_KERNELS = (HIDDEN, HEAD)
_OTHER = "logit_correlation", "logit_correlation_within_classes"


@dataclass(frozen=True)
class Outcome:
    """Outputs (differences of two logits) on the m held-out rows, of one size and seed.

    Attributes:
        size: Size of the training set.
        seed: Seed of the training rows, the head and the runs.
        labels: ``(m,)``, 0 or 1.
        f0: ``(m,)``, outputs before training.
        kernel: (predictor, method or null kernel) -> ``(m,)``, predictions.
        strengths: (predictor, method or null kernel) -> the chosen ridge or time.
        permuted: ``(draws, m)``, regression onto permuted training labels with the first method's kernel.
        trained: method -> ``(m,)``, outputs of its trained network.
        again: method -> ``(m,)``, outputs of a network trained with another data order.
        losses: method -> mean training loss of the last steps.
    """

    size: int
    seed: int
    labels: np.ndarray
    f0: np.ndarray
    kernel: dict[tuple[str, str], np.ndarray]
    strengths: dict[tuple[str, str], float]
    permuted: np.ndarray
    trained: dict[str, np.ndarray]
    again: dict[str, np.ndarray]
    losses: dict[str, float]


def prefix_of(kind: str) -> str:
    """What precedes the names of metrics between the predictions of one kind, such as "kernel_head_"."""
    return f"{kind.replace(' + ', '_').replace(' ', '_')}_"


Key = tuple[str, str, str]  # The name, left and right of a metric.


def measures(outcome: Outcome, methods: Sequence[str], task: str) -> dict[Key, float]:
    """Every metric of one size and seed."""
    return dict([*_scores(outcome, methods, task), *_predictions(outcome, methods), *_between(outcome, methods)])


def _scores(o: Outcome, methods: Sequence[str], task: str) -> Iterator[tuple[Key, float]]:
    def score(f: np.ndarray) -> float:
        return next(iter(scores(task, classes(f), o.labels).values()))

    for method, f in o.trained.items():
        yield ("score", f"trained: {method}", ""), score(f)
    for (predictor, name), f in o.kernel.items():
        if predictor in PREDICTORS and name in methods:
            yield ("score", f"{PREDICTORS[predictor]}: {name}", ""), score(f)
        else:
            yield ("score", f"null: {name or predictor}", ""), score(f)
    if (REGRESSION, HEAD) in o.kernel and HEAD in methods:  # The method's kernel is the null kernel too.
        yield ("score", f"null: {HEAD}", ""), score(o.kernel[REGRESSION, HEAD])
    yield ("score", f"null: {PERMUTED}", ""), float(np.mean([score(f) for f in o.permuted]))


def _alike(o: Outcome, prefix: str, left: str, right: str, f: np.ndarray, g: np.ndarray) -> dict[Key, float]:
    found = alikeness(f, g, o.labels, o.f0)
    return {(f"{prefix}{name}", left, right): value for name, value in found.items()}


def _predictions(o: Outcome, methods: Sequence[str]) -> Iterator[tuple[Key, float]]:
    """Yield metrics of each trained network against predictions of its own kernel, of other kernels, and of nulls."""
    for method, f in o.trained.items():
        rivals = {p: g for (p, name), g in o.kernel.items() if name == method and p in PREDICTORS}
        rivals |= {name: g for (p, name), g in o.kernel.items() if p == REGRESSION and name in NULL_KERNELS}
        rivals |= {p: g for (p, _), g in o.kernel.items() if p in (MAJORITY, START)}
        found = {right: alikeness(f, g, o.labels, o.f0) for right, g in rivals.items()}
        draws = [alikeness(f, g, o.labels, o.f0) for g in o.permuted]
        found[PERMUTED] = {name: float(np.mean([draw[name] for draw in draws])) for name in draws[0]}
        for right, values in found.items():
            for name, value in values.items():
                if name not in _OTHER or right not in (MAJORITY, START):
                    yield ("prediction_agreement" if name == "agreement" else name, method, right), value
        for other in methods:
            values = alikeness(f, o.kernel[REGRESSION, other], o.labels, o.f0)
            for name in ("agreement", "logit_correlation"):
                yield (f"cross_{name}", f"trained: {method}", f"kernel: {other}"), values[name]


def _between(o: Outcome, methods: Sequence[str]) -> Iterator[tuple[Key, float]]:
    """Yield metrics of the first method's network and predictions against those of the other methods and of nulls."""
    first = methods[0]
    for other in methods[1:]:
        if o.trained:
            yield from _alike(o, "trained_", first, other, o.trained[first], o.trained[other]).items()
        for predictor, word in PREDICTORS.items():
            if (predictor, first) in o.kernel and (predictor, other) in o.kernel:
                pair = o.kernel[predictor, first], o.kernel[predictor, other]
                yield from _alike(o, prefix_of(word), first, other, *pair).items()
    for null in NULL_KERNELS:
        if (REGRESSION, null) in o.kernel:
            pair = o.kernel[REGRESSION, first], o.kernel[REGRESSION, null]
            yield from _alike(o, "kernel_", first, null, *pair).items()
    for method, f in o.again.items():
        yield from _alike(o, "trained_", method, AGAIN, o.trained[method], f).items()
