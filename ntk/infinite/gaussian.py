"""Pairs of jointly Gaussian pre-activations, and the three expectations of an activation over them."""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from ntk.checks import not_overflown

ADVICE = "use smaller inputs, a smaller sigma_w, or fewer layers"
# Smaller variances have lost digits, since products of them are below the range of float64.
SMALLEST = torch.finfo(torch.float64).tiny / torch.finfo(torch.float64).eps
# The fourth powers of numbers up to this, and of their inverses, are within the range of float64.
LARGEST = 1e70


def root(x: Tensor) -> Tensor:
    """The square root, with derivative 0 at 0.

    x is 0 for the variance of an input of zeros, and for the angle of an input with itself. Both stay 0 when a kernel
    is differentiated, so 0 is their derivative. The angle between two inputs that happen to be equal has a kink there,
    whose one-sided derivatives cancel.
    """
    positive = x > 0
    return torch.where(positive, torch.where(positive, x, torch.ones_like(x)).sqrt(), torch.zeros_like(x))


def ratio(x: Tensor, y: Tensor) -> Tensor:
    """x / y, and x where y is 0, so that values that are replaced later have no derivative 0 / 0."""
    return x / torch.where(y == 0, torch.ones_like(y), y)


def check_variances(variances: Tensor, positive: Tensor) -> None:
    """Raise OverflowError if a variance underflows where ``positive`` says that it is not 0."""
    if bool((positive & (variances < SMALLEST)).any()):
        raise OverflowError(
            f"the variance of a pre-activation underflows float64, below {SMALLEST:.1g}: use larger inputs, a larger "
            "sigma_w, biases, or fewer layers"
        )


def sine(minus: Tensor, plus: Tensor) -> Tensor:
    """The sine of arccos(rho), from 1 - rho and 1 + rho."""
    return root(minus * plus)


def coangle(minus: Tensor, plus: Tensor) -> Tensor:
    """pi - arccos(rho), from 1 - rho and 1 + rho, by half angles (Kahan): accurate from 0 to pi."""
    return 2 * torch.atan2(root(plus), root(minus))


@dataclass(frozen=True)
class Pairs:
    """Many pairs (h, h') ~ N(0, [[q1, cov], [cov, q2]]), in fields that broadcast together.

    The correlation rho is stored as ``minus`` = 1 - rho and ``plus`` = 1 + rho, each with its own relative accuracy: an
    angle found by arccos(rho) loses half of the digits where rho is near 1 or -1, as it is in deep networks.
    Where a variance is 0 the correlation is set to 0; every output multiplies it by 0.

    Raises:
        OverflowError: a field is NaN or infinite, so that no layer goes on from an overflow of the layer below.
    """

    q1: Float[Tensor, "..."]
    q2: Float[Tensor, "..."]
    cov: Float[Tensor, "..."]
    minus: Float[Tensor, "..."]
    plus: Float[Tensor, "..."]

    def __post_init__(self) -> None:
        for values in (self.q1, self.q2, self.cov, self.minus, self.plus):
            not_overflown(values, "covariances of pre-activations", ADVICE)

    @property
    def scale(self) -> Tensor:
        """sqrt(q1 q2), the covariance of a perfectly correlated pair."""
        return root(self.q1) * root(self.q2)

    @property
    def sine(self) -> Tensor:
        """sin of the angle between h and h'."""
        return sine(self.minus, self.plus)

    @property
    def coangle(self) -> Tensor:
        """pi - arccos(rho)."""
        return coangle(self.minus, self.plus)

    @property
    def determinant(self) -> Tensor:
        """q1 q2 - cov^2, without the cancellation."""
        return self.q1 * self.q2 * (self.minus * self.plus)

    @property
    def same(self) -> Tensor:
        """A mask of the pairs with h = h' up to rounding: rho = 1 and equal variances."""
        return (self.minus < 1e-28) & ((self.q1 - self.q2).abs() <= 1e-14 * self.q1)


class Moments(NamedTuple):
    """The expectations that determine the kernels of one layer.

    Attributes:
        product: E[phi(h) phi(h')], for the network's covariance.
        slopes: E[phi'(h) phi'(h')], for full fine-tuning.
        propulsion: E[h h' phi'(h) phi'(h')], for Propulsion.
    """

    product: Tensor
    slopes: Tensor
    propulsion: Tensor


def diagonal(q: Tensor) -> Pairs:
    """The pairs (h, h), h ~ N(0, q)."""
    return Pairs(q, q, q, torch.zeros_like(q), torch.where(q > 0, 2.0, 1.0).to(q))


def pairs_of_rows(a: Float[Tensor, "n1 d"], b: Float[Tensor, "n2 d"], *, symmetric: bool = False) -> Pairs:
    """The pairs whose covariance is ``a @ b.T``; with ``symmetric``, b is a. Cost n1 n2 d.

    Raises:
        OverflowError: covariances overflow.
    """
    q1, q2 = (a * a).sum(1, keepdim=True), (b * b).sum(1, keepdim=True).T
    cov = a @ b.T
    if symmetric:
        cov = (cov + cov.T) / 2
        cov.diagonal().copy_(q1[:, 0])
    u, v = _directions(a), _directions(b)
    rho = u @ v.T
    minus, plus = _half_square(1 - rho, u, v), _half_square(1 + rho, u, -v)
    if symmetric:
        minus, plus = (minus + minus.T) / 2, (plus + plus.T) / 2
    return Pairs(q1, q2, cov, *_without_variance(q1, q2, minus, plus))


def _directions(x: Float[Tensor, "n d"]) -> Float[Tensor, "n d"]:
    """The rows scaled to norm 1; rows of zeros stay 0."""
    largest = x.abs().amax(dim=1, keepdim=True)
    none = largest == 0
    # The squares of a row's entries may leave the range of float64, those of its entries over the largest do not.
    scaled = torch.where(none, torch.ones_like(x), x) / torch.where(none, torch.ones_like(largest), largest.detach())
    return torch.where(none, torch.zeros_like(x), scaled / scaled.norm(dim=1, keepdim=True))


def next_pairs(
    pairs: Pairs,
    moments: Moments,
    own1: Tensor,
    own2: Tensor,
    sigma_w: float,
    sigma_b: float,
    complements: tuple[Tensor, Tensor] | None,
) -> Pairs:
    """The pairs of the next layer, of covariance sigma_w^2 E[phi phi'] + sigma_b^2, with an accurate correlation.

    With a, a' the standard deviations of sigma_w phi(h) and sigma_w phi(h'), kappa their correlation, N^2 = a^2 +
    sigma_b^2 and N'^2 likewise,

        N N' (1 - rho) = sigma_b^2 (a - a')^2 / (N N' + a a' + sigma_b^2) + a a' (1 - kappa)
        N N' (1 + rho) = (N N' - a a') + sigma_b^2 + a a' (1 + kappa)

    sums of non-negative terms. ``complements`` is (1 - kappa, 1 + kappa) if the activation has an accurate formula.
    Otherwise they are computed from the moments with an absolute error of rounding size, which suffices for a smooth
    activation, and 1 - kappa is set to 0 where h and h' are one variable.

    Raises:
        OverflowError: a covariance overflows, or a variance underflows.
    """
    b2 = sigma_b**2
    a1, a2 = sigma_w * root(own1), sigma_w * root(own2)
    q1, q2 = a1**2 + b2, a2**2 + b2
    check_variances(q1, pairs.q1 > 0)
    check_variances(q2, pairs.q2 > 0)
    aa, nn = a1 * a2, root(q1) * root(q2)
    if complements is None:
        kappa = ratio(sigma_w**2 * moments.product, aa).clamp(-1, 1)
        complements = torch.where(pairs.same, torch.zeros_like(kappa), 1 - kappa), 1 + kappa
    minus = ratio(ratio(b2 * (a1 - a2) ** 2, nn + aa + b2) + aa * complements[0], nn)
    plus = ratio(ratio(b2 * (q1 + a2**2), nn + aa) + b2 + aa * complements[1], nn)
    cov = sigma_w**2 * moments.product + b2
    return Pairs(q1, q2, cov, *_without_variance(q1, q2, minus.clamp(0, 2), plus.clamp(0, 2)))


def sum_of_pairs(a: Pairs, b: Pairs) -> Pairs:
    """The pairs of h + g for independent pairs of h and of g, with an accurate correlation.

    With s = sqrt(q_h q_h'), t = sqrt(q_g q_g') and N N' the root of the product of the sums' variances,

        N N' (1 -+ rho) = (N N' - s - t) + s (1 -+ rho_h) + t (1 -+ rho_g)
        N N' - s - t = (sqrt(q_h q_g') - sqrt(q_g q_h'))^2 / (N N' + s + t)
    """
    q1, q2 = a.q1 + b.q1, a.q2 + b.q2
    nn = root(q1) * root(q2)
    rest = ratio((root(a.q1 * b.q2) - root(b.q1 * a.q2)) ** 2, nn + a.scale + b.scale)
    minus = ratio(rest + a.scale * a.minus + b.scale * b.minus, nn)
    plus = ratio(rest + a.scale * a.plus + b.scale * b.plus, nn)
    return Pairs(q1, q2, a.cov + b.cov, *_without_variance(q1, q2, minus.clamp(0, 2), plus.clamp(0, 2)))


def _without_variance(q1: Tensor, q2: Tensor, minus: Tensor, plus: Tensor) -> tuple[Tensor, Tensor]:
    """1 - rho and 1 + rho with rho = 0 by convention where a variance is 0; the formulas give 0 / 0 there."""
    none = (q1 == 0) | (q2 == 0)
    return minus.masked_fill(none, 1.0), plus.masked_fill(none, 1.0)


def _half_square(value: Tensor, u: Tensor, v: Tensor) -> Tensor:
    """1 - u.v for unit rows, computed as |u - v|^2 / 2 where the subtraction cancels digits."""
    rows, columns = torch.nonzero(value < 1e-2, as_tuple=True)
    step = max(1, 10**7 // u.shape[1])
    for start in range(0, len(rows), step):
        i, j = rows[start : start + step], columns[start : start + step]
        value[i, j] = ((u[i] - v[j]) ** 2).sum(1) / 2
    return value.clamp(0, 2)
