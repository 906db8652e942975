"""Random sketches of one parameter's features, whose inner products are unbiased for those of the features.

CountSketch (Charikar, Chen and Farach-Colton 2002) adds each entry, with a random sign, to a random one of w buckets.
TensorSketch (Pham and Pagh 2013) is the CountSketch of an outer product whose bucket and sign are the sum (modulo w)
and the product of those of its sides. It is the circular convolution of the sides' CountSketches, a product of their
Fourier transforms, so that the outer product is never formed. Each sketch is drawn R times, into R separate widths.
"""

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Complex, Float, Int
from torch import Tensor

from ntk.features import Dense, Feature, Lookup, Outer, formed

# Matrices with more elements have a TensorSketch; features of other parameters are formed for a CountSketch.
LARGE = 1 << 16
# Elements of the largest temporary.
_CHUNK = 1 << 22


@dataclass(frozen=True)
class Hash:
    """R draws of a bucket and a sign for each of d entries.

    Attributes:
        bucket: ``(R, d)``, from 0 to width - 1.
        sign: ``(R, d)``, -1 or 1.
        width: w.
    """

    bucket: Int[Tensor, "R d"]
    sign: Float[Tensor, "R d"]
    width: int

    @staticmethod
    def drawn(key: str, d: int, replicates: int, width: int, like: Tensor) -> "Hash":
        """The same buckets and signs for the same key, whatever else is drawn."""
        number = int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "little") >> 1
        generator = torch.Generator().manual_seed(number)
        bucket = torch.randint(width, (replicates, d), generator=generator)
        sign = torch.randint(2, (replicates, d), generator=generator) * 2 - 1
        return Hash(bucket.to(like.device), sign.to(like), width)

    def count_sketch(self, X: Float[Tensor, "N d"]) -> Float[Tensor, "N R w"]:
        """The CountSketches of the rows of X."""
        columns = X.T.contiguous()  # whole rows of memory are added to one another
        result = X.new_zeros(len(self.bucket), self.width, len(X))
        for out, bucket, sign in zip(result, self.bucket, self.sign, strict=True):
            out.index_add_(0, bucket, columns * sign[:, None])
        return result.permute(2, 0, 1)

    def waves(self, X: Float[Tensor, "N d"]) -> Complex[Tensor, "N R f"]:
        """Fourier transforms of the CountSketches of the rows of X."""
        return torch.fft.rfft(self.count_sketch(X).contiguous(), dim=2)

    def waves_of_entries(self, entries: Int[Tensor, "N"]) -> Complex[Tensor, "N R f"]:
        """Fourier transforms of the CountSketches of unit vectors; zero for entry -1."""
        frequencies = torch.arange(self.width // 2 + 1, device=entries.device)
        turns = (self.bucket[:, entries.clamp_min(0)].T[..., None] * frequencies) % self.width
        angle = turns.to(self.sign.dtype) * (-2 * math.pi / self.width)
        size = self.sign[:, entries.clamp_min(0)].T * (entries >= 0)[:, None]
        return torch.polar(torch.ones_like(angle), angle) * size[..., None]


@dataclass(frozen=True)
class ParameterSketch:
    """The sketch of one parameter's features.

    Attributes:
        shape: of the parameter.
        rows: the hash of the first axis, or of all entries of a parameter that is small or has one axis.
        columns: the hash of the other axes; None if ``rows`` is of all entries.
    """

    shape: torch.Size
    rows: Hash
    columns: Hash | None

    @staticmethod
    def drawn(name: str, shape: torch.Size, seed: int, replicates: int, width: int, like: Tensor) -> "ParameterSketch":
        """The sketch for a parameter's name and a seed; those of two names are independent."""
        key = f"{seed} {name}"
        if len(shape) < 2 or shape.numel() <= LARGE:
            return ParameterSketch(shape, Hash.drawn(key, shape.numel(), replicates, width, like), None)
        rows = Hash.drawn(f"{key} rows", shape[0], replicates, width, like)
        return ParameterSketch(shape, rows, Hash.drawn(f"{key} columns", shape[1:].numel(), replicates, width, like))

    def add(
        self,
        features: Sequence[Feature],
        waves: Complex[Tensor, "n c R f"],
        buckets: Float[Tensor, "n c R w"],
    ) -> None:
        """Add the sketch of the features of all uses to the buckets, or to their Fourier transforms."""
        for feature in features:
            if self.columns is None or not isinstance(feature, Outer | Lookup):
                self._add_formed(feature, buckets)
            else:
                self._add_tokens(feature, self.columns, waves)

    def _add_tokens(self, feature: Outer | Lookup, columns: Hash, waves: Tensor) -> None:
        """The sum over tokens of the TensorSketches of g x^T."""
        step = max(1, _CHUNK // (len(columns.bucket) * columns.width))
        for some in (slice(start, start + step) for start in range(0, feature.g.shape[1], step)):
            owner = feature.tokens.owner[some]
            if isinstance(feature, Lookup):
                of_g, x = columns, self.rows.waves_of_entries(feature.ids[some])
            else:
                of_g, of_x = (columns, self.rows) if feature.transposed else (self.rows, columns)
                x = of_x.waves(feature.x[some].to(feature.g.dtype))
            for a, g in enumerate(feature.g):
                waves[:, a].index_add_(0, owner, of_g.waves(g[some]) * x)

    def _add_formed(self, feature: Feature, buckets: Tensor) -> None:
        """The CountSketch of whole features, one draw at a time."""
        dense = feature if isinstance(feature, Dense) else formed(feature, self.shape)
        n, c = feature.shape
        entries = dense.value.reshape(n * c, -1).T.contiguous()  # (p, n c)
        for draw, bucket in enumerate(self.rows.bucket):
            sign = self.rows.sign[draw]
            if self.columns is not None:
                bucket = (bucket[:, None] + self.columns.bucket[draw]).flatten() % self.rows.width
                sign = (sign[:, None] * self.columns.sign[draw]).flatten()
            sketch = entries.new_zeros(self.rows.width, n * c).index_add_(0, bucket, entries * sign[:, None])
            buckets[:, :, draw] += sketch.T.view(n, c, -1)
