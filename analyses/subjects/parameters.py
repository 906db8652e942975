"""Which part of a model a parameter belongs to, by its name."""

from typing import Any


def is_scale(name: str) -> bool:
    """Whether a parameter is one of Propulsion's scale vectors z."""
    return ".propulsion_z." in name


def backbone_prefix(model: Any) -> str:
    """How the names of the pre-trained parameters of a Hugging Face model begin, in contrast to those of its head."""
    return f"{model.base_model_prefix}."


def is_backbone(model: Any, name: str) -> bool:
    """Whether a parameter belongs to the pre-trained part of a Hugging Face model, and not to its head."""
    return name.startswith(backbone_prefix(model))
