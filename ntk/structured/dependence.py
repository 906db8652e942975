"""What the tensors of a forward pass depend on: the batch, parameters alone, or neither."""

import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ntk.features import Feature
from ntk.structured.autograd import Received
from ntk.tokens import Gradients

Origin = tuple[int, int]
"""Where a forward pass made a tensor: the number of the operation, and which of its results the tensor is."""


@dataclass(frozen=True)
class Data:
    """A tensor depends on the batch.

    Attributes:
        active: whether it depends on a captured use too, so that gradients must pass through it.
        origin: where it was made.
    """

    active: bool = False
    origin: Origin = (0, 0)


@dataclass
class Derived:
    """A tensor depends on parameters alone; some forms have a cheaper feature than a dense one.

    Attributes:
        names: the parameters that it depends on.
        lookup: (parameter name, ids, padding index) if it holds the rows of an embedding at ids that are the same for
            every example, as position embeddings do.
        transpose: the name of the matrix that it is the transpose of.
        layer: the watched module that returned it, if it is a lookup and nothing else.
    """

    names: frozenset[str]
    lookup: tuple[str, Tensor, int | None] | None = None
    transpose: str | None = None
    layer: str | None = None


@dataclass
class Use:
    """One operation that mixes data with a parameter, or with a tensor derived from parameters.

    Attributes:
        names: the parameters whose feature this is.
        feature: turns the gradients at the output into a feature.
        derived: the tensor whose (dense) feature it is, if that is not a parameter itself.
        number: the number of the operation among the forward pass's mixing operations.
        received: the gradients at the operation's output, shared by its uses.
        output: the operation's output, or the embedding rows that were added to it, if it was asked for.
        version: of the output, which an in-place operation would change.
        within: the innermost watched module in whose call it is.
        layer: the watched module whose call does this and nothing else.
        arguments: addresses and sizes of the operation's tensors.
        operation: the name of the function of torch.
        slow: why the operation is differentiated example by example; None if a rule takes it.
        positions: rows of the operation's output for each example, along all axes but the last.
    """

    names: frozenset[str]
    feature: Callable[[Gradients], Feature]
    derived: Tensor | None = None
    number: int = 0
    received: Received | None = None
    output: Tensor | None = None
    version: int = 0
    within: str | None = None
    layer: str | None = None
    arguments: frozenset[tuple[int, int]] = frozenset()
    operation: str = ""
    slow: str | None = None
    positions: float = 1.0


@dataclass(frozen=True)
class Captured:
    """The feature of one use of one parameter.

    Attributes:
        name: of the parameter.
        use: the operation.
        feature: the feature.
        output: the operation's output at the feature's tokens, ``(N, r)``; None if it was not asked for or was
            overwritten.
    """

    name: str
    use: Use
    feature: Feature
    output: Tensor | None = None


class Dependence:
    """The dependences of one forward pass, by tensor; a tensor that is freed is forgotten.

    Attributes:
        n: number of examples.
        names: of the parameters, by the id of the tensor.
    """

    def __init__(self, parameters: Mapping[str, Tensor], n: int):
        self.n = n
        self.names = {id(p): name for name, p in parameters.items()}
        # Tensors compare entry by entry, so that weakref's own dictionaries cannot hold them.
        self._held: dict[int, tuple[weakref.ref[Tensor], Data | Derived]] = {}

    def __getitem__(self, t: Any) -> Data | Derived | None:
        """What a tensor depends on; None for a constant."""
        name = self.names.get(id(t))
        if name is not None:
            return Derived(frozenset((name,)))
        held = self._held.get(id(t))
        return held[1] if held is not None and held[0]() is t else None

    def __setitem__(self, t: Tensor, dependence: Data | Derived) -> None:
        self._held[id(t)] = weakref.ref(t), dependence

    def is_parameter(self, t: Any) -> bool:
        """Whether this is one of the parameters themselves."""
        return id(t) in self.names

    def is_derived(self, t: Any) -> bool:
        """Whether this is a parameter, or a tensor that depends on parameters alone."""
        return isinstance(self[t], Derived)

    def derived(self, t: Tensor) -> Derived:
        """The dependence of a tensor for which :meth:`is_derived` holds."""
        dependence = self[t]
        assert isinstance(dependence, Derived)
        return dependence
