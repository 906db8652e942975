"""Which part of a model a parameter belongs to, by its name, and methods that are kept to such parts."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from ntk.adapters import Found, Layer, Method


@dataclass(frozen=True)
class SelectedParameters(Method):
    """Full fine-tuning of the parameters that a predicate selects by name and value.

    Attributes:
        selects: Whether a parameter is trained.
    """

    selects: Callable[[str, Tensor], bool]

    def share(self, name: str, parameter: Tensor, module: nn.Module, layer: str | None) -> float:
        """All of a selected parameter's kernel, and nothing of the others'."""
        return float(self.selects(name, parameter))


@dataclass(frozen=True)
class Backbone(Method):
    """A method kept away from the parameters of the head; what it adds beside layers stays.

    Attributes:
        method: The method.
        prefix: How the names of the backbone's parameters begin; "" where there is no head.
    """

    method: Method
    prefix: str

    def share(self, name: str, parameter: Tensor, module: nn.Module, layer: str | None) -> float:
        """The method's own, in the backbone."""
        return self.method.share(name, parameter, module, layer) if name.startswith(self.prefix) else 0.0

    def adapts(self, module: str) -> bool:
        """As the method does."""
        return self.method.adapts(module)

    def features(self, layer: Layer) -> Found:
        """The method's own."""
        return self.method.features(layer)

    @property
    def in_reads(self) -> bool:
        """As the method does."""
        return self.method.in_reads


def is_scale(name: str) -> bool:
    """Whether a parameter is one of Propulsion's scale vectors z."""
    return ".propulsion_z." in name


def backbone_prefix(model: Any) -> str:
    """How the names of the pre-trained parameters of a Hugging Face model begin, in contrast to those of its head."""
    return f"{model.base_model_prefix}."


def is_backbone(model: Any, name: str) -> bool:
    """Whether a parameter belongs to the pre-trained part of a Hugging Face model, and not to its head."""
    return name.startswith(backbone_prefix(model))


def backbone_tuning(model: Any) -> SelectedParameters:
    """Full fine-tuning of a Hugging Face model without its head."""
    return SelectedParameters(lambda name, parameter: is_backbone(model, name))


def backbone_weights(model: Any) -> SelectedParameters:
    """Full fine-tuning of the matrices and embeddings of a Hugging Face model without its head."""
    return SelectedParameters(lambda name, parameter: parameter.ndim == 2 and is_backbone(model, name))
