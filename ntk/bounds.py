"""Error of an inner product after a random projection: tail bound, exact variance, exact tail probability.

W is (d, n) with iid entries of mean 0 and variance 1; x and x' are projected to S = (1/d) (W x).(W x'), E[S] = x.x'.
Each of these kernels has entries S:

| kernel                                             | d        | x.x'                            |
|----------------------------------------------------|----------|---------------------------------|
| Propulsion on one random linear layer, k = 1       | width    | the inputs' inner product       |
| LoRA at B = 0, one layer and token, A variance 1/r | rank r   | of the layer's inputs a.a'      |
| a kernel sketched by m random directions           | m        | the kernel's entry K[i, j]      |

The tail bound and the exact tail hold for unit x, x', and depend only on rho = x.x'. Divide an entry of a kernel by
sqrt(K[i, i] K[j, j]) before using them. The bound is that of Theorem 1 of the Propulsion paper (Kowsher, Prottasha and
Bhat 2024) and of Malladi et al. (2023, sec. 5); the exact variance and tail are far sharper. Nothing here applies to a
projection that is not random, such as pre-trained weights.
"""

import math
from bisect import bisect_left
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from scipy.special import betaincinv, chdtr, chdtrc
from torch import Tensor

from ntk.checks import check_count, normalised, not_overflown, real_and_finite, shifted
from ntk.layout import Kernel, kernel_matrix

# The largest dimension that dimension_needed looks at.
LARGEST_DIMENSION = 10**9
# From here on the exact tail is computed by inversion.
_LARGE = 10**4


def tail_bound(d: int, epsilon: int | float) -> float:
    """Upper bound min(1, 4 exp(-(eps^2 - eps^3) d / 4)) of Pr[|S - rho| >= eps], for Gaussian W, unit x, x', eps < 1.

    It follows from Pr[| |W u|^2 / d - |u|^2 | >= eps |u|^2] <= 2 exp(-(eps^2 - eps^3) d / 4), at u = x + x' and at
    u = x - x' (Johnson and Lindenstrauss 1984; Dasgupta and Gupta 2003), because 4 S = (|W(x+x')|^2 - |W(x-x')|^2) / d.

    Raises:
        ValueError: d < 1, or epsilon outside (0, 1), where the bound is not proved.
    """
    _check_dimension(d)
    _check_epsilon(epsilon)
    return min(1.0, 4 * math.exp(-(epsilon**2 - epsilon**3) * d / 4))


def variance(d: int, rho: int | float) -> float:
    """Var[S] = (1 + rho^2) / d, exactly, for Gaussian W and unit x, x'."""
    _check_dimension(d)
    _check_rho(rho)
    return (1 + rho**2) / d


def projection_variance(x: Float[Tensor, "n"], x2: Float[Tensor, "n"], d: int, *, kurtosis: int | float = 3) -> float:
    """Var[S] = (|x|^2 |x'|^2 + (x.x')^2 + (kurtosis - 3) sum_i x_i^2 x'_i^2) / d, for any x, x' and iid entries of W.

    ``kurtosis`` is E[w^4] for entries of variance 1: 3 for Gaussian entries, 1 for signs, 9/5 for uniform ones (LoRA's
    A in peft).

    Raises:
        ValueError: vectors of different length, complex or not finite, kurtosis below 1 (no random variable has it),
            d < 1.
        OverflowError: the variance overflows.
    """
    x, x2 = _vectors(x, x2)
    _check_dimension(d)
    if not 1 <= kurtosis < math.inf:
        raise ValueError(f"the kurtosis E[w^4] / E[w^2]^2 is at least 1 and must be finite; got {kurtosis}")
    own = (x @ x) * (x2 @ x2) + (x @ x2) ** 2
    value = (own + (kurtosis - 3) * (x**2 * x2**2).sum()) / d
    return float(not_overflown(value, "the variance and its terms", "scale the vectors"))


def kernel_variance(kernel: Kernel, d: int) -> Float[Tensor, "rows rows"]:
    """Variance of each entry of a kernel sketched by d Gaussian directions: (K_ii K_jj + K_ij^2) / d, flattened.

    LoRA's kernel at rank d, for one layer and token, has this variance with K = a.a', times (g.g')^2.

    Raises:
        ValueError: the kernel is complex, not finite or not square; its diagonal or a 2 x 2 minor is negative; d < 1.
        OverflowError: a variance overflows.
    """
    _check_dimension(d)
    K, exponent = normalised(kernel_matrix(kernel, square=True))
    own = K.diagonal()[:, None] * K.diagonal()[None]
    if bool((K.diagonal() < 0).any()) or bool((own * (1 + 1e-6) < K**2).any()):
        raise ValueError("the kernel is not positive semi-definite: an entry exceeds sqrt(K[i, i] K[j, j])")
    return not_overflown(shifted((own + K**2) / d, 2 * exponent), "the variances of the entries", "scale the kernel")


def tail(d: int, epsilon: int | float, rho: int | float) -> float:
    """The exact probability Pr[|S - rho| >= eps], for Gaussian W and unit x, x' with x.x' = rho.

    S = (1 + rho)/(2 d) X - (1 - rho)/(2 d) Y with X, Y independent chi-square variables of d degrees of freedom, the
    squared norms of W(x + x') and W(x - x') in units of their variances. Below d = 10^4 one of them is integrated
    numerically, and the other's distribution function is known; from there on the characteristic function is inverted.
    The relative error is below 1e-9 for probabilities down to 1e-40 and d up to 10^14.

    Raises:
        ValueError: d below 1 or infinite, epsilon not positive, rho outside -1 to 1.

    Example:
        >>> round(tail(100, 0.2, 0.5), 4), round(tail_bound(100, 0.2), 4)
        (0.0724, 1.0)
    """
    _check_dimension(d)
    _check_epsilon(epsilon, upper=math.inf)
    _check_rho(rho)
    if d >= _LARGE:
        return min(1.0, _exceeds_by_inversion(rho, d, epsilon) + _exceeds_by_inversion(-rho, d, epsilon))
    a, b = (1 + rho) / (2 * d), (1 - rho) / (2 * d)
    return min(1.0, _exceeds(a, b, d, rho + epsilon) + _exceeds(b, a, d, epsilon - rho))


def dimension_needed(
    epsilon: int | float, confidence: int | float, *, rho: int | float | None = None, entries: int = 1
) -> int:
    """The least dimension d (width, rank or sketch size) for which |S - rho| < eps with probability ``confidence``.

    By :func:`tail_bound`, ceil(4 log(4 entries / (1 - confidence)) / (eps^2 - eps^3)); with ``rho`` by the exact
    :func:`tail`.

    Args:
        epsilon: error of an entry of a kernel, relative to sqrt(K[i, i] K[j, j]).
        confidence: probability that the error is below ``epsilon``.
        rho: the entry, relative to the same; None for a dimension that suffices at every rho.
        entries: number of entries that are all to be so accurate (union bound); n (n + 1) / 2 for a kernel.

    Raises:
        ValueError: epsilon or confidence outside (0, 1); more than 10^9 dimensions.

    Example:
        >>> dimension_needed(0.1, 0.95), dimension_needed(0.1, 0.95, rho=0.5)
        (1948, 480)
    """
    _check_epsilon(epsilon)
    if not 0 < confidence < 1:
        raise ValueError(f"confidence must lie between 0 and 1; got {confidence}")
    check_count(entries, "entries")
    failure = (1 - confidence) / entries
    least = 4 * math.log(4 / failure) / (1 - epsilon) / epsilon / epsilon
    if least > LARGEST_DIMENSION:
        raise ValueError(f"epsilon={epsilon} and confidence={confidence} take more than {LARGEST_DIMENSION} dimensions")
    d = math.ceil(4 * math.log(4 / failure) / (epsilon**2 - epsilon**3))
    if rho is None:
        return d
    # The bound's dimension always suffices, so the search ends before it.
    return 1 + bisect_left(range(1, d), True, key=lambda dimension: tail(dimension, epsilon, rho) <= failure)


@dataclass(frozen=True)
class Estimate:
    """A probability estimated from ``draws`` trials, with its Clopper-Pearson interval."""

    probability: float
    lower: float
    upper: float
    draws: int
    confidence: float


def clopper_pearson(successes: int, draws: int, confidence: int | float = 0.95) -> Estimate:
    """The exact binomial interval (Clopper and Pearson 1934), with coverage of at least ``confidence``.

    Example:
        >>> interval = clopper_pearson(0, 100, 0.95)
        >>> interval.lower, round(interval.upper, 4)
        (0.0, 0.0362)
    """
    if not 0 <= successes <= draws or not draws >= 1 or successes % 1 or draws % 1:
        raise ValueError(f"expected whole numbers 0 <= successes <= draws and draws >= 1; got {successes} of {draws}")
    if not 0 < confidence < 1:
        raise ValueError(f"confidence must lie between 0 and 1; got {confidence}")
    side = (1 - confidence) / 2
    lower = float(betaincinv(successes, draws - successes + 1, side)) if successes else 0.0
    upper = float(betaincinv(successes + 1, draws - successes, 1 - side)) if successes < draws else 1.0
    return Estimate(successes / draws, lower, upper, draws, confidence)


SIMULATIONS = ("plane", "matrix")


def simulate(
    x: Float[Tensor, "n"],
    x2: Float[Tensor, "n"],
    d: int,
    *,
    draws: int,
    generator: torch.Generator,
    method: str = "plane",
) -> Float[Tensor, "draws"]:
    """Draws of S = (1/d) (W x).(W x') with Gaussian W, for unit x and x'.

    | ``method``   | draws                                                                    | numbers a draw |
    |--------------|--------------------------------------------------------------------------|----------------|
    | ``"matrix"`` | W itself                                                                 | n d            |
    | ``"plane"``  | its products with an orthonormal basis of the plane of x and x', Gaussian | 2 d            |

    Raises:
        ValueError: x or x' is not of unit length; the bound and the tail are for unit vectors.
    """
    if method not in SIMULATIONS:
        raise ValueError(f"method must be one of {', '.join(map(repr, SIMULATIONS))}; got {method!r}")
    x, x2 = _vectors(x, x2)
    for name, vector in (("x", x), ("x2", x2)):
        if abs(float(vector.norm()) - 1) > 1e-9:
            raise ValueError(
                f"{name} must have unit length; its norm is {float(vector.norm()):.6g}. Divide it by that, or use "
                "projection_variance, which holds for any length"
            )
    _check_dimension(d)
    check_count(draws, "draws")
    if method == "plane":
        across = x2 - (x @ x2) * x
        x, x2 = torch.tensor([1.0, 0.0]).to(x), torch.stack([x @ x2, across.norm()])
    values, step = [], max(1, 10**6 // (d * len(x)))
    for start in range(0, draws, step):
        size = (min(step, draws - start), d, len(x))
        W = torch.randn(size, generator=generator, dtype=x.dtype, device=generator.device).to(x.device)
        values.append(((W @ x) * (W @ x2)).mean(dim=1))
    return torch.cat(values)


def estimate_tail(
    x: Float[Tensor, "n"],
    x2: Float[Tensor, "n"],
    d: int,
    epsilon: int | float,
    *,
    draws: int,
    generator: torch.Generator,
    confidence: int | float = 0.95,
) -> Estimate:
    """Pr[|S - rho| >= eps] by Monte Carlo (:func:`simulate`), with its Clopper-Pearson interval."""
    _check_epsilon(epsilon)
    S = simulate(x, x2, d, draws=draws, generator=generator)
    rho = float(x.double() @ x2.double())
    return clopper_pearson(int(((S - rho).abs() >= epsilon).sum()), draws, confidence)


def _exceeds(a: float, b: float, d: int, t: float) -> float:
    """Pr[a X - b Y >= t], X and Y independent chi-square with d degrees of freedom, a, b >= 0, a + b > 0.

    For t >= 0 it is E_Y[Pr(X >= (t + b Y) / a)] and for t < 0 E_X[Pr(Y <= (a X - t) / b)], whose inner probability is
    smooth. The outer variable is d exp(s); its density in s decays exponentially on both sides, so the trapezoidal rule
    converges exponentially. It gives the density's own integral, 1, to rounding too, so that the density needs no
    constant, whose terms of size d log(d) cancel.
    """
    if a == 0 and t >= 0:
        return 0.0
    if b == 0 and t < 0:
        return 1.0
    s = np.linspace(-(math.sqrt(500 / d) + 250 / d), math.log1p(math.sqrt(1000 / d) + 500 / d), 4001)
    density = np.exp(d / 2 * (s - np.expm1(s)))
    y = d * np.exp(s)
    inner = chdtrc(d, (t + b * y) / a) if t >= 0 else chdtr(d, (a * y - t) / b)
    return float(np.sum(density * inner) / np.sum(density))


def _exceeds_by_inversion(rho: float, d: int, epsilon: float) -> float:
    """Pr[S - rho >= eps] for large d, where scipy's chi-square distribution function loses its digits.

    With A = 1 + rho, B = 1 - rho and s = rho + eps, K(t) = -(log(1 - A t) + log(1 + B t)) / 2 is the cumulant function
    of one of the d terms of d S, and the probability is the integral of exp(d (K(t) - s t)) / t over a vertical line
    right of 0, divided by 2 pi i (Daniels 1987). The line passes through the saddle point K'(t) = s, or 1.5 standard
    deviations beside the pole at 0 if the saddle point is nearer to it. The integrand is nearly Gaussian there, and the
    trapezoidal rule converges exponentially. Linear parts of the logarithms cancel, so they are left out.
    """
    if epsilon >= 1:
        return 0.0  # below 1e-600 at d = 10^4
    A, B, s = 1 + rho, 1 - rho, rho + epsilon
    linear = 1 + rho**2 + 2 * rho * epsilon  # s A B t^2 + linear t - eps = 0 is K'(t) = s
    saddle = 2 * epsilon / (linear + math.sqrt(linear**2 + 4 * s * A * B * epsilon))
    t = max(saddle, 1.5 / math.sqrt(d * (1 + rho**2)))
    left, right = A / (1 - A * t), B / (1 + B * t)
    slope = (s * A * B * t**2 + linear * t - epsilon) / ((1 - A * t) * (1 + B * t))  # K'(t) - s
    y = np.arange(0, 14, 0.1) / math.sqrt(d * (left**2 + right**2) / 2)
    size = np.exp(-d / 4 * (np.log1p((left * y) ** 2) + np.log1p((right * y) ** 2)))
    phase = d * (slope * y + (_arctan_less(left * y) - _arctan_less(right * y)) / 2)
    values = size * (t * np.cos(phase) + y * np.sin(phase)) / (t**2 + y**2)
    peak = -d * ((_log1p_less(-A * t) + _log1p_less(B * t)) / 2 + epsilon * t)
    return math.exp(peak) * float(values.sum() - values[0] / 2) * float(y[1]) / math.pi


def _log1p_less(x: float) -> float:
    """log(1 + x) - x without cancellation: 2 artanh(r) - x, r = x / (2 + x)."""
    r = x / (2 + x)
    return math.log1p(x) - x if abs(r) > 1 / 3 else 2 * r**3 * float(_odd_series(r**2)) - 2 * r**2 / (1 - r)


def _arctan_less(x: Float[np.ndarray, "m"]) -> Float[np.ndarray, "m"]:
    """arctan(x) - x without cancellation."""
    return np.where(np.abs(x) > 1 / 3, np.arctan(x) - x, -(x**3) * _odd_series(-np.minimum(x**2, 1 / 9)))


def _odd_series(u: Any) -> Any:
    """The sum of u^k / (2 k + 3) for |u| <= 1/9: artanh(r) = r + r^3 times it at u = r^2."""
    return np.polynomial.polynomial.polyval(u, 1 / np.arange(3, 39, 2))


def _check_dimension(d: int) -> None:
    check_count(d, "the dimension d (width, rank or sketch size)")


def _check_epsilon(epsilon: float, upper: float = 1.0) -> None:
    if not 0 < epsilon < upper:
        raise ValueError(
            f"epsilon must lie in (0, {upper:g}); got {epsilon}"
            + (": eps^2 - eps^3 is not positive outside, and the bound says nothing" if upper == 1 else "")
        )


def _check_rho(rho: float) -> None:
    if not -1 <= rho <= 1:
        raise ValueError(f"rho is the inner product of unit vectors and must lie in [-1, 1]; got {rho}")


def _vectors(x: Tensor, x2: Tensor) -> tuple[Tensor, Tensor]:
    if x.ndim != 1 or x.shape != x2.shape:
        raise ValueError(f"expected two vectors of one length; got shapes {tuple(x.shape)} and {tuple(x2.shape)}")
    return real_and_finite(x, "x"), real_and_finite(x2, "x2")
