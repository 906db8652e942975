"""The three expectations for any differentiable activation: a Hermite series, and the plain two-dimensional rule.

| name          | for                            | cost for n1 x n2 pairs                                |
|---------------|--------------------------------|-------------------------------------------------------|
| ``series``    | the default without closed form | n nodes terms + n1 n2 terms, terms from 64 to 2048    |
| ``quadrature``| its check, a few pairs          | n1 n2 nodes^2, nodes from 32 to 512 an axis           |

Both refine until two levels agree and refuse, with the error they reached, when they never do: kinks converge slowly,
and so do poles near the real axis once the variance is large (tanh at q = 100).
"""

import math
from collections.abc import Callable
from functools import lru_cache

import torch
from jaxtyping import Float
from scipy.special import roots_hermitenorm
from torch import Tensor

from ntk.infinite.activations import Activation
from ntk.infinite.gaussian import Moments, Pairs

TOLERANCE = 1e-12
LARGEST_DEGREE = 2048
_STEPS = tuple(2.0**-i for i in range(4, 9))
_NODES = (32, 64, 128, 256, 512)
_REACH = 13.0  # standard deviations: exp(-13^2 / 4) is below rounding, and half of the weight is all that is used

Function = Callable[[Tensor], Tensor]


class ConvergenceError(ValueError):
    """A quadrature does not reach its tolerance."""


def integrands(activation: Activation) -> tuple[Function, Function, Function]:
    """phi, phi' and h phi'(h): the expectations of :class:`Moments` are of their products at h and h'."""
    return activation.function, activation.derivative, lambda h: h * activation.derivative(h)


def diagonal_moments(activation: Activation, q: Float[Tensor, "n"]) -> Moments:
    """The expectations at h' = h ~ N(0, q), by the trapezoidal rule: exponentially accurate for analytic functions."""
    return Moments(*(_second_moment(f, q, activation.name)[0] for f in integrands(activation)))


def series_moments(activation: Activation, pairs: Pairs) -> Moments:
    """By Mehler's formula: with a_k(q) = E[f(sqrt(q) z) He_k(z)] / sqrt(k!),

        E[f(h) f(h')] = sum_k rho^k a_k(q) a_k(q')

    The terms left out after K are at most |rho|^K sqrt(t t'), t = E[f(h)^2] - sum_{k<K} a_k(q)^2; K grows until that is
    below 1e-12 of sqrt(E[f(h)^2] E[f(h')^2]) for every pair. Takes ``pairs`` with q1 (n1, 1) and q2 (1, n2).

    Raises:
        ConvergenceError: 2048 terms do not reach it.
    """
    q1, q2 = pairs.q1[:, 0], pairs.q2[0]
    same, rho = pairs.same, (pairs.plus - pairs.minus) / 2
    rho = torch.where(same, torch.zeros_like(rho), rho)
    results = []
    for f in integrands(activation):
        (own1, step1), (own2, step2) = (_second_moment(f, q, activation.name) for q in (q1, q2))
        sum_ = _mehler(f, q1, q2, own1, own2, rho, min(step1, step2), activation.name)
        results.append(torch.where(same, own1[:, None].expand_as(sum_), sum_))
    return Moments(*results)


def quadrature_moments(activation: Activation, pairs: Pairs, tolerance: float = 1e-10) -> Moments:
    """By the product Gauss-Hermite rule on h = sqrt(q) z, h' = sqrt(q') (rho z + sqrt(1 - rho^2) z').

    Raises:
        ConvergenceError: 512^2 nodes and 256^2 differ by more than ``tolerance``, relative to the largest value.
    """
    previous: Moments | None = None
    error = math.inf
    for nodes in _NODES:
        current = Moments(*(_product_rule(f, pairs, nodes) for f in integrands(activation)))
        if previous is not None:
            error = max(float((a - b).abs().max() / a.abs().max().clamp(min=1e-300)) for a, b in zip(current, previous))
            if error <= tolerance:
                return current
        previous = current
    raise ConvergenceError(_refusal(activation.name, f"{_NODES[-1]}^2 Gauss-Hermite nodes", error))


def _mehler(
    f: Function, q1: Tensor, q2: Tensor, own1: Tensor, own2: Tensor, rho: Tensor, step: float, name: str
) -> Tensor:
    error, terms = math.inf, 32
    size = (own1[:, None] * own2[None]).sqrt()
    while terms < LARGEST_DEGREE:
        terms *= 2
        a, b = (_coefficients(f, q, terms, step) for q in (q1, q2))
        # Never below the rounding of the difference: a tail of 0 would vouch for the other factor, however long.
        tails = [torch.maximum(own - (x**2).sum(1), 1e-15 * own) for own, x in ((own1, a), (own2, b))]
        left_out = rho.abs() ** terms * (tails[0][:, None] * tails[1][None]).sqrt()
        error = float(torch.nan_to_num(left_out / size, nan=0.0).max())
        if error <= TOLERANCE:
            result = torch.zeros_like(rho)
            for k in range(terms - 1, -1, -1):  # Horner's scheme in rho
                torch.addr(result.mul_(rho), a[:, k], b[:, k], out=result)
            return result
    raise ConvergenceError(_refusal(name, f"{LARGEST_DEGREE} Hermite terms", error))


def _coefficients(f: Function, q: Tensor, terms: int, step: float) -> Float[Tensor, "n k"]:
    z, weights, basis = _hermite_basis(terms, step)
    z, weights, basis = (x.to(q) for x in (z, weights, basis))
    return (f(q.sqrt()[:, None] * z) * weights) @ basis.T


@lru_cache(maxsize=4)
def _hermite_basis(terms: int, step: float) -> tuple[Tensor, Tensor, Tensor]:
    """Nodes z, the weights exp(-z^2 / 4) step / sqrt(2 pi), and exp(-z^2 / 4) He_k(z) / sqrt(k!), which is bounded."""
    z = _grid(step)
    half = torch.exp(-(z**2) / 4)
    rows = [half, z * half]
    for k in range(1, terms - 1):
        rows.append((z * rows[-1] - math.sqrt(k) * rows[-2]) / math.sqrt(k + 1))
    return z, half * step / math.sqrt(2 * math.pi), torch.stack(rows[:terms])


def _second_moment(f: Function, q: Tensor, name: str) -> tuple[Tensor, float]:
    """E[f(h)^2], h ~ N(0, q), and the step of the trapezoidal rule that the coefficients need as well.

    A step is accepted when it agrees with the next finer one to 1e-13; that finer one is returned. Its error on the
    square is then around 1e-26, on a product with a Hermite function of the degrees in use 1e-13 or less.
    """
    error, previous = math.inf, None
    for step in _STEPS:
        z = _grid(step).to(q)
        weights = torch.exp(-(z**2) / 2) * step / math.sqrt(2 * math.pi)
        current = (f(q.sqrt()[:, None] * z) ** 2) @ weights
        if not torch.isfinite(current).all():
            raise ConvergenceError(f"activation {name} is not finite within {_REACH:g} standard deviations")
        if previous is not None:
            error = float(torch.nan_to_num((current - previous).abs() / current, nan=0.0).max())
            if error <= 1e-13:
                return current, step
        previous = current
    raise ConvergenceError(_refusal(name, f"{len(_grid(_STEPS[-1]))} nodes", error))


def _grid(step: float) -> Tensor:
    n = round(_REACH / step)
    return torch.arange(-n, n + 1, dtype=torch.float64) * step


def _product_rule(f: Function, pairs: Pairs, nodes: int) -> Tensor:
    z, weights = (torch.as_tensor(x).to(pairs.cov) for x in roots_hermitenorm(nodes))
    weights = weights / math.sqrt(2 * math.pi)
    shape = pairs.cov.shape
    s1, s2, rho, sine = (
        x.expand(shape).reshape(-1, 1, 1)
        for x in (pairs.q1.sqrt(), pairs.q2.sqrt(), (pairs.plus - pairs.minus) / 2, pairs.sine)
    )
    values = []
    for i in range(s1.shape[0]):  # a pair at a time: the plain formula
        h, h2 = s1[i] * z[:, None], s2[i] * (rho[i] * z[:, None] + sine[i] * z[None, :])
        values.append((weights * f(h)[:, 0]) @ f(h2) @ weights)
    return torch.stack(values).reshape(shape)


def _refusal(name: str, what: str, error: float) -> str:
    return (
        f"the expectations of activation {name} do not converge: {what} reach a relative error of {error:.1g}. Kinks "
        "and large variances cause this: use an activation with closed forms (relu, leaky_relu), smaller inputs or a "
        "smaller sigma_w"
    )
