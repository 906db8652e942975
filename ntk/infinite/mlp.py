"""Kernels of the infinitely wide multilayer perceptron: NNGP, NTK, Propulsion, and the gap between the last two.

The network, in NTK parametrisation with L hidden layers, W and b standard normal:

    h^1 = sigma_w / sqrt(n_0) W^1 x + sigma_b b^1
    h^{l+1} = sigma_w / sqrt(n_l) W^{l+1} phi(h^l) + sigma_b b^{l+1},     f = h^{L+1}

Its limits as all widths n_1..n_L grow, with (h, h') ~ N(0, Sigma^l):

    Sigma^1 = sigma_w^2 x.x' / n_0 + sigma_b^2           Sigma^{l+1} = sigma_w^2 E[phi(h) phi(h')] + sigma_b^2
    D^{L+1} = 1                                          D^l = sigma_w^2 E[phi'(h) phi'(h')] D^{l+1}

    full fine-tuning  K_F = sum_{l=1..L+1} Sigma^l D^l      (Jacot, Gabriel and Hongler 2018, thm. 1)
    Propulsion        K_P = k^2 sum_l sigma_w^2 E[h h' phi'(h) phi'(h')] D^{l+1}      over the chosen hidden layers l

All are kernels of one output; between two different outputs they are 0.
"""

import math
from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from ntk.checks import check_count, not_overflown, real_and_finite
from ntk.infinite.activations import Activation, find
from ntk.infinite.gaussian import ADVICE, LARGEST, Moments, Pairs, check_variances, diagonal, next_pairs, pairs_of_rows
from ntk.infinite.quadrature import diagonal_moments, quadrature_moments, series_moments

METHODS = ("auto", "closed", "series", "quadrature")


@dataclass(frozen=True)
class RandomTerm:
    """The mean and variance over initialisations, ``(n1, n2)`` each, of a term that is random at any width."""

    mean: Float[Tensor, "n1 n2"]
    variance: Float[Tensor, "n1 n2"]


@dataclass(frozen=True)
class Layers:
    """The parts of the kernels by layer, along the first axis; sums over it give the totals.

    Attributes:
        covariance: Sigma^l, l = 1..L+1; the last is the NNGP kernel.
        weights: (Sigma^l - sigma_b^2) D^l, full fine-tuning of W^l, l = 1..L+1.
        biases: sigma_b^2 D^l, full fine-tuning of b^l, l = 1..L+1.
        propulsion: K_P of the multiplier on h^l, l = 1..L, degree included.
        gap: K_P,l / k^2 - K_F,l = sigma_w^2 D^{l+1} Cov(h h', phi'(h) phi'(h')), l = 1..L.
    """

    covariance: Float[Tensor, "readout n1 n2"]
    weights: Float[Tensor, "readout n1 n2"]
    biases: Float[Tensor, "readout n1 n2"]
    propulsion: Float[Tensor, "hidden n1 n2"]
    gap: Float[Tensor, "hidden n1 n2"]


@dataclass(frozen=True)
class MLPKernels:
    """The result of :func:`mlp_kernels`; every kernel is ``(n1, n2)``, float64.

    Attributes:
        nngp: covariance of the outputs at initialisation, Sigma^{L+1}.
        ntk: full fine-tuning, K_F = ``ntk_weights + ntk_biases``.
        ntk_weights: full fine-tuning of the weights alone.
        ntk_biases: full fine-tuning of the biases alone (BitFit).
        propulsion: K_P of the chosen ``positions``, at z = 1.
        propulsion_input: the multiplier on the network's input, k^2 sum_j x_j x'_j s_j s'_j with s = df/dx. It does not
            converge as the widths grow, unless the *input* dimension n_0 grows as well: the s_j stay random, and each
            depends on its own first-layer weights. Mean k^2 (Sigma^1 - sigma_b^2) D^1 and variance are those of
            independent s_j, with relative errors of order 1/n_0, for inputs without dominant coordinates. An embedding
            as wide as the hidden layers is such an input.
        propulsion_readout: the multiplier on the output, k^2 f f', which never converges. Mean and variance are exact.
        lora: LoRA on every weight at B = 0 and scale 1, A with iid entries of variance 1/r, as its rank r grows:
            ``ntk_weights``. At finite rank this is the mean, and :meth:`lora_variance` is the variance.
        positions: the positions summed in ``propulsion``: ``"input"`` (its mean) and hidden layers 1..L.
        layers: the parts by layer; None without ``per_layer``.
    """

    nngp: Float[Tensor, "n1 n2"]
    ntk: Float[Tensor, "n1 n2"]
    ntk_weights: Float[Tensor, "n1 n2"]
    ntk_biases: Float[Tensor, "n1 n2"]
    propulsion: Float[Tensor, "n1 n2"]
    propulsion_input: RandomTerm
    propulsion_readout: RandomTerm
    positions: tuple[str | int, ...]
    layers: Layers | None
    _lora_variance: Float[Tensor, "n1 n2"]

    @property
    def lora(self) -> Float[Tensor, "n1 n2"]:
        """The limit of LoRA's kernel as its rank grows, ``ntk_weights``."""
        return self.ntk_weights

    def lora_variance(self, rank: int) -> Float[Tensor, "n1 n2"]:
        """Variance of LoRA's kernel over A, at infinite width: sum_l (D^l)^2 (S S' + (Sigma^l - sigma_b^2)^2) / r.

        S and S' are Sigma^l - sigma_b^2 at (x, x) and (x', x'). The inner product of a layer's inputs a, a' projected
        on r random directions has variance (|a|^2 |a'|^2 + (a.a')^2) / r (Malladi et al. 2023, sec. 5; exact here).
        """
        check_count(rank, "LoRA's rank")
        return self._lora_variance / rank


def mlp_kernels(
    x1: Tensor | np.ndarray,
    x2: Tensor | np.ndarray | None = None,
    *,
    depth: int,
    activation: str | Activation | Callable[[Tensor], Tensor],
    sigma_w: int | float,
    sigma_b: int | float,
    degree: int | float = 1,
    positions: str | int | Collection[str | int] = "hidden",
    method: str = "auto",
    per_layer: bool = True,
) -> MLPKernels:
    """The kernels of the infinitely wide MLP of ``depth`` hidden layers: see :mod:`ntk.infinite.mlp` for the formulas.

    Args:
        x1: inputs, ``(n1, n_0)``; computed in float64 on their device.
        x2: inputs of the columns, ``(n2, n_0)``; None for the symmetric kernel.
        depth: number of hidden layers L; 0 is the linear model.
        activation: ``"linear"``, ``"relu"``, ``"leaky_relu"``, ``"erf"``, ``"gelu"``, ``"tanh"``, ``"silu"``,
            :func:`ntk.infinite.leaky_relu` with another slope, :func:`ntk.infinite.relu_power`, or any differentiable
            elementwise function.
        sigma_w: standard deviation of the weights, positive.
        sigma_b: standard deviation of the biases.
        degree: k of Propulsion's z^k.
        positions: where Propulsion multiplies: ``"hidden"`` (every hidden layer), ``"all"`` (and the input), or a
            collection of ``"input"`` and layers 1..L.
        method: ``"closed"`` forms, the Hermite ``"series"``, plain Gauss-Hermite ``"quadrature"`` (slow); ``"auto"`` is
            the first of them that the activation has.
        per_layer: keep the parts by layer, at a memory of 5 L n1 n2; without them it is O(n1 n2) at any depth.

    Returns:
        The kernels of one output. Absolute errors relative to sqrt(K(x, x) K(x', x')) are of rounding size for closed
        forms, and 1e-12 for each layer for the series. A chaotic network (sigma_w^2 E[phi'^2] > 1) amplifies them from
        layer to layer as it amplifies the inputs' differences.

    Raises:
        ValueError: unusable arguments, with what was expected; the readout as a position, which has no limit.
        ConvergenceError: the activation's expectations do not converge (a ValueError).
        OverflowError: a covariance or kernel overflows float64, or inputs without biases underflow it.
        NotImplementedError: inputs that take gradients, for an activation without closed forms or another method.

    Closed forms can be differentiated by the inputs, on the diagonal and at equal inputs too.

    Example:
        >>> x = torch.eye(2, dtype=torch.float64)
        >>> kernels = mlp_kernels(x, depth=1, activation="relu", sigma_w=2**0.5, sigma_b=0)
        >>> kernels.ntk
        tensor([[2.0000, 0.3183],
                [0.3183, 2.0000]], dtype=torch.float64)
        >>> torch.allclose(kernels.propulsion + kernels.propulsion_input.mean, kernels.ntk)
        True
    """
    a, b = checked_inputs(x1, x2)
    phi = find(activation)
    check_numbers(depth, sigma_w, sigma_b, degree)
    chosen = _positions(positions, depth)
    moments_of, diagonal_of = _method(method, phi)
    if (
        torch.is_grad_enabled()
        and (a.requires_grad or b.requires_grad)
        and (phi.moments is None or moments_of is not phi.moments or not phi.gradients)
    ):
        raise NotImplementedError(
            f"kernels of {phi.name} by series, quadrature or powers have no gradients in the inputs, only the closed "
            "forms of named activations have: detach the inputs"
        )
    sw, sb, k2 = float(sigma_w), float(sigma_b), float(degree) ** 2

    first, first1, first2, pairs = first_layer(a, b, sw, sb, symmetric=x2 is None)

    # Sums over the layers up to l, each term times D^1 / D^{l+1}. One factor takes them to the next layer, so no D is
    # stored.
    d, d1, d2 = torch.ones_like(first), torch.ones_like(first1), torch.ones_like(first2)
    weights, biases, propulsion = first, sb**2 * d, torch.zeros_like(d)
    lora_variance = first1 * first2 + first**2
    steps = [(first, d, torch.zeros_like(d))]
    for layer in range(1, depth + 1):
        moments = moments_of(pairs)
        if x2 is None:  # rounding breaks the symmetry
            moments = Moments(*((m + m.T) / 2 for m in moments))
        own1 = Moments(*(m[:, None] for m in diagonal_of(pairs.q1[:, 0])))
        own2 = Moments(*(m[None] for m in diagonal_of(pairs.q2[0])))
        complements = phi.complements(pairs) if phi.complements else None
        share, factor, multiplied = (sw**2 * m for m in moments)
        weights = weights * factor + share
        biases = biases * factor + sb**2
        propulsion = propulsion * factor + (multiplied if layer in chosen else 0)
        lora_variance = lora_variance * factor**2 + sw**4 * own1.product * own2.product + share**2
        d, d1, d2 = d * factor, d1 * sw**2 * own1.slopes, d2 * sw**2 * own2.slopes
        if per_layer:
            steps.append((share, factor, multiplied))
        pairs = next_pairs(pairs, moments, own1.product, own2.product, sw, sb, complements)

    input_mean = first * d
    fourth = (a**2) @ (b**2).T * (sw**2 / a.shape[1]) ** 2  # sum_j x_j^2 x'_j^2, of the variance over s_j
    result = MLPKernels(
        nngp=pairs.cov,
        ntk=weights + biases,
        ntk_weights=weights,
        ntk_biases=biases,
        propulsion=k2 * (propulsion + (input_mean if "input" in chosen else 0)),
        propulsion_input=RandomTerm(k2 * input_mean, k2**2 * fourth * (d1 * d2 + d**2)),
        propulsion_readout=RandomTerm(k2 * pairs.cov, k2**2 * (pairs.q1 * pairs.q2 + pairs.cov**2)),
        positions=chosen,
        layers=_split(steps, sb, k2) if per_layer else None,
        _lora_variance=lora_variance,
    )
    check_results(result, result.propulsion_input, result.propulsion_readout, result.layers)
    return result


def first_layer(a: Tensor, b: Tensor, sw: float, sb: float, *, symmetric: bool) -> tuple[Tensor, Tensor, Tensor, Pairs]:
    """sigma_w^2 x.x' / n_0 of the pairs, of the rows and of the columns, without the bias; and the pairs of h^1.

    Correlations are computed with the bias as one more coordinate of the inputs, which is accurate. Covariances are
    sums of both terms, so that subtracting a bias that is large compared with the inputs loses no digits.

    Raises:
        OverflowError: covariances overflow, or underflow in the absence of a bias.
    """
    rows = [sw / math.sqrt(x.shape[1]) * x for x in (a, b)]
    extended = [torch.cat([x, sb * torch.ones_like(x[:, :1])], dim=1) for x in rows]
    first1, first2 = (rows[0] ** 2).sum(1, keepdim=True), (rows[1] ** 2).sum(1, keepdim=True).T
    first = rows[0] @ rows[1].T
    check_variances(first1[:, 0] + sb**2, a.detach().any(dim=1))
    check_variances(first2[0] + sb**2, b.detach().any(dim=1))
    if symmetric:
        first = (first + first.T) / 2
        first.diagonal().copy_(first1[:, 0])
    pairs = pairs_of_rows(*extended, symmetric=symmetric)
    return first, first1, first2, replace(pairs, q1=first1 + sb**2, q2=first2 + sb**2, cov=first + sb**2)


def _split(steps: list[tuple[Tensor, Tensor, Tensor]], sb: float, k2: float) -> Layers:
    """The parts by layer l, from Sigma^l - sigma_b^2, and from D^{l-1} / D^l and E[h h' phi' phi'] of the layer below.

    The first layer has no layer below; the last is the readout.
    """
    shares, factors, multiplied = (torch.stack(parts) for parts in zip(*steps))
    after = [torch.ones_like(shares[0])]  # D^{L+1}, ..., D^1
    for factor in reversed(factors[1:]):
        after.append(after[-1] * factor)
    D = torch.stack(after[::-1])
    covariance = shares + sb**2
    return Layers(
        covariance=covariance,
        weights=shares * D,
        biases=sb**2 * D,
        propulsion=k2 * (multiplied * D)[1:],
        # The difference sigma_w^2 Cov(h h', phi' phi') is taken before the factor D, which is more accurate.
        gap=(multiplied[1:] - covariance[:-1] * factors[1:]) * D[1:],
    )


def checked_inputs(x1: Tensor | np.ndarray, x2: Tensor | np.ndarray | None) -> tuple[Tensor, Tensor]:
    """Both inputs in float64; ``x2`` is ``x1`` if None.

    Raises:
        ValueError: they are not matrices of finite real numbers with the same number of columns.
    """
    a = real_and_finite(torch.as_tensor(x1), "x1")
    b = a if x2 is None else real_and_finite(torch.as_tensor(x2), "x2").to(a)
    for name, x in (("x1", a), ("x2", b)):
        if x.ndim != 2 or 0 in x.shape:
            raise ValueError(f"{name} must be a matrix of inputs, (n, n_0), not empty; got shape {tuple(x.shape)}")
    if a.shape[1] != b.shape[1]:
        raise ValueError(f"x1 and x2 must have the same number of columns n_0; got {a.shape[1]} and {b.shape[1]}")
    return a, b


def check_results(*parts: Any) -> None:
    """Raise OverflowError if a tensor in one of these dataclasses is NaN or infinite."""
    for part in parts:
        for name, values in vars(part).items() if part is not None else ():
            if isinstance(values, Tensor):
                not_overflown(values, f"kernels ({name.lstrip('_')})", ADVICE)


def check_numbers(depth: int, sigma_w: float, sigma_b: float, degree: float) -> None:
    """Raise ValueError for a depth, standard deviation or degree that no network can have."""
    if depth < 0 or depth % 1:
        raise ValueError(f"depth, the number of hidden layers, must be whole and at least 0; got {depth}")
    if not (math.isfinite(sigma_w) and sigma_w > 0):
        raise ValueError(f"sigma_w must be positive and finite; got {sigma_w}")
    if not (math.isfinite(sigma_b) and sigma_b >= 0):
        raise ValueError(f"sigma_b must be at least 0 and finite; got {sigma_b}")
    if not math.isfinite(degree):
        raise ValueError(f"degree must be finite; got {degree}")
    for name, value in (("sigma_w", sigma_w), ("sigma_b", sigma_b), ("degree", degree)):
        if value and not 1 / LARGEST <= abs(value) <= LARGEST:
            raise OverflowError(
                f"powers of {name} overflow or underflow float64; got {value}: take one within 1e-70 to 1e70"
            )


def _positions(positions: str | int | Collection[str | int], depth: int) -> tuple[str | int, ...]:
    allowed: tuple[str | int, ...] = ("input", *range(1, depth + 1))
    if positions in ("hidden", "all"):
        return allowed if positions == "all" else allowed[1:]
    chosen = (positions,) if isinstance(positions, str | int) else tuple(positions)
    if "readout" in chosen:
        raise ValueError(
            "Propulsion on the readout has no deterministic limit: its kernel k^2 f f' stays random at any width. Its "
            "mean and variance are in propulsion_readout; leave 'readout' out of positions"
        )
    wrong = [p for p in chosen if isinstance(p, bool) or p not in allowed]
    if wrong or len(set(chosen)) != len(chosen):
        raise ValueError(
            f"positions must be 'hidden', 'all' or distinct ones of 'input' and the hidden layers 1..{depth}; "
            f"got {positions!r}"
        )
    return chosen


def _method(method: str, phi: Activation) -> tuple[Callable[[Pairs], Moments], Callable[[Tensor], Moments]]:
    """Functions for the expectations over pairs, and over h' = h."""
    if method not in METHODS:
        raise ValueError(f"method must be one of {', '.join(map(repr, METHODS))}; got {method!r}")
    closed = phi.moments
    if method == "closed" and closed is None:
        raise ValueError(f"activation {phi.name} has no closed forms; use method='series'")
    if closed is not None and method in ("auto", "closed"):
        return closed, lambda q: closed(diagonal(q))
    moments_of = quadrature_moments if method == "quadrature" else series_moments
    return partial(moments_of, phi), partial(diagonal_moments, phi)
