"""The scale of Propulsion: z^k (Kowsher et al. 2024, Eq. 1-3), of one vector or pooled over several (App. F).

A pooling acts on the scales z_i^k, coordinate by coordinate, and does not depend on the layer's output. So the pooled
scale is again one vector, and can be merged.

Vectors that start equal get equal gradients from every pooling (with max and min, ties share the gradient) and stay
equal: they act as one vector trained at another rate. Several vectors therefore start at different values
(`initial_vectors`), chosen so that the pooled scale is as configured.
"""

import math
from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

# Relative standard deviation of the initial scales of several vectors: small compared with the changes of training, so
# that with max or min pooling every vector gets gradients.
SPREAD = 0.02


def power(z: Float[Tensor, "..."], degree: int | float) -> Float[Tensor, "..."]:
    """The scale: z^k for an integer degree k, sign(z) |z|^k for another, in float32 or wider.

    The second form agrees with the first at odd k, increases with z everywhere and is never NaN; nor is its gradient,
    k |z|^(k-1), which is taken as 0 at z = 0.
    """
    z = z.to(torch.promote_types(z.dtype, torch.float32))
    if isinstance(degree, int):
        return z**degree
    # The inner where keeps autograd from forming 0 * inf at z = 0.
    nonzero = z != 0
    return torch.where(nonzero, z.sign() * torch.where(nonzero, z.abs(), 1.0) ** degree, 0.0)


def root(scale: Float[Tensor, "..."], degree: int | float) -> Float[Tensor, "..."]:
    """The z whose `power` is the scale; the positive one if there are two.

    Raises:
        ValueError: a scale is negative and the degree even.
    """
    if isinstance(degree, int) and degree % 2 == 0 and bool((scale < 0).any()):
        raise ValueError(f"no z has a negative z**{degree}: use an odd or a non-integer degree")
    return scale.sign() * scale.abs() ** (1 / degree)


def root_mean_square(scales: Float[Tensor, "p d_out"]) -> Float[Tensor, "d_out"]:
    """L2 pooling |s| / sqrt(p): of p equal scales it is their common value."""
    return torch.linalg.vector_norm(scales, dim=0) / math.sqrt(len(scales))


POOLINGS: dict[str, Callable[[Tensor], Tensor]] = {
    "mean": lambda scales: scales.mean(dim=0),
    "max": lambda scales: scales.amax(dim=0),
    "min": lambda scales: scales.amin(dim=0),
    "l2": root_mean_square,
}


def scale_of(z: Tensor, degree: int | float, pooling: str = "mean") -> Float[Tensor, "d_out"]:
    """z^k of one vector (d_out,), pooled of several (p, d_out)."""
    scale = power(z, degree)
    return scale if scale.ndim == 1 else POOLINGS[pooling](scale)


def initial_vectors(
    vectors: int, width: int, *, degree: int | float, pooling: str, value: float, noise: float, dtype: torch.dtype
) -> Tensor:
    """The initial z: `value` everywhere, plus Gaussian noise; several vectors differ around it.

    Args:
        vectors: the number p of vectors.
        width: the number d_out of output features.
        degree: the degree k.
        pooling: one of `POOLINGS`.
        value: the pooled scale starts at value^k (to rounding if p > 1), and without noise at p = 1 z is that value.
        noise: standard deviation, from torch's global generator.
        dtype: dtype of the result.

    Returns:
        (d_out,), or (p, d_out) if p > 1.
    """
    if vectors == 1:
        z = torch.full((width,), value, dtype=dtype)
    else:
        scales = 1 + SPREAD * torch.randn(vectors, width, dtype=dtype).clamp(-3, 3)
        z = value * root(scales / POOLINGS[pooling](scales), degree)
    return z + noise * torch.randn(z.shape, dtype=dtype) if noise else z
