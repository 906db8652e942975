"""Kernels from features: one parameter's Gram matrix, forming its features slice by slice or not at all.

`_direct` forms features and multiplies them; `_ghost` works on pairs of tokens (Novak et al. 2022, sec. 3; Li et al.
2022, "ghost"). :func:`gram` takes whichever needs less time.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ntk.features import Dense, Feature, Lookup, Outer

# Elements of the largest temporary: 64 MB in float32, which stays in reach of the caches' prefetching.
CHUNK = 1 << 24
# Tokens in a block of a ghost contraction on a processor: its matrices of c tokens squared stay in the caches.
_BLOCK = 256
# Rows from which a product of halves is faster than a whole one.
_HALF = 128


def gram(
    groups: Sequence[Sequence[Feature]],
    shape: torch.Size,
    split: int | None,
    chunk: int = CHUNK,
    *,
    signed: bool = False,
) -> Tensor:
    """Kernel of one parameter, over all examples of all groups in their order: ``(n c, n c)``, outputs fast.

    Args:
        groups: for each group of examples, the features of every use of the parameter, which add up.
        shape: of the parameter.
        split: with two batches, the number of examples of the first; only its block against the second is computed
            then.
        chunk: elements of the largest temporary.
        signed: put the sign of each column's feature in place of the feature, which leaves no way but to form it.
    """
    kinds = {type(feature) for features in groups for feature in features}
    if kinds == {Lookup}:
        groups, count = _renumbered(groups)
        shape = torch.Size((count, shape[-1]))
    if not signed and len(kinds) == 1 and kinds != {Dense} and _ghost_is_cheaper(groups, shape):
        return _ghost(groups, split)
    return _direct(groups, shape, split, chunk, signed=signed)


def signed_product(left: Tensor, split: int | None) -> Tensor:
    """left sign(left)^T, or its block between two batches."""
    return left @ left.sign().T if split is None else left[:split] @ left[split:].sign().T


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


def _direct(
    groups: Sequence[Sequence[Feature]],
    shape: torch.Size,
    split: int | None,
    chunk: int = CHUNK,
    *,
    signed: bool = False,
) -> Tensor:
    """Feature by feature, a slice of the parameter's rows at a time, skipping rows that are zero for everyone."""
    rows, width = (shape[0], shape[1:].numel()) if shape else (1, 1)
    sizes = [features[0].shape[0] for features in groups]
    like = groups[0][0].values
    n, c = sum(sizes), groups[0][0].shape[1]
    count, first = n * c, None if split is None else split * c
    most = min(rows, max(1, chunk // max(1, count * width)))
    buffer = like.new_empty(count * most * width)
    total: Tensor | None = None
    for part in _slices(groups, rows, most):
        inside = part.stop - part.start
        formed = buffer[: count * inside * width].view(n, c, inside, width)
        for features, block in zip(groups, formed.split(sizes), strict=True):
            features[0].write(part, block)
            for feature in features[1:]:
                feature.write(part, block, add=True)
        value = (signed_product if signed else product)(formed.view(count, inside * width), first)
        total = value if total is None else total.add_(value)
    if total is None:
        return like.new_zeros(count, count) if first is None else like.new_zeros(first, count - first)
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


@dataclass(frozen=True)
class _Block:
    """All tokens of some examples.

    Attributes:
        x: ``(N, s)``, what a matrix multiplied, or ``(N,)``, which row was read.
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

    def inner(self, other: "_Block") -> Tensor:
        """x . x' for each pair of tokens: ``(N, N')``; of rows of an embedding, 1 where they are the same."""
        if self.x.ndim == 2:
            return self.x @ other.x.T
        return ((self.x[:, None] == other.x) & (self.x >= 0)[:, None]).to(self.g.dtype)


def _ghost(groups: Sequence[Sequence[Feature]], split: int | None) -> Tensor:
    """sum_ts (g_t . g_s)(x_t . x_s), without forming a feature.

    Block by block, small enough to stay in cache; of a symmetric kernel only the upper blocks.
    """
    blocks = _blocks(groups, split)
    n, c = blocks[-1].stop, len(blocks[0].g)
    full = blocks[0].g.new_zeros(n, c, n, c)
    for i, left in enumerate(blocks):
        for right in blocks[i:]:
            if split is not None and not (left.stop <= split <= right.start):
                continue
            pairs = left.g.flatten(0, 1) @ right.g.flatten(0, 1).T
            pairs = pairs.view(c, len(left.x), c, len(right.x))
            pairs *= left.inner(right)[:, None, :]
            value = (left.owner @ pairs.flatten(2)).view(c, len(left.owner), c, len(right.x)) @ right.owner.T
            value = value.permute(1, 0, 3, 2)
            full[left.start : left.stop, :, right.start : right.stop] = value
            if split is None and left is not right:
                full[right.start : right.stop, :, left.start : left.stop] = value.permute(2, 3, 0, 1)
    full = full.view(n * c, n * c)
    return full if split is None else full[: split * c, split * c :]


def _block_size(g: Tensor) -> int:
    """Tokens in a block: an accelerator waits for launches rather than for memory, and takes as few as `CHUNK` allows.

    Args:
        g: ``(c, N, r)``, on the device that multiplies.
    """
    return _BLOCK if g.device.type == "cpu" else max(_BLOCK, math.isqrt(CHUNK) // len(g))


def _blocks(groups: Sequence[Sequence[Feature]], split: int | None) -> list[_Block]:
    """The tokens of all groups, cut between examples into blocks, and between two batches."""
    merged = [_merged(features) for features in groups]
    counts = [count for _, _, owned in merged for count in owned]
    size, starts = _block_size(merged[0][1]), [0]
    for number in range(1, len(counts)):
        if number == split or sum(counts[starts[-1] : number + 1]) > size:
            starts.append(number)
    x = torch.cat([x for x, _, _ in merged]) if len(merged) > 1 else merged[0][0]
    blocks: list[_Block] = []
    offset = 0
    for start, stop in zip(starts, [*starts[1:], len(counts)], strict=True):
        mine = torch.tensor(counts[start:stop], device=x.device)
        count = sum(counts[start:stop])
        parts = list(_parts(merged, offset, offset + count)) or [merged[0][1][:, :0]]
        g = torch.cat(parts, dim=1).contiguous()
        owner = torch.repeat_interleave(torch.eye(len(mine), dtype=g.dtype, device=g.device), mine, dim=1)
        part = x[offset : offset + count]
        blocks.append(_Block(part.to(g.dtype) if part.ndim == 2 else part, g, owner, start))
        offset += count
    return blocks


_Merged = tuple[Tensor, Tensor, list[int]]  # x, g and how many tokens each example has


def _merged(features: Sequence[Feature]) -> _Merged:
    """The tokens of one group, of all uses of the parameter, in the examples' order."""
    first = features[0]
    assert not isinstance(first, Dense)
    if len(features) == 1:
        return _inputs(first), first.g, first.tokens.counts
    owner = torch.cat([f.tokens.owner for f in features if not isinstance(f, Dense)])
    order = owner.argsort(stable=True)
    x = torch.cat([_inputs(f) for f in features])[order]
    g = torch.cat([f.g for f in features if not isinstance(f, Dense)], dim=1)[:, order]
    return x, g, torch.bincount(owner, minlength=first.tokens.n).tolist()


def _inputs(feature: Feature) -> Tensor:
    assert not isinstance(feature, Dense)
    return feature.x if isinstance(feature, Outer) else feature.ids


def _parts(merged: Sequence[_Merged], start: int, stop: int) -> Iterator[Tensor]:
    """Gradients of tokens start..stop-1, as slices of the groups that hold them."""
    for _, g, _ in merged:
        if start < g.shape[1] and stop > 0:
            yield g[:, max(0, start) : stop]
        start, stop = start - g.shape[1], stop - g.shape[1]


def _ghost_is_cheaper(groups: Sequence[Sequence[Feature]], shape: torch.Size) -> bool:
    """Compare the multiplications of the two contractions, weighted by the share of the peak rate that each reaches."""
    tokens, n, c, r, s = 0, 0, 1, 1, 1
    for features in groups:
        for feature in features:
            assert not isinstance(feature, Dense)
            c, count, r = feature.g.shape
            tokens += count
            s = feature.x.shape[-1] if isinstance(feature, Outer) else 0
        n += features[0].shape[0]
    forming = 1.4 * tokens * c * r * s
    direct = forming + (1 if n * c < 2 * _HALF else 0.75) * (n * c) ** 2 * shape.numel()
    ghost = 0.65 * tokens**2 * (s + c**2 * r + 20 * c**2)
    return ghost < direct


def _renumbered(groups: Sequence[Sequence[Feature]]) -> tuple[list[list[Feature]], int]:
    """Lookups with the rows that were read numbered anew, and how many those are, at least 1."""
    lookups = [[f for f in features if isinstance(f, Lookup)] for features in groups]
    ids = torch.cat([f.ids for features in lookups for f in features])
    read = ids[ids >= 0].unique()
    if len(read) == 0:
        return [list(features) for features in lookups], 1

    def moved(f: Lookup) -> Feature:
        return Lookup(torch.where(f.ids >= 0, torch.searchsorted(read, f.ids.clamp_min(0)), -1), f.g, f.tokens)

    return [[moved(f) for f in features] for features in lookups], len(read)
