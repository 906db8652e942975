"""Tangent features of one parameter without its Jacobian: what each kind of use leaves, and how kernels come of it.

The feature of example i and output a is d f_a(x_i)/d theta_p. It is a sum over tokens t of outer products for a matrix
that multiplies (`Outer`), rows of an embedding (`Lookup`), and otherwise a small tensor of its own (`Dense`). Letters
as in :mod:`ntk`, and r, s for a matrix's rows and columns. Each holds one group of examples; a kernel is contracted
over lists of them.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

# Elements of the largest temporary: 64 MB in float32, which stays in reach of the caches' prefetching.
CHUNK = 1 << 24
# Tokens in a block of a ghost contraction: its matrices of c tokens squared stay in the caches.
_BLOCK = 256
# Rows from which a product of halves is faster than a whole one.
_HALF = 128


@dataclass(frozen=True)
class Outer:
    """sum_t g[i, a, t] x[i, t]^T, (r, s); or its transpose, for a matrix that multiplies from the right.

    Attributes:
        x: ``(n, t, s)``, what the matrix multiplied.
        g: ``(n, c, t, r)``, the gradient at the product.
        transposed: the parameter is stored as (s, r).
    """

    x: Tensor
    g: Tensor
    transposed: bool

    @cached_property
    def real(self) -> Tensor:
        """Which tokens have a gradient: ``(n, t)``, bool. One that is not a number counts."""
        return torch.linalg.vector_norm(self.g, ord=float("inf"), dim=(1, 3)) != 0

    def active(self) -> Tensor | None:
        """Where each example's tokens that have a gradient are, and as few others as possible: ``(n, most)``.

        None if that would spare little.
        """
        most = max(1, int(self.real.sum(dim=1).max()))
        if most > 0.8 * self.real.shape[1]:
            return None
        return self.real.to(torch.uint8).argsort(dim=1, descending=True, stable=True)[:, :most]

    def at(self, places: Tensor) -> "Outer":
        """The feature from these tokens alone, ``(n, most)`` places."""
        g = self.g.gather(2, places[:, None, :, None].expand(-1, self.g.shape[1], -1, self.g.shape[-1]))
        return Outer(tokens_at(self.x, places), g, self.transposed)

    def beside(self, x: Tensor) -> "Outer":
        """The feature of another matrix (r, s') that multiplies x, with the same gradients."""
        other = Outer(x, self.g, False)
        other.__dict__["real"] = self.real
        return other

    def write(self, rows: slice, out: Tensor, *, add: bool = False) -> None:
        """Put the rows of the feature into ``out``, ``(n, c, rows, width)``, or add them to it."""
        x = self.x.to(self.g.dtype)
        if self.transposed:
            left = x[..., rows].mT.contiguous()
            for a in range(self.g.shape[1]):
                torch.baddbmm(out[:, a], left, self.g[:, a], beta=int(add), out=out[:, a])
        else:  # all outputs at once
            left = self.g[..., rows].mT.reshape(len(x), -1, x.shape[1])
            whole = out.flatten(1, 2)
            torch.baddbmm(whole, left, x, beta=int(add), out=whole)

    def active_rows(self, count: int) -> Tensor:
        """Which of the parameter's rows are not zero for every example: ``(count,)``, bool."""
        side = self.x if self.transposed else self.g
        return (side != 0).flatten(0, -2).any(dim=0)


@dataclass(frozen=True)
class Lookup:
    """Rows of an embedding: row v of the feature is the sum of g[i, a, t] over the tokens with ids[i, t] = v.

    Attributes:
        ids: ``(n, t)``; -1 where no row was read that has a gradient.
        g: ``(n, c, t, s)``, the gradient at the row read.
    """

    ids: Tensor
    g: Tensor

    def write(self, rows: slice, out: Tensor, *, add: bool = False) -> None:
        """Put the rows of the feature into ``out``, ``(n, c, rows, width)``, or add them to it."""
        n, c, count, width = out.shape
        result = self.g.new_zeros(n, c, count + 1, width)  # the last row gathers what lies outside
        inside = (self.ids >= rows.start) & (self.ids < rows.stop)
        place = torch.where(inside, self.ids - rows.start, count)
        result.scatter_add_(2, place[:, None, :, None].expand_as(self.g), self.g)
        out.copy_(result[:, :, :count] + out if add else result[:, :, :count])

    def active_rows(self, count: int) -> Tensor:
        """Which of the parameter's rows are read by any example: ``(count,)``, bool."""
        active = torch.zeros(count, dtype=torch.bool, device=self.ids.device)
        active[self.ids[self.ids >= 0]] = True
        return active


@dataclass(frozen=True)
class Dense:
    """The feature itself.

    Attributes:
        value: ``(n, c, *shape)``.
    """

    value: Tensor

    def write(self, rows: slice, out: Tensor, *, add: bool = False) -> None:
        """Put the rows of the feature into ``out``, ``(n, c, rows, width)``, or add them to it."""
        value = (self.value[:, :, rows] if self.value.ndim > 2 else self.value).reshape(out.shape)
        out.copy_(value + out if add else value)

    def active_rows(self, count: int) -> Tensor:
        """Which of the parameter's rows are not zero for every example: ``(count,)``, bool."""
        return (self.value != 0).reshape(-1, count, self.value.shape[3:].numel()).any(dim=-1).any(dim=0)


Feature = Outer | Lookup | Dense


def tokens_at(x: Tensor, places: Tensor) -> Tensor:
    """Tokens ``(n, most)`` of x ``(n, t, d)``."""
    return x.gather(1, places[:, :, None].expand(-1, -1, x.shape[-1]))


def formed(feature: Feature, shape: torch.Size) -> Dense:
    """The whole feature of a parameter of this shape."""
    like = values_of(feature)
    out = like.new_empty(*like.shape[:2], shape[0], shape[1:].numel())
    feature.write(slice(0, shape[0]), out)
    return Dense(out.view(*like.shape[:2], *shape))


def subtract(feature: Feature, weights: Tensor, total: Tensor) -> None:
    """total -= sum_ia weights[i, a] feature[i, a]: what a backward pass of the weighted outputs leaves, in place."""
    if isinstance(feature, Dense):
        total -= torch.einsum("nc...,nc->...", feature.value, weights)
        return
    g = torch.einsum("nctd,nc->ntd", feature.g, weights).flatten(0, 1).to(total.dtype)
    if isinstance(feature, Outer):
        x = feature.x.flatten(0, 1).to(total.dtype)
        left, right = (x, g) if feature.transposed else (g, x)
        total.view(left.shape[1], right.shape[1]).addmm_(left.T, right, alpha=-1)
    else:
        real = (feature.ids >= 0).flatten()
        total.index_add_(0, feature.ids.flatten()[real], g[real], alpha=-1)


def gram(groups: Sequence[Sequence[Feature]], shape: torch.Size, split: int | None, chunk: int = CHUNK) -> Tensor:
    """Kernel of one parameter, over all examples of all groups in their order: ``(n c, n c)``, outputs fast.

    Args:
        groups: for each group of examples, the features of every use of the parameter, which add up.
        shape: of the parameter.
        split: with two batches, the number of examples of the first; only its block against the second is computed
            then.
        chunk: elements of the largest temporary.
    """
    kinds = {type(feature) for features in groups for feature in features}
    if kinds == {Lookup}:
        return _lookup_gram(groups, split, chunk)
    if kinds == {Outer} and _ghost_is_cheaper(groups, shape):
        return _ghost_gram(groups, split)
    return _direct_gram(groups, shape, split, chunk)


def product(left: Tensor, split: int | None) -> Tensor:
    """left left^T, or its block between two batches; a large symmetric product by halves, at 9/16 of the work."""
    if split is not None:
        return left[:split] @ left[split:].T
    half = len(left) // 2
    if half < _HALF:
        return left @ left.T
    result = left.new_empty(len(left), len(left))
    result[:half, :half] = product(left[:half], None)
    result[half:, half:] = product(left[half:], None)
    torch.mm(left[half:], left[:half].T, out=result[half:, :half])
    result[:half, half:] = result[half:, :half].T
    return result


def _direct_gram(
    groups: Sequence[Sequence[Feature]], shape: torch.Size, split: int | None, chunk: int = CHUNK
) -> Tensor:
    """Feature by feature, a slice of the parameter's rows at a time, skipping rows that are zero for everyone."""
    rows, width = (shape[0], shape[1:].numel()) if shape else (1, 1)
    sizes = [_examples(features) for features in groups]
    like = values_of(groups[0][0])
    n, c = sum(sizes), like.shape[1]
    count, first = n * c, None if split is None else split * c
    total = like.new_zeros(count, count) if first is None else like.new_zeros(first, count - first)
    most = min(rows, max(1, chunk // max(1, count * width)))
    buffer = like.new_empty(count * most * width)
    for part in _slices(groups, rows, most):
        inside = part.stop - part.start
        formed = buffer[: count * inside * width].view(n, c, inside, width)
        for features, block in zip(groups, formed.split(sizes), strict=True):
            features[0].write(part, block)
            for feature in features[1:]:
                feature.write(part, block, add=True)
        total += product(formed.view(count, inside * width), first)
    return total


def _slices(groups: Sequence[Sequence[Feature]], rows: int, size: int) -> Iterator[slice]:
    """Slices of at most ``size`` rows that cover every row which is not zero for all examples."""
    if rows <= size:
        yield slice(0, rows)
        return
    active = torch.stack([f.active_rows(rows) for features in groups for f in features]).any(dim=0)
    remaining = active.cpu().nonzero().flatten().tolist()
    stop = 0
    for row in remaining:
        if row >= stop:
            stop = min(row + size, rows)
            yield slice(row, stop)


def _examples(features: Sequence[Feature]) -> int:
    return len(values_of(features[0]))


def values_of(feature: Feature) -> Tensor:
    """What leads with the feature's examples and outputs."""
    return feature.value if isinstance(feature, Dense) else feature.g


@dataclass(frozen=True)
class _Tokens:
    """Tokens of some examples, of all uses of a matrix, in the examples' order.

    Attributes:
        x: ``(N, s)``.
        g: ``(c, N, r)``.
        owner: ``(n, N)``, 1 where a token belongs to an example.
        start: number of the first example.
    """

    x: Tensor
    g: Tensor
    owner: Tensor
    start: int

    @property
    def stop(self) -> int:
        """One past the number of the last example."""
        return self.start + len(self.owner)


def _ghost_gram(groups: Sequence[Sequence[Feature]], split: int | None) -> Tensor:
    """sum_ts (g_t . g_s)(x_t . x_s), without forming a feature (Novak et al. 2022, sec. 3; Li et al. 2022, "ghost").

    Block by block, small enough to stay in cache; of a symmetric kernel only the upper blocks.
    """
    blocks = _token_blocks(groups)
    n, c = blocks[-1].stop, len(blocks[0].g)
    full = blocks[0].g.new_zeros(n, c, n, c)
    for i, left in enumerate(blocks):
        for right in blocks[i:]:
            if split is not None and not (left.stop <= split <= right.start):
                continue
            inner = left.g.flatten(0, 1) @ right.g.flatten(0, 1).T
            inner = inner.view(c, len(left.x), c, len(right.x))
            inner *= (left.x @ right.x.T)[:, None, :]
            value = (
                (left.owner @ (inner @ right.owner.T).flatten(2)).view(c, -1, c, len(right.owner)).permute(1, 0, 3, 2)
            )
            full[left.start : left.stop, :, right.start : right.stop] = value
            if split is None and left is not right:
                full[right.start : right.stop, :, left.start : left.stop] = value.permute(2, 3, 0, 1)
    full = full.view(n * c, n * c)
    return full if split is None else full[: split * c, split * c :]


def _token_blocks(groups: Sequence[Sequence[Feature]]) -> list[_Tokens]:
    """All tokens that have a gradient, cut between examples into blocks of about `_BLOCK`."""
    blocks: list[_Tokens] = []
    start = 0
    for features in groups:
        outers = [f for f in features if isinstance(f, Outer)]
        x, g, real = outers[0].x, outers[0].g, outers[0].real
        if len(outers) > 1:
            x, g = torch.cat([f.x for f in outers], dim=1), torch.cat([f.g for f in outers], dim=2)
            real = torch.cat([f.real for f in outers], dim=1)
        # (n, c, t, r) -> (c, n t, r), and only the real ones of n t.
        x, g = x.flatten(0, 1).to(g.dtype), g.transpose(0, 1).flatten(1, 2)
        places = real.flatten().nonzero().flatten()
        if len(places) < len(x):
            x, g = x[places], g[:, places]
        step = max(1, _BLOCK // real.shape[1])
        counts = [int(k) for k in real.sum(dim=1).tolist()]
        offset = 0
        for first in range(0, len(counts), step):
            mine = torch.tensor(counts[first : first + step], device=g.device)
            count = int(mine.sum())
            owner = torch.repeat_interleave(torch.eye(len(mine), dtype=g.dtype, device=g.device), mine, dim=1)
            part = slice(offset, offset + count)
            blocks.append(_Tokens(x[part], g[:, part].contiguous(), owner, start + first))
            offset += count
        start += len(counts)
    return blocks


def _ghost_is_cheaper(groups: Sequence[Sequence[Feature]], shape: torch.Size) -> bool:
    """Compare the multiplications of the two contractions, weighted by the share of the peak rate that each reaches."""
    tokens, n = 0, 0
    c, r, s = 1, 1, 1
    for features in groups:
        for feature in features:
            assert isinstance(feature, Outer)
            tokens += int(feature.real.sum())
            (c, r), s = (feature.g.shape[1], feature.g.shape[-1]), feature.x.shape[-1]
        n += _examples(features)
    direct = 1.4 * tokens * c * r * s + (1 if n * c < 2 * _HALF else 0.75) * (n * c) ** 2 * r * s
    ghost = 0.65 * tokens**2 * (s + c**2 * r + 20 * c**2)
    return ghost < direct


def _lookup_gram(groups: Sequence[Sequence[Feature]], split: int | None, chunk: int) -> Tensor:
    """Pairs of equal ids only: a dense Gram matrix over the rows that were read, numbered anew."""
    ids = torch.cat([f.ids.flatten() for features in groups for f in features if isinstance(f, Lookup)])
    read = ids[ids >= 0].unique()
    renumbered = []
    for features in groups:
        moved: list[Feature] = []
        for f in features:
            assert isinstance(f, Lookup)
            place = torch.searchsorted(read, f.ids.clamp_min(0)) if len(read) else f.ids
            moved.append(Lookup(torch.where(f.ids >= 0, place, -1), f.g))
        renumbered.append(moved)
    return _direct_gram(renumbered, torch.Size((max(1, len(read)), values_of(groups[0][0]).shape[-1])), split, chunk)
