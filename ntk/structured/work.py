"""What the uses of a parameter cost, as a comparison on one or two examples shows it, and which of them are slow."""

import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch

from ntk.features import Dense, Lookup
from ntk.structured.dependence import Captured

# A parameter that holds more than this fraction of the work and goes the slow way is warned of.
SHARE_OF_WORK = 0.01


class SlowKernelWarning(UserWarning):
    """A parameter that holds much of the work is computed example by example, or by the reference."""


@dataclass(frozen=True)
class Work:
    """One use of one parameter in a comparison.

    Attributes:
        name: of the parameter.
        operation: the name of the function of torch.
        slow: why the operation is differentiated example by example; None if a rule takes it.
        n: number of examples in the comparison.
        tokens: N, over all of them, if the feature consists of outer products or rows of an embedding; 0 if it is a
            whole tensor.
        rows: r, the gradient's size at a token; 0 for a whole tensor.
        columns: s, the input's size at a token; 0 for an embedding and for a whole tensor.
        held: bytes of the feature.
        multiplications: of the parameter with one example's data in a forward pass; estimated for a slow operation.
    """

    name: str
    operation: str
    slow: str | None
    n: int
    tokens: int
    rows: int
    columns: int
    held: int
    multiplications: float


def work_of(captured: Captured, shape: torch.Size) -> Work:
    """What one use of a parameter of this shape costs."""
    feature, use = captured.feature, captured.use
    n, _ = feature.shape
    tokens = rows = columns = 0
    if isinstance(feature, Dense):
        held = feature.value.nbytes
        # Of an operation without a rule only sizes are known: a layer multiplies each row by the whole parameter.
        multiplications = shape.numel() * (1.0 if use.slow is None else use.positions)
    else:
        tokens, rows, columns = feature.sizes
        held = feature.g.nbytes + (feature.ids.nbytes if isinstance(feature, Lookup) else feature.x.nbytes)
        multiplications = tokens * rows * max(1, columns) / n
    return Work(captured.name, use.operation, use.slow, n, tokens, rows, columns, held, multiplications)


def slow_parameters(works: Iterable[Work]) -> dict[str, str]:
    """The parameters with more than `SHARE_OF_WORK` of the work in slow operations, the most first, with reasons."""
    works = list(works)
    total = sum(work.multiplications for work in works)
    slow: dict[str, float] = {}
    why: dict[str, str] = {}
    for work in works:
        if work.slow is not None:
            slow[work.name] = slow.get(work.name, 0.0) + work.multiplications
            why.setdefault(work.name, f"{work.operation}: {work.slow}")
    return {name: why[name] for name in sorted(slow, key=lambda k: -slow[k]) if slow[name] > SHARE_OF_WORK * total}


def warn_of_slow_parameters(
    by_example: Mapping[str, str], by_reference: Mapping[str, str], examples: int, *, stacklevel: int
) -> None:
    """Give one warning that names the parameters that go the slow way, with reasons and costs; none without any.

    Every parameter that the reference takes counts, since its Jacobian costs passes over the whole model.
    """
    said = []
    if by_example:
        name, why = next(iter(by_example.items()))
        said.append(
            f"{_named(name, len(by_example))} example by example ({why}), at the cost of running that operation again "
            f"for each of the {examples} examples, forward and backward for each output"
        )
    if by_reference:
        name, why = next(iter(by_reference.items()))
        said.append(
            f"{_named(name, len(by_reference))} by the reference ({why}), at the cost of Jacobians of the whole model "
            f"for each of the {examples} examples"
        )
    if said:
        words = f"the kernel is exact, but computed in part the slow way: {'; '.join(said)}. "
        warnings.warn(words + "See ntk.explain(model, inputs).", SlowKernelWarning, stacklevel=stacklevel + 1)


def _named(name: str, count: int) -> str:
    return name if count == 1 else f"{name} and {count - 1} more"
