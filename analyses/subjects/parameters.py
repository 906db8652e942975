"""Parts of a model by the names of their parameters, and methods restricted to such parts."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from ntk.adapters import Method


@dataclass(frozen=True)
class SelectedParameters(Method):
    """Full fine-tuning of the parameters that a predicate selects by name and value.

    Attributes:
        selects: Whether a parameter is trained.
    """

    selects: Callable[[str, Tensor], bool]

    def share(self, name: str, parameter: Tensor, module: nn.Module, layer: str | None) -> float:
        """1 for a selected parameter, 0 for any other."""
        return float(self.selects(name, parameter))


def is_scale(name: str) -> bool:
    """Whether a parameter is one of Propulsion's scale vectors z."""
    return ".propulsion_z." in name


def backbone_prefix(model: Any) -> str:
    """Beginning of the names of the pre-trained parameters of a Hugging Face model, which its head's do not share."""
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
