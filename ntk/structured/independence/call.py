"""One dispatched operation, as the rules of independence see it."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor


class Lost(Exception):
    """The examples of a result cannot be located, or they depend on one another."""


@dataclass(frozen=True)
class Call:
    """One dispatched operation, as the rules see it.

    Attributes:
        arguments: by their names in the operation's schema.
        result: what it returned.
        n: number of examples.
        m: consecutive entries of one example along the axis, the same number for all tensors of the batch.
        axes: id of a tensor -> the axis along which it has the examples; constants have no entry.
        written: the arguments that the operation has written to.
    """

    arguments: Mapping[str, Any]
    result: Any
    n: int
    m: int
    axes: Mapping[int, int]
    written: list[Tensor]

    def __getitem__(self, name: str) -> Any:
        return self.arguments.get(name)

    @property
    def tensors(self) -> list[Tensor]:
        """All tensors among the arguments."""
        return list(tensors_of(self.arguments.values()))

    @property
    def first(self) -> Tensor:
        """The first tensor that the operation returned."""
        return next(tensors_of([self.result]))

    def axis(self, t: Any) -> int | None:
        """The axis along which a tensor has the examples; None for a constant."""
        return self.axes.get(id(t)) if isinstance(t, Tensor) else None

    def axis_of(self, t: Any) -> int:
        """The axis along which a tensor has the examples.

        Raises:
            Lost: it is a constant.
        """
        axis = self.axis(t)
        if axis is None:
            raise Lost
        return axis

    def constant(self, *values: Any) -> bool:
        """Whether none of these depends on the examples."""
        return all(self.axis(t) is None for t in values)

    def uniform(self, t: Tensor, axis: int) -> None:
        """Make sure that a constant holds the same values for every example, if its ``axis`` runs along the examples.

        Raises:
            Lost: it does not.
        """
        if axis < 0 or t.shape[axis] == 1 or t.stride(axis) == 0 or any(t is other for other in self.written):
            return
        if t.shape[axis] % (self.n * self.m):
            raise Lost
        if not alike(t.detach().unflatten(axis, (-1, self.n, self.m)), axis + 1):
            raise Lost

    def agrees(self, t: Tensor, axis: int) -> None:
        """Make sure that a tensor has the examples along this axis, or is a constant that is the same for all of them.

        Raises:
            Lost: it does neither.
        """
        if self.constant(t):
            self.uniform(t, axis)
        elif self.axis(t) != axis:
            raise Lost


def alike(t: Tensor, axis: int) -> bool:
    """Whether a tensor is constant along an axis."""
    return bool((t == t.narrow(axis, 0, 1)).all())


def tensors_of(values: Any) -> Iterator[Tensor]:
    """All tensors among values and lists of values."""
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, (list, tuple)):
            yield from tensors_of(value)
