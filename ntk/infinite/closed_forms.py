"""Closed forms of the three expectations for each activation, as functions of :class:`~ntk.infinite.gaussian.Pairs`.

Below (h, h') have variances q, q', covariance c, correlation rho and angle theta = arccos(rho).
"""

import math
from typing import Any

import torch
from scipy.special import gamma, hyp2f1
from torch import Tensor

from ntk.infinite.gaussian import Moments, Pairs, coangle, sine


def linear(pairs: Pairs) -> Moments:
    """phi(h) = h: the expectations are c, 1 and c."""
    return Moments(pairs.cov, torch.ones_like(pairs.cov), pairs.cov)


def linear_complements(pairs: Pairs) -> tuple[Tensor, Tensor]:
    """1 - rho and 1 + rho of (h, h')."""
    return pairs.minus, pairs.plus


class _FirstArcCosine(torch.autograd.Function):
    """s sin(theta) + (pi - theta) c for c = s cos(theta), whose differential is sin(theta) ds + (pi - theta) dc.

    The terms in d theta cancel, but each is infinite at theta = 0, where autograd would give NaN.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(scale: Tensor, cov: Tensor, minus: Tensor, plus: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        """The value, from 1 - cos(theta) and 1 + cos(theta)."""
        return scale * sine(minus, plus) + coangle(minus, plus) * cov

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Save the angle."""
        ctx.save_for_backward(inputs[2], inputs[3])

    @staticmethod
    def backward(ctx: Any, gradient: Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
        """The gradients by s and c."""
        minus, plus = ctx.saved_tensors
        return gradient * sine(minus, plus), gradient * coangle(minus, plus), None, None


class _EvenComplement(torch.autograd.Function):
    """v - (2/pi) (sin(a) - a cos(a)) for v = 1 - cos(a), whose derivative by v is 1 - (2/pi) a."""

    generate_vmap_rule = True

    @staticmethod
    def forward(versine: Tensor, sine: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        """The value; sin(a) is an argument since it is known more accurately. The coangle of pi - a is a."""
        return versine - (2 / math.pi) * (sine - coangle(2 - versine, versine) * (1 - versine))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Save the angle."""
        ctx.save_for_backward(inputs[0])

    @staticmethod
    def backward(ctx: Any, gradient: Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
        """The gradient by v."""
        (versine,) = ctx.saved_tensors
        return gradient * (1 - (2 / math.pi) * coangle(2 - versine, versine)), None


def leaky_relu(pairs: Pairs, slope: float) -> Moments:
    """phi(h) = max(h, 0) + slope min(h, 0); slope 0 is ReLU (Cho and Saul 2009, arc-cosine kernels of order 1 and 0).

    E[phi phi']    = slope c + (1 - slope)^2 sqrt(q q') (sin(theta) + (pi - theta) rho) / (2 pi)
    E[phi' phi']   = slope + (1 - slope)^2 (pi - theta) / (2 pi)
    E[h h' phi' phi'] = E[phi phi'],  since h phi'(h) = phi(h)
    """
    coangle, weight = pairs.coangle, (1 - slope) ** 2 / (2 * math.pi)
    scale, cov, minus, plus = torch.broadcast_tensors(pairs.scale, pairs.cov, pairs.minus, pairs.plus)
    product = slope * pairs.cov + weight * _FirstArcCosine.apply(scale, cov, minus, plus)  # pyright: ignore[reportOperatorIssue]
    return Moments(product, slope + weight * coangle, product)


def leaky_relu_complements(pairs: Pairs, slope: float) -> tuple[Tensor, Tensor]:
    """1 -+ the correlation of (phi(h), phi(h')), from the odd and even parts s h and t |h| of phi.

    The correlation of |h| and |h'| is (2/pi)(sin(a) + (pi/2 - a) cos(a)) with a the angle's acute representative, so 1
    minus it is (1 - cos(a)) - (2/pi)(sin(a) - a cos(a)) with 1 - cos(a) = min(1 - rho, 1 + rho) known accurately.
    """
    s, t = ((1 + slope) / 2) ** 2, ((1 - slope) / 2) ** 2
    versine = torch.minimum(pairs.minus, pairs.plus)
    even = _EvenComplement.apply(versine, pairs.sine).clamp(min=0)  # pyright: ignore[reportAttributeAccessIssue]
    return (s * pairs.minus + t * even) / (s + t), (s * pairs.plus + t * (2 - even)) / (s + t)


def relu_power(pairs: Pairs, power: float, negative: float) -> Moments:
    """phi(h) = h^p for h > 0 and b |h|^p for h < 0, with s = (1 + b) / 2 and t = (1 - b) / 2.

        E[phi phi']       = s^2 E[|h|^p |h'|^p] + t^2 E[sgn(h) |h|^p sgn(h') |h'|^p]
        E[phi' phi']      = p^2 (t^2 E[|h|^(p-1) |h'|^(p-1)] + s^2 E[sgn(h) |h|^(p-1) sgn(h') |h'|^(p-1)])
        E[h h' phi' phi'] = p^2 E[phi phi'],  since h phi'(h) = p phi(h)

    For b = 0 and whole p these are the arc-cosine kernels of order p (Cho and Saul 2009). Slopes are infinite at
    h' = h for p = 1/2.
    """
    s, t = ((1 + negative) / 2) ** 2, ((1 - negative) / 2) ** 2
    product = s * _absolute(pairs, power) + t * _signed(pairs, power)
    slopes = t * _absolute(pairs, power - 1) + s * _signed(pairs, power - 1)
    return Moments(product, power**2 * slopes, power**2 * product)


def _absolute(pairs: Pairs, p: float) -> Tensor:
    """E[|h|^p |h'|^p] = (q q')^(p/2) (2^p / pi) Gamma((p + 1)/2)^2 F(-p/2, -p/2; 1/2; rho^2) (Nabeya 1951)."""
    factor = 2**p / math.pi * gamma((p + 1) / 2) ** 2
    return factor * _hypergeometric(pairs, p, -p / 2, 0.5) * pairs.scale**p


def _signed(pairs: Pairs, p: float) -> Tensor:
    """E[sgn(h h') |h h'|^p] = (q q')^(p/2) rho (2^(p+1) / pi) Gamma(p/2 + 1)^2 F((1-p)/2, (1-p)/2; 3/2; rho^2)."""
    factor = 2 ** (p + 1) / math.pi * gamma(p / 2 + 1) ** 2
    rho = (pairs.plus - pairs.minus) / 2
    return factor * rho * _hypergeometric(pairs, p, (1 - p) / 2, 1.5) * pairs.scale**p


def _hypergeometric(pairs: Pairs, p: float, a: float, c: float) -> Tensor:
    """F(a, a; c; rho^2), where c - 2 a = p + 1/2.

    Near rho^2 = 1 it is a constant plus a multiple of (1 - rho^2)^(p + 1/2), which needs 1 - rho^2 to more digits than
    rho^2 has if p + 1/2 < 1. The formula is the one that connects z and 1 - z (DLMF 15.8.4).
    """
    rest = (pairs.minus * pairs.plus).detach()
    direct = torch.from_numpy(hyp2f1(a, a, c, (1 - rest).cpu().numpy())).to(rest)
    power = p + 1 / 2
    if not 0 < power < 0.95:
        return direct
    z = rest.cpu().numpy()
    first = gamma(c) * gamma(power) / gamma(c - a) ** 2 * hyp2f1(a, a, 1 - power, z)
    second = gamma(c) * gamma(-power) / gamma(a) ** 2 * hyp2f1(c - a, c - a, 1 + power, z)
    near = torch.from_numpy(first + z**power * second).to(rest)
    return torch.where(rest < 0.5, near, direct)


def erf(pairs: Pairs) -> Moments:
    """phi = erf (Williams 1996). With Delta = (1 + 2 q)(1 + 2 q') - 4 c^2,

        E[phi phi']       = (2/pi) arctan(2 c / sqrt(Delta))
        E[phi' phi']      = (4/pi) Delta^(-1/2)
        E[h h' phi' phi'] = (4/pi) c Delta^(-3/2)

    The last is the Gaussian integral of h h' exp(-h^2 - h'^2), whose covariance is (Sigma^-1 + 2)^-1.
    """
    delta = 1 + 2 * (pairs.q1 + pairs.q2) + 4 * pairs.determinant
    root = delta.sqrt()
    slopes = (4 / math.pi) / root
    return Moments((2 / math.pi) * torch.atan2(2 * pairs.cov, root), slopes, slopes * pairs.cov / delta)


def gelu(pairs: Pairs) -> Moments:
    """phi(h) = h Phi(h), Phi the normal distribution function (E[phi phi']: Tsuchida et al. 2021).

    With det = q q' - c^2 and Delta = (1 + q)(1 + q') - c^2,

        E[phi phi']  = c/4 + (1/2pi) [ (c^2 + q q' Delta) / ((1 + q)(1 + q') sqrt(Delta)) + c arctan(c / sqrt(Delta)) ]
        E[phi' phi'] = 1/4 + (1/2pi) [ arctan(c / sqrt(Delta))
                                       + c/sqrt(Delta) (1/Delta + 1/(1 + q) + 1/(1 + q')) ]

    phi'(h) = Phi + h N with N the normal density, so E[h h' phi' phi'] has four terms: E[phi phi'], E[h^2 N h' Phi'],
    the same with h and h' exchanged, and E[h^2 N h'^2 N']. Each N changes the covariance; Stein's lemma gives

        E[h^2 N h' Phi']    = (1/(2 pi sqrt(Delta))) [ q (q' + det)/(1 + q)^2 + c^2 (1/Delta + 1/(1 + q)) / (1 + q) ]
        E[h^2 N h'^2 N']    = (1/(2 pi Delta^(5/2))) [ (q + det)(q' + det) + 2 c^2 ]
    """
    q1, q2, c, det = pairs.q1, pairs.q2, pairs.cov, pairs.determinant
    one1, one2 = 1 + q1, 1 + q2
    delta = 1 + q1 + q2 + det
    root = delta.sqrt()
    angle = torch.atan2(c, root)
    product = c / 4 + ((c**2 + q1 * q2 * delta) / (one1 * one2 * root) + c * angle) / (2 * math.pi)
    slopes = 1 / 4 + (angle + c / root * (1 / delta + 1 / one1 + 1 / one2)) / (2 * math.pi)
    one_sided = (
        q1 * (q2 + det) / one1**2
        + q2 * (q1 + det) / one2**2
        + c**2 * ((1 / delta + 1 / one1) / one1 + (1 / delta + 1 / one2) / one2)
    )
    two_sided = ((q1 + det) * (q2 + det) + 2 * c**2) / delta**2
    return Moments(product, slopes, product + (one_sided + two_sided) / (2 * math.pi * root))
