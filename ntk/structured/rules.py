"""One rule per operation: from the gradients at its output to the tangent features of the parameters it mixed in.

A rule takes the call and returns, for each of its arguments that depends on parameters alone, a function from the
gradients at the output ``(n m, ...)`` to a :class:`~ntk.features.Feature`. The first axis of data holds m rows for each
example, in the examples' order; :mod:`ntk.structured.verification` checks that numerically before a kernel is returned.
Where a parameter has the last axis alone, all other axes are tokens, and tokens without a gradient are left out
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
from ntk.features import Dense, Lookup, Outer, formed
from ntk.structured import convolutions
from ntk.structured.dependence import Data, Dependence, Use
from ntk.structured.rule import FeatureOf, Unsuitable, Uses, affine, bind
from ntk.tokens import Gradients


def uses_of(dependence: Dependence, func: Any, args: tuple, kwargs: dict, result: Tensor) -> dict[int, Use]:
    """The uses in one call, by the id of the tensor used."""
    rule, slow = RULES.get(func), None
    try:
        if rule is None:
            raise Unsuitable("the operation has no rule")
        uses = rule(dependence, args, kwargs, result)
    except Unsuitable as error:
        slow = str(error) or "the operation's rule is for calls of another form"
        uses = _example_by_example(dependence, func, args, kwargs, result)
    return named(dependence, func, uses, result, slow)


def named(dependence: Dependence, func: Any, uses: Uses, result: Tensor, slow: str | None = None) -> dict[int, Use]:
    """Uses by the id of the tensor used, with the name of the operation; ``slow`` is why no rule takes it."""
    note(BY_RULE if slow is None else BY_EXAMPLE, name_of(func))
    found = {id(t): use if isinstance(use, Use) else _use(dependence, t, use) for t, use in uses}
    for use in found.values():
        use.operation, use.slow = name_of(func), slow
        use.positions = result.numel() / max(1, result.shape[-1]) / dependence.n
    return found


def _use(dependence: Dependence, t: Tensor, feature: FeatureOf) -> Use:
    return Use(dependence.derived(t).names, feature, None if dependence.is_parameter(t) else t)


def _matrix(dependence: Dependence, x: Tensor, weight: Tensor, *, rows_first: bool) -> tuple[Tensor, FeatureOf | Use]:
    """x W^T (``rows_first``) or x W: outer products of x and the gradient."""
    x = x.detach()
    if x.ndim < 2 or len(x) % dependence.n:
        raise Unsuitable

    def outer(g: Gradients, transposed: bool) -> Outer:
        return Outer(g.inputs(x), g.packed, g.tokens, transposed)

    if dependence.is_parameter(weight):
        return weight, partial(outer, transposed=not rows_first)
    derived = dependence.derived(weight)
    if derived.transpose is not None:
        return weight, Use(derived.names, partial(outer, transposed=rows_first))
    return weight, lambda g: formed(outer(g, not rows_first), weight.shape)


def _affine(dependence: Dependence, x: Any, weight: Any, bias: Any, of_weight: Callable[[], Any]) -> Uses:
    """The uses in an operation whose bias is broadcast along all axes but its own."""
    of_bias = partial(summed, bias.shape) if isinstance(bias, Tensor) else None
    return affine(dependence, x, weight, bias, of_weight, of_bias)


def _linear(dependence: Dependence, args: tuple, kwargs: dict, result: Tensor) -> Uses:
    x, weight, bias = bind(("input", "weight", "bias"), args, kwargs)
    if weight.ndim != 2:
        raise Unsuitable
    return _affine(dependence, x, weight, bias, partial(_matrix, dependence, x, weight, rows_first=True))


def _addmm(dependence: Dependence, args: tuple, kwargs: dict, result: Tensor) -> Uses:
    bias, x, weight = bind(("input", "mat1", "mat2"), args, kwargs)
    if len(args) > 3 or set(kwargs) - {"input", "mat1", "mat2"}:
        raise Unsuitable
    return _affine(dependence, x, weight, bias, partial(_matrix, dependence, x, weight, rows_first=False))


def _matmul(dependence: Dependence, args: tuple, kwargs: dict, result: Tensor) -> Uses:
    if len(args) != 2 or not dependence.is_derived(args[1]) or args[1].ndim != 2:
        raise Unsuitable
    return _affine(dependence, *args, None, partial(_matrix, dependence, *args, rows_first=False))


def _embedding(dependence: Dependence, args: tuple, kwargs: dict, result: Tensor) -> Uses:
    ids, weight, padding, max_norm, _, by_frequency = bind(
        ("input", "weight", "padding_idx", "max_norm", "norm_type", "scale_grad_by_freq"), args, kwargs
    )
    if max_norm is not None or by_frequency or not dependence.is_parameter(weight) or len(ids) % dependence.n:
        raise Unsuitable
    return [(weight, partial(_looked_up, _readable(ids, padding, len(weight))))]


def _readable(ids: Tensor, padding: int | None, rows: int) -> Tensor:
    """The ids with -1 for the padding index, whose row has no gradient in torch."""
    return ids if padding is None else torch.where(ids == padding % rows, -1, ids)


def _looked_up(ids: Tensor, g: Gradients) -> Lookup:
    return Lookup(g.tokens.pick(ids.reshape(-1, 1)).squeeze(1), g.packed, g.tokens)


def _add(dependence: Dependence, args: tuple, kwargs: dict, result: Tensor, *, signs: tuple[int, int] = (1, 1)) -> Uses:
    if len(args) != 2 or kwargs:
        raise Unsuitable
    uses: Uses = []
    for t, sign in zip(args, signs):
        if not dependence.is_derived(t):
            continue
        derived = dependence.derived(t)
        if derived.lookup is not None and sign == 1 and result.ndim >= 2 and t.shape[-1] == result.shape[-1]:
            # Rows of an embedding that all examples share (position ids) count as if each example had read them.
            name, ids, padding = derived.lookup
            ids = _readable(ids, padding, 1 << 62).expand(result.shape[:-1])
            rows = t.detach().expand(result.shape)
            uses.append((t, Use(frozenset((name,)), partial(_looked_up, ids), output=rows, layer=derived.layer)))
        else:
            uses.append((t, partial(summed, t.shape, sign=sign)))
    return uses


def _mul(dependence: Dependence, args: tuple, kwargs: dict, result: Tensor) -> Uses:
    if len(args) != 2 or kwargs:
        raise Unsuitable
    uses: Uses = []
    for t, other in (args, args[::-1]):
        if dependence.is_derived(t):
            if dependence.is_derived(other):
                raise Unsuitable
            held = other.detach() if isinstance(other, Tensor) else other
            uses.append((t, partial(times, t.shape, held)))
    return uses


def times(shape: torch.Size, factor: Any, g: Gradients) -> Dense:
    """Sum the gradients times the other factor over the axes along which a tensor of ``shape`` was broadcast."""
    if isinstance(factor, Tensor) and factor.shape == g.shape and _is_last_axis(shape, g.shape):
        product = g.packed * g.tokens.pick(factor.reshape(-1, factor.shape[-1]))
        return _per_example(g.tokens.sums(product.to(g.dtype)), shape)
    n, whole = g.n, g.whole
    if isinstance(factor, Tensor) and factor.ndim == len(g.shape) and factor.shape[:1] == g.shape[:1]:
        factor = factor.unflatten(0, (n, 1, -1))
    return _over_broadcast(n, shape, (whole * factor).to(g.dtype))


def _layer_norm(dependence: Dependence, args: tuple, kwargs: dict, result: Tensor) -> Uses:
    x, shape, weight, bias, eps = bind(("input", "normalized_shape", "weight", "bias", "eps"), args, kwargs)

    def feature(g: Gradients) -> Dense:
        return times(weight.shape, F.layer_norm(x.detach(), shape, eps=1e-5 if eps is None else eps), g)

    return _affine(dependence, x, weight, bias, lambda: (weight, feature))


def _rms_norm(dependence: Dependence, args: tuple, kwargs: dict, result: Tensor) -> Uses:
    x, shape, weight, eps = bind(("input", "normalized_shape", "weight", "eps"), args, kwargs)

    def feature(g: Gradients) -> Dense:
        return times(weight.shape, F.rms_norm(x.detach(), shape, eps=eps), g)

    return _affine(dependence, x, weight, None, lambda: (weight, feature))


def summed(shape: torch.Size, g: Gradients, *, sign: int = 1) -> Dense:
    """Sum the gradients over the axes along which a tensor of ``shape`` was broadcast."""
    if _is_last_axis(shape, g.shape):
        feature = _per_example(g.tokens.sums(g.packed), shape)
    else:
        feature = _over_broadcast(g.n, shape, g.whole)
    return feature if sign == 1 else Dense(-feature.value)


def _is_last_axis(shape: torch.Size, result: torch.Size) -> bool:
    """Whether a tensor was broadcast along all axes of a result except the last one."""
    return len(result) > 1 and shape.numel() == result[-1] == shape[-1:].numel() and len(shape) <= len(result)


def _per_example(sums: Tensor, shape: torch.Size) -> Dense:
    """Turn sums ``(c, n, d)`` into features of a parameter of this shape."""
    return Dense(sums.transpose(0, 1).reshape(sums.shape[1], sums.shape[0], *shape))


def _over_broadcast(n: int, shape: torch.Size, g: Tensor) -> Dense:
    """Sum g ``(n, c, m, ...)`` over any axes along which a tensor of ``shape`` was broadcast."""
    if len(shape) == g.ndim - 2 and shape[0] != 1:
        # The tensor has rows of the batch, and each example meets its own rows alone.
        if shape[0] != n * g.shape[2]:
            raise ValueError(f"cannot tell the examples apart in a tensor of shape {tuple(shape)}")
        own = torch.zeros(n, g.shape[1], n, *g.shape[2:], dtype=g.dtype, device=g.device)
        own[torch.arange(n), :, torch.arange(n)] = g
        return Dense(own.flatten(2, 3).sum_to_size(n, g.shape[1], *shape))
    rest = g.shape[3:]
    inner = shape[len(shape) - len(rest) :] if len(shape) >= len(rest) else shape
    value = g.sum(dim=2).sum_to_size(*g.shape[:2], *(1,) * (len(rest) - len(inner)), *inner)
    return Dense(value.reshape(*g.shape[:2], *shape))


def _example_by_example(dependence: Dependence, func: Any, args: tuple, kwargs: dict, result: Tensor) -> Uses:
    """The derivative of any operation, taken for one example's rows of the result at a time."""
    n = dependence.n
    leaves, spec = tree_flatten((args, kwargs))
    sources = [i for i, t in enumerate(leaves) if dependence.is_derived(t)]
    batched = [i for i, t in enumerate(leaves) if isinstance(t, Tensor) and isinstance(dependence[t], Data)]
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
        # One example alone if the call allows it. If a tensor of parameters has rows of the batch, the whole batch
        # runs, at n times the cost.
        alone = sliced
        if alone:
            try:
                alone = value_of(which, leaf, 0).shape == (rows, *shape[1:])
            except RuntimeError:
                alone = False
        whole = None if alone else value_of(which, leaf, None)
        gradient = partial(torch.autograd.grad, inputs=leaf, retain_graph=True)
        per_output = []
        for i in range(n):
            with torch.enable_grad():
                value = value_of(which, leaf, i) if whole is None else whole[i * rows : (i + 1) * rows]
            per_output += [gradient(value, grad_outputs=ga.reshape(value.shape))[0] for ga in g[i]]
        return Dense(torch.stack(per_output).unflatten(0, (n, -1)))

    return [(leaves[i], partial(feature, i)) for i in dict.fromkeys(sources)]


def name_of(func: Any) -> str:
    """The name of a function of torch, under which :mod:`ntk.counts` counts it."""
    return resolve_name(func) or getattr(func, "__name__", str(func))


RULES: dict[Any, Callable[..., Uses]] = {
    F.linear: _linear,
    torch.addmm: _addmm,
    **dict.fromkeys((torch.matmul, Tensor.matmul, torch.mm, Tensor.mm), _matmul),
    F.embedding: _embedding,
    **dict.fromkeys((torch.add, Tensor.add), _add),
    **dict.fromkeys((torch.sub, Tensor.sub), partial(_add, signs=(1, -1))),
    **dict.fromkeys((torch.mul, Tensor.mul), _mul),
    **dict.fromkeys((F.layer_norm, torch.layer_norm), _layer_norm),
    F.rms_norm: _rms_norm,
    **convolutions.RULES,
}
