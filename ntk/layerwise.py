"""Why Propulsion's kernel differs from full fine-tuning's, layer by layer, for any weights.

A linear layer has outputs v_t = W a_t + b of length r at tokens t, and g_t are the gradients at them. Primes mark the
second example. The kernels of the layer's weight, of a whole matrix on its outputs (:class:`ntk.adapters.OutputMatrix`)
and of Propulsion's vector at degree 1 are

    K_F = sum_ts (g_t . g'_s) (a_t . a'_s)
    K_M = sum_ts (g_t . g'_s) (v_t . v'_s) / r
    K_P = sum_ts sum_j g_tj g'_sj v_tj v'_sj  =  K_M + r sum_ts Cov_j(g_tj g'_sj, v_tj v'_sj)

with Cov_j the covariance over the r coordinates of the output. Without a bias, K_M is K_F in the metric W W^T / r, so
that K_F and K_M differ by the anisotropy of W. K_M and K_P differ by the choice of coordinates: the mean of K_P over
all rotations of the output is close to K_M (:func:`ntk.adapters.rotated_mean`).
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ntk.adapters import Found, Layer, LayerMethod, Method, Modules, OutputMatrix, Propulsion, chosen, layers_of
from ntk.empirical import kernels_of_methods
from ntk.features import Outer
from ntk.inputs import Inputs
from ntk.outputs import Output
from ntk.request import Request


@dataclass(frozen=True)
class Decomposition:
    """The kernels of one linear layer, each ``(n1, n2, c, c)`` or its reduction, unnormalised.

    Attributes:
        full: K_F of the weight, without the bias.
        metric: K_M of a whole matrix on the outputs.
        coordinates: K_P - K_M, what the choice of coordinates adds.
    """

    full: Float[Tensor, "n1 n2 ..."]
    metric: Float[Tensor, "n1 n2 ..."]
    coordinates: Float[Tensor, "n1 n2 ..."]

    @property
    def propulsion(self) -> Float[Tensor, "n1 n2 ..."]:
        """K_P of Propulsion's vector at degree 1 and z = 1; at degree k it is k^2 times this."""
        return self.metric + self.coordinates


@dataclass(frozen=True)
class _Weight(LayerMethod):
    """The weight of a linear layer, as far as the layer's own calls use it: d f / d W = sum_t g_t a_t^T."""

    modules: Modules

    def features(self, layer: Layer) -> Found:
        assert layer.x is not None
        if layer.read is not None or layer.at_inputs is not None:
            raise NotImplementedError(
                f"{layer.name} does more than multiply by its weight, or the model uses its weight or bias itself, so "
                "that its kernels are not those of one product: leave it out of modules"
            )
        yield "W", layer.weight.shape, Outer(layer.x, layer.g, layer.feature.tokens)


_PARTS: Mapping[str, type[_Weight] | type[OutputMatrix] | type[Propulsion]] = {
    "full": _Weight,
    "metric": OutputMatrix,
    "propulsion": Propulsion,
}


def decomposition(
    model: nn.Module,
    inputs: Inputs,
    inputs2: Inputs | None = None,
    *,
    modules: Modules = None,
    output: Output | None = None,
    reduce: str | None = None,
    method: str = "auto",
    memory_budget: int | float | None = None,
    progress: bool = False,
) -> dict[str, Decomposition]:
    """K_F, K_M and K_P - K_M of every linear layer of the model's body: formulas in :mod:`ntk.layerwise`.

    Arguments as in :func:`ntk.adapter_kernels`, and:

    Args:
        modules: the linear layers, as a method's ``modules``; None for all. Embeddings and the head are none.
        reduce: as in :func:`ntk.empirical_ntk`; all three are linear in the pairs of outputs.

    Returns:
        One :class:`Decomposition` for each layer, by the name of its module in the model's order. Layers that share a
        weight each count their own calls. Kernels of a layer on which the output does not depend are 0.

    Raises:
        ValueError: as :func:`ntk.adapter_kernels`; no linear layer is chosen, or the output depends on none of them.
        NotImplementedError: a chosen layer does more than multiply by its weight, or the model uses the weight or bias
            without calling the layer; leave it out of ``modules``.
        MemoryError: as :func:`ntk.empirical_ntk`.

    Cost: the passes of :func:`ntk.adapter_kernels`, and three contractions for each layer. ``coordinates`` is a
    difference, with the rounding of K_P.

    Example:
        >>> model = torch.nn.Linear(3, 2, bias=False).double()
        >>> parts = decomposition(model, torch.eye(3, dtype=torch.float64)[:2], reduce="trace")[""]
        >>> torch.allclose(parts.metric, (model.weight.T @ model.weight)[:2, :2])
        True
        >>> bool(parts.coordinates.abs().max() < 1e-12)
        True
    """
    layers = [name for name, layer in layers_of(model).items() if not isinstance(layer, nn.Embedding)]
    layers = [name for name in layers if chosen(modules, name)]
    if not layers:
        raise ValueError(f"no linear layer of the model's body is chosen by modules={modules!r}")
    methods: dict[str, Method] = {
        f"{part} of {name}": kind(modules=frozenset([name]).__contains__)
        for name in layers
        for part, kind in _PARTS.items()
    }
    request = Request(model, inputs, inputs2, output, reduce, memory_budget, progress)
    kernels = kernels_of_methods(request, methods, method)
    if not kernels:
        raise ValueError(f"the model's output depends on none of the linear layers that modules={modules!r} chooses")
    zero = torch.zeros_like(next(iter(kernels.values())))
    result = {}
    for name in layers:
        full, metric, propulsion = (kernels.get(f"{part} of {name}", zero) for part in _PARTS)
        result[name] = Decomposition(full, metric, propulsion - metric)
    return result
