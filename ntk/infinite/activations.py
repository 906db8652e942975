"""The table of activations: function, derivative, and the closed forms that exist."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from ntk.infinite import closed_forms
from ntk.infinite.gaussian import LARGEST, Moments, Pairs


@dataclass(frozen=True)
class Activation:
    """An elementwise function, its derivative, and its closed forms.

    Attributes:
        function: phi, on tensors of any shape.
        derivative: phi', which may be wrong at single points.
        moments: the closed forms of the three expectations, or None.
        complements: closed forms of 1 - kappa and 1 + kappa for kappa the correlation of phi(h) and phi(h'), or None.
        homogeneous: phi(s h) = s phi(h) for s > 0, hence h phi'(h) = phi(h).
        gradients: whether autograd differentiates ``moments`` by the covariances.
    """

    name: str
    function: Callable[[Tensor], Tensor]
    derivative: Callable[[Tensor], Tensor]
    moments: Callable[[Pairs], Moments] | None = None
    complements: Callable[[Pairs], tuple[Tensor, Tensor]] | None = None
    homogeneous: bool = False
    gradients: bool = True


def leaky_relu(slope: float = 0.01) -> Activation:
    """max(h, 0) + slope min(h, 0), with derivative ``slope`` at 0 as in PyTorch."""
    if not abs(slope) < LARGEST:
        raise ValueError(f"the slope of leaky_relu must be finite, below {LARGEST:g}; got {slope}")
    return Activation(
        "leaky_relu" if slope else "relu",
        lambda h: torch.where(h > 0, h, slope * h),
        lambda h: torch.where(h > 0, 1.0, torch.full_like(h, slope)),  # of two numbers it would be float32
        partial(closed_forms.leaky_relu, slope=slope),
        partial(closed_forms.leaky_relu_complements, slope=slope),
        homogeneous=True,
    )


def relu_power(power: float, negative: float = 0.0) -> Activation:
    """h^p for h > 0 and negative |h|^p for h < 0: every positively homogeneous function of degree p, up to a factor.

    h phi'(h) = p phi(h), so that Propulsion on a layer has p^2 k^2 times the kernel of the next layer's weights, and no
    other functions have such a law (docs/theory.md, Theorem 5a). Nearly parallel inputs of a network of several layers
    lose digits for p < 3/2: E[phi' phi'] has a relative error of up to 1e-16^(p - 1/2) there.

    Raises:
        ValueError: a power of at most 1/2, for which E[phi'(h)^2] and the kernel of full fine-tuning are infinite; a
            power or factor that is not finite.
    """
    if not (math.isfinite(power) and power > 1 / 2):
        raise ValueError(f"the power of relu_power must be finite and above 1/2, where E[phi'^2] ends; got {power}")
    if power == 1:
        return leaky_relu(-negative)
    if not abs(negative) < LARGEST:
        raise ValueError(f"the factor of relu_power must be finite, below {LARGEST:g}; got {negative}")

    def side(h: Tensor, exponent: float, factor: float) -> Tensor:
        size = torch.where(h == 0, 1.0, h.abs()) ** exponent  # where h is 0 the power may be infinite
        return torch.where(h > 0, size, factor * size).masked_fill(h == 0, 0.0)

    return Activation(
        f"relu_power({power:g})",
        lambda h: side(h, power, negative),
        lambda h: power * side(h, power - 1, -negative),
        partial(closed_forms.relu_power, power=power, negative=negative),
        gradients=False,
    )


def _distribution(h: Tensor) -> Tensor:
    return torch.erfc(-h / math.sqrt(2)) / 2


def _density(h: Tensor) -> Tensor:
    return torch.exp(-(h**2) / 2) / math.sqrt(2 * math.pi)


def _silu_derivative(h: Tensor) -> Tensor:
    s = torch.sigmoid(h)
    return s * (1 + h * (1 - s))


ACTIVATIONS: dict[str, Activation] = {
    activation.name: activation
    for activation in (
        Activation(
            "linear",
            lambda h: h,
            torch.ones_like,
            closed_forms.linear,
            closed_forms.linear_complements,
            homogeneous=True,
        ),
        leaky_relu(0.0),
        leaky_relu(),
        Activation("erf", torch.erf, lambda h: 2 / math.sqrt(math.pi) * torch.exp(-(h**2)), closed_forms.erf),
        Activation(
            "gelu", lambda h: h * _distribution(h), lambda h: _distribution(h) + h * _density(h), closed_forms.gelu
        ),
        Activation("tanh", torch.tanh, lambda h: 1 - torch.tanh(h) ** 2),
        Activation("silu", torch.nn.functional.silu, _silu_derivative),
    )
}


# torch's functions of these names are recognised, so that closed forms are used. Torch's `linear` is a product.
_TORCH: dict[object, str] = {
    getattr(place, name): name
    for place in (torch, torch.nn.functional, torch.special)
    for name in ACTIVATIONS
    if name != "linear" and hasattr(place, name)
}


def find(activation: str | Activation | Callable[[Tensor], Tensor]) -> Activation:
    """The activation of a name or of a differentiable elementwise function; an :class:`Activation` is returned.

    Raises:
        ValueError: an unknown name; a function without a usable derivative, or with jumps.
    """
    if isinstance(activation, Activation):
        return activation
    name = _TORCH.get(activation) if callable(activation) and activation.__hash__ else activation
    if isinstance(name, str) and name in ACTIVATIONS:
        return ACTIVATIONS[name]
    if isinstance(activation, str) or not callable(activation):
        raise ValueError(
            f"activation must be one of {', '.join(map(repr, ACTIVATIONS))}, an Activation such as "
            f"ntk.infinite.leaky_relu(0.2), or a differentiable elementwise function of tensors; got {activation!r}"
        )
    return from_function(activation)


def from_function(function: Callable[[Tensor], Tensor], name: str | None = None) -> Activation:
    """An activation from an elementwise function, differentiated by autograd.

    Raises:
        ValueError: the function is not elementwise, is not finite, or has no derivative that integrates to it: Stein's
            identity E[z phi(z)] = E[phi'(z)] fails, as it does for a step, whose derivative is 0 wherever it exists.
    """
    name = name or str(getattr(function, "__name__", type(function).__name__))

    def derivative(h: Tensor) -> Tensor:
        with torch.enable_grad():
            leaf = h.detach().requires_grad_()
            value = function(leaf)
            if not value.requires_grad:
                raise ValueError(f"activation {name} has no derivative: autograd sees no dependence on its input")
            return torch.autograd.grad(value.sum(), leaf)[0]

    # The grid is offset from 0, where kinks are, so that the derivative exists on it.
    z = torch.arange(-12, 12, 1 / 64, dtype=torch.float64) + 1 / 128
    with torch.no_grad():
        value = function(z)
    if value.shape != z.shape or not torch.isfinite(value).all():
        raise ValueError(f"activation {name} must map a tensor elementwise to finite values of the same shape")
    weights = _density(z) / 64
    left, right = float(weights @ (z * value)), float(weights @ derivative(z))
    size = float((weights @ value**2).sqrt() + abs(right))
    if not abs(left - right) <= 1e-2 * size:
        raise ValueError(
            f"activation {name} has no usable derivative: E[z phi(z)] = {left:.4g} but E[phi'(z)] = {right:.4g} for "
            "z ~ N(0, 1). It jumps somewhere (a step or sign); a tangent kernel needs a differentiable activation"
        )
    return Activation(name, lambda h: function(h).detach(), derivative)
