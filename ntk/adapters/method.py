"""The interface of parameter-efficient methods, whose kernels come from passes of the bare network.

At its initialisation an adapter does not change the network's function, so the tangent features of its parameters
follow from quantities of the bare network at each layer: the layer's inputs x_t, its outputs y_t (bias included) and
the gradients g_t at the outputs, summed over tokens t. One forward and c backward passes serve all methods at once.

A method is one class. It gives weights to parameters of the network itself (full fine-tuning, BitFit, norms), or it
computes the features of its own parameters at one layer. r is the width of a layer, s that of its input.
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
"""A choice of layers: a regular expression of the whole name, names or their last parts, a predicate; None for all."""

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
        weighed: whether :meth:`Method.share` was called for the weight with the layer's name.
        at_inputs: ``(c, N, s)``, the part of the gradients at the inputs that passes through this layer; None if it
            is g W.
        read: ``(n, c, r)``, sum_k (df/dW_jk) W_jk + (df/db_j) b_j, with gradients through uses of the weight W and the
            bias b other than calls of the layer; None without such uses. For calls this sum is sum_t g_tj y_tj.
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
        """The sum over tokens of g_tj y_tj, outputs times the gradients at them."""
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
        """The factor of a network parameter's kernel in the method's kernel; 0 if the method freezes the parameter.

        Args:
            name: of the parameter.
            parameter: the parameter.
            module: the module that holds it.
            layer: the module's name, if the parameter is the matrix of this module alone and the module may carry
                adapters; else None.
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
        """Whether the features include uses of a layer's weight other than calls; peft's adapters act on calls only."""
        return False


class LayerMethod(Method):
    """A method with parameters of its own at the layers that its attribute ``modules`` chooses."""

    modules: Modules

    def adapts(self, module: str) -> bool:
        """Whether ``modules`` chooses the layer."""
        return chosen(self.modules, module)


def chosen(modules: Modules, name: str) -> bool:
    """Whether a choice of layers includes a module, by peft's rules for ``target_modules``."""
    if modules is None:
        return True
    if callable(modules):
        return modules(name)
    if isinstance(modules, str):
        return re.fullmatch(modules, name) is not None
    return any(name == part or name.endswith(f".{part}") for part in modules)


def seed_of(key: str) -> int:
    """The seed of a random generator for a key."""
    return zlib.crc32(key.encode())


def layers_of(model: nn.Module) -> dict[str, nn.Module]:
    """The layers that take adapters, by the names of their modules.

    These are the linear layers and embeddings of the model's body. The head, which is every module of a Hugging Face
    model outside of its body, takes none. Modules that share a weight count as separate layers.
    """
    body = getattr(model, getattr(model, "base_model_prefix", "") or "", model)
    inside = {id(module) for module in body.modules()}
    return {
        name: module
        for name, module in model.named_modules()
        if id(module) in inside and isinstance(module, (nn.Linear, Conv1D, nn.Embedding))
    }


def layer_of(name: str, module: nn.Module, feature: Outer | Lookup, output: Tensor | None, *, weighed: bool) -> Layer:
    """The :class:`Layer` of a module from a captured use of its weight, if the module's call does nothing else.

    ``feature`` is that of the weight. ``output`` is the operation's output ``(N, r)``; if None, it is computed again.

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
    """The detached weight, ``(r, s)`` of a linear layer or ``(rows, r)`` of an embedding, and the bias."""
    weight, bias = module.weight, getattr(module, "bias", None)
    assert isinstance(weight, Tensor)
    weight = weight.detach().T if isinstance(module, Conv1D) else weight.detach()
    return weight, None if bias is None else bias.detach()
