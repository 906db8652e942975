"""Predictions, from a kernel, of the outputs during and after training: regression and gradient flow.

While a network's tangent features do not change, its outputs follow df/dt = -K dL/df in training on a loss L(f) by
gradient flow (Jacot, Gabriel and Hongler 2018; Lee et al. 2019, eq. 7). Outputs f and targets y are ``(n, c)``; kernels
``(n1, n2, c, c)``, or ``(n1, n2)`` for outputs that share one. Losses are sums over examples, (1/2) |f - y|^2 or the
cross-entropy; for means over n examples, divide the times by n. All functions compute in float64.
"""

import math
from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Float
from scipy.integrate import solve_ivp
from scipy.sparse.linalg import LinearOperator
from torch import Tensor, nn

from ntk.checks import check_numbers, not_overflown, real_and_finite
from ntk.dynamics.products import flowed, solved
from ntk.layout import Kernel, check_semidefinite, kernel_matrix

# By rounding of the entries of a kernel, eigenvalues may lie this far below zero, relative to the largest.
NEGATIVE = 1e-6
# A kernel counts as singular if its smallest eigenvalue, relative to the largest, is at most this: the coefficients
# would consist of rounding errors.
SINGULAR = 1e-13


class Spectrum:
    """Eigenvalues and eigenvectors of a training kernel, which determine training on squared loss.

    Attributes:
        values: ``(rows,)``, ascending; values below ``rounding`` are set to 0.
        vectors: ``(rows, rows)``.
        rounding: the accuracy of an eigenvalue, rows times the machine epsilon times the largest.
        outputs: c of the kernel, or None for a kernel that all outputs share.

    Raises:
        ValueError: the kernel is complex, not finite, not square, not symmetric, or not positive semi-definite.
        OverflowError: an eigenvalue overflows.
    """

    def __init__(self, kernel: Kernel):
        """Decompose a kernel at a cost of (n c)^3."""
        values, self.vectors = torch.linalg.eigh(kernel_matrix(kernel, symmetric=True))
        not_overflown(values, "the eigenvalues", "scale the kernel")
        check_semidefinite(values, NEGATIVE)
        self.rounding = len(values) * torch.finfo(torch.float64).eps * float(values[-1])
        self.values = torch.where(values > self.rounding, values, 0.0)
        self.outputs = kernel.shape[2] if kernel.ndim == 4 else None

    def rows(self, f: Float[Tensor, "n c"]) -> Float[Tensor, "rows columns"]:
        """The outputs as columns that the kernel's matrix can multiply.

        Raises:
            ValueError: the outputs are complex, not finite, or of a shape that does not fit the kernel.
        """
        f = real_and_finite(f, "outputs")
        n = len(self.values) if self.outputs is None else len(self.values) // self.outputs
        if f.ndim != 2 or len(f) != n or self.outputs not in (None, f.shape[1]):
            raise ValueError(f"expected outputs (n, c) of {n} examples, as the kernel's; got {tuple(f.shape)}")
        return f if self.outputs is None else f.reshape(-1, 1)

    def apply(self, function: Tensor, rows: Float[Tensor, "rows columns"]) -> Float[Tensor, "rows columns"]:
        """V diag(function) V^T rows."""
        return self.vectors @ (function[:, None] * (self.vectors.T @ rows))


def kernel_regression(
    kernel: Kernel | LinearOperator,
    targets: Float[Tensor, "n c"],
    initial: Float[Tensor, "_ _"] | None = None,
    *,
    cross: Kernel | LinearOperator | None = None,
    initial_cross: Float[Tensor, "m c"] | None = None,
    ridge: int | float = 0.0,
    tolerance: float = 1e-8,
    products: int = 500,
) -> Float[Tensor, "m c"]:
    """The limit of gradient flow on squared loss: f(x) = f_0(x) + K(x, X) (K + ridge I)^-1 (y - f_0(X)).

    Args:
        kernel: of the n training examples; or a symmetric positive semi-definite scipy ``LinearOperator`` of its
            matrix, such as :class:`ntk.NTKOperator`, whose products with vectors are then all that is used.
        targets: y.
        initial: f_0(X); 0 if None.
        cross: kernel or operator of m new inputs (rows) against the training examples; None for the training examples
            themselves.
        initial_cross: f_0 of the new inputs; 0 if None.
        ridge: penalty on the distance of the parameters from their start, (ridge / 2) |theta - theta_0|^2.
        tolerance: with an operator, the residual of the linear system, relative to |y - f_0|. The training outputs err
            by no more than tolerance |y - f_0|, an output of a new x by no more than that times
            sqrt(K(x, x) / ridge) / 2.
        products: with an operator, the most products with it; as many vectors are kept.

    Raises:
        ValueError: shapes that do not fit, numbers that are complex or not finite, a kernel that is not positive
            semi-definite, a negative ridge; a singular kernel without ridge, for which outputs of new inputs are not
            determined; an operator without ridge, since products do not show its smallest eigenvalues.
        ArithmeticError: with an operator, ``tolerance`` is not reached; says what is.
        OverflowError: the predictions overflow.
    """
    if not (math.isfinite(ridge) and ridge >= 0):
        raise ValueError(f"ridge must be at least 0; got {ridge}")
    if isinstance(kernel, LinearOperator):
        if ridge == 0:
            raise ValueError(
                "regression on an operator needs a ridge above 0: without it the result depends on the smallest "
                "eigenvalues, which products do not show; give a ridge, such as 1e-6 times the trace / rows, or the "
                "kernel as a matrix"
            )
        y, f0 = _start(targets, initial)
        b = _rows_of(kernel, y - f0)
        coefficients, moved = solved(kernel, b, ridge, _tolerance(tolerance), products)
        if cross is None:
            return _predicted(f0 + torch.from_numpy(moved).reshape(f0.shape))
        return _at_new(cross, torch.from_numpy(coefficients), y.shape[1], initial_cross)
    spectrum = Spectrum(kernel)
    shifted = spectrum.values + ridge
    if cross is not None and float(shifted[0]) <= SINGULAR * float(shifted[-1]):
        raise ValueError(
            f"the kernel is singular (eigenvalues from {float(shifted[0]):.3g} to {float(shifted[-1]):.3g}): examples "
            "repeat or parameters are fewer than outputs; give a ridge, such as 1e-8 times its trace"
        )
    y, f0 = _start(targets, initial)
    residual = spectrum.rows(y - f0)
    if cross is None:
        share = torch.where(spectrum.values > 0, spectrum.values / shifted, 0.0)
        return _predicted(f0 + spectrum.apply(share, residual).reshape(f0.shape))
    return _at_new(cross, spectrum.apply(1 / shifted, residual), y.shape[1], initial_cross)


def gradient_flow(
    kernel: Kernel | LinearOperator,
    targets: Float[Tensor, "n c"],
    initial: Float[Tensor, "_ _"] | None = None,
    *,
    times: Sequence[float] | Float[Tensor, "times"],
    cross: Kernel | LinearOperator | None = None,
    initial_cross: Float[Tensor, "m c"] | None = None,
    tolerance: float = 1e-8,
    products: int = 500,
) -> Float[Tensor, "times m c"]:
    """Outputs at the given times on squared loss: f_t(X) = y + exp(-K t) (f_0 - y) (Lee et al. 2019, eq. 8, 9).

    On new inputs f_t(x) = f_0(x) + K(x, X) K^-1 (I - exp(-K t)) (y - f_0). The kernel may be singular: along an
    eigenvector of eigenvalue 0 nothing moves, and K(x, X) is 0 on it. Eigenvalues within rounding of 0 are set to 0,
    since the rounding would grow with time. Gradient descent at rate r is at the times r, 2 r, ... as r goes to 0.
    Arguments as in :func:`kernel_regression`. With an operator the training outputs err by no more than
    tolerance |y - f_0| at any of the times, an output of a new x by no more than that times sqrt(K(x, x) t), beside the
    rounding of its products. The number of products grows with the square root of the largest eigenvalue times t.

    Raises:
        ValueError: as :func:`kernel_regression`, but no ridge is needed; negative times.
        ArithmeticError: as :func:`kernel_regression`.
    """
    if isinstance(kernel, LinearOperator):
        y, f0 = _start(targets, initial)
        b = _rows_of(kernel, y - f0)
        found, moves = flowed(kernel, b, _times(times), _tolerance(tolerance), products)
        if cross is None:
            return torch.stack([_predicted(f0 + torch.from_numpy(moved).reshape(f0.shape)) for moved in moves])
        return torch.stack([_at_new(cross, torch.from_numpy(a), y.shape[1], initial_cross) for a in found])
    spectrum = Spectrum(kernel)
    y, f0 = _start(targets, initial)
    residual = spectrum.rows(y - f0)
    results = []
    for t in _times(times):
        moved = -torch.expm1(-spectrum.values * t)
        if cross is None:
            results.append(_predicted(f0 + spectrum.apply(moved, residual).reshape(f0.shape)))
        else:
            weights = torch.where(spectrum.values > spectrum.rounding, moved / spectrum.values, 0.0)
            results.append(_at_new(cross, spectrum.apply(weights, residual), y.shape[1], initial_cross))
    return torch.stack(results)


def cross_entropy_flow(
    kernel: Kernel,
    labels: Tensor,
    initial: Float[Tensor, "n c"],
    *,
    times: Sequence[float] | Float[Tensor, "times"],
    cross: Kernel | None = None,
    initial_cross: Float[Tensor, "m c"] | None = None,
    tolerance: float = 1e-8,
) -> Float[Tensor, "times m c"]:
    """Logits at the given times on cross-entropy: df/dt = K (y - softmax(f)), y the labels' indicator vectors.

    The coefficients a of f_t = f_0 + K a, for training and new inputs alike, follow da/dt = y - softmax(f_0 + K a).
    Arguments as in :func:`kernel_regression`, and:

    Args:
        labels: ``(n,)`` classes, of an integer dtype, or ``(n, c)`` probabilities, whose rows sum to 1.
        initial: f_0(X), with one column for each class.
        tolerance: relative tolerance of the integrator (LSODA, which handles stiff equations).

    Raises:
        ValueError: as :func:`gradient_flow`; labels that do not fit, or are no classes or probabilities.
        ArithmeticError: the integrator fails; the message holds its reason.
    """
    spectrum = Spectrum(kernel)
    f0 = real_and_finite(initial, "initial")
    spectrum.rows(f0)
    y = _probabilities(labels, f0)
    if not 0 < tolerance < 1:
        raise ValueError(f"the integrator's relative tolerance must lie between 0 and 1; got {tolerance}")
    # Times the largest eigenvalue, a is of the order of the logits, for which the integrator's tolerance is meant.
    unit = float(spectrum.values[-1]) or 1.0
    K = kernel_matrix(kernel) / unit
    rows = (len(K), -1)
    instants = [t * unit for t in _times(times)]
    if not math.isfinite(max(instants)):
        raise OverflowError("the product of a time and the kernel's largest eigenvalue overflows float64: scale either")

    def slope(_: float, a: np.ndarray) -> np.ndarray:
        f = f0 + (K @ torch.from_numpy(a).reshape(rows)).reshape(f0.shape)
        return (y - torch.softmax(f, dim=1)).flatten().numpy()

    a = {0.0: np.zeros(f0.numel())}  # by instant
    if later := sorted({t for t in instants if t > 0}):
        solved = solve_ivp(slope, (0.0, later[-1]), a[0.0], "LSODA", later, rtol=tolerance, atol=tolerance * 1e-3)
        if not solved.success:
            raise ArithmeticError(f"the flow could not be integrated: {solved.message}")
        a |= zip(later, solved.y.T)
    coefficients = [torch.from_numpy(a[t].copy()).reshape(rows) for t in instants]
    if cross is None:
        return torch.stack([_predicted(f0 + (K @ column).reshape(f0.shape)) for column in coefficients])
    return torch.stack([_at_new(cross, column / unit, f0.shape[1], initial_cross) for column in coefficients])


def sign_gradient_kernel(
    jacobian: Float[Tensor, "n1 c p"], jacobian2: Float[Tensor, "n2 c p"] | None = None
) -> Float[Tensor, "n1 n2 c c"]:
    """<grad f_a(x), sign(grad f_b(x'))>, the effect on f(x) of sign descent on x' (Malladi et al. 2023, def. 3.4).

    Adam's first steps are sign descent, which this kernel describes instead of the tangent kernel. It is not
    symmetric, and scaling the network only scales its columns.

    Args:
        jacobian: grad f of the rows, parameters flattened.
        jacobian2: grad f of the columns; that of the rows if None.

    Raises:
        ValueError: a Jacobian that is complex or not finite.
        OverflowError: a sum over parameters overflows the Jacobian's dtype.
    """
    other = jacobian if jacobian2 is None else jacobian2
    for name, each in (("jacobian", jacobian), ("jacobian2", other)):
        check_numbers(each, name)
    kernel = torch.einsum("iap,jbp->ijab", jacobian, other.sign())
    return not_overflown(kernel, "sums over parameters", "pass the Jacobian in float64, or scaled")


def _start(targets: Tensor, initial: Tensor | None) -> tuple[Tensor, Tensor]:
    """Targets and initial outputs in float64."""
    y = real_and_finite(targets, "targets")
    if initial is None:
        return y, torch.zeros_like(y)
    if initial.shape != y.shape:
        raise ValueError(
            f"expected targets and initial outputs of one shape; got {tuple(y.shape)} and {tuple(initial.shape)}"
        )
    return y, real_and_finite(initial, "initial")


def _probabilities(labels: Tensor, logits: Float[Tensor, "n c"]) -> Float[Tensor, "n c"]:
    """Labels as the probability of each class."""
    n, c = logits.shape
    if labels.shape not in ((n,), (n, c)):
        raise ValueError(f"expected labels (n,) or probabilities (n, c) for logits {(n, c)}; got {tuple(labels.shape)}")
    if labels.ndim == 1:
        if labels.is_floating_point() or labels.is_complex():
            raise ValueError(f"expected labels (n,) of an integer dtype, the classes; got {labels.dtype}: use .long()")
        if not bool(((labels >= 0) & (labels < c)).all()):
            raise ValueError(f"expected classes from 0 to {c - 1}; labels go from {labels.min()} to {labels.max()}")
        return nn.functional.one_hot(labels.long(), c).double()
    y = real_and_finite(labels, "labels")
    if bool((y < 0).any()) or not bool(((y.sum(1) - 1).abs() <= 1e-6).all()):
        raise ValueError("expected probabilities (n, c) of at least 0, whose rows sum to 1: divide each row by its sum")
    return y


def _predicted(outputs: Tensor) -> Tensor:
    return not_overflown(outputs, "the predicted outputs", "scale targets and initial outputs")


def _rows_of(operator: LinearOperator, f: Float[Tensor, "n c"]) -> Float[np.ndarray, "rows columns"]:
    """The outputs as columns that an operator can multiply."""
    rows = operator.shape[0]
    if operator.shape[0] != operator.shape[1] or rows not in (len(f), f.numel()):
        raise ValueError(
            f"expected an operator of shape {(f.numel(),) * 2} for outputs {tuple(f.shape)}, or {(len(f),) * 2} for "
            f"outputs that share a kernel; got {operator.shape}"
        )
    return f.reshape(rows, -1).cpu().numpy()


def _tolerance(tolerance: float) -> float:
    if not 0 < tolerance < 1:
        raise ValueError(f"tolerance must lie between 0 and 1; got {tolerance}")
    return tolerance


def _at_new(cross: Kernel | LinearOperator, coefficients: Tensor, c: int, initial: Tensor | None) -> Tensor:
    K = cross if isinstance(cross, LinearOperator) else kernel_matrix(cross, "cross")
    if K.shape[1] != len(coefficients):
        raise ValueError(
            f"expected a cross kernel of new inputs against the {len(coefficients)} rows of the training kernel; got "
            f"{tuple(cross.shape)}"
        )
    if isinstance(K, LinearOperator):
        moved = torch.from_numpy(np.asarray(K.matmat(coefficients.numpy()), dtype=np.float64)).reshape(-1, c)
    else:
        moved = (K @ coefficients.to(K.device)).reshape(-1, c)
    if initial is None:
        return _predicted(moved)
    if initial.shape != moved.shape:
        raise ValueError(f"expected initial outputs {tuple(moved.shape)} of the new inputs; got {tuple(initial.shape)}")
    return _predicted(real_and_finite(initial, "initial_cross") + moved)


def _times(times: Sequence[float] | Tensor) -> list[float]:
    instants = [float(t) for t in times]
    if not instants or not all(math.isfinite(t) and t >= 0 for t in instants):
        raise ValueError(f"times must be finite and at least 0; got {instants}")
    return instants
