"""Rules for convolutions, and for the norms whose weights belong to channels.

Data have the shape ``(n m, C, *positions)``, m inputs for each of n examples.
"""

from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ntk.features import Dense, formed
from ntk.patches import Geometry, Patches
from ntk.structured.dependence import Dependence
from ntk.structured.rule import FeatureOf, Unsuitable, Uses, affine, bind
from ntk.tokens import Gradients

_CONVOLUTION = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
_TRANSPOSED = ("input", "weight", "bias", "stride", "padding", "output_padding", "groups", "dilation")


def convolution(dependence: Dependence, args: tuple, kwargs: dict, result: Tensor) -> Uses:
    """Convolutions in one to three dimensions, in groups too."""
    x, weight, bias, stride, padding, dilation, groups = bind(_CONVOLUTION, args, kwargs)
    kernel = tuple(weight.shape[2:])
    stride, dilation = (_each(value, len(kernel), 1) for value in (stride, dilation))
    if padding == "same":
        whole = [d * (k - 1) for k, d in zip(kernel, dilation)]
        before = tuple(size // 2 for size in whole)
        after = tuple(size - size // 2 for size in whole)
    else:
        before = after = _each(0 if padding == "valid" else padding, len(kernel), 0)
    geometry = Geometry(kernel, stride, dilation, before, after)
    return _uses(dependence, x, weight, bias, partial(_kernel, x, weight.shape, geometry, groups or 1, False))


def transposed_convolution(dependence: Dependence, args: tuple, kwargs: dict, result: Tensor) -> Uses:
    """Transposed convolutions, in groups too: the roles of inputs and outputs are exchanged."""
    x, weight, bias, stride, padding, _, groups, dilation = bind(_TRANSPOSED, args, kwargs)
    kernel = tuple(weight.shape[2:])
    stride, dilation = (_each(value, len(kernel), 1) for value in (stride, dilation))
    # Patches end where the last one does; what output_padding adds to the output is in none of them.
    border = _each(padding, len(kernel), 0)
    geometry = Geometry(kernel, stride, dilation, border, border)
    return _uses(dependence, x, weight, bias, partial(_kernel, x, weight.shape, geometry, groups or 1, True))


def _each(value: Any, axes: int, default: int) -> tuple[int, ...]:
    """An option with one number for each axis."""
    numbers = (default if value is None else value,) if not isinstance(value, (tuple, list)) else tuple(value)
    return tuple(numbers) * axes if len(numbers) == 1 else tuple(numbers)


def _uses(dependence: Dependence, x: Any, weight: Tensor, bias: Any, feature: FeatureOf) -> Uses:
    if isinstance(x, Tensor) and (x.ndim != weight.ndim or len(x) % dependence.n):
        raise Unsuitable("its input has no axis of examples")
    if dependence.is_derived(weight) and not dependence.is_parameter(weight):
        return affine(dependence, x, weight, bias, lambda: (weight, lambda g: formed(feature(g), weight.shape)), _sum)
    return affine(dependence, x, weight, bias, lambda: (weight, feature), _sum)


def _kernel(
    x: Tensor, shape: torch.Size, geometry: Geometry, groups: int, transposed: bool, g: Gradients
) -> Patches | Dense:
    """The feature of the kernel; with several groups, which make it small, it is formed at once."""
    patches = Patches(x.detach().unflatten(0, (g.n, -1)), g.whole, geometry, transposed)
    return patches if groups == 1 else _of_groups(patches, groups, shape)


def _of_groups(patches: Patches, groups: int, shape: torch.Size) -> Dense:
    """The features of all groups: each is that of a convolution of its own channels."""
    n, c = patches.shape
    value = patches.like.new_empty(n, c, groups, shape[0] // groups, shape[1:].numel())
    patches.write_groups(groups, value)
    return Dense(value.view(n, c, *shape))


def _sum(g: Gradients) -> Dense:
    """The feature of a bias of channels."""
    return Dense(_by_channel(g).sum(dim=(2, 4)))


def _by_channel(g: Gradients) -> Tensor:
    """The gradients ``(n, c, m, R, T)``, with all positions along one axis."""
    return g.whole.reshape(*g.whole.shape[:4], -1)


def batch_norm(dependence: Dependence, args: tuple, kwargs: dict, result: Tensor) -> Uses:
    """Normalisation by stored statistics."""
    x, mean, variance, weight, bias, training, _, eps = bind(
        ("input", "running_mean", "running_var", "weight", "bias", "training", "momentum", "eps"), args, kwargs
    )
    if training or mean is None or dependence.is_derived(mean) or dependence.is_derived(variance):
        raise Unsuitable("it does not normalise by stored statistics")
    normalised = partial(F.batch_norm, running_mean=mean, running_var=variance, eps=1e-5 if eps is None else eps)
    return _norm(dependence, x, weight, bias, normalised)


def group_norm(dependence: Dependence, args: tuple, kwargs: dict, result: Tensor) -> Uses:
    """Normalisation over groups of channels and all positions."""
    x, groups, weight, bias, eps = bind(("input", "num_groups", "weight", "bias", "eps"), args, kwargs)
    return _norm(
        dependence, x, weight, bias, partial(F.group_norm, num_groups=groups, eps=1e-5 if eps is None else eps)
    )


def instance_norm(dependence: Dependence, args: tuple, kwargs: dict, result: Tensor) -> Uses:
    """Normalisation over all positions."""
    x, mean, variance, weight, bias, of_inputs, _, eps = bind(
        ("input", "running_mean", "running_var", "weight", "bias", "use_input_stats", "momentum", "eps"), args, kwargs
    )
    if (mean is not None and of_inputs is not False) or len(x) % dependence.n or x.ndim < 3:
        raise Unsuitable("it updates its statistics")
    options = {"use_input_stats": mean is None, "eps": 1e-5 if eps is None else eps}
    return _norm(
        dependence, x, weight, bias, partial(F.instance_norm, running_mean=mean, running_var=variance, **options)
    )


def _norm(dependence: Dependence, x: Any, weight: Any, bias: Any, normalised: Any) -> Uses:
    """The uses in a norm: its weight multiplies normalised inputs, and its bias is added, at every position."""

    def feature(g: Gradients) -> Dense:
        values = normalised(x.detach()).to(g.dtype).unflatten(0, (g.n, -1))
        return Dense(torch.einsum("nmrt,ncmrt->ncr", values.reshape(*values.shape[:3], -1), _by_channel(g)))

    if isinstance(x, Tensor) and x.ndim < 2:
        raise Unsuitable("its input has no axis of examples")
    return affine(dependence, x, weight, bias, lambda: (weight, feature), _sum)


def prelu(dependence: Dependence, args: tuple, kwargs: dict, result: Tensor) -> Uses:
    """max(x, 0) + w min(x, 0), with one weight for each channel or for all."""
    x, weight = bind(("input", "weight"), args, kwargs)

    def feature(g: Gradients) -> Dense:
        values = x.detach().clamp(max=0).to(g.dtype).unflatten(0, (g.n, -1))
        found = torch.einsum("nmrt,ncmrt->ncr", values.reshape(*values.shape[:3], -1), _by_channel(g))
        return Dense(found if weight.numel() == found.shape[2] else found.sum(dim=2, keepdim=True))

    if isinstance(x, Tensor) and (x.ndim < 2 or weight.ndim != 1):
        raise Unsuitable("its input has no axis of channels")
    return affine(dependence, x, weight, None, lambda: (weight, feature), None)


RULES: dict[Any, Any] = {
    **dict.fromkeys((F.conv1d, F.conv2d, F.conv3d), convolution),
    **dict.fromkeys((F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d), transposed_convolution),
    F.batch_norm: batch_norm,
    **dict.fromkeys((F.group_norm, torch.group_norm), group_norm),
    F.instance_norm: instance_norm,
    **dict.fromkeys((F.prelu, torch.prelu), prelu),
}
