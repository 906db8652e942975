"""One parameter's Gram matrix from its features, which are formed slice by slice or not at all.

`_direct` forms features and multiplies them; `_ghost` works on pairs of tokens (Novak et al. 2022, sec. 3; Li et al.
2022, "ghost"). :func:`gram` takes whichever needs less time. Outputs are contracted as the kernel's layout says
(:class:`ntk.layout.Layout`); k, m and d are its numbers of matrices, of rows, and of outputs in a sum.
"""

import itertools
import math
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial

import torch
from torch import Tensor

from ntk.counts import CONTRACTED, note
from ntk.features import Dense, Feature, Lookup, Outer
from ntk.layout import Layout
from ntk.patches import Patches
from ntk.structured.contraction import FORMED, HALF, PAIRS, Sizes
from ntk.tokens import Tokens

# Elements of the largest temporary: 64 MB in float32, which the caches' prefetching copes with.
CHUNK = 1 << 24
# Tokens in a block of a ghost contraction on a processor, so that its matrices over pairs of tokens stay in the caches.
_BLOCK = 256


_AtTokens = Outer | Lookup | Patches

Groups = Sequence[Sequence[Feature]]
"""For each group of examples, the features of every use of one parameter, which add up."""


def gram(
    groups: Groups, shape: torch.Size, split: int | None, layout: Layout, chunk: int = CHUNK, *, signed: bool = False
) -> Tensor:
    """Kernel of one parameter over all examples of all groups in their order: ``(k, n m, n m)``, outputs fast.

    Args:
        groups: the features.
        shape: of the parameter.
        split: with two batches, the number of examples of the first; only its block against the second is computed.
        layout: what becomes of the outputs.
        chunk: elements of the largest temporary.
        signed: replace each column's feature by its sign, for which features must be formed.
    """
    kinds = {type(feature) for features in groups for feature in features}
    if kinds == {Lookup}:
        groups, count = _renumbered(groups)
        shape = torch.Size((count, shape[-1]))
    # Pairs of tokens need x on one side: uses of one matrix as x W and as x W^T put it on both.
    sides = {getattr(feature, "transposed", False) for features in groups for feature in features}
    pairs = len(kinds) == len(sides) == 1 and kinds != {Dense}
    if not signed and pairs and _sizes(groups, shape).way(layout) == PAIRS:
        note(CONTRACTED, PAIRS)
        return _ghost(groups, split, layout, chunk)
    note(CONTRACTED, FORMED)
    if kinds == {Patches} and len(sides) == 1:
        groups, shape = _by_channel(groups, chunk)
    return _direct(groups, shape, split, layout, chunk, signed=signed)


def product(left: Tensor, split: int | None, *, signed: bool = False) -> Tensor:
    """left left^T for each of k matrices ``(k, rows, d p)``, or its block between two batches.

    A large symmetric product is taken by halves, at 9/16 of the work. With ``signed``, left sign(left)^T.
    """
    if split is not None or signed:
        rows, columns = (left, left) if split is None else (left[:, :split], left[:, split:])
        return _times(rows, columns.sign() if signed else columns)
    if left.shape[1] < 2 * HALF:
        return _times(left, left)
    result = left.new_empty(len(left), left.shape[1], left.shape[1])
    for matrix, out in zip(left, result, strict=True):
        _symmetric(matrix, out)
    return result


def _times(left: Tensor, right: Tensor) -> Tensor:
    """left right^T for each of k matrices."""
    return torch.mm(left[0], right[0].T)[None] if len(left) == 1 else torch.bmm(left, right.mT)


def _symmetric(left: Tensor, out: Tensor) -> None:
    half = len(left) // 2
    if half < HALF:
        torch.mm(left, left.T, out=out)
        return
    _symmetric(left[:half], out[:half, :half])
    _symmetric(left[half:], out[half:, half:])
    torch.mm(left[half:], left[:half].T, out=out[half:, :half])
    out[:half, half:] = out[half:, :half].T


def _direct(
    groups: Groups, shape: torch.Size, split: int | None, layout: Layout, chunk: int = CHUNK, *, signed: bool = False
) -> Tensor:
    """By formed features: some outputs at a time where the layout keeps outputs apart, and a slice of rows of those."""
    width = shape[1:].numel() if shape else 1
    n, c = sum(features[0].shape[0] for features in groups), groups[0][0].shape[1]
    k, m, _ = layout.factors(c)
    step = c if m > 1 else max(1, chunk // max(1, n * width))
    if step >= c:
        return _formed(groups, shape, split, layout, chunk, signed=signed)
    products: list[Tensor] = []
    for first in range(0, c, step):
        some = [[feature.of(slice(first, first + step)) for feature in features] for features in groups]
        value = _formed(some, shape, split, layout, chunk, signed=signed)
        if k > 1 or not products:
            products.append(value)
        else:
            products[0].add_(value)
    return torch.cat(products) if k > 1 else products[0]


def _formed(
    groups: Groups, shape: torch.Size, split: int | None, layout: Layout, chunk: int, *, signed: bool
) -> Tensor:
    """A slice of the parameter's rows at a time, skipping rows that are zero for everyone."""
    rows, width = (shape[0], shape[1:].numel()) if shape else (1, 1)
    sizes = [features[0].shape[0] for features in groups]
    like = groups[0][0].like
    n, c = sum(sizes), groups[0][0].shape[1]
    k, m, _ = layout.factors(c)
    first = None if split is None else split * m
    most = min(rows, max(1, chunk // max(1, n * c * width)))
    buffer = like.new_empty(n * c * most * width)
    total: Tensor | None = None
    for chosen in slices_of_rows(groups, rows, most):
        inside = chosen.stop - chosen.start
        formed = buffer[: n * c * inside * width].view(n, c, inside, width)
        for features, block in zip(groups, formed.split(sizes), strict=True):
            features[0].write(chosen, block)
            for feature in features[1:]:
                feature.write(chosen, block, add=True)
        value = product(layout.arrange(formed), first, signed=signed)
        total = value if total is None else total.add_(value)
    if total is None:
        return like.new_zeros(k, n * m, n * m) if split is None else like.new_zeros(k, split * m, (n - split) * m)
    return total


def slices_of_rows(groups: Groups, rows: int, size: int) -> Iterator[slice]:
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


@dataclass(frozen=True)
class _Block:
    """Some consecutive tokens.

    Attributes:
        x: ``(N, s)``, what a matrix multiplied, or ``(N,)``, the rows of an embedding that were read.
        g: ``(k, m N, d r)``.
        owner: ``(n, N)``, 1 where a token belongs to an example.
        start: number of the first example.
    """

    x: Tensor
    g: Tensor
    owner: Tensor
    start: int

    @property
    def examples(self) -> slice:
        """The examples that have a token here."""
        return slice(self.start, self.start + len(self.owner))

    def inner(self, other: "_Block") -> Tensor:
        """x . x' for each pair of tokens, ``(N, N')``; for an embedding, 1 where both tokens read the same row."""
        if self.x.ndim == 2:
            return self.x @ other.x.T
        return ((self.x[:, None] == other.x) & (self.x >= 0)[:, None]).to(self.g.dtype)


def _ghost(groups: Groups, split: int | None, layout: Layout, chunk: int = CHUNK) -> Tensor:
    """sum_ts (g_t . g_s)(x_t . x_s), without forming a feature.

    Blocks of tokens are small enough to stay in cache. A symmetric kernel needs only the upper blocks.
    """
    merged = [_merged(features) for features in groups]
    counts = [count for feature in merged for count in feature.tokens.counts]
    n, c, like = len(counts), merged[0].shape[1], merged[0].like
    k, m, _ = layout.factors(c)
    size = _block_size(like.device, chunk, k * m**2)
    before = sum(counts[:split])  # tokens of the first batch
    row_spans = list(_spans(0, before, size))
    column_spans = row_spans if split is None else list(_spans(before, sum(counts), size))
    first = 0 if split is None else split  # the example of the first column
    full = like.new_zeros(k, n if split is None else split, m, n - first, m)
    block = partial(_block, merged, counts, layout)
    if sum(tokens * (s + c * r) for tokens, r, s in (feature.sizes for feature in merged)) <= chunk:
        block = cache(block)  # so that a block is put together once, and not for each other block

    def at(rows: _Block, columns: _Block) -> Tensor:
        return full[:, rows.examples, :, columns.examples.start - first : columns.examples.stop - first]

    for i, span in enumerate(row_spans):
        rows = block(span)
        for other in column_spans[i if split is None else 0 :]:
            columns = rows if other == span else block(other)
            pairs = _times(rows.g, columns.g).view(k, m, len(rows.x), m, len(columns.x))
            pairs *= rows.inner(columns)[:, None, :]
            value = (rows.owner @ pairs.flatten(3)).view(k, m, -1, m, len(columns.x)) @ columns.owner.T
            value = value.transpose(1, 2).transpose(3, 4)
            at(rows, columns).add_(value)
            if split is None and other != span:
                at(columns, rows).add_(value.permute(0, 3, 4, 1, 2))
    return full.view(k, full.shape[1] * m, -1)


def _block_size(device: torch.device, chunk: int, size: int) -> int:
    """Tokens in a block, if a temporary has ``size`` elements for each pair of tokens.

    An accelerator waits for launches rather than for memory, and takes as few blocks as ``chunk`` allows.
    """
    most = max(1, math.isqrt(chunk // size))
    return min(_BLOCK, most) if device.type == "cpu" else most


def _spans(start: int, stop: int, size: int) -> Iterator[tuple[int, int]]:
    yield from ((first, min(first + size, stop)) for first in range(start, stop, size))


def _block(
    merged: Sequence[Outer | Lookup | Patches], counts: list[int], layout: Layout, span: tuple[int, int]
) -> _Block:
    """The tokens of a span, which may begin or end within an example."""
    start, stop = span
    xs, gs = zip(*_within(merged, start, stop), strict=True)
    x, g = torch.cat(xs), torch.cat(gs, dim=1)
    c, tokens, r = g.shape
    k, m, d = layout.factors(c)
    g = g.view(k, m, d, tokens, r).transpose(2, 3).reshape(k, m * tokens, d * r)
    ends = list(itertools.accumulate(counts))
    first, last = bisect_right(ends, start), bisect_right(ends, stop - 1)
    inside = [min(stop, ends[i]) - max(start, ends[i] - counts[i]) for i in range(first, last + 1)]
    owner = torch.repeat_interleave(
        torch.eye(len(inside), dtype=g.dtype, device=g.device), torch.tensor(inside, device=g.device), dim=1
    )
    return _Block(x.to(g.dtype) if x.ndim == 2 else x, g, owner, first)


def _merged(features: Sequence[Feature]) -> _AtTokens:
    """The tokens of one group, of all uses of the parameter, in the examples' order."""
    held = [f for f in features if not isinstance(f, Dense)]
    if len(held) == 1:
        return held[0]
    owner = torch.cat([f.tokens.owner for f in held])
    order = owner.argsort(stable=True)
    xs, gs = zip(*(f.between(0, f.sizes[0]) for f in held))
    x, g, tokens = torch.cat(xs)[order], torch.cat(gs, dim=1)[:, order], Tokens(held[0].tokens.n, owner[order])
    return Lookup(x, g, tokens) if x.ndim == 1 else Outer(x, g, tokens)


def _within(merged: Sequence[_AtTokens], start: int, stop: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Inputs and gradients of tokens start..stop-1, as slices of the groups that hold them."""
    for feature in merged:
        count = feature.sizes[0]
        if start < count and stop > 0:
            yield feature.between(max(0, start), min(stop, count))
        start, stop = start - count, stop - count


def _sizes(groups: Groups, shape: torch.Size) -> Sizes:
    """The sizes of features at tokens."""
    tokens, n, r, s = 0, 0, 1, 1
    for features in groups:
        for feature in features:
            assert not isinstance(feature, Dense)
            count, r, s = feature.sizes
            tokens += count
        n += features[0].shape[0]
    return Sizes(n, groups[0][0].shape[1], tokens, r, s, shape.numel())


def _by_channel(groups: Groups, chunk: int) -> tuple[Groups, torch.Size]:
    """Features of a convolution by the channels of their patches, and the shape of the parameter in that order.

    At most ``chunk`` numbers of the patches are made at once.
    """
    patches = [[f for f in features if isinstance(f, Patches)] for features in groups]
    found = [[replace(f, by_channel=True, most=chunk) for f in features] for features in patches]
    first = found[0][0]
    return found, torch.Size((first.channels, first.narrow_channels * math.prod(first.geometry.kernel)))


def _renumbered(groups: Groups) -> tuple[list[list[Feature]], int]:
    """Lookups with the rows that were read renumbered from 0, and the number of these rows, at least 1."""
    lookups = [[f for f in features if isinstance(f, Lookup)] for features in groups]
    ids = torch.cat([f.ids for features in lookups for f in features])
    read = ids[ids >= 0].unique()
    if len(read) == 0:
        return [list(features) for features in lookups], 1

    def moved(f: Lookup) -> Feature:
        return Lookup(torch.where(f.ids >= 0, torch.searchsorted(read, f.ids.clamp_min(0)), -1), f.g, f.tokens)

    return [[moved(f) for f in features] for features in lookups], len(read)
