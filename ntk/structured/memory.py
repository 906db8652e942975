"""Bytes that each operation of a model holds, and cutting the model into segments that fit in memory."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from ntk.features import Dense, Feature, Lookup
from ntk.functional import Leaves
from ntk.structured.capture import Capture, Segment

# The fraction of memory for activations of the batch in progress; the rest holds the features of all batches.
IN_PROGRESS = 0.3


@dataclass
class Cost:
    """What one mixing operation holds, in bytes for each token and for each example.

    Attributes:
        names: the parameters that it uses.
        graph: activations that autograd keeps until the next mixing operation, and gradient buffers, for each token
            while a batch is in progress.
        per_token: features of matrices and embeddings, until they are contracted.
        per_example: features of other parameters.
    """

    names: set[str] = field(default_factory=set)
    graph: float = 0.0
    per_token: float = 0.0
    per_example: float = 0.0


@contextmanager
def measured(capture: Capture, leaves: Leaves, costs: list[Cost], tokens: int) -> Iterator[None]:
    """Add what autograd keeps to the costs of the mixing operation seen last before it was kept."""
    seen = {p.untyped_storage().data_ptr() for p in leaves.values()}

    def keep(t: Tensor) -> Tensor:
        with torch._C.DisableTorchFunction():  # the forward pass calls this function, and the capture must not see it
            storage = t.untyped_storage()
        if storage.data_ptr() not in seen:
            seen.add(storage.data_ptr())
            cost_of(costs, max(0, capture.count - 1)).graph += t.nbytes / tokens
        return t

    with saved_tensors_hooks(keep, lambda t: t):
        yield


def cost_of(costs: list[Cost], number: int) -> Cost:
    """The entry of one operation, made if it is not there yet."""
    while len(costs) <= number:
        costs.append(Cost())
    return costs[number]


def charge(cost: Cost, feature: Feature, n: int, tokens: int, shared: set[int]) -> None:
    """Add the bytes of a feature, except of tensors that other features share (``shared``, by address)."""
    if isinstance(feature, Dense):
        cost.per_example += feature.value.nbytes / n
        return
    for t in (feature.g,) if isinstance(feature, Lookup) else (feature.x, feature.g):
        if t.data_ptr() not in shared:
            shared.add(t.data_ptr())
            cost.per_token += t.nbytes / tokens


def bytes_per_token(costs: Sequence[Cost], segment: Segment) -> float:
    """What a batch in progress holds over a segment, for each token."""
    stop = None if segment[1] == float("inf") else int(segment[1])
    return sum(cost.graph for cost in costs[segment[0] : stop])


def cut(costs: Sequence[Cost], tokens: int, examples: int, room: float) -> list[Segment] | None:
    """Cut the mixing operations, from the last to the first, into segments whose features fit in ``room`` bytes.

    Returns None if one of them alone does not fit.
    """
    held = [cost.per_token * tokens + cost.per_example * examples for cost in costs]
    lowest = {name: i for i, cost in reversed(list(enumerate(costs))) for name in cost.names}
    segments: list[Segment] = []
    stop: float = float("inf")
    load = carried = 0.0  # carried: features of parameters that are used again further down
    for i in reversed(range(len(costs))):
        if load + carried + held[i] > room and load > 0:
            segments.append((i + 1, stop))
            stop, load = i + 1, 0.0
            carried = sum(held[j] for j in range(i + 1, len(costs)) if any(lowest[n] <= i for n in costs[j].names))
        if carried + held[i] > room:
            return None
        load += held[i]
    return [*segments, (0, stop)]


def least_room(costs: Sequence[Cost], tokens: int, examples: int) -> float:
    """The smallest ``room`` for which :func:`cut` finds segments, to a relative accuracy of 1e-3."""
    low, high = 0.0, sum(cost.per_token * tokens + cost.per_example * examples for cost in costs)
    while high - low > 1e-3 * high:
        middle = (low + high) / 2
        low, high = (middle, high) if cut(costs, tokens, examples, middle) is None else (low, middle)
    return high
