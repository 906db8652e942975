"""One rule per operation: from the gradients at its output to the tangent features of the parameters it mixed in.

A rule takes the call and returns, for each tensor of parameters among its arguments, a function from the gradients at
the output ``(n m, ...)`` to a :class:`~ntk.features.Feature`. The first axis of data holds m rows for each example, in
the examples' order; :mod:`ntk.structured.verification` checks that numerically before a kernel is believed. Where the
last axis is the only one that the parameter has, all others are tokens, and those without a gradient are left out
(:mod:`ntk.tokens`). An operation without an entry in `RULES` is differentiated example by example, which is exact and
slower.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import resolve_name
from torch.utils._pytree import tree_flatten, tree_unflatten

from ntk.counts import BY_EXAMPLE, BY_RULE, note
from ntk.features import Dense, Feature, Lookup, Outer, formed
from ntk.structured.capture import Capture, Data, Derived, Use
from ntk.tokens import Gradients

FeatureOf = Callable[[Gradients], Feature]


def features_of(capture: Capture, func: Any, args: tuple, kwargs: dict, result: Tensor) -> dict[int, Use] | None:
    """The uses in one call, by the id of the tensor used; None if there is no rule for it."""
    rule = RULES.get(func)
    try:
        found = None if rule is None else rule(capture, args, kwargs, result)
    except _Unsuitable:
        found = None
    if found is not None:
        note(BY_RULE, name_of(func))
    else:
        found = _example_by_example(capture, args, kwargs, result, func=func)
        if found is None:
            return None
        note(BY_EXAMPLE, name_of(func))
    return {id(t): use if isinstance(use, Use) else _use(capture, t, use) for t, use in found}


class _Unsuitable(Exception):
    """The call is not of the form that a rule is for."""


Found = list[tuple[Tensor, "FeatureOf | Use"]]


def _use(capture: Capture, t: Tensor, feature: FeatureOf) -> Use:
    state = capture.state(t)
    assert isinstance(state, Derived)
    return Use(state.names, feature, None if id(t) in capture.names else t)


def _is_source(capture: Capture, t: Any) -> bool:
    return isinstance(t, Tensor) and isinstance(capture.state(t), Derived)


def _is_parameter(capture: Capture, t: Any) -> bool:
    return id(t) in capture.names


def _matrix(capture: Capture, x: Tensor, weight: Tensor, *, rows_first: bool) -> tuple[Tensor, FeatureOf | Use]:
    """x W^T (``rows_first``) or x W: outer products of x and the gradient."""
    x = x.detach()
    if x.ndim < 2 or len(x) % capture.n:
        raise _Unsuitable

    def outer(g: Gradients, transposed: bool) -> Outer:
        return Outer(g.inputs(x), g.packed, g.tokens, transposed)

    state = capture.state(weight)
    if _is_parameter(capture, weight):
        return weight, partial(outer, transposed=not rows_first)
    if isinstance(state, Derived) and state.transpose is not None:
        return weight, Use(state.names, partial(outer, transposed=rows_first))
    return weight, lambda g: formed(outer(g, not rows_first), weight.shape)


def _linear(capture: Capture, args: tuple, kwargs: dict, result: Tensor) -> Found:
    x, weight, bias = _bind(("input", "weight", "bias"), args, kwargs)
    found: Found = []
    if _is_source(capture, x) or weight.ndim != 2:
        raise _Unsuitable
    if _is_source(capture, weight):
        found.append(_matrix(capture, x, weight, rows_first=True))
    if _is_source(capture, bias):
        found.append((bias, partial(_summed, bias.shape)))
    return found


def _addmm(capture: Capture, args: tuple, kwargs: dict, result: Tensor) -> Found:
    bias, x, weight = _bind(("input", "mat1", "mat2"), args, kwargs)
    if len(args) > 3 or set(kwargs) - {"input", "mat1", "mat2"} or _is_source(capture, x):
        raise _Unsuitable
    found: Found = []
    if _is_source(capture, weight):
        found.append(_matrix(capture, x, weight, rows_first=False))
    if _is_source(capture, bias):
        found.append((bias, partial(_summed, bias.shape)))
    return found


def _matmul(capture: Capture, args: tuple, kwargs: dict, result: Tensor) -> Found:
    if len(args) != 2 or not _is_source(capture, args[1]) or _is_source(capture, args[0]) or args[1].ndim != 2:
        raise _Unsuitable
    return [_matrix(capture, args[0], args[1], rows_first=False)]


def _embedding(capture: Capture, args: tuple, kwargs: dict, result: Tensor) -> Found:
    ids, weight, padding, max_norm, _, by_frequency = _bind(
        ("input", "weight", "padding_idx", "max_norm", "norm_type", "scale_grad_by_freq"), args, kwargs
    )
    if max_norm is not None or by_frequency or not _is_parameter(capture, weight) or len(ids) % capture.n:
        raise _Unsuitable
    return [(weight, partial(_looked_up, _readable(ids, padding, len(weight))))]


def _readable(ids: Tensor, padding: int | None, rows: int) -> Tensor:
    """Row -1 for the padding index, whose row has no gradient (as torch defines it)."""
    return ids if padding is None else torch.where(ids == padding % rows, -1, ids)


def _looked_up(ids: Tensor, g: Gradients) -> Lookup:
    return Lookup(g.tokens.pick(ids.reshape(-1, 1)).squeeze(1), g.packed, g.tokens)


def _add(capture: Capture, args: tuple, kwargs: dict, result: Tensor, *, signs: tuple[int, int] = (1, 1)) -> Found:
    if len(args) != 2 or kwargs:
        raise _Unsuitable
    found: Found = []
    for t, sign in zip(args, signs):
        if not _is_source(capture, t):
            continue
        state = capture.state(t)
        assert isinstance(state, Derived)
        if state.lookup is not None and sign == 1 and result.ndim >= 2 and t.shape[-1] == result.shape[-1]:
            # Rows of an embedding that all examples share (position ids): as if each had read them itself.
            name, ids, padding = state.lookup
            ids = _readable(ids, padding, 1 << 62).expand(result.shape[:-1])
            rows = t.detach().expand(result.shape)
            found.append((t, Use(frozenset((name,)), partial(_looked_up, ids), output=rows, layer=state.layer)))
        else:
            found.append((t, partial(_summed, t.shape, sign=sign)))
    return found


def _mul(capture: Capture, args: tuple, kwargs: dict, result: Tensor) -> Found:
    if len(args) != 2 or kwargs:
        raise _Unsuitable
    found: Found = []
    for t, other in (args, args[::-1]):
        if _is_source(capture, t):
            if _is_source(capture, other):
                raise _Unsuitable
            held = other.detach() if isinstance(other, Tensor) else other
            found.append((t, partial(_times, t.shape, held)))
    return found


def _times(shape: torch.Size, factor: Any, g: Gradients) -> Dense:
    """Sum the gradients times the other factor over the axes along which a tensor of ``shape`` was broadcast."""
    if isinstance(factor, Tensor) and factor.shape == g.shape and _is_last_axis(shape, g.shape):
        product = g.packed * g.tokens.pick(factor.reshape(-1, factor.shape[-1]))
        return _per_example(g.tokens.sums(product.to(g.dtype)), shape)
    n, whole = g.n, g.whole
    if isinstance(factor, Tensor) and factor.ndim == len(g.shape) and factor.shape[:1] == g.shape[:1]:
        factor = factor.unflatten(0, (n, 1, -1))
    return _over_broadcast(n, shape, (whole * factor).to(g.dtype))


def _layer_norm(capture: Capture, args: tuple, kwargs: dict, result: Tensor) -> Found:
    x, shape, weight, bias, eps = _bind(("input", "normalized_shape", "weight", "bias", "eps"), args, kwargs)
    return _norm(capture, lambda: F.layer_norm(x.detach(), shape, eps=1e-5 if eps is None else eps), x, weight, bias)


def _rms_norm(capture: Capture, args: tuple, kwargs: dict, result: Tensor) -> Found:
    x, shape, weight, eps = _bind(("input", "normalized_shape", "weight", "eps"), args, kwargs)
    return _norm(capture, lambda: F.rms_norm(x.detach(), shape, eps=eps), x, weight, None)


def _norm(capture: Capture, normalized: Callable[[], Tensor], x: Any, weight: Any, bias: Any) -> Found:
    if _is_source(capture, x):
        raise _Unsuitable
    found: Found = []
    if _is_source(capture, weight):
        found.append((weight, lambda g: _times(weight.shape, normalized(), g)))
    if _is_source(capture, bias):
        found.append((bias, partial(_summed, bias.shape)))
    return found


def _summed(shape: torch.Size, g: Gradients, *, sign: int = 1) -> Dense:
    """Sum the gradients over the axes along which a tensor of ``shape`` was broadcast."""
    if _is_last_axis(shape, g.shape):
        found = _per_example(g.tokens.sums(g.packed), shape)
    else:
        found = _over_broadcast(g.n, shape, g.whole)
    return found if sign == 1 else Dense(-found.value)


def _is_last_axis(shape: torch.Size, result: torch.Size) -> bool:
    """Whether a tensor was broadcast along all axes of a result but the last, the first included."""
    return len(result) > 1 and shape.numel() == result[-1] == shape[-1:].numel() and len(shape) <= len(result)


def _per_example(sums: Tensor, shape: torch.Size) -> Dense:
    """(c, n, d) as features of a parameter of this shape."""
    return Dense(sums.transpose(0, 1).reshape(sums.shape[1], sums.shape[0], *shape))


def _over_broadcast(n: int, shape: torch.Size, g: Tensor) -> Dense:
    """Sum g ``(n, c, m, ...)``, whatever the axes."""
    whole = len(shape) == g.ndim - 2 and shape[0] != 1
    if whole:
        # The tensor has the batch's own rows: each example sees its rows of it and no others.
        if shape[0] != n * g.shape[2]:
            raise ValueError(f"cannot tell the examples apart in a tensor of shape {tuple(shape)}")
        own = torch.zeros(n, g.shape[1], n, *g.shape[2:], dtype=g.dtype, device=g.device)
        own[torch.arange(n), :, torch.arange(n)] = g
        return Dense(own.flatten(2, 3).sum_to_size(n, g.shape[1], *shape))
    rest = g.shape[3:]
    inner = shape[len(shape) - len(rest) :] if len(shape) >= len(rest) else shape
    value = g.sum(dim=2).sum_to_size(*g.shape[:2], *(1,) * (len(rest) - len(inner)), *inner)
    return Dense(value.reshape(*g.shape[:2], *shape))


def _example_by_example(
    capture: Capture, args: tuple, kwargs: dict, result: Tensor, *, func: Any = None
) -> Found | None:
    """Any operation: its own derivative, of one example's rows of the result at a time."""
    n = capture.n
    leaves, spec = tree_flatten((args, kwargs))
    sources = [i for i, t in enumerate(leaves) if _is_source(capture, t)]
    batched = [i for i, t in enumerate(leaves) if isinstance(t, Tensor) and isinstance(capture.state(t), Data)]
    leaves = [t.detach() if i in batched else t for i, t in enumerate(leaves)]
    shape = result.shape
    rows = len(result) // n
    sliced = all(leaves[i].ndim > 0 and len(leaves[i]) % n == 0 for i in batched)

    def value_of(which: int, leaf: Tensor, example: int | None) -> Tensor:
        filled = [t.detach() if i in sources else t for i, t in enumerate(leaves)]
        filled[which] = leaf
        if example is not None:
            for i in batched:
                filled[i] = leaves[i].unflatten(0, (n, -1))[example]
        again_args, again_kwargs = tree_unflatten(filled, spec)
        with torch.enable_grad():
            return func(*again_args, **again_kwargs)

    def feature(which: int, gradients: Gradients) -> Dense:
        g = gradients.whole
        leaf = leaves[which].detach().clone().requires_grad_()
        # Alone if the call allows it; among all, at n times the cost, if a tensor of parameters has rows of the batch.
        alone = sliced
        if alone:
            try:
                alone = value_of(which, leaf, 0).shape == (rows, *shape[1:])
            except RuntimeError:
                alone = False
        whole = None if alone else value_of(which, leaf, None)
        found = []
        for i in range(n):
            with torch.enable_grad():
                value = value_of(which, leaf, i) if whole is None else whole[i * rows : (i + 1) * rows]
            found += [torch.autograd.grad(value, leaf, ga.reshape(value.shape), retain_graph=True)[0] for ga in g[i]]
        return Dense(torch.stack(found).unflatten(0, (n, -1)))

    return [(leaves[i], partial(feature, i)) for i in dict.fromkeys(sources)]


def name_of(func: Any) -> str:
    """What a function of torch is called where rules are counted."""
    return resolve_name(func) or getattr(func, "__name__", str(func))


def _bind(names: tuple[str, ...], args: tuple, kwargs: dict) -> list[Any]:
    return [args[i] if i < len(args) else kwargs.get(name) for i, name in enumerate(names)]


RULES: dict[Any, Callable[..., Found]] = {
    F.linear: _linear,
    torch.addmm: _addmm,
    torch.matmul: _matmul,
    torch.Tensor.matmul: _matmul,
    torch.mm: _matmul,
    torch.Tensor.mm: _matmul,
    F.embedding: _embedding,
    torch.add: _add,
    torch.Tensor.add: _add,
    torch.sub: partial(_add, signs=(1, -1)),
    torch.Tensor.sub: partial(_add, signs=(1, -1)),
    torch.mul: _mul,
    torch.Tensor.mul: _mul,
    F.layer_norm: _layer_norm,
    torch.layer_norm: _layer_norm,
    F.rms_norm: _rms_norm,
}
