"""What a rule of an operation is given and returns, and how it says that a call is not for it."""

from collections.abc import Callable
from typing import Any

from torch import Tensor

from ntk.features import Feature
from ntk.structured.dependence import Dependence, Use
from ntk.tokens import Gradients

FeatureOf = Callable[[Gradients], Feature]
Uses = list[tuple[Tensor, FeatureOf | Use]]
"""Tensors that depend on parameters alone, with the feature that the call gives each, or with the whole use."""


class Unsuitable(Exception):
    """The call is not of the form that a rule is for; the message says in which way."""


def bind(names: tuple[str, ...], args: tuple, kwargs: dict) -> list[Any]:
    """The arguments of these names, by position or by name; None for those that were not given."""
    return [args[i] if i < len(args) else kwargs.get(name) for i, name in enumerate(names)]


def affine(dependence: Dependence, x: Any, weight: Any, bias: Any, of_weight: Callable[[], Any], of_bias: Any) -> Uses:
    """The uses in an operation on data by a weight, whose use ``of_weight`` makes, and a bias that is added.

    Raises:
        Unsuitable: the data depend on parameters alone.
    """
    if dependence.is_derived(x):
        raise Unsuitable("its input depends on parameters alone")
    uses: Uses = []
    if dependence.is_derived(weight):
        uses.append(of_weight())
    if dependence.is_derived(bias):
        uses.append((bias, of_bias))
    return uses
