"""Detection of layers of a checkpoint that look untrained, by their values."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

# The distribution of fewer values cannot be told.
FEWEST = 100
# A Gaussian sample exceeds this many standard errors with a probability below one in a million.
_ERRORS = 5.0


@dataclass(frozen=True)
class Untrained:
    """A matrix that looks drawn and never trained.

    Attributes:
        name: Name of the weight.
        std: Standard deviation of its values.
        excess_kurtosis: Excess kurtosis of its values; 0 for a Gaussian.
    """

    name: str
    std: float
    excess_kurtosis: float

    def __str__(self) -> str:
        return f"{self.name} (Gaussian of std {self.std:.2g}, excess kurtosis {self.excess_kurtosis:.2f}, zero bias)"


def looks_untrained(name: str, weight: Float[Tensor, "out inputs"], bias: Float[Tensor, " out"]) -> Untrained | None:
    """Describe a layer that looks untrained: a Gaussian matrix and a bias of zeros. Return None for other layers.

    Initialisation draws entries independently and sets biases to exactly 0; training changes both. So the bias must be
    0; mean, skewness and excess kurtosis must be those of a Gaussian sample within five standard errors (1/sqrt(n),
    sqrt(6/n), sqrt(24/n) for n values); and the largest singular value, which learnt directions raise, must be at most
    sqrt(out) + sqrt(inputs) + 5 standard deviations, which independent Gaussian entries exceed with a probability below
    exp(-25/2) (Davidson and Szarek 2001, theorem II.13).

    Matrices of fewer than 100 values are never reported. The singular value, of cost O(out inputs min(out, inputs)), is
    computed only if all other criteria hold.
    """
    if weight.numel() < FEWEST or bias.any():
        return None
    values = weight.detach().float()
    count, mean, std = values.numel(), float(values.mean()), float(values.std())
    if not std > 0:
        return None
    standard = (values - mean) / std
    skewness, excess = float((standard**3).mean()), float((standard**4).mean()) - 3
    gaussian = (
        abs(mean) <= _ERRORS * std / math.sqrt(count)
        and abs(skewness) <= _ERRORS * math.sqrt(6 / count)
        and abs(excess) <= _ERRORS * math.sqrt(24 / count)
    )
    edge = math.sqrt(values.shape[0]) + math.sqrt(values.shape[1]) + _ERRORS
    if gaussian and float(torch.linalg.matrix_norm(standard, ord=2)) <= edge:
        return Untrained(name, std, excess)
    return None


def untrained_layers(weights: Mapping[str, Tensor]) -> Iterator[Untrained]:
    """Yield the layers that look untrained, of pairs of a matrix ``X.weight`` and a bias ``X.bias``."""
    for name in weights:
        bias = f"{name.removesuffix('weight')}bias"
        if not name.endswith("weight") or bias not in weights or weights[bias].any():
            continue  # The bias first, since its test is cheap and decides for most layers.
        if (weight := weights[name]).ndim == 2 and (layer := looks_untrained(name, weight, weights[bias])) is not None:
            yield layer
