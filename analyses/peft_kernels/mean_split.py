"""Kernels split into the part of the mean activation and the residual, to see why kernels of different methods align.

A layer's input is split into its mean over all real tokens and examples and a residual, x_t = m + r_t, which splits the
output too: y_t = (W m + b) + W r_t. With the gradients g_t at the output and gamma = sum_t g_t, the features split into

| method     | common            | residual                     |
|------------|-------------------|------------------------------|
| full       | gamma m^T         | sum_t g_t r_t^T              |
| Propulsion | gamma * (W m + b) | sum_t g_t * (W r_t)          |
| BitFit     | gamma             | 0: a bias multiplies 1       |

A kernel is the sum of the common part, the residual part and cross terms, so that shares of its trace need not add to
1. Only linear layers of the backbone are split. The classes here are methods like those of `ntk.adapters`.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ntk.adapters import Found, Layer, Method, layers_of
from ntk.features import Dense, Outer
from ntk.functional import evaluation
from ntk.inputs import Batch, group_examples

Part = Literal["whole", "common", "residual"]
PARTS: tuple[Part, ...] = ("whole", "common", "residual")


def mean_inputs(model: nn.Module, inputs: Batch) -> dict[str, Tensor]:
    """The mean input ``(s,)`` of every linear layer of the backbone, by module name, over all real tokens and examples.

    Means are in float64. Each example has its own forward pass, without padding.
    """
    sums: dict[str, Tensor] = {}
    counts: dict[str, int] = {}

    def hook(name: str) -> Any:
        def add(module: nn.Module, arguments: tuple[Tensor, ...]) -> None:
            x = arguments[0].detach().double().flatten(0, -2)
            sums[name] = sums.get(name, torch.zeros_like(x[0])) + x.sum(0)
            counts[name] = counts.get(name, 0) + len(x)

        return add

    linear = [(name, module) for name, module in layers_of(model).items() if not isinstance(module, nn.Embedding)]
    handles = [module.register_forward_pre_hook(hook(name)) for name, module in linear]
    try:
        with evaluation(model), torch.no_grad():
            for group in group_examples(inputs):
                for position in range(len(group.indices)):
                    model(**group.example(position))
    finally:
        for handle in handles:
            handle.remove()
    return {name: total / counts[name] for name, total in sums.items()}


@dataclass(frozen=True)
class LinearMethod(Method):
    """A method on the linear layers with all of its features, or with one part of them.

    Attributes:
        means: Mean inputs of the layers, from :func:`mean_inputs`.
        part: Part of the features.
    """

    means: Mapping[str, Tensor] = field(repr=False)
    part: Part = "whole"

    def adapts(self, module: str) -> bool:
        """True for layers that have a mean input."""
        return module in self.means


class SplitWeights(LinearMethod):
    """Full fine-tuning of the weights."""

    def share(self, name: str, parameter: Tensor, module: nn.Module, layer: str | None) -> float:
        """1 for a layer's own weight if `part` is "whole", so that its kernel is that of the parameter; otherwise 0."""
        return float(self.part == "whole" and layer in self.means)

    def features(self, layer: Layer) -> Found:
        """Features of the weight ``(r, s)``; for the common part |m| gamma, which has the same kernel as gamma m^T."""
        assert isinstance(layer.feature, Outer)
        assert layer.x is not None
        mean = self.means[layer.name].to(layer.g)
        if self.part == "common":
            yield "W", layer.y.shape[-1:], Dense(mean.norm() * layer.over_tokens(layer.g).value)
        elif self.part == "residual":
            yield "W", layer.weight.shape, layer.feature.beside(layer.x - mean)
        elif not layer.weighed:
            yield "W", layer.weight.shape, layer.feature.beside(layer.x)


class SplitPropulsion(LinearMethod):
    """Propulsion of degree 1 on the layers' outputs."""

    def features(self, layer: Layer) -> Found:
        """Features of the vector z, of length r."""
        mean = layer.weight.to(layer.g) @ self.means[layer.name].to(layer.g)
        if layer.bias is not None:
            mean = mean + layer.bias.to(layer.g)
        values = {"whole": layer.y, "common": mean.expand_as(layer.y), "residual": layer.y - mean}[self.part]
        yield "z", layer.y.shape[-1:], layer.over_tokens(layer.g * values)


class LinearBiases(LinearMethod):
    """BitFit; the whole and the common part are equal, since a bias has no residual part.

    Layers without a bias are treated as if they had one.
    """

    def features(self, layer: Layer) -> Found:
        """Features of the bias, of length r."""
        yield "b", layer.y.shape[-1:], layer.over_tokens(layer.g)


def split_methods(means: Mapping[str, Tensor]) -> dict[str, Method]:
    """The methods whose whole and split kernels are compared, with the names "NAME, PART"."""
    methods: dict[str, Method] = {}
    for part in PARTS:
        methods[f"full, {part}"] = SplitWeights(means, part)
        methods[f"Propulsion, {part}"] = SplitPropulsion(means, part)
    return methods | {"BitFit": LinearBiases(means)}
