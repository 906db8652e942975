"""A stand-in for the weight of a layer in a batch whose examples have different adapters, and so different weights."""

from typing import Any

import torch
from torch import Tensor

# Functions that are allowed, since models read a weight's dtype before they call its layer.
_ANSWERED = frozenset(
    {
        *(getattr(Tensor, name).__get__ for name in ("device", "dtype", "is_meta", "layout", "ndim", "requires_grad")),
        *(getattr(Tensor, name) for name in ("dim", "is_floating_point", "numel", "size", "__len__")),
        Tensor.shape.__get__,  # pyright: ignore[reportAttributeAccessIssue]
    }
)


class OfSeveralAdapters(Tensor):
    """A tensor with the shape, dtype and device of a weight that raises an error if its values are used."""

    layer: str

    @classmethod
    def of(cls, weight: Tensor, layer: str) -> "OfSeveralAdapters":
        """Return the stand-in for the weight of the layer of this name."""
        made = weight.detach().as_subclass(cls)
        made.layer = layer
        return made

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Call a function that needs only the shape, dtype or device of the tensor.

        Raises:
            ValueError: the function needs the values of the tensor.
        """
        if func in _ANSWERED:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **(kwargs or {}))
        names = (t.layer for t in (*args, *(kwargs or {}).values()) if isinstance(t, cls))
        raise ValueError(
            f"the model reads the weight of {next(names, 'a layer')!r} and does not call it, so that no example can "
            "have an adapter of its own there: run each adapter's examples by themselves, or leave the layer out of "
            "the adapters (exclude_modules)"
        )
