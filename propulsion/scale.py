"""The scale of Propulsion: z^k (Kowsher et al. 2024, Eq. 1-3), of one vector or pooled over several (App. F).

A pooling acts on the scales z_i^k, coordinate by coordinate, and does not see the layer's output. So the pooled scale
of any pooling is again one vector, and merges as one.

Vectors that start equal get equal gradients from mean and L2 pooling, and stay equal for ever: p of them are one vector
trained at another rate. From max and min, ties share the gradient, with the same end. So several vectors start apart
(`initial_vectors`), spread so that their pooled scale is the wanted one.
"""

import math
from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

# Relative spread of the scales that several vectors start with. Small beside what training moves them by, so that with
# max or min pooling every vector comes into play.
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
    """The z whose `power` is the scale, the positive one of two.

    Raises:
        ValueError: a negative scale, which no even power gives.
    """
    if isinstance(degree, int) and degree % 2 == 0 and bool((scale < 0).any()):
        raise ValueError(f"no z has a negative z**{degree}: use an odd or a non-integer degree")
    return scale.sign() * scale.abs() ** (1 / degree)


def root_mean_square(scales: Float[Tensor, "p d_out"]) -> Float[Tensor, "d_out"]:
    """|s| / sqrt(p): L2 pooling, so that equal vectors pool to what they are."""
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
    """What z starts with: `value` everywhere, plus Gaussian noise; of several vectors, spread about that.

    Args:
        vectors: p.
        width: d_out.
        degree: k.
        pooling: one of `POOLINGS`.
        value: the pooled scale starts at value^k (to rounding if p > 1), and without noise at p = 1 z is that value.
        noise: standard deviation, from torch's global generator.
        dtype: of the result.

    Returns:
        (d_out,), or (p, d_out) if p > 1.
    """
    if vectors == 1:
        z = torch.full((width,), value, dtype=dtype)
    else:
        scales = 1 + SPREAD * torch.randn(vectors, width, dtype=dtype).clamp(-3, 3)
        z = value * root(scales / POOLINGS[pooling](scales), degree)
    return z + noise * torch.randn(z.shape, dtype=dtype) if noise else z
