"""Kernels of parameter-efficient methods at their initialisation, from the stream of the full kernel.

At its initialisation an adapter leaves the network's function as it is, so the tangent features of its parameters are
made of what a pass of the bare network shows at each layer: a layer's inputs x_t, its outputs y_t (bias included) and
the gradients g_t there, summed over tokens t. One forward and c backward passes serve every method at once.

A method is one class. Either it gives parameters of the network itself a weight (full fine-tuning, BitFit, norms), or
it says for one layer what the features of its own parameters are. r is the width of a layer, s that of its input.
"""

import re
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ntk.features import Dense, Feature, Lookup, Outer

Modules = str | Sequence[str] | Callable[[str], bool] | None
"""Which layers, by a regular expression of the whole name, names or their last parts, or a predicate; None for all."""

Found = Iterator[tuple[str, torch.Size, Feature]]
"""The names of a method's own parameters at one layer, their shapes and their features."""


@dataclass(frozen=True)
class Layer:
    """One use of a linear layer or an embedding by n examples.

    Attributes:
        name: of the module.
        weight: ``(r, s)``; of an embedding its table, ``(rows, r)``.
        bias: ``(r,)``, if there is one.
        x: ``(N, s)`` inputs; None for an embedding.
        y: ``(N, r)`` outputs.
        feature: of the weight; it holds the gradients at the outputs.
        weighed: whether :meth:`Method.share` has been called for the weight with the layer's name.
        at_inputs: ``(c, N, s)``, the gradients at the inputs by way of this layer, if they are not just g W.
        read: ``(n, c, r)``, sum_k (df/dW_jk) W_jk + (df/db_j) b_j over what the model reads of the weight W and the
            bias b without calling the layer; over the tokens of calls, g_tj y_tj sums to the same.
    """

    name: str
    weight: Tensor
    bias: Tensor | None
    x: Tensor | None
    y: Tensor
    feature: Outer | Lookup
    weighed: bool = True
    at_inputs: Tensor | None = None
    read: Tensor | None = None

    @property
    def g(self) -> Float[Tensor, "c N r"]:
        """The gradients g_t at the outputs."""
        return self.feature.g

    def over_tokens(self, values: Float[Tensor, "c N d"]) -> Dense:
        """The sum over each example's tokens, as a feature."""
        return Dense(self.feature.tokens.sums(values).transpose(0, 1))

    @cached_property
    def gy(self) -> Dense:
        """sum_t g_tj y_tj."""
        return self.over_tokens(self.g * self.y)

    @cached_property
    def gx(self) -> Dense:
        """The sum over tokens of inputs times the gradients at them."""
        assert self.x is not None
        back = self.g @ self.weight.to(self.g.dtype) if self.at_inputs is None else self.at_inputs
        return self.over_tokens(back * self.x)


class Method:
    """A parameter-efficient method at its initialisation."""

    def share(self, name: str, parameter: Tensor, module: nn.Module, layer: str | None) -> float:
        """The weight with which the kernel of a parameter of the network enters; 0 where it is frozen.

        Args:
            name: of the parameter.
            parameter: the parameter.
            module: whose parameter it is.
            layer: that module's name, if the parameter is the matrix of this module alone and adapters may stand
                beside it.
        """
        return 0.0

    def adapts(self, module: str) -> bool:
        """Whether the layer of this name carries parameters of the method's own."""
        return False

    def features(self, layer: Layer) -> Found:
        """The features of the method's own parameters at a layer that carries them."""
        return iter(())

    @property
    def in_reads(self) -> bool:
        """Whether these also act where the model reads a layer's weight without calling it; peft's act on calls."""
        return False


class LayerMethod(Method):
    """A method with parameters of its own at the layers that its ``modules`` chooses."""

    modules: Modules

    def adapts(self, module: str) -> bool:
        """The chosen layers."""
        return chosen(self.modules, module)


def chosen(modules: Modules, name: str) -> bool:
    """Whether a choice of layers includes a module, as peft reads ``target_modules``."""
    if modules is None:
        return True
    if callable(modules):
        return modules(name)
    if isinstance(modules, str):
        return re.fullmatch(modules, name) is not None
    return any(name == part or name.endswith(f".{part}") for part in modules)


def seed_of(key: str) -> int:
    """A seed for random numbers from a key."""
    return zlib.crc32(key.encode())


def layers_of(model: nn.Module) -> dict[str, nn.Module]:
    """The layers that take adapters, by the names of their modules.

    These are the linear layers and embeddings of the model's body. The head, which is whatever a Hugging Face model has
    beside its body, takes none. Modules that share a weight count as separate layers.
    """
    body = getattr(model, getattr(model, "base_model_prefix", "") or "", model)
    inside = {id(module) for module in body.modules()}
    return {
        name: module
        for name, module in model.named_modules()
        if id(module) in inside and isinstance(module, (nn.Linear, Conv1D, nn.Embedding))
    }


def layer_of(name: str, module: nn.Module, feature: Outer | Lookup, output: Tensor | None, *, weighed: bool) -> Layer:
    """One layer as the methods see it, from a captured use of its weight whose call does nothing else.

    The feature is that of its weight. The output is that of the operation, ``(N, r)``; it is computed again if None.

    Raises:
        NotImplementedError: the model has overwritten the output of an embedding.
    """
    weight, bias = matrix_of(module)
    x = feature.x.to(feature.g.dtype) if isinstance(feature, Outer) else None
    if output is None:
        if x is None:
            raise NotImplementedError(f"the model overwrites the output of {name}")
        output = torch.nn.functional.linear(x.to(weight.dtype), weight, bias)
    return Layer(name, weight, bias, x, output.to(feature.g.dtype), feature, weighed)


def matrix_of(module: nn.Module) -> tuple[Tensor, Tensor | None]:
    """Weight, ``(r, s)`` of a linear layer and ``(rows, r)`` of an embedding, and bias; detached."""
    weight, bias = module.weight, getattr(module, "bias", None)
    assert isinstance(weight, Tensor)
    weight = weight.detach().T if isinstance(module, Conv1D) else weight.detach()
    return weight, None if bias is None else bias.detach()
