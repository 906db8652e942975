"""Predictors of which method trains best: one short function each, and a table of them with their sources.

A predictor takes the `Evidence` of one candidate and returns a number, or None where the evidence lacks what it needs.
A new predictor is one function and one entry in `PREDICTORS`. Kernels are those of `ntk`, (n, n, c, c), of all that the
method trains with the head, after the head alone was trained on frozen features of other rows (Tomihari and Sato 2024).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from scipy import stats
from torch import Tensor

import ntk
from analyses.peft_kernels.measures import label_kernel
from ntk import UndefinedMetricError

RIDGE = 0.1
"""Ridge of the kernel regression, relative to the kernel's mean eigenvalue."""
FOLDS = 5


@dataclass(frozen=True)
class Evidence:
    """What is known of one candidate before it is trained in full.

    Attributes:
        trained_parameters: Number of parameters that it trains.
        gradient_norm: Euclidean norm of the training loss's gradient at the start.
        decrement: Sum over roles g of rate_g ||grad_g L||_1, by which one step of Adam lowers the loss to first order.
        score: Held-out score after the first round of successive halving.
        loss: Held-out loss then.
        training_loss: Mean training loss of the last quarter of those steps.
        features: Features ``(m, h)`` of the held-out rows then, which the head reads; None if they are not known.
        held_out: Labels ``(m,)`` of these rows.
        kernel: Kernel ``(n, n, c, c)`` of some training rows; None if it is not known.
        full: The same of full fine-tuning.
        outputs: Outputs ``(n, c)`` of these rows with the head that was trained on frozen features.
        labels: Their labels ``(n,)``.
        regression: Whether labels are real numbers.
    """

    trained_parameters: int
    gradient_norm: float | None
    decrement: float | None
    score: float
    loss: float
    training_loss: float
    features: np.ndarray | None
    held_out: np.ndarray
    kernel: Tensor | None
    full: Tensor | None
    outputs: np.ndarray | None
    labels: np.ndarray | None
    regression: bool


@dataclass(frozen=True)
class Predictor:
    """An entry of the table.

    Attributes:
        function: From the evidence of a candidate to a number, or None.
        sign: 1 if larger is predicted to be better, -1 if smaller is.
        source: Who proposed it, or what it is.
    """

    function: Callable[[Evidence], float | None]
    sign: int
    source: str


def targets(labels: np.ndarray, *, classes: int) -> Float[np.ndarray, "n c"]:
    """One-hot vectors of classes, or the values themselves as one column if `classes` is 1."""
    return labels[:, None].astype(float) if classes == 1 else np.eye(classes)[labels.astype(int)]


def residuals(outputs: Float[np.ndarray, "n c"], labels: np.ndarray) -> Float[np.ndarray, "n c"]:
    """Targets minus predictions: y - f of a regression, one-hot(y) - softmax(f) of a classification.

    For cross-entropy this is the negative gradient of a row's loss with respect to its outputs.
    """
    f = torch.from_numpy(np.asarray(outputs, dtype=float))
    predicted = f if f.shape[1] == 1 else f.softmax(dim=1)
    return targets(labels, classes=f.shape[1]) - predicted.numpy()


def kernel_regression_score(
    kernel: Float[Tensor, "n n c c"], outputs: Float[np.ndarray, "n c"], labels: np.ndarray
) -> float | None:
    """Cross-validated score of ridge regression of the residuals by a kernel: accuracy, or the share of variance.

    In each of `FOLDS` folds, with r the residuals, rows T kept and rows V left out, the prediction on V is

        softmax(f_V) + K_VT (K_TT + lambda I)^-1 r_T,        lambda = RIDGE tr(K) / (n c),

    with f_V in place of the softmax for a regression. Rows are dealt to folds in the order of their labels. One linear
    system of size n c for each fold. None for a kernel of trace 0, and for values that are all the same.
    """
    n, c = outputs.shape
    K = ntk.flatten(kernel).double().numpy()
    r = residuals(outputs, labels)
    ridge = RIDGE * np.trace(K) / len(K)
    if not ridge > 0 or (c == 1 and not np.ptp(labels)):
        return None
    fold = np.empty(n, dtype=int)
    fold[np.argsort(labels, kind="stable")] = np.arange(n) % FOLDS
    found = targets(labels, classes=c) - r
    for k in range(FOLDS):
        left, kept = np.repeat(fold == k, c), np.repeat(fold != k, c)
        weights = np.linalg.solve(K[np.ix_(kept, kept)] + ridge * np.eye(kept.sum()), r[fold != k].ravel())
        found[fold == k] += (K[np.ix_(left, kept)] @ weights).reshape(-1, c)
    if c > 1:
        return float((found.argmax(axis=1) == labels).mean())
    return float(1 - ((found[:, 0] - labels) ** 2).mean() / labels.astype(float).var())


def kernel_gradient_norm(
    kernel: Float[Tensor, "n n c c"], outputs: Float[np.ndarray, "n c"], labels: np.ndarray
) -> float:
    """Norm of the gradient of the mean loss, sqrt(r^T K r) / n, since the gradient is -J^T r / n.

    For a regression the loss is half of the mean squared error.
    """
    r = torch.from_numpy(residuals(outputs, labels)).flatten()
    square = float(r @ ntk.flatten(kernel).double() @ r)
    return math.sqrt(max(square, 0.0)) / len(outputs)


def effective_dimension(kernel: Float[Tensor, "n n c c"]) -> float | None:
    """tr K (K + lambda I)^-1 with lambda the mean eigenvalue (Zhang 2005, sec. 3): directions that a ridge leaves.

    None for a kernel of zeros.
    """
    values = torch.linalg.eigvalsh(ntk.flatten(kernel).double()).clamp(min=0)
    return float((values / (values + values.mean())).sum()) if values.any() else None


def log_evidence(features: Float[np.ndarray, "n h"], y: Float[np.ndarray, " n"]) -> float:
    """Logarithm of the largest evidence of Bayesian linear regression, over n (You et al. 2021, sec. 4, LogME).

    With weights w ~ N(0, 1/alpha) and noise of precision beta,

        (h/2 log alpha + n/2 log beta - n/2 log 2 pi - beta/2 ||F m - y||^2 - alpha/2 ||m||^2 - 1/2 log|A|) / n,

    A = alpha I + beta F^T F and m = beta A^-1 F^T y. The fixed point alpha = gamma / ||m||^2,
    beta = (n - gamma) / ||F m - y||^2, gamma = sum of beta s^2 / (alpha + beta s^2), maximises it (MacKay 1992); one
    singular value decomposition serves all iterations. Features that fit y exactly have no largest evidence: beta is at
    most 1e10. The evidence of features that are all zero does not depend on alpha.
    """
    n, h = features.shape
    U, s, _ = np.linalg.svd(np.asarray(features, dtype=float), full_matrices=False)
    z = U.T @ y
    outside = max(float(y @ y - z @ z), 0.0)  # The part of y that no weights reach.
    alpha = beta = 1.0
    for _ in range(200):
        shrunk = beta * s**2 / (alpha + beta * s**2)
        m2 = float(((shrunk * z)[s > 0] ** 2 / s[s > 0] ** 2).sum())
        rest = outside + float((((1 - shrunk) * z) ** 2).sum())
        gamma = float(shrunk.sum())
        new = gamma / max(m2, 1e-12) if gamma else alpha, min((n - gamma) / max(rest, 1e-12), 1e10)
        done = abs(math.log(new[0] / alpha)) + abs(math.log(new[1] / beta)) < 1e-6
        alpha, beta = new
        if done:
            break
    shrunk = beta * s**2 / (alpha + beta * s**2)
    m2 = float(((shrunk * z)[s > 0] ** 2 / s[s > 0] ** 2).sum())
    rest = outside + float((((1 - shrunk) * z) ** 2).sum())
    log_det = float(np.log(alpha + beta * s**2).sum()) + (h - len(s)) * math.log(alpha)
    total = h * math.log(alpha) + n * math.log(beta) - n * math.log(2 * math.pi) - beta * rest - alpha * m2 - log_det
    return total / 2 / n


def logme(features: Float[np.ndarray, "n h"], labels: np.ndarray, *, regression: bool) -> float:
    """`log_evidence` of the labels of a regression, or its mean over the classes that occur, one against the rest."""
    if regression:
        return log_evidence(features, labels.astype(float))
    return float(np.mean([log_evidence(features, (labels == c).astype(float)) for c in np.unique(labels)]))


def label_alignment(kernel: Tensor, labels: np.ndarray, *, regression: bool, centred: bool) -> float | None:
    """Alignment of a kernel, traced over outputs, with that of the labels (Cristianini et al. 2001).

    Centring (Cortes, Mohri and Rostamizadeh 2012) removes what all rows have in common: the mean of the tangent
    features, which is most of the kernel of a pre-trained model.
    """
    align = ntk.cka if centred else ntk.kernel_alignment
    try:
        return align(_traced(kernel), label_kernel(labels, regression=regression))
    except UndefinedMetricError:
        return None


def _cka_with_full(e: Evidence) -> float | None:
    if e.kernel is None or e.full is None:
        return None
    try:
        return ntk.cka(_traced(e.full), _traced(e.kernel))
    except UndefinedMetricError:
        return None


def _aligned(e: Evidence, *, centred: bool) -> float | None:
    if e.kernel is None or e.labels is None:
        return None
    return label_alignment(e.kernel, e.labels, regression=e.regression, centred=centred)


def _of_kernel(function: Callable[[Tensor, np.ndarray, np.ndarray], float | None], e: Evidence) -> float | None:
    if e.kernel is None or e.outputs is None or e.labels is None:
        return None
    return function(e.kernel, e.outputs, e.labels)


def _traced(kernel: Float[Tensor, "n n c c"]) -> Float[Tensor, "n n"]:
    return ntk.reduce_outputs(kernel.double(), "trace")


PREDICTORS: dict[str, Predictor] = {
    "early score": Predictor(lambda e: e.score, 1, "successive halving: Jamieson and Talwalkar 2016"),
    "early loss": Predictor(lambda e: e.loss, -1, "successive halving by the held-out loss"),
    "training loss": Predictor(lambda e: e.training_loss, -1, "sum of training losses: Ru et al. 2021"),
    "log parameters": Predictor(lambda e: math.log(e.trained_parameters), 1, "number of trained parameters"),
    "gradient norm": Predictor(lambda e: e.gradient_norm, 1, "Abdelfattah et al. 2021, grad_norm"),
    "decrement": Predictor(lambda e: e.decrement, 1, "first-order fall of the loss by a step of Adam"),
    "LogME": Predictor(
        lambda e: None if e.features is None else logme(e.features, e.held_out, regression=e.regression), 1,
        "You et al. 2021, of the features after the first round",
    ),
    "CKA with full": Predictor(_cka_with_full, 1, "Kornblith et al. 2019"),
    "label alignment": Predictor(lambda e: _aligned(e, centred=False), 1, "Cristianini et al. 2001"),
    "centred label alignment": Predictor(
        lambda e: _aligned(e, centred=True), 1, "Cortes, Mohri and Rostamizadeh 2012"
    ),
    "kernel regression": Predictor(
        lambda e: _of_kernel(kernel_regression_score, e), 1, "cross-validated, at a head trained on frozen features"
    ),
    "kernel gradient norm": Predictor(
        lambda e: _of_kernel(kernel_gradient_norm, e), 1, "at a head trained on frozen features"
    ),
    "effective dimension": Predictor(
        lambda e: None if e.kernel is None else effective_dimension(e.kernel), 1, "Zhang 2005"
    ),
}  # fmt: skip
"""The predictors by name."""


def rank_correlation(values: Int[np.ndarray, " k"] | Float[np.ndarray, " k"], scores: np.ndarray) -> float:
    """Spearman's rank correlation; NaN for fewer than three candidates, or if either side is constant."""
    if len(values) < 3 or np.ptp(values) == 0 or np.ptp(scores) == 0:
        return math.nan
    found: Any = stats.spearmanr(values, scores)
    return float(found.statistic)
