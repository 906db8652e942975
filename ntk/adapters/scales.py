"""Methods that multiply the inputs or outputs of layers by a trained vector."""

import math
from dataclasses import dataclass
from functools import lru_cache

import torch
from jaxtyping import Float
from torch import Tensor

from ntk.adapters.method import Found, Layer, LayerMethod, Method, Modules, chosen, seed_of
from ntk.features import Dense, Outer


@dataclass(frozen=True)
class Propulsion(LayerMethod):
    """A vector z that multiplies the outputs of a layer as z**degree, at z = 1 (Kowsher et al. 2024).

        d f / d z_j = degree * sum_t g_tj y_tj

    If a model uses a layer's weight and bias without calling the layer, they are multiplied by z**degree there.

    Attributes:
        degree: the exponent k; the kernel grows as k squared.
        modules: layers and embeddings that carry a vector.
        basis: "coordinates" of the output; or "rotated", where the layer returns Q^T (z**degree * Q y) with Q a random
            orthogonal matrix. The rotated kernel shows what depends on the coordinates: its mean over Q is close to the
            kernel of :class:`OutputMatrix` (:func:`rotated_mean`).
        seed: of Q, which also depends on the output's length and on nothing else.
    """

    degree: float = 1.0
    modules: Modules = None
    basis: str = "coordinates"
    seed: int = 0

    def __post_init__(self) -> None:
        if not math.isfinite(self.degree):
            raise ValueError(f"the degree of Propulsion must be finite; got {self.degree}")
        if self.basis not in ("coordinates", "rotated"):
            raise ValueError(f"basis must be 'coordinates' or 'rotated'; got {self.basis!r}")

    def features(self, layer: Layer) -> Found:
        """The feature of z, a vector of length r.

        Raises:
            NotImplementedError: a rotated basis, and the model uses the layer's weight or bias without calling it.
        """
        if self.basis == "rotated":
            if layer.read is not None:
                raise NotImplementedError(
                    f"the model itself uses the weight or bias of {layer.name}, which a rotated basis does not scale: "
                    "leave the layer out of modules"
                )
            q = rotation(layer.y.shape[-1], self.seed).to(layer.g)
            yield "z", layer.y.shape[-1:], layer.over_tokens(self.degree * (layer.g @ q.T) * (layer.y @ q.T))
            return
        value = layer.gy.value if layer.read is None else layer.gy.value + layer.read
        yield "z", layer.y.shape[-1:], Dense(self.degree * value)

    @property
    def in_reads(self) -> bool:
        """True, since z multiplies the weight there."""
        return True


@dataclass(frozen=True)
class OutputMatrix(LayerMethod):
    """A whole matrix B that multiplies the outputs of a layer as (1 + B / sqrt(r)) y, at B = 0.

        d f / d B = sum_t g_t y_t^T / sqrt(r)

    Propulsion of degree 1 trains the diagonal of sqrt(r) B. For a linear layer without a bias the kernel is that of its
    weight W in the metric W W^T / r, since d f / d B = (d f / d W) W^T / sqrt(r).

    Attributes:
        modules: layers and embeddings that carry a matrix.
    """

    modules: Modules = None

    def features(self, layer: Layer) -> Found:
        """The feature of B, ``(r, r)``."""
        r = layer.y.shape[-1]
        y = layer.y / math.sqrt(r)
        yield "B", torch.Size((r, r)), Outer(y, layer.g, layer.feature.tokens)


@lru_cache(maxsize=8)
def rotation(r: int, seed: int) -> Float[Tensor, "r r"]:
    """A random orthogonal matrix, uniform over all of them (Mezzadri 2007), float64; O(r^3)."""
    generator = torch.Generator().manual_seed(seed_of(f"{seed}.rotation.{r}"))
    q, upper = torch.linalg.qr(torch.randn(r, r, generator=generator, dtype=torch.float64))
    return q * upper.diagonal().sign()


def rotated_mean(
    products: Float[Tensor, "..."], traces: Float[Tensor, "..."], transposed: Float[Tensor, "..."], r: int
) -> Float[Tensor, "..."]:
    """The mean over all rotations of the kernel of Propulsion with ``basis="rotated"``, at degree 1.

        E_Q sum_j (Q M Q^T)_jj (Q M' Q^T)_jj = (<M, M'> + tr M tr M' + <M, M'^T>) / (r + 2),   M = sum_t g_t y_t^T

    by the fourth moments of a uniformly random unit vector.

    Args:
        products: <M, M'>, r times the kernel of :class:`OutputMatrix`.
        traces: tr M tr M'.
        transposed: <M, M'^T>.
        r: the length of the output.
    """
    return (products + traces + transposed) / (r + 2)


@dataclass(frozen=True)
class IA3(Method):
    """Vectors of ones that multiply the outputs of layers, or the inputs of feed-forward layers (Liu et al. 2022).

    Attributes:
        modules: layers whose outputs are scaled.
        feedforward: layers whose inputs are scaled instead.
    """

    modules: Modules
    feedforward: Modules = ()

    def adapts(self, module: str) -> bool:
        """Whether ``modules`` or ``feedforward`` chooses the layer."""
        return chosen(self.modules, module) or chosen(self.feedforward, module)

    def features(self, layer: Layer) -> Found:
        """The feature of the vector, of length s at feed-forward layers and r at others."""
        if layer.x is None:
            return
        if chosen(self.feedforward, layer.name):
            yield "l", layer.x.shape[-1:], layer.gx
        else:
            yield "l", layer.y.shape[-1:], layer.gy
