"""Names of a package that are imported when they are first asked for."""

import importlib
from collections.abc import Callable, Sequence
from typing import Any


def lazy(package: str, names: Sequence[str]) -> Callable[[str], Any]:
    """The ``__getattr__`` of a package that has these names from its module ``analysis``.

    A module of the package can then be run by ``python -m`` without having been imported before, and the docstring of
    the package can be read without loading torch.
    """

    def attribute(name: str) -> Any:
        if name not in names:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        return getattr(importlib.import_module(f"{package}.analysis"), name)

    return attribute
