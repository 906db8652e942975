"""Methods that multiply the inputs or outputs of layers by a trained vector."""

import math
from dataclasses import dataclass

from ntk.adapters.method import Found, Layer, LayerMethod, Method, Modules, chosen
from ntk.features import Dense


@dataclass(frozen=True)
class Propulsion(LayerMethod):
    """A vector z that multiplies the outputs of a layer as z**degree, at z = 1 (Kowsher et al. 2024).

        d f / d z_j = degree * sum_t g_tj y_tj

    If a model uses a layer's weight and bias without calling the layer, they are multiplied by z**degree there.

    Attributes:
        degree: the exponent k; the kernel grows as k squared.
        modules: layers and embeddings that carry a vector.
    """

    degree: float = 1.0
    modules: Modules = None

    def __post_init__(self) -> None:
        if not math.isfinite(self.degree):
            raise ValueError(f"the degree of Propulsion must be finite; got {self.degree}")

    def features(self, layer: Layer) -> Found:
        """The feature of z, a vector of length r."""
        value = layer.gy.value if layer.read is None else layer.gy.value + layer.read
        yield "z", layer.y.shape[-1:], Dense(self.degree * value)

    @property
    def in_reads(self) -> bool:
        """True, since z multiplies the weight there."""
        return True


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
