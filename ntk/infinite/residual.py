"""Kernels of the infinitely wide residual network, for positively homogeneous activations.

    h^1 = sigma_w / sqrt(n_0) W^1 x + sigma_b b^1
    h^{l+1} = h^l + u^{l+1},   u^{l+1} = alpha (sigma_w / sqrt(n) W^{l+1} phi(h^l) + sigma_b b^{l+1}),   l < L
    f = sigma_w / sqrt(n) W^{L+1} phi(h^L) + sigma_b b^{L+1}

A multiplier scales its branch: u -> z^k u. With U^l the covariance of u^l (u^1 = h^1), Sigma^l = U^1 + ... + U^l that
of h^l, and D^l that of the gradients at h^l,

    D^{L+1} = 1,   c_L = sigma_w^2,   c_m = alpha^2 sigma_w^2 D^{m+1} for m < L
    D^l = sum_{m=l..L} c_m E[phi'(h^m) phi'(h'^m)]
    K_F,l = U^l D^l                                           (weights and bias of layer l)
    K_P,l = k^2 sum_{m=l..L} c_m E[u^l u'^l phi'(h^m) phi'(h'^m)]

since the gradient at h^l is a sum of independent terms, one from each nonlinearity that the branch's output reaches.
It follows that

    K_P,l / k^2 - K_F,l = sum_{m=l..L} c_m Cov(u u', phi'(h^m) phi'(h'^m))

which docs/theory.md derives. The multilayer perceptron has only the term m = l, and there the sum over layers
telescopes to the next layer's weights; here it does not.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from ntk.infinite.activations import Activation, find
from ntk.infinite.closed_forms import leaky_relu, leaky_relu_complements
from ntk.infinite.gaussian import Pairs, ratio, root, sum_of_pairs
from ntk.infinite.mlp import check_numbers, check_results, checked_inputs, first_layer
from ntk.infinite.networks import check_branch_scale


@dataclass(frozen=True)
class ResidualKernels:
    """The result of :func:`residual_kernels`; kernels by layer have the layers l = 1..L+1 or 1..L on the first axis.

    Attributes:
        nngp: covariance of the outputs.
        weights: full fine-tuning of W^l, l = 1..L+1.
        biases: of b^l, l = 1..L+1.
        propulsion: of the multiplier on layer l = 1..L (the stem, then the branches), degree included.
        propulsion_input: the mean of the multiplier on the input, which converges as in :class:`MLPKernels`.
        gap: K_P,l / k^2 - K_F,l, l = 1..L.
    """

    nngp: Float[Tensor, "n1 n2"]
    weights: Float[Tensor, "readout n1 n2"]
    biases: Float[Tensor, "readout n1 n2"]
    propulsion: Float[Tensor, "hidden n1 n2"]
    propulsion_input: Float[Tensor, "n1 n2"]
    gap: Float[Tensor, "hidden n1 n2"]

    @property
    def ntk(self) -> Float[Tensor, "n1 n2"]:
        """Full fine-tuning of everything."""
        return (self.weights + self.biases).sum(0)


def residual_kernels(
    x1: Tensor | np.ndarray,
    x2: Tensor | np.ndarray | None = None,
    *,
    depth: int,
    activation: str | Activation | Callable[[Tensor], Tensor],
    sigma_w: int | float,
    sigma_b: int | float = 0.0,
    branch_scale: int | float = 1.0,
    degree: int | float = 1,
) -> ResidualKernels:
    """The limits for :class:`ntk.infinite.networks.ResidualMLP` of ``depth`` hidden layers; see this module's formulas.

    Arguments as for :func:`ntk.infinite.mlp_kernels`; ``branch_scale`` is alpha. Memory and cost L^2 n1 n2 / 2.

    Raises:
        ValueError: an activation that is not positively homogeneous; depth below 1; a ``branch_scale`` that is not
            finite; as :func:`mlp_kernels`.
        OverflowError: as :func:`mlp_kernels`.
    """
    a, b = checked_inputs(x1, x2)
    phi = find(activation)
    if not phi.homogeneous:
        raise ValueError(
            f"residual_kernels knows positively homogeneous activations (linear, relu, leaky_relu); got {phi.name}"
        )
    check_numbers(depth, sigma_w, sigma_b, degree)
    if depth < 1:
        raise ValueError(f"a residual network needs at least one hidden layer; got depth {depth}")
    check_branch_scale(branch_scale)
    slope = -float(phi.function(torch.tensor(-1.0, dtype=torch.float64)))
    sw2, sb2, alpha2 = float(sigma_w) ** 2, float(sigma_b) ** 2, float(branch_scale) ** 2

    first, _, _, stem = first_layer(a, b, float(sigma_w), float(sigma_b), symmetric=x2 is None)
    streams, branches, shares, slopes = [stem], [stem], [first], []
    for layer in range(1, depth + 1):
        moments = leaky_relu(streams[-1], slope)
        slopes.append(moments.slopes)
        shares.append(sw2 * moments.product)
        if layer < depth:
            branch = _branch(streams[-1], moments.product, slope, alpha2 * sw2, alpha2 * sb2)
            branches.append(branch)
            streams.append(sum_of_pairs(streams[-1], branch))

    one = torch.ones_like(first)
    D, c = [one], []  # D^{L+1}, D^L, ..., D^1 and c_L, ..., c_1
    for layer in range(depth, 0, -1):
        c.append((sw2 if layer == depth else alpha2 * sw2) * D[-1])
        D.append(c[-1] * slopes[layer - 1] + (D[-1] if layer < depth else 0))
    D.reverse()
    c.reverse()
    scales = [1.0, *[alpha2] * (depth - 1), 1.0]
    propulsion, gap = [], []
    for i, branch in enumerate(branches):
        products = [_squares(branch, stream, slope) for stream in streams[i:]]
        propulsion.append(sum(w * p for w, p in zip(c[i:], products)))
        gap.append(sum(w * (p - branch.cov * s) for w, p, s in zip(c[i:], products, slopes[i:])))
    k2 = float(degree) ** 2
    result = ResidualKernels(
        nngp=shares[-1] + sb2,
        weights=torch.stack([scale * share * d for scale, share, d in zip(scales, shares, D)]),
        biases=torch.stack([scale * sb2 * d for scale, d in zip(scales, D)]),
        propulsion=k2 * torch.stack([torch.as_tensor(p) for p in propulsion]),
        propulsion_input=k2 * first * D[0],
        gap=torch.stack([torch.as_tensor(g) for g in gap]),
    )
    check_results(result)
    return result


def _branch(stream: Pairs, product: Tensor, slope: float, weight: float, bias: float) -> Pairs:
    """The pairs of a branch's output, with covariance weight E[phi phi'] + bias."""
    own = weight * (1 + slope**2) / 2
    image = Pairs(own * stream.q1, own * stream.q2, weight * product, *leaky_relu_complements(stream, slope))
    b, zero = torch.full_like(product, bias), torch.zeros_like(product)
    return sum_of_pairs(image, Pairs(b, b, b, zero, zero + 2)) if bias else image


def _squares(u: Pairs, h: Pairs, slope: float) -> Tensor:
    """E[u u' phi'(h) phi'(h')] where h = u + something independent.

    phi'(h) = s + t sign(h), and by Stein's lemma, with r and rho the correlations of (u, u') and (h, h') and a, b the
    shares sqrt(U/q), sqrt(U'/q') of u in h,

        E[u u' sign(h) sign(h')] = (2/pi) sqrt(U U') { r arcsin(rho)
            + (a b [(r - rho)^2 + 1 - rho^2] - rho r (a - b)^2) / sqrt(1 - rho^2) }

    whose second term is 0 where rho = +-1, since r = rho and a = b there. For u = h it is the formula of leaky ReLU.
    """
    s2, t2 = ((1 + slope) / 2) ** 2, ((1 - slope) / 2) ** 2
    a, b = root(ratio(u.q1, h.q1)), root(ratio(u.q2, h.q2))
    r, rho, difference = (u.plus - u.minus) / 2, (h.plus - h.minus) / 2, h.minus - u.minus
    spread = a * b * (difference**2 + h.sine**2) - rho * r * (a - b) ** 2
    spread = torch.where(h.sine > 0, ratio(spread, h.sine), 0.0)
    signs = (2 / math.pi) * u.scale * (r * (h.coangle - math.pi / 2) + spread)
    return s2 * u.cov + t2 * signs
