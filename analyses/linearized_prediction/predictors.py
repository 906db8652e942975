"""Predictions of kernels on new rows: regression and gradient flow, each with a strength chosen on the training rows.

Kernels are of one output and ``(n + m, n + m)``: n training rows, then m new ones. The strength is the ridge, or the
time at which the flow stops. It is chosen from a grid by the squared error of the predictions on left-out folds of the
training rows; the labels of new rows are not used.
"""

from collections.abc import Callable, Mapping

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

import ntk
from ntk.dynamics import Spectrum, gradient_flow

RIDGES = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)
"""Ridges, relative to the kernel's mean diagonal entry over the training rows."""
TIMES = (0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0, 1e3, 3e3, 1e4)
"""Times of gradient flow, relative to n over the training kernel's trace, one over its mean eigenvalue."""
FOLDS = 4

Predictor = Callable[[Tensor, Tensor, Tensor], dict[float, Tensor]]
"""(kernel ``(n, n)``, y - f_0 ``(n, columns)``, cross kernel ``(m, n)``) -> f - f_0 of new rows, by strength."""


def regression(kernel: Tensor, residual: Tensor, cross: Tensor) -> dict[float, Tensor]:
    """Kernel ridge regression, like :func:`ntk.dynamics.kernel_regression`, at all ridges from one decomposition."""
    spectrum = Spectrum(kernel)
    mean = _unit(float(spectrum.values.mean()))
    return {ridge: cross @ spectrum.apply(1 / (spectrum.values + ridge * mean), residual) for ridge in RIDGES}


def flow(kernel: Tensor, residual: Tensor, cross: Tensor) -> dict[float, Tensor]:
    """Gradient flow of the linearised model on squared loss, stopped at each time."""
    unit = 1 / _unit(float(kernel.diagonal().mean()))
    moved = gradient_flow(kernel, residual, times=[t * unit for t in TIMES], cross=cross)
    return dict(zip(TIMES, moved, strict=True))


def sign_regression(kernel: Tensor, residual: Tensor, cross: Tensor) -> dict[float, Tensor]:
    """:func:`ntk.sign_gradient_regression` of a sign-gradient kernel, at all ridges."""
    mean = _unit(float(kernel.diagonal().mean()))
    start, start_of_new = (torch.zeros(n, dtype=torch.float64) for n in (len(kernel), len(cross)))

    def predicted(y: Tensor, ridge: float) -> Tensor:
        options = {"cross": cross, "initial_cross": start_of_new, "ridge": ridge * mean}
        return ntk.sign_gradient_regression(kernel, y, start, **options)

    return {ridge: torch.stack([predicted(y, ridge) for y in residual.T], dim=1) for ridge in RIDGES}


def _unit(mean: float) -> float:
    """The mean eigenvalue, in which ridges and times are measured.

    Raises:
        ntk.UndefinedMetricError: It is not positive.
    """
    if not mean > 0:
        raise ntk.UndefinedMetricError(
            f"the kernel of the training rows has the mean eigenvalue {mean:.3g}: ridges and times relative to it are "
            "undefined"
        )
    return mean


def predict(
    predictor: Predictor, kernel: Float[Tensor, "rows rows"], y: Float[Tensor, "n"], f0: Float[Tensor, "rows"], *,
    seed: int,
) -> tuple[Float[Tensor, "m"], float]:  # fmt: skip
    """Predicted outputs ``(m,)`` on the new rows, and the strength that was chosen on the training rows.

    Args:
        predictor: `regression`, `flow` or `sign_regression`.
        kernel: Kernel of the n training rows, then the m new rows.
        y: Targets of the training rows.
        f0: Initial outputs of all rows.
        seed: Seed of the folds.
    """
    n = len(y)
    K, residual, f0 = kernel.double(), (y - f0[:n]).double()[:, None], f0.double()
    errors: dict[float, float] = {}
    for held in folds(n, seed):
        kept = torch.tensor(sorted(set(range(n)) - set(held)))
        rows = torch.tensor(held)
        for strength, moved in predictor(K[kept][:, kept], residual[kept], K[rows][:, kept]).items():
            error = float((moved - residual[rows]).square().sum())
            errors[strength] = errors.get(strength, 0.0) + error
    best = min(errors, key=lambda strength: errors[strength])
    return f0[n:] + predictor(K[:n, :n], residual, K[n:, :n])[best][:, 0], best


def permuted_predictions(
    kernel: Float[Tensor, "rows rows"], y: Float[Tensor, "n"], f0: Float[Tensor, "rows"], ridge: float, *, draws: int,
    seed: int,
) -> Float[Tensor, "draws m"]:  # fmt: skip
    """Predictions of regression onto training labels in random order, at a given ridge, for comparison."""
    n, generator = len(y), torch.Generator().manual_seed(seed)
    K, f0 = kernel.double(), f0.double()
    targets = torch.stack([y[torch.randperm(n, generator=generator)] for _ in range(draws)], dim=1).double()
    return (f0[n:, None] + regression(K[:n, :n], targets - f0[:n, None], K[n:, :n])[ridge]).T


def folds(n: int, seed: int) -> list[list[int]]:
    """Row numbers in random parts of nearly equal size: `FOLDS` parts, or n if n is smaller."""
    order = np.random.default_rng(seed).permutation(n)
    return [sorted(part.tolist()) for part in np.array_split(order, min(FOLDS, n))]


# --- how alike two predictions are ----------------------------------------------------------------------------------


def classes(f: np.ndarray) -> np.ndarray:
    """The class, 0 or 1, from the difference of two logits."""
    return (np.asarray(f) > 0).astype(int)


def alikeness(f: np.ndarray, g: np.ndarray, labels: np.ndarray, f0: np.ndarray) -> Mapping[str, float]:
    """How similar two outputs ``(m,)`` are, and how similar unrelated outputs would be.

    Returns:
        `agreement`, the share of rows with the same predicted class; `chance_agreement`, its expectation if predicted
        classes were independent with the same frequencies; `independent_errors_agreement`, its expectation if they were
        independent given the label, as for two unrelated classifiers of these accuracies; `logit_correlation`,
        Pearson's correlation of f - f_0 and g - f_0; `logit_correlation_within_classes`, the same after the mean of
        each class is subtracted.
    """  # fmt: skip
    a, b = classes(f), classes(g)
    weights = [(np.mean(labels == c), a[labels == c], b[labels == c]) for c in np.unique(labels)]
    moved = [np.asarray(f) - f0, np.asarray(g) - f0]
    return {
        "agreement": float(np.mean(a == b)),
        "chance_agreement": _independent(a, b),
        "independent_errors_agreement": float(sum(w * _independent(x, z) for w, x, z in weights)),
        "logit_correlation": _correlation(*moved),
        "logit_correlation_within_classes": _correlation(*(_without_means(v, labels) for v in moved)),
    }


def _independent(a: np.ndarray, b: np.ndarray) -> float:
    p, q = float(np.mean(a)), float(np.mean(b))
    return p * q + (1 - p) * (1 - q)


def _without_means(values: np.ndarray, labels: np.ndarray) -> np.ndarray:
    result = values.copy()
    for c in np.unique(labels):
        result[labels == c] -= values[labels == c].mean()
    return result


def _correlation(x: np.ndarray, y: np.ndarray) -> float:
    x, y = x - x.mean(), y - y.mean()
    size = float(np.linalg.norm(x) * np.linalg.norm(y))
    return float(x @ y) / size if size else float("nan")
