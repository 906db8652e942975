"""How commands load a checkpoint that asks for trust: code of its own, or weights that do not fit."""

import dataclasses
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class LoadingOptions:
    """What is accepted of a checkpoint that is refused otherwise."""

    trust_remote_code: bool = False
    """Run Python code that comes with the model."""
    allow_unfitting_weights: bool = False
    """Load weights that do not fit the model's config.json, those that are missing at random."""

    @property
    def loading(self) -> dict[str, Any]:
        """These options as arguments of `propulsion.pretrained.load_model`."""
        return {name: getattr(self, name) for name in LOADING_OPTIONS}


LOADING_OPTIONS = tuple(field.name for field in dataclasses.fields(LoadingOptions))
"""The names of these options."""
