"""Features of one trained parameter until they are contracted; small ones of many parameters become one vector."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import torch

from ntk.features import Dense, Feature

# Elements of the largest parameter whose features are merged with others'.
_VECTOR = 1 << 16


@dataclass
class Pending:
    """Features of one trained parameter, by batch, until all are there.

    Attributes:
        shape: of the parameter.
        weights: kernel -> the weight with which the parameter's kernel enters it.
        features: number of a batch -> the features of the parameter's uses.
    """

    shape: torch.Size
    weights: Mapping[str, float]
    features: dict[int, list[Feature]] = field(default_factory=dict)


class Vectors:
    """Small features of parameters that enter the same kernels with the same weights, merged to one vector."""

    def __init__(self, most: int):
        """Merge up to ``most`` elements."""
        self._most = most
        self._held: dict[tuple, list[Pending]] = {}

    def take(self, pending: Pending) -> bool:
        """Keep a parameter's features if they are small vectors; return whether they are."""
        dense = all(isinstance(f, Dense) for features in pending.features.values() for f in features)
        if not dense or pending.shape.numel() > _VECTOR:
            return False
        self._held.setdefault((*pending.weights.items(), *sorted(pending.features)), []).append(pending)
        return True

    def merged(self, *, everything: bool = False) -> Iterator[Pending]:
        """Yield the vectors that have become large, or everything, each as one parameter."""
        for key, held in list(self._held.items()):
            rows = sum(features[0].shape[0] * features[0].shape[1] for features in held[0].features.values())
            if rows * sum(pending.shape.numel() for pending in held) > (0 if everything else self._most):
                del self._held[key]
                yield _merge(held)


def _merge(held: list[Pending]) -> Pending:
    """One vector of all entries of several parameters' dense features."""
    features: dict[int, list[Feature]] = {}
    for batch in held[0].features:
        values = []
        for pending in held:
            first, *others = (f.value for f in pending.features[batch] if isinstance(f, Dense))
            values.append(sum(others, start=first).reshape(*first.shape[:2], pending.shape.numel()))
        features[batch] = [Dense(torch.cat(values, dim=-1))]
    return Pending(torch.Size((sum(pending.shape.numel() for pending in held),)), held[0].weights, features)
