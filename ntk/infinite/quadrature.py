"""The three expectations for any differentiable activation: a Hermite series, and a plain rule on the plane.

| name           | what                                                | cost                                        |
|----------------|-----------------------------------------------------|---------------------------------------------|
| ``series``     | Hermite expansion of each side, Mehler's formula    | n nodes terms + n1 n2 terms, 64 - 2048 terms |
| ``quadrature`` | Gauss-Legendre in polar coordinates, pair by pair   | n1 n2 nodes, about 10^4 to 10^6 nodes        |

The series is the default for activations without closed form. The plain rule takes the few pairs for which the series
does not converge: nearly parallel ones of activations that are steep or have a kink. Both rules have a panel boundary
at 0, so that a kink there costs no accuracy (ELU, softsign), and both refine until two levels agree. If no two levels
agree, because of a kink or jump elsewhere (hardtanh at 1), they raise an error that says the accuracy reached. The same
happens if an activation grows so fast that its expectations lie beyond the nodes (exp at a variance of 70).
"""

import math
from collections.abc import Callable
from functools import lru_cache

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from ntk.checks import real_and_finite
from ntk.infinite.activations import Activation
from ntk.infinite.gaussian import Moments, Pairs

TOLERANCE = 1e-12
LARGEST_DEGREE = 2048
_LINE_NODES = (16, 24, 48)  # of a panel of the line
_PLANE_NODES = (8, 12, 16, 24, 32)  # of a panel of the radius and of the angle
# Half-widths of the line, in standard deviations. The weight exp(-h^2 / 4) of a Hermite coefficient is below rounding
# at the first, which suffices for every activation of polynomial growth; exp and sinh take the second.
_REACHES = (13.0, 26.0)
# A pair by the plain rule costs about as much as this many multiply-adds of the series.
_PLANE_COST = 2_000_000
_CHUNK = 2**22  # numbers held at once by the plain rule

Function = Callable[[Tensor], Tensor]


class ConvergenceError(ValueError):
    """A quadrature does not reach its tolerance."""


def integrands(activation: Activation) -> tuple[Function, Function, Function]:
    """phi, phi' and h phi'(h): the expectations of :class:`Moments` are of their products at h and h'."""
    return activation.function, activation.derivative, lambda h: h * activation.derivative(h)


def diagonal_moments(activation: Activation, q: Float[Tensor, "n"]) -> Moments:
    """The expectations at h' = h ~ N(0, q), by Gauss-Legendre panels that narrow towards 0.

    Raises:
        ConvergenceError: the finest panels do not reach a relative error of 1e-12.
    """
    reach = _reach(activation, q)
    return Moments(*(_second_moment(f, q, activation.name, reach)[0] for f in integrands(activation)))


def series_moments(activation: Activation, pairs: Pairs) -> Moments:
    """The expectations by Mehler's formula: with a_k(q) = E[f(sqrt(q) z) He_k(z)] / sqrt(k!),

        E[f(h) f(h')] = sum_k rho^k a_k(q) a_k(q')

    The terms left out after K are at most |rho|^K sqrt(t t'), t = E[f(h)^2] - sum_{k<K} a_k(q)^2. K grows until that is
    below 1e-12 of sqrt(E[f(h)^2] E[f(h')^2]) for all pairs except those that :func:`plane_moments` takes at a lower
    cost. ``pairs`` must have q1 (n1, 1) and q2 (1, n2).

    Raises:
        ConvergenceError: neither reaches that accuracy.
    """
    q1, q2 = pairs.q1[:, 0], pairs.q2[0]
    reach = _reach(activation, torch.cat([q1, q2]))
    rho = (pairs.plus - pairs.minus) / 2
    skipped = pairs.same  # the pairs for which the series is not needed
    sums, own = [], []
    for f in integrands(activation):
        (own1, level1), (own2, level2) = (_second_moment(f, q, activation.name, reach) for q in (q1, q2))
        sum_, missed = _mehler(f, q1, q2, own1, own2, rho, skipped, max(level1, level2), reach)
        sums.append(sum_)
        own.append(own1)
        skipped = skipped | missed  # the plain rule gives all three expectations of a pair
    if bool((hard := skipped & ~pairs.same).any()):
        for sum_, values in zip(sums, plane_moments(activation, *_flat(pairs, hard)), strict=True):
            sum_[hard] = values
    return Moments(*(torch.where(pairs.same, o[:, None].expand_as(s), s) for o, s in zip(own, sums, strict=True)))


def quadrature_moments(activation: Activation, pairs: Pairs) -> Moments:
    """The expectations by :func:`plane_moments`, pair by pair."""
    everywhere = torch.ones_like(pairs.cov, dtype=torch.bool)
    moments = plane_moments(activation, *_flat(pairs, everywhere))
    return Moments(*(values.reshape(pairs.cov.shape) for values in moments))


def plane_moments(
    activation: Activation, s1: Float[Tensor, "m"], s2: Float[Tensor, "m"], angle: Float[Tensor, "m"]
) -> Moments:
    """The expectations of m pairs of standard deviations s1, s2 and correlation cos(angle), in polar coordinates.

    h = s1 r cos(t), h' = s2 r cos(t - angle), weight r exp(-r^2 / 2) / (2 pi). The zeros of h and h' are four rays,
    which bound the panels, so an activation that is analytic except for a kink at 0 is integrated to rounding.

    Raises:
        ConvergenceError: a pair's value changes by more than 1e-12 of E|f f'| between the two finest levels.
        ValueError: deviations or angles that are complex or not finite.
    """
    s1, s2, angle = (real_and_finite(x, name) for x, name in ((s1, "s1"), (s2, "s2"), (angle, "angle")))
    reach = _reach(activation, torch.cat([s1, s2]) ** 2)
    results = torch.empty(3, len(s1), dtype=s1.dtype, device=s1.device)
    steep = torch.maximum(s1, s2).clamp(min=1)
    todo, previous, error = torch.arange(len(s1), device=s1.device), None, math.inf
    for nodes in _PLANE_NODES:
        grading = 2 + math.ceil(math.log2(float(steep[todo].max())))
        values, sizes = _plane_rule(activation, s1[todo], s2[todo], angle[todo], nodes, grading, reach)
        results[:, todo] = values
        if previous is not None:
            # Where the size is 0, so are the values; NaN is an overflow, which does not count as converged.
            errors = torch.where(sizes == 0, 0.0, (values - previous).abs() / sizes).amax(0)
            error = float(errors.max())
            keep = ~(errors <= TOLERANCE)
            todo, values = todo[keep], values[:, keep]
            if not len(todo):
                return Moments(*results)
        previous = values
    raise ConvergenceError(_refusal(activation.name, f"{_PLANE_NODES[-1]} nodes to a panel", error))


def _flat(pairs: Pairs, chosen: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Standard deviations and angles of the chosen pairs; the angle by half angles, accurate from 0 to pi."""
    s1, s2, minus, plus = (
        x.expand(chosen.shape)[chosen] for x in (pairs.q1.sqrt(), pairs.q2.sqrt(), pairs.minus, pairs.plus)
    )
    return s1, s2, 2 * torch.atan2(minus.sqrt(), plus.sqrt())


def _mehler(
    f: Function,
    q1: Tensor,
    q2: Tensor,
    own1: Tensor,
    own2: Tensor,
    rho: Tensor,
    skip: Tensor,
    level: int,
    reach: float,
) -> tuple[Tensor, Tensor]:
    """The sums of Mehler's formula, and a mask of the pairs for which they have not converged."""
    size = (own1[:, None] * own2[None]).sqrt()
    terms = 32
    while True:
        terms *= 2
        z, weights, basis = (x.to(rho) for x in _hermite_basis(terms, level, reach))
        a, b = ((f(q.sqrt()[:, None] * z) * weights) @ basis.T for q in (q1, q2))
        # Never below the rounding of the difference, since a tail of 0 would hide any tail of the other factor.
        tails = [torch.maximum(own - (x**2).sum(1), 1e-15 * own) for own, x in ((own1, a), (own2, b))]
        left_out = rho.abs() ** terms * (tails[0][:, None] * tails[1][None]).sqrt()
        missed = (torch.nan_to_num(left_out / size, nan=0.0) > TOLERANCE) & ~skip
        cost = (rho.numel() + len(z) * (len(q1) + len(q2))) * terms
        if terms >= LARGEST_DEGREE or int(missed.sum()) * _PLANE_COST <= cost:
            break
    result = torch.zeros_like(rho)
    for k in range(terms - 1, -1, -1):  # Horner's scheme in rho
        torch.addr(result.mul_(rho), a[:, k], b[:, k], out=result)
    return result, missed


@lru_cache(maxsize=8)
def _hermite_basis(terms: int, level: int, reach: float) -> tuple[Tensor, Tensor, Tensor]:
    """Nodes z, their weights with exp(-z^2 / 4) / sqrt(2 pi), and the bounded exp(-z^2 / 4) He_k(z) / sqrt(k!)."""
    z, weights = _line(level, reach)
    half = torch.exp(-(z**2) / 4)
    rows = [half, z * half]
    for k in range(1, terms - 1):
        rows.append((z * rows[-1] - math.sqrt(k) * rows[-2]) / math.sqrt(k + 1))
    return z, half * weights / math.sqrt(2 * math.pi), torch.stack(rows[:terms])


def _reach(activation: Activation, q: Tensor) -> float:
    """The half-width of the line that holds the expectations over N(0, q).

    Beyond it lies at most 1e-24 of E[f(h)^2] for each integrand f, as the next stretch of the same width shows. By the
    inequality of Cauchy and Schwarz that changes products and Hermite coefficients by at most 1e-12.

    Raises:
        ConvergenceError: the longest line does not hold them.
    """
    for reach in _REACHES:
        inside = _line(0, reach)
        z, weights = (torch.from_numpy(x) for x in _panels(np.arange(reach, 2 * reach + 0.5), _LINE_NODES[0]))
        outside = torch.cat([-z, z]), torch.cat([weights, weights])
        squares = [[_squares(f, q, nodes) for nodes in (inside, outside)] for f in integrands(activation)]
        # Infinite or missing values within are reported by the integration.
        if all(bool(((beyond <= TOLERANCE**2 * within) | ~torch.isfinite(within)).all()) for within, beyond in squares):
            return reach
    raise ConvergenceError(
        f"activation {activation.name} grows too fast for a variance of {float(q.max()):.3g}: its expectations lie "
        f"beyond {_REACHES[-1]:g} standard deviations. Use smaller inputs or a smaller sigma_w"
    )


def _squares(f: Function, q: Tensor, nodes: tuple[Tensor, Tensor]) -> Tensor:
    """E[f(h)^2], h ~ N(0, q), over the part of the line that the nodes cover."""
    z, weights = (x.to(q) for x in nodes)
    # The weight is taken into the square, which overflows later so.
    return (f(q.sqrt()[:, None] * z) * torch.exp(-(z**2) / 4)) ** 2 @ weights / math.sqrt(2 * math.pi)


def _second_moment(f: Function, q: Tensor, name: str, reach: float) -> tuple[Tensor, int]:
    """E[f(h)^2], h ~ N(0, q), and the level of the line's rule that suffices for it."""
    error, previous = math.inf, None
    for level in range(len(_LINE_NODES)):
        current = _squares(f, q, _line(level, reach))
        if not torch.isfinite(current).all():
            raise ConvergenceError(
                f"activation {name} or its square is not finite within {reach:g} standard deviations, of variances up "
                f"to {float(q.max()):.3g}: use smaller inputs or a smaller sigma_w"
            )
        if previous is not None:
            error = float(torch.nan_to_num((current - previous).abs() / current, nan=0.0).max())
            if error <= TOLERANCE:
                return current, level
        previous = current
    raise ConvergenceError(_refusal(name, f"{_LINE_NODES[-1]} nodes to a panel", error))


@lru_cache(maxsize=8)
def _line(level: int, reach: float) -> tuple[Tensor, Tensor]:
    """Nodes and weights over +-reach, on panels of width 1/2 that halve towards 0 down to 2^-10."""
    z, weights = (torch.from_numpy(x) for x in _panels(_radii(10, 0.5, reach), _LINE_NODES[level]))
    return torch.cat([-z.flip(0), z]), torch.cat([weights.flip(0), weights])


def _radii(grading: int, step: float, reach: float) -> np.ndarray:
    """Edges of panels from 0 to ``reach``, whose widths halve towards 0 below ``step``."""
    return np.array([0.0, *(step * 2.0**-i for i in range(grading, 0, -1)), *np.arange(step, reach + step / 2, step)])


def _panels(edges: np.ndarray, nodes: int) -> tuple[np.ndarray, np.ndarray]:
    """Gauss-Legendre nodes and weights on each panel between two edges."""
    x, w = np.polynomial.legendre.leggauss(nodes)
    half = np.diff(edges)[:, None] / 2
    return (edges[:-1, None] + half * (1 + x)).ravel(), (half * w).ravel()


def _plane_rule(
    activation: Activation, s1: Tensor, s2: Tensor, angle: Tensor, nodes: int, grading: int, reach: float
) -> tuple[Tensor, Tensor]:
    """The three integrals of each pair, and those of their absolute values, both (3, m)."""
    r, r_weights = (torch.from_numpy(x).to(s1) for x in _panels(_radii(grading, 1.0, reach), nodes))
    r_weights = r_weights * r * torch.exp(-(r**2) / 2) / (2 * math.pi)
    ends = np.array([0.0, *(2.0**-i for i in range(grading + 1, 0, -1))])
    u, u_weights = (torch.from_numpy(x).to(s1) for x in _panels(np.unique([*ends, *(1 - ends)]), nodes))
    results = torch.zeros(2, 3, len(s1), dtype=s1.dtype, device=s1.device)
    step = max(1, _CHUNK // (len(r) * len(u)))
    for start in range(0, len(s1), step):
        chunk = slice(start, start + step)
        a = angle[chunk][:, None]
        # First between the rays where h and h' differ in sign, then where they agree; then both with reversed signs.
        for width, direction, direction2 in (
            (a, torch.sin(a * u), -torch.sin(a * (1 - u))),
            (math.pi - a, torch.sin((math.pi - a) * (1 - u)), torch.sin((math.pi - a) * u)),
        ):
            for sign in (1.0, -1.0):
                h, h2 = (
                    sign * s[chunk][:, None, None] * d[:, :, None] * r for s, d in ((s1, direction), (s2, direction2))
                )
                slopes = activation.derivative(h) * activation.derivative(h2)
                for i, values in enumerate((activation.function(h) * activation.function(h2), slopes, h * h2 * slopes)):
                    for j, integrand in enumerate((values, values.abs())):
                        results[j, i, chunk] += (integrand @ r_weights @ u_weights) * width[:, 0]
    return results[0], results[1]


def _refusal(name: str, what: str, error: float) -> str:
    return (
        f"the expectations of activation {name} do not converge: {what} reach a relative error of {error:.1g}. A kink "
        "or a jump away from 0 causes this, and so does a function that varies too fast at this variance: use an "
        "activation that is smooth but at 0, smaller inputs or a smaller sigma_w"
    )
