"""Checks of the tensors that functions take and return, and scaling by powers of two, which keeps sums in range."""

import math
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

_TINY = torch.finfo(torch.float64).tiny


def real_and_finite(x: Any, name: str) -> Tensor:
    """A tensor, or an array as a tensor, in float64, after :func:`check_numbers`."""
    x = as_tensor(x)
    check_numbers(x, name)
    return x.double()


def check_numbers(x: Any, name: str) -> None:
    """Check that x is a tensor of real, finite numbers.

    Raises:
        TypeError: not a tensor.
        ValueError: complex, NaN or infinite entries.
    """
    check_tensor(x, name)
    if x.is_complex():
        raise ValueError(
            f"{name} must be real; got {x.dtype}, whose imaginary part would be lost: pass its .real if that is meant"
        )
    if not torch.isfinite(x).all():
        raise ValueError(f"{name} holds NaN or infinite values, and must be finite: see where they come from")


def as_tensor(x: Any) -> Tensor:
    """An array of numpy as a tensor; anything else as it is, for :func:`check_tensor` to refuse what is no tensor."""
    if not isinstance(x, np.ndarray) or x.dtype.kind not in "fciub":
        return cast("Tensor", x)
    # torch warns of memory that it could write to and must not, as that of a mapped file.
    return torch.from_numpy(x if x.flags.writeable else x.copy())


def check_tensor(x: Any, name: str) -> None:
    """Raise TypeError unless x is a tensor."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a torch tensor; got {type(x).__name__}: convert it by torch.as_tensor")


def check_count(value: int, name: str) -> None:
    """Raise ValueError unless a number is whole, at least 1 and finite."""
    if not 1 <= value < math.inf or value % 1:
        raise ValueError(f"{name} must be at least 1, whole and finite; got {value}")


def not_overflown(x: Tensor, what: str, advice: str) -> Tensor:
    """The result of a computation with finite inputs.

    Raises:
        OverflowError: an entry is NaN or infinite.
    """
    if not torch.isfinite(x).all():
        raise OverflowError(
            f"{what} overflow {x.dtype}, whose largest number is {torch.finfo(x.dtype).max:.2g}: {advice}"
        )
    return x


def power_of_two(x: Tensor) -> int:
    """The exponent e for which the largest entry of |x| 2^-e lies in [1/2, 1); 0 if x is zero or empty."""
    return math.frexp(float(x.detach().abs().max()))[1] if x.numel() else 0


def shifted(x: Tensor, exponent: int) -> Tensor:
    """x 2^exponent, exact unless it leaves the range of float64; 2^exponent itself may leave it."""
    half = exponent // 2
    return x * 2.0**half * 2.0 ** (exponent - half)


def normalised(x: Tensor) -> tuple[Tensor, int]:
    """(x 2^-e, e) with the e of :func:`power_of_two`."""
    exponent = power_of_two(x)
    return shifted(x, -exponent), exponent


def norm(x: Tensor) -> tuple[float, int]:
    """(v, e) with the Euclidean norm v 2^e of all entries, whatever their size."""
    scaled, exponent = normalised(x)
    return float(scaled.norm()), exponent


def in_range(value: float, exponent: int, what: str) -> float:
    """value 2^exponent.

    Raises:
        OverflowError: the result is beyond the range of float64, on either side.
    """
    try:
        result = math.ldexp(value, exponent)
    except OverflowError:
        result = math.inf
    if not math.isfinite(result) or (value != 0 and abs(result) < _TINY):
        size = math.log10(abs(value)) + exponent * math.log10(2)
        raise OverflowError(f"{what} is about 1e{size:+.0f}, beyond the range of float64: scale the kernels")
    return result
