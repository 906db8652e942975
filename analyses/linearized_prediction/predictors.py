"""What kernels predict on new rows: regression and gradient flow, each with one strength chosen on the training rows.

Kernels are of one output and ``(n + m, n + m)``: n training rows, then m new ones. The strength (the ridge, or the time
at which the flow stops) is the one of a grid whose predictions of left-out folds of the training rows have the smallest
squared error; the new rows' labels play no part in it.
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
    """Kernel ridge regression, as :func:`ntk.dynamics.kernel_regression`, for all ridges from one decomposition."""
    spectrum = Spectrum(kernel)
    mean = float(spectrum.values.mean())
    return {ridge: cross @ spectrum.apply(1 / (spectrum.values + ridge * mean), residual) for ridge in RIDGES}


def flow(kernel: Tensor, residual: Tensor, cross: Tensor) -> dict[float, Tensor]:
    """Gradient flow of the linearised model on squared loss, stopped at each time."""
    unit = len(kernel) / float(kernel.trace())
    moved = gradient_flow(kernel, residual, times=[t * unit for t in TIMES], cross=cross)
    return dict(zip(TIMES, moved, strict=True))


def sign_regression(kernel: Tensor, residual: Tensor, cross: Tensor) -> dict[float, Tensor]:
    """:func:`ntk.sign_gradient_regression`, for a sign-gradient kernel."""
    mean = float(kernel.diagonal().mean())
    start, start_of_new = (torch.zeros(n, dtype=torch.float64) for n in (len(kernel), len(cross)))

    def predicted(y: Tensor, ridge: float) -> Tensor:
        options = {"cross": cross, "initial_cross": start_of_new, "ridge": ridge * mean}
        return ntk.sign_gradient_regression(kernel, y, start, **options)

    return {ridge: torch.stack([predicted(y, ridge) for y in residual.T], dim=1) for ridge in RIDGES}


def predict(
    predictor: Predictor, kernel: Float[Tensor, "rows rows"], y: Float[Tensor, "n"], f0: Float[Tensor, "rows"], *,
    seed: int,
) -> tuple[Float[Tensor, "m"], float]:  # fmt: skip
    """Outputs on the rows behind the n training rows, and the strength that was chosen on those.

    Args:
        predictor: one of this module.
        kernel: n training rows first.
        y: targets of the training rows.
        f0: initial outputs of all rows.
        seed: of the folds.
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
    """Regression onto training labels in random order, at a given ridge: what the kernel predicts of no labels."""
    n, generator = len(y), torch.Generator().manual_seed(seed)
    K, f0 = kernel.double(), f0.double()
    targets = torch.stack([y[torch.randperm(n, generator=generator)] for _ in range(draws)], dim=1).double()
    return (f0[n:, None] + regression(K[:n, :n], targets - f0[:n, None], K[n:, :n])[ridge]).T


def folds(n: int, seed: int) -> list[list[int]]:
    """Row numbers in random parts of nearly equal size, four or as many as there are rows."""
    order = np.random.default_rng(seed).permutation(n)
    return [sorted(part.tolist()) for part in np.array_split(order, min(FOLDS, n))]


# --- how alike two predictions are ----------------------------------------------------------------------------------


def classes(f: np.ndarray) -> np.ndarray:
    """The class, 0 or 1, that the difference of two logits says."""
    return (np.asarray(f) > 0).astype(int)


def alikeness(f: np.ndarray, g: np.ndarray, labels: np.ndarray, f0: np.ndarray) -> Mapping[str, float]:
    """How alike two outputs ``(m,)`` are, and what would be so by chance.

    Returns:
        `agreement`, the share of rows given the same class; `chance_agreement`, expected if the classes were
        independent at these rates; `independent_errors_agreement`, expected if they were independent given the label,
        which is what two unrelated classifiers as accurate as these reach; `logit_correlation`, Pearson's, f_0
        subtracted; `logit_correlation_within_classes`, the same once each class's mean is taken out.
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
