"""Tangent features of one parameter without its Jacobian: one class for each way of using the parameter.

The feature of example i and output a is d f_a(x_i)/d theta_p. It is a sum over tokens t of outer products for a matrix
that multiplies (`Outer`), a sum of rows of an embedding (`Lookup`), a sum over positions for a convolution's kernel
(:class:`ntk.patches.Patches`), and for any other use a whole tensor (`Dense`).
Letters are as in :mod:`ntk`; N counts the tokens of all examples, and r, s are a matrix's rows and columns. A feature
object holds one group of examples; :mod:`ntk.structured.gram` contracts lists of them to kernels.
"""

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from ntk.patches import Patches
from ntk.tokens import Tokens

# With fewer columns than this, forming the feature one output at a time is faster than reordering its gradients.
_NARROW = 64


class _TokenFeature:
    """A feature stored as gradients ``(c, N, r)`` at tokens."""

    g: Tensor
    tokens: Tokens

    @property
    def sizes(self) -> tuple[int, int, int]:
        """(N, r, s), with s = 0 for an embedding."""
        return self.g.shape[1], self.g.shape[2], 0

    @property
    def shape(self) -> tuple[int, int]:
        """(n, c)."""
        return self.tokens.n, len(self.g)

    @property
    def like(self) -> Tensor:
        """A tensor of this dtype and device."""
        return self.g


@dataclass(frozen=True)
class Outer(_TokenFeature):
    """sum_t g[a, t] x[t]^T over the tokens of an example, (r, s); or its transpose, for a matrix on the right.

    Attributes:
        x: ``(N, s)``, the inputs that the matrix multiplied.
        g: ``(c, N, r)``, the gradient at the product.
        tokens: the example of each token.
        transposed: whether the parameter is stored as (s, r).
        padded: the gradients example by example, after the first call of ``by_example``; shared by features that have
            the same gradients.
    """

    x: Tensor
    g: Tensor
    tokens: Tokens
    transposed: bool = False
    padded: list[Tensor] = field(default_factory=list, repr=False)

    @property
    def sizes(self) -> tuple[int, int, int]:
        """(N, r, s)."""
        return self.g.shape[1], self.g.shape[2], self.x.shape[-1]

    def between(self, start: int, stop: int) -> tuple[Tensor, Tensor]:
        """Tokens start..stop-1: inputs ``(N, s)`` and gradients ``(c, N, r)``."""
        return self.x[start:stop], self.g[:, start:stop]

    def beside(self, x: Tensor) -> "Outer":
        """The feature of another matrix (r, s') that multiplies x ``(N, s')``, with the same gradients."""
        return Outer(x, self.g, self.tokens, False, self.padded)

    def of(self, outputs: slice) -> "Outer":
        """The feature of some of the outputs."""
        return Outer(self.x, self.g[outputs], self.tokens, self.transposed, [g[outputs] for g in self.padded])

    @property
    def by_example(self) -> Tensor:
        """The gradients ``(c, n, t, r)``, with zeros after the tokens of shorter examples."""
        if not self.padded:
            self.padded.append(self.tokens.padded(self.g))
        return self.padded[0]

    def write(self, rows: slice, out: Tensor, *, add: bool = False) -> None:
        """Put the rows of the feature into ``out``, ``(n, c, rows, width)``, or add them to it."""
        x, g = self.tokens.padded(self.x.to(self.g.dtype)), self.by_example
        if self.transposed or x.shape[-1] < _NARROW:  # one output at a time
            for a in range(len(g)):
                left, right = (x[..., rows], g[a]) if self.transposed else (g[a][..., rows], x)
                torch.baddbmm(out[:, a], left.mT, right, beta=int(add), out=out[:, a])
        else:  # all outputs at once
            left = g[..., rows].permute(1, 0, 3, 2).reshape(len(x), -1, x.shape[1])
            whole = out.flatten(1, 2)
            torch.baddbmm(whole, left, x, beta=int(add), out=whole)

    def active_rows(self, count: int) -> Tensor:
        """A mask ``(count,)`` of the parameter's rows that are not zero for every example."""
        side = self.x if self.transposed else self.g
        return (side != 0).flatten(0, -2).any(dim=0)


@dataclass(frozen=True)
class Lookup(_TokenFeature):
    """Rows of an embedding: row v of the feature is the sum of g[a, t] over an example's tokens with ids[t] = v.

    Attributes:
        ids: ``(N,)``; -1 where the row that was read has no gradient.
        g: ``(c, N, s)``, the gradient at the row read.
        tokens: the example of each token.
    """

    ids: Tensor
    g: Tensor
    tokens: Tokens

    def between(self, start: int, stop: int) -> tuple[Tensor, Tensor]:
        """Tokens start..stop-1: ids ``(N,)`` and gradients ``(c, N, s)``."""
        return self.ids[start:stop], self.g[:, start:stop]

    def of(self, outputs: slice) -> "Lookup":
        """The feature of some of the outputs."""
        return Lookup(self.ids, self.g[outputs], self.tokens)

    def write(self, rows: slice, out: Tensor, *, add: bool = False) -> None:
        """Put the rows of the feature into ``out``, ``(n, c, rows, width)``, or add them to it."""
        n, c, count, width = out.shape
        inside = (self.ids >= rows.start) & (self.ids < rows.stop)
        row = torch.where(inside, self.ids - rows.start, count)  # one more row, for ids outside of ``rows``
        result = self.g.new_zeros(c, n * (count + 1), width)
        result.index_add_(1, self.tokens.owner * (count + 1) + row, self.g)
        result = result.unflatten(1, (n, -1))[:, :, :count].transpose(0, 1)
        out.copy_(result + out if add else result)

    def active_rows(self, count: int) -> Tensor:
        """A mask ``(count,)`` of the parameter's rows that any example reads."""
        active = torch.zeros(count, dtype=torch.bool, device=self.ids.device)
        active[self.ids[self.ids >= 0]] = True
        return active


@dataclass(frozen=True)
class Dense:
    """A feature stored as a whole tensor.

    Attributes:
        value: ``(n, c, *shape)``.
    """

    value: Tensor

    def of(self, outputs: slice) -> "Dense":
        """The feature of some of the outputs."""
        return Dense(self.value[:, outputs])

    @property
    def shape(self) -> tuple[int, int]:
        """(n, c)."""
        return self.value.shape[0], self.value.shape[1]

    @property
    def like(self) -> Tensor:
        """A tensor of this dtype and device."""
        return self.value

    def write(self, rows: slice, out: Tensor, *, add: bool = False) -> None:
        """Put the rows of the feature into ``out``, ``(n, c, rows, width)``, or add them to it."""
        value = (self.value[:, :, rows] if self.value.ndim > 2 else self.value).reshape(out.shape)
        out.copy_(value + out if add else value)

    def active_rows(self, count: int) -> Tensor:
        """A mask ``(count,)`` of the parameter's rows that are not zero for every example."""
        return (self.value != 0).reshape(-1, count, self.value.shape[3:].numel()).any(dim=-1).any(dim=0)


Feature = Outer | Lookup | Patches | Dense


def formed(feature: Feature, shape: torch.Size) -> Dense:
    """The feature of a parameter of this shape, as a whole tensor."""
    out = feature.like.new_empty(*feature.shape, shape[0], shape[1:].numel())
    feature.write(slice(0, shape[0]), out)
    return Dense(out.view(*feature.shape, *shape))


def evenly(feature: Outer) -> Outer:
    """The same feature with as many tokens for each example, zeros after those of shorter ones."""
    if feature.tokens.equal:
        return feature
    n, most = feature.tokens.n, feature.tokens.most
    owner = torch.arange(n, device=feature.g.device).repeat_interleave(most)
    x, g = feature.tokens.padded(feature.x).flatten(0, 1), feature.by_example.flatten(1, 2)
    return Outer(x, g, Tokens(n, owner), feature.transposed)


def in_dtype(feature: Feature, dtype: torch.dtype) -> Feature:
    """The feature with gradients of this dtype, in which all of its products are computed."""
    if feature.like.dtype == dtype:
        return feature
    if isinstance(feature, Dense):
        return Dense(feature.value.to(dtype))
    if isinstance(feature, Outer):
        return replace(feature, g=feature.g.to(dtype), padded=[])
    return replace(feature, g=feature.g.to(dtype))


def subtract(feature: Feature, weights: Tensor, total: Tensor) -> Tensor:
    """total - sum_ia weights[i, a] feature[i, a], in place unless ``total`` is sparse.

    The subtracted sum is the gradient of the weighted sum of the outputs by the parameter.
    """
    weights = weights.to(feature.like.dtype)
    if total.is_sparse and not isinstance(feature, Lookup):
        total = total.to_dense()
    if isinstance(feature, Dense):
        return total.sub_(torch.einsum("nc...,nc->...", feature.value, weights))
    if isinstance(feature, Patches):
        return total.sub_(formed(feature.summed(weights), total.shape).value.sum(dim=(0, 1)).to(total.dtype))
    g = torch.einsum("cNd,Nc->Nd", feature.g, weights[feature.tokens.owner]).to(total.dtype)
    if isinstance(feature, Outer):
        x = feature.x.to(total.dtype)
        left, right = (x, g) if feature.transposed else (g, x)
        total.view(left.shape[1], right.shape[1]).addmm_(left.T, right, alpha=-1)
        return total
    real = feature.ids >= 0
    if total.is_sparse:
        return (
            total - torch.sparse_coo_tensor(feature.ids[real][None], g[real], total.shape, check_invariants=True)
        ).coalesce()
    return total.index_add_(0, feature.ids[real], g[real], alpha=-1)
