"""Regression and gradient flow from products with a training kernel, by Krylov spaces with bounds of their error.

With b = y - f_0, both have coefficients g(K) b: g(x) = 1 / (x + ridge) for regression, and g(x) = (1 - exp(-x t)) / x
for the flow until t. In a Krylov space of m vectors (:mod:`ntk.krylov`) what remains is |b| beta_m |g(T)[m, 1]|: the
residual of the linear system, and for the flow the integral over time of the size of its residual, since
exp(-s T)[m, 1] keeps its sign. As K has no negative eigenvalue, the flow's outputs err by no more than that.
"""

from collections.abc import Callable

import numpy as np
from jaxtyping import Float
from scipy.sparse.linalg import LinearOperator

from ntk.krylov import Krylov, lanczos
from ntk.trace_estimation import images

Function = Callable[[np.ndarray], np.ndarray]


def ridge_function(ridge: float) -> Function:
    """g(x) = 1 / (x + ridge)."""
    return lambda values: 1 / (np.maximum(values, 0) + ridge)


def flow_function(t: float) -> Function:
    """g(x) = (1 - exp(-x t)) / x, and t at 0."""

    def function(values: np.ndarray) -> np.ndarray:
        x = np.maximum(values, 0)
        return np.where(x > 0, -np.expm1(-x * t) / np.where(x > 0, x, 1.0), t)

    return function


def solved(
    A: LinearOperator, b: Float[np.ndarray, "rows k"], ridge: float, tolerance: float, products: int
) -> tuple[Float[np.ndarray, "rows k"], Float[np.ndarray, "rows k"]]:
    """a = (A + ridge)^-1 b, and A a, with |b - (A + ridge) a| <= tolerance |b| for each column.

    Raises:
        ArithmeticError: more products would be needed.
    """
    space = _space(A, b, ridge_function(ridge), tolerance, products)
    a = space.applied(ridge_function(ridge))
    image = images(A, a)
    _check(b - image - ridge * a, b, A, tolerance)
    return a, image


def flowed(
    A: LinearOperator, b: Float[np.ndarray, "rows k"], times: list[float], tolerance: float, products: int
) -> tuple[list[Float[np.ndarray, "rows k"]], list[Float[np.ndarray, "rows k"]]]:
    """For each time a = A^-1 (1 - exp(-A t)) b, and the movement A a, to tolerance |b| in the norm of each column.

    Raises:
        ArithmeticError: more products would be needed.
    """
    latest = max(times)
    space = _space(A, b, flow_function(latest), tolerance, products)
    coefficients = [space.applied(flow_function(t)) for t in times]
    moved = [b - space.applied(lambda values, t=t: np.exp(-np.maximum(values, 0) * t)) for t in times]
    last = times.index(latest)
    _check(images(A, coefficients[last]) - moved[last], b, A, tolerance)
    return coefficients, moved


def _space(A: LinearOperator, b: np.ndarray, function: Function, tolerance: float, products: int) -> Krylov:
    """A Krylov space in which the remainder of the function is half the tolerance."""

    def enough(space: Krylov) -> bool:
        return bool((space.remainder(function) <= tolerance / 2).all())

    space = lanczos(A, b, products, enough)
    if not enough(space):
        worst = float(space.remainder(function).max())
        raise ArithmeticError(
            f"after {space.alpha.shape[1]} products the error bound is {worst:.2g} of |y - f_0|, above the tolerance "
            f"{tolerance:g}: give a larger ridge, earlier times or a larger tolerance, more products=, or the kernel "
            "as a matrix"
        )
    return space


def _check(residual: np.ndarray, b: np.ndarray, A: LinearOperator, tolerance: float) -> None:
    """Compare with the operator itself what the recurrence says, which products in low precision may belie."""
    size = np.linalg.norm(residual, axis=0) / np.maximum(np.linalg.norm(b, axis=0), np.finfo(float).tiny)
    if not bool((size <= tolerance).all()):
        raise ArithmeticError(
            f"the residual is {float(size.max()):.2g} of |y - f_0|, above the tolerance {tolerance:g}: products in "
            f"{A.dtype} are not exact enough; take the model in float64, or a larger tolerance or ridge"
        )
