"""Products of one parameter's Jacobian with vectors, from its features, and the squared norms of its rows.

J has one row for each example and output: its feature. A block of k vectors on that side is V ``(n, c, k)``; on the
side of the parameter it is U ``(k, *shape)``. A matrix (r, s) with N tokens is multiplied in one of two ways. From its
tokens, each of J^T V and J U takes k N r s multiplications. By features that are formed slice by slice, the slices take
c N r s and each product k n c r s, so that blocks of vectors take this way.
"""

from collections.abc import Iterator, Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ntk.features import Dense, Feature, Lookup, Outer, evenly, formed
from ntk.structured.gram import slices_of_rows

Block = tuple[Int[Tensor, "_"], Sequence[Feature]]
"""The rows of V of a batch of examples, and the features of every use of one parameter in it, which add up."""

# Elements of a slice of formed features: 8 MB in float32, which mostly stay in the caches between their products.
_SLICE = 1 << 21
# The time of a multiplication in forming features, and in products with formed features, relative to one from tokens,
# as measured on a processor; below so many vectors a product with formed features waits for memory.
_FORMING, _MULTIPLYING, _FEW = 3.0, 2.0, 8


def add_transposed_product(features: Sequence[Feature], V: Float[Tensor, "n c k"], U: Float[Tensor, "k ..."]) -> None:
    """Add J^T V, the sum over examples and outputs of V[i, a] times the feature, to U."""
    if _forming_is_cheaper(features, len(U), products=1):
        weights = V.flatten(0, 1).T
        for rows, value in _slices([features], U.shape[1:]):
            U[:, rows].flatten(1).add_(weights @ value)
        return
    for feature in features:
        if not isinstance(feature, Outer | Lookup):
            U.add_((V.flatten(0, 1).T @ _whole(feature, U.shape[1:])).view(U.shape))
            continue
        for some in _at_a_time(feature, len(U)):
            weighted = _weighted(feature, V[:, :, some])  # (N, k, r)
            if isinstance(feature, Lookup):
                real = feature.ids >= 0
                U[some].index_add_(1, feature.ids[real], weighted[real].transpose(0, 1))
            else:
                added = weighted.flatten(1).T @ feature.x.to(weighted.dtype)
                added = added.view(weighted.shape[1], -1, feature.x.shape[1])
                U[some].add_(added.mT if feature.transposed else added)


def product(features: Sequence[Feature], U: Float[Tensor, "k ..."]) -> Float[Tensor, "n c k"]:
    """J U, the inner products of each feature with k tensors of the parameter's shape."""
    n, c = features[0].shape
    out = U.new_zeros(n, c, len(U))
    if _forming_is_cheaper(features, len(U), products=1):
        for rows, value in _slices([features], U.shape[1:]):
            out.flatten(0, 1).addmm_(value, U[:, rows].flatten(1).T)
        return out
    for feature in features:
        if not isinstance(feature, Outer | Lookup):
            out += (_whole(feature, U.shape[1:]) @ U.reshape(len(U), -1).T).view(out.shape)
            continue
        for some in _at_a_time(feature, len(U)):
            if isinstance(feature, Lookup):
                along = U[some][:, feature.ids.clamp_min(0)].transpose(0, 1) * (feature.ids >= 0)[:, None, None]
            else:
                x = feature.x.to(U.dtype)
                sides = (U[some].mT if feature.transposed else U[some]).reshape(-1, x.shape[1])
                along = (x @ sides.T).unflatten(1, (-1, feature.g.shape[2]))
            out[:, :, some] += _inner(feature, along)
    return out


def add_kernel_product(
    rows: Sequence[Block],
    columns: Sequence[Block] | None,
    shape: torch.Size,
    V: Float[Tensor, "n2 c k"],
    out: Float[Tensor, "n1 c k"],
) -> None:
    """Add J_1 J_2^T V of one parameter to ``out``; ``columns`` is None if J_1 = J_2."""
    right = rows if columns is None else columns
    if not rows or not right:
        return
    features = [f for _, uses in [*rows, *(columns or ())] for f in uses]
    if _forming_is_cheaper(features, V.shape[2], products=2):
        _add_by_formed(rows, columns, shape, V, out)
        return
    U = V.new_zeros(V.shape[2], *shape)
    for index, uses in right:
        add_transposed_product(uses, V[index], U)
    for index, uses in rows:
        out.index_add_(0, index, product(uses, U))


def squared_norms(features: Sequence[Feature], shape: torch.Size) -> Float[Tensor, "n c"]:
    """The diagonal of J J^T: |sum of the uses' features|^2 of each example and output.

    Cost: t^2 (s + c r) multiplications for an example of t tokens, or c t r s where that is less.
    """
    kinds = {type(f) for f in features}
    sides = {isinstance(f, Outer) and f.transposed for f in features}
    if kinds <= {Outer, Lookup} and len(kinds) == len(sides) == 1 and _pairs_are_cheaper(features):
        return _norms_of_pairs(features)
    n, c = features[0].shape
    total = features[0].like.new_zeros(n, c)
    for _, value in _slices([features], shape):
        total += value.square().sum(dim=1).view(n, c)
    return total


def renumbered(blocks: Sequence[Block], shape: torch.Size) -> tuple[list[Block], torch.Size]:
    """The blocks of an embedding with the rows that any example reads numbered from 0, and the shape of their table.

    Blocks with another feature than lookups are returned as they are.
    """
    lookups = [f for _, features in blocks for f in features if isinstance(f, Lookup)]
    if len(lookups) < sum(len(features) for _, features in blocks):
        return list(blocks), shape
    ids = torch.cat([f.ids for f in lookups])
    read = ids[ids >= 0].unique()

    def moved(f: Feature) -> Feature:
        assert isinstance(f, Lookup)
        ids = torch.searchsorted(read, f.ids.clamp_min(0)) if len(read) else f.ids
        return Lookup(torch.where(f.ids >= 0, ids, -1), f.g, f.tokens)

    table = torch.Size((max(1, len(read)), *shape[1:]))
    return [(index, [moved(f) for f in features]) for index, features in blocks], table


def _at_a_time(feature: Outer | Lookup, k: int) -> Iterator[slice]:
    """The k vectors, as many at a time as keep the temporaries over tokens small."""
    step = max(1, 4 * _SLICE // max(1, feature.g.shape[1] * feature.g.shape[2]))
    return (slice(start, min(start + step, k)) for start in range(0, k, step))


def _weighted(feature: Outer | Lookup, V: Tensor) -> Float[Tensor, "N k r"]:
    """sum_a V[owner, a] g[a] at each token."""
    at = V[feature.tokens.owner]
    total = at[:, 0, :, None] * feature.g[0][:, None, :]
    for a in range(1, len(feature.g)):
        total.addcmul_(at[:, a, :, None], feature.g[a][:, None, :])
    return total


def _inner(feature: Outer | Lookup, along: Float[Tensor, "N k r"]) -> Float[Tensor, "n c k"]:
    """The sum over an example's tokens of g . along."""
    n, c = feature.shape
    inner = torch.stack([(along @ g[:, :, None]).squeeze(-1) for g in feature.g], dim=1)  # (N, c, k)
    return inner.new_zeros(n, c, along.shape[1]).index_add_(0, feature.tokens.owner, inner)


def _whole(feature: Feature, shape: torch.Size) -> Float[Tensor, "nc p"]:
    dense = feature if isinstance(feature, Dense) else formed(feature, shape)
    return dense.value.reshape(-1, shape.numel())


def _add_by_formed(
    rows: Sequence[Block], columns: Sequence[Block] | None, shape: torch.Size, V: Tensor, out: Tensor
) -> None:
    index = torch.cat([i for i, _ in rows])
    other = index if columns is None else torch.cat([i for i, _ in columns])
    weights = V[other].flatten(0, 1).T  # (k, n2 c)
    total = out.new_zeros(len(index) * out.shape[1], out.shape[2])
    for _, value in _slices([features for _, features in [*rows, *(columns or ())]], shape):
        left, right = (value, value) if columns is None else (value[: len(total)], value[len(total) :])
        total.addmm_(left, (weights @ right).T)
    out.index_add_(0, index, total.view(len(index), *out.shape[1:]))


def _slices(groups: Sequence[Sequence[Feature]], shape: torch.Size) -> Iterator[tuple[slice, Float[Tensor, "nc p"]]]:
    """Slices of the parameter's rows, and the groups' features there, formed; rows of zeros are skipped."""
    groups = [[evenly(f) if isinstance(f, Outer) else f for f in features] for features in groups]
    rows, width = (shape[0], shape[1:].numel()) if shape else (1, 1)
    sizes = [features[0].shape[0] for features in groups]
    n, c, like = sum(sizes), groups[0][0].shape[1], groups[0][0].like
    most = min(rows, max(1, _SLICE // max(1, n * c * width)))
    buffer = like.new_empty(n * c * most * width)
    for chosen in slices_of_rows(groups, rows, most):
        inside = chosen.stop - chosen.start
        value = buffer[: n * c * inside * width].view(n, c, inside, width)
        for features, block in zip(groups, value.split(sizes), strict=True):
            for use, feature in enumerate(features):
                feature.write(chosen, block, add=use > 0)
        yield chosen, value.view(n * c, inside * width)


def _forming_is_cheaper(features: Sequence[Feature], k: int, *, products: int) -> bool:
    """Compare the two ways for so many products with k vectors, all from features formed once."""
    matrices = [f for f in features if isinstance(f, Outer)]
    if len(matrices) < len(features):
        return False
    tokens, c = sum(f.g.shape[1] for f in matrices), features[0].shape[1]
    n = sum({id(f.tokens): f.tokens.n for f in matrices}.values())
    by_formed = _FORMING * tokens * c + _MULTIPLYING * products * max(k, _FEW) * n * c
    return by_formed < products * k * tokens


def _pairs_are_cheaper(features: Sequence[Feature]) -> bool:
    feature = features[0]
    if not isinstance(feature, Outer):
        return True
    t = sum(f.tokens.most for f in features if isinstance(f, Outer))
    c, _, r = feature.g.shape
    s = feature.x.shape[1]
    return t * (s + c * r) < 1.4 * c * r * s


def _norms_of_pairs(features: Sequence[Feature]) -> Float[Tensor, "n c"]:
    """sum_ts (g_t . g_s)(x_t . x_s) over an example's tokens; for an embedding, x_t . x_s is 1 within a row."""
    held = [f for f in features if isinstance(f, Outer | Lookup)]
    g = torch.cat([f.tokens.padded(f.g) for f in held], dim=2)  # (c, n, t, r)
    if isinstance(held[0], Outer):
        x = torch.cat([f.tokens.padded(f.x.to(f.g.dtype)) for f in held if isinstance(f, Outer)], dim=1)
    else:  # 0 for padding and for rows without a gradient
        x = torch.cat([f.tokens.padded(f.ids[:, None] + 1) for f in held if isinstance(f, Lookup)], dim=1)
    c, n, t, _ = g.shape
    total = g.new_empty(n, c)
    step = max(1, _SLICE // t**2)
    for some in (slice(start, start + step) for start in range(0, n, step)):
        inner = x[some] @ x[some].mT if x.is_floating_point() else ((x[some] == x[some].mT) & (x[some] > 0)).to(g.dtype)
        for a in range(c):
            total[some, a] = (inner * (g[a, some] @ g[a, some].mT)).sum(dim=(1, 2))
    return total
