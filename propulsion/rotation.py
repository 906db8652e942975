"""Scales in a random orthogonal basis of a layer's outputs, y = Q^T (s * Q v): ``PropulsionConfig(basis="rotated")``.

The kernel of such scales does not depend on the coordinates in which a layer was trained. Beside that of plain scales
it shows what the choice of coordinates does (`docs/theory.md`, Theorems 12 and 13).
"""

import zlib
from functools import lru_cache

import torch
from jaxtyping import Float
from torch import Tensor

BASES = ("coordinates", "rotated")


@lru_cache(maxsize=16)
def rotation(
    width: int, seed: int, dtype: torch.dtype = torch.float64, device: torch.device | str = "cpu"
) -> Float[Tensor, "r r"]:
    """Q, orthogonal and uniformly random (Mezzadri 2007), the same for all layers of one width and seed; O(width^3).

    It is `ntk.adapters.rotation`, computed again here because neither package imports the other. An adapter is saved
    with the seed and not with Q.
    """
    generator = torch.Generator().manual_seed(zlib.crc32(f"{seed}.rotation.{width}".encode()))
    q, upper = torch.linalg.qr(torch.randn(width, width, generator=generator, dtype=torch.float64))
    return (q * upper.diagonal().sign()).to(device, dtype)


def scaled_in_basis(v: Float[Tensor, "..."], scale: Float[Tensor, "r"], seed: int, axis: int = -1) -> Tensor:
    """Q^T (s * Q v) along an axis of length r, in the wider dtype of v and s, and rounded once to the dtype of v.

    It is computed as v + Q^T ((s - 1) * Q v), which is v to the last bit at s = 1. Two products with Q cost 4 r^2
    operations for each token, twice as many as a square layer.
    """
    wide = torch.promote_types(v.dtype, scale.dtype)
    q = rotation(len(scale), seed, wide, v.device)
    moved = v.movedim(axis, -1).to(wide)
    change = ((moved @ q.T) * (scale.to(v.device, wide) - 1)) @ q
    return (moved + change).to(v.dtype).movedim(-1, axis)
