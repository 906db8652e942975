"""What layers are given, return and get back when a model calls them: the reference for adapters.

Examples run one at a time, and autograd alone finds the gradients at what a layer returned and at what it was given. It
therefore does not matter what the layer does, whether its output has an axis of examples, whether the model writes into
that output, or how many layers share a weight. Where the model reads a layer's weight or bias outside of the layer's
calls, it reads a copy with a gradient of its own.

For n examples and c outputs: n forward and c n backward passes, and the inputs, outputs and gradients of the layers
on all examples, as many layers at once as fit in memory.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ntk.adapters import Layer, Method, matrix_of
from ntk.features import Feature, Lookup, Outer
from ntk.functional import batch_of, call, first_line, requiring_gradients
from ntk.inputs import Group, one_by_one
from ntk.layout import Layout
from ntk.reference import gigabytes
from ntk.request import Request
from ntk.structured.gram import gram
from ntk.tokens import Tokens, not_zero

# If a layer only multiplies by its weight, its outputs differ from W x + b by at most this many machine epsilons.
_ROUNDING = 64


@dataclass
class _Record:
    """What one example leaves at a layer, with the names and units of :class:`ntk.adapters.Layer`.

    Attributes:
        x: ``(N, s)``.
        y: ``(N, r)``.
        g: ``(c, N, r)``.
        at_inputs: ``(c, N, s)``.
        read: ``(c, r)``.
    """

    x: Tensor | None
    y: Tensor
    g: Tensor
    at_inputs: Tensor | None
    read: Tensor | None

    @property
    def size(self) -> int:
        """In bytes."""
        return sum(t.nbytes for t in vars(self).values() if t is not None)


@dataclass
class _Watched:
    """A layer while one example runs.

    Attributes:
        calls: what it was given (None for an embedding) and returned, in each call.
        copies: (owner, name) of a parameter -> the copy that the model reads outside of the layer's calls.
    """

    name: str
    module: nn.Module
    calls: list[tuple[Tensor | None, Tensor]] = field(default_factory=list)
    copies: dict[tuple[nn.Module, str], nn.Parameter] = field(default_factory=dict)


def adapter_kernels(
    request: Request, layers: Mapping[str, nn.Module], methods: Mapping[str, Method]
) -> tuple[dict[str, Tensor], set[str]]:
    """The kernels of what methods add to layers, ``{method: (n1, n2, ...)}``, for the methods that adapt any of them.

    Returns:
        The kernels, and the layers whose weight the model reads outside of their calls, where only methods with
        `in_reads` act.

    Raises:
        NotImplementedError: a layer returns no tensor, or is no layer of tokens; names it.
        MemoryError: one layer's inputs, outputs and gradients do not fit, with the size needed.
    """
    sides = [one_by_one(groups) for groups in (request.rows, request.columns) if groups]
    n, n1, n2 = sum(map(len, sides)), len(sides[0]), len(sides[-1])
    longest = max((example for side in sides for example in side), key=lambda example: example.length)
    with requiring_gradients(request.model, []):
        first = _run(request, longest, layers)
        c, like = next((len(records.g), records.g) for records in first.values())
        shape = n1, n2, *request.layout.shape(c)
        budget = request.budget(like.device)
        room = budget - (len(methods) + 2) * n1 * n2 * request.layout.size(c) * like.dtype.itemsize
        sizes = {name: records.size * n for name, records in first.items()}
        if (most := max(sizes.values())) > room:
            name = max(sizes, key=lambda name: sizes[name])
            raise MemoryError(
                f"the inputs, outputs and gradients of {name} on all {n} examples need "
                f"{gigabytes(budget - room + most)} but memory_budget is {gigabytes(budget)}: raise memory_budget, or "
                "use fewer examples"
            )
        del first
        kernels: dict[str, Tensor] = {}
        read: set[str] = set()
        for names in _batches(sizes, room):
            chosen = {name: layers[name] for name in names}
            recorded = [[_run(request, example, chosen) for example in side] for side in sides]
            for name in names:
                records = [[each.pop(name) for each in side] for side in recorded]
                is_read = any(record.read is not None for side in records for record in side)
                if is_read:
                    read.add(name)
                joined = [_joined(name, layers[name], side, is_read) for side in records]
                for key, method in methods.items():
                    if method.adapts(name):
                        total = kernels.setdefault(key, torch.zeros(shape, dtype=like.dtype, device=like.device))
                        for kernel in _kernels(method, joined, request.layout):
                            total += kernel
    return kernels, read


def _kernels(method: Method, layers: Sequence[Layer], layout: Layout) -> Iterator[Tensor]:
    """The kernel of each parameter that a method adds to one layer, which is given once for each side."""
    split = layers[0].feature.tokens.n if len(layers) > 1 else None
    for sides in zip(*(method.features(layer) for layer in layers), strict=True):
        features: list[list[Feature]] = [[feature] for _, _, feature in sides]
        if all(isinstance(f, Outer | Lookup) and not f.g.shape[1] for (f,) in features):
            continue  # the layer is never called
        yield layout.kernel(gram(features, sides[0][1], split, layout), layers[0].feature.shape[1])


def _batches(sizes: Mapping[str, int], room: float) -> Iterator[list[str]]:
    names: list[str] = []
    held = 0
    for name, size in sizes.items():
        if names and held + size > room:
            yield names
            names, held = [], 0
        names.append(name)
        held += size
    yield names


def _run(request: Request, example: Group, layers: Mapping[str, nn.Module]) -> dict[str, _Record]:
    """What one example leaves at each layer; an error says in one line why that is not known."""
    try:
        with torch.enable_grad(), _watching(layers) as watched:
            values = call(request.model, request.output, batch_of(example), 1)[0]
            tensors = [t for w in watched for t in (*(t for pair in w.calls for t in pair), *w.copies.values())]
            # A tensor that the model computes under no_grad requires no gradient.
            targets = [t for t in tensors if t is not None and t.requires_grad]
            rows: list[Sequence[Tensor | None]] = []
            for value in values:
                if values.requires_grad and targets:
                    rows.append(torch.autograd.grad(value, targets, retain_graph=True, allow_unused=True))
                else:
                    rows.append([None] * len(targets))
            gradients = {id(t): [row[i] for row in rows] for i, t in enumerate(targets)}
            dtype = torch.promote_types(values.dtype, torch.float32)
            return {w.name: _record(w, gradients, len(values), dtype) for w in watched}
    except (ValueError, NotImplementedError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        raise NotImplementedError(
            f"what this model's layers do cannot be captured ({first_line(error)}): wrap the model by peft, and take "
            "empirical_ntk(..., params='trainable') of that"
        ) from error


def _record(w: _Watched, gradients: Mapping[int, list[Tensor | None]], c: int, dtype: torch.dtype) -> _Record:
    def at(t: Tensor) -> Tensor:
        """The gradients at a tensor of tokens, ``(c, N, d)``."""
        # This happens if the backward pass calls the layer again, or torch.func calls it on tensors of its own.
        if t.requires_grad and id(t) not in gradients:
            raise NotImplementedError(
                f"what {w.name} does cannot be captured, called inside of torch.func or of a checkpoint: leave it "
                "out of the method's modules, or switch that off"
            )
        rows = [torch.zeros_like(t) if g is None else g for g in gradients.get(id(t), [None] * c)]
        return torch.stack([row.reshape(-1, row.shape[-1]) for row in rows]).to(dtype)

    weight, bias = matrix_of(w.module)
    reads_rows = isinstance(w.module, nn.Embedding)
    r = weight.shape[1 if reads_rows else 0]
    xs, ys, gs, backs = [], [], [], []
    for x, y in w.calls:
        y_ = y.detach().reshape(-1, y.shape[-1])
        if y.shape[-1] != r or (x is not None and x.numel() // x.shape[-1] != len(y_)):
            raise NotImplementedError(
                f"{w.name} turns {None if x is None else tuple(x.shape)} into {tuple(y.shape)} and not each token into "
                f"one of {r} numbers, so that no adapter can stand beside it: leave it out of the method's modules"
            )
        g = at(y)
        real = not_zero(g).view(c, -1).any(dim=0).nonzero().flatten()
        gs.append(g.index_select(1, real))
        ys.append(y_.index_select(0, real).to(dtype))
        if x is not None:
            xs.append(x.detach().reshape(-1, x.shape[-1]).index_select(0, real).to(dtype))
            backs.append(at(x).index_select(1, real))
    empty = weight.new_zeros(0, r, dtype=dtype)
    y, g = (torch.cat(ys), torch.cat(gs, dim=1)) if ys else (empty, empty.expand(c, 0, r))
    x = back = None
    if not reads_rows:
        s = weight.shape[1]
        x = torch.cat(xs) if xs else weight.new_zeros(0, s, dtype=dtype)
        if not _only_multiplies(x, y, weight, bias):
            back = torch.cat(backs, dim=1) if backs else x.expand(c, 0, s)
    return _Record(x, y, g, back, _read(w, gradients, dtype, c))


def _only_multiplies(x: Tensor, y: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Whether y = W x + b, to rounding."""
    if not weight.is_floating_point() or x.shape[-1] != weight.shape[1]:
        return False
    weight, bias = weight.to(x.dtype), None if bias is None else bias.to(x.dtype)
    sizes = nn.functional.linear(x.abs(), weight.abs(), None if bias is None else bias.abs())
    error = (nn.functional.linear(x, weight, bias) - y).abs()
    return bool((error <= _ROUNDING * torch.finfo(y.dtype).eps * sizes).all())


def _read(w: _Watched, gradients: Mapping[int, list[Tensor | None]], dtype: torch.dtype, c: int) -> Tensor | None:
    """sum_k (df/dW_jk) W_jk + (df/db_j) b_j, ``(c, r)``, over what the model reads outside of the layer's calls.

    Returns None if it reads nothing.

    Raises:
        NotImplementedError: it reads another parameter of the layer.
    """
    used = {key: p for key, p in w.copies.items() if any(g is not None for g in gradients[id(p)])}
    if not used:
        return None
    products = []
    for (owner, name), p in used.items():
        if owner is not w.module or name not in ("weight", "bias"):
            raise NotImplementedError(
                f"the model computes with {name} of {w.name} outside of that layer's calls, where no adapter can "
                "stand: leave the layer out of the method's modules, or take ntk.empirical_ntk of the adapted model"
            )
        rows = torch.stack([torch.zeros_like(p) if g is None else g for g in gradients[id(p)]]).to(dtype)
        product = rows * p.detach().to(dtype)
        if name == "weight":
            product = product.sum(dim=2 if isinstance(w.module, nn.Linear) else 1)
        products.append(product)
    return sum(products[1:], start=products[0])


def _joined(name: str, module: nn.Module, records: Sequence[_Record], is_read: bool) -> Layer:
    """The layer on all examples of one side; ``is_read`` if the model reads its weight, for an example of either."""
    weight, bias = matrix_of(module)
    g = torch.cat([p.g for p in records], dim=1)
    counts = torch.tensor([p.g.shape[1] for p in records], device=g.device)
    tokens = Tokens(len(records), torch.arange(len(records), device=g.device).repeat_interleave(counts))
    read = None
    if is_read:
        zeros = g.new_zeros(len(g), g.shape[-1])
        read = torch.stack([zeros if p.read is None else p.read for p in records])
    y = torch.cat([p.y for p in records])
    if isinstance(module, nn.Embedding):
        ids = torch.full((g.shape[1],), -1, device=g.device)
        return Layer(name, weight, bias, None, y, Lookup(ids, g, tokens), weighed=False, read=read)
    x = torch.cat([p.x for p in records if p.x is not None])
    back = None
    if any(p.at_inputs is not None and p.g.shape[1] for p in records):
        matrix = weight.to(g.dtype)
        back = torch.cat([p.g @ matrix if p.at_inputs is None else p.at_inputs for p in records], dim=1)
    return Layer(name, weight, bias, x, y, Outer(x, g, tokens), weighed=False, at_inputs=back, read=read)


@contextmanager
def _watching(layers: Mapping[str, nn.Module]) -> Iterator[list[_Watched]]:
    """Record what layers are given and return; outside of their calls the model reads copies of their parameters."""
    watched = [_Watched(name, module) for name, module in layers.items()]
    hooks = []
    own = {key: p for w in watched for key, p in _parameters(w.module).items()}
    try:
        for w in watched:
            inside = {key: own[key] for key in _parameters(w.module)}
            w.copies = {key: nn.Parameter(p.detach(), requires_grad=p.is_floating_point()) for key, p in inside.items()}
            _put(w.copies)
            hooks.append(w.module.register_forward_pre_hook(partial(_enter, w, inside), with_kwargs=True))
            hooks.append(w.module.register_forward_hook(partial(_leave, w)))
        for w in watched:
            w.copies = {key: p for key, p in w.copies.items() if p.requires_grad}
        yield watched
    finally:
        for hook in hooks:
            hook.remove()
        _put(own)


_Parameters = Mapping[tuple[nn.Module, str], nn.Parameter]  # by their owner and their name in it


def _parameters(module: nn.Module) -> _Parameters:
    return {(m, name): p for m in module.modules() for name, p in m._parameters.items() if p is not None}


def _put(parameters: _Parameters) -> None:
    for (owner, name), p in parameters.items():
        owner._parameters[name] = p


def _enter(w: _Watched, inside: _Parameters, module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
    _put(inside)
    if isinstance(module, nn.Embedding):
        w.calls.append((None, torch.empty(0)))
        return args, kwargs
    key = next((k for k, v in (*enumerate(args), *kwargs.items()) if isinstance(v, Tensor)), None)
    if key is None:
        raise NotImplementedError(f"{w.name} is called without a tensor: leave it out of the method's modules")
    x = args[key] if isinstance(key, int) else kwargs[key]
    x = (x if x.requires_grad else x.detach().requires_grad_()).clone()  # each call has a tensor of its own
    w.calls.append((x, torch.empty(0)))
    if isinstance(key, int):
        return (*args[:key], x, *args[key + 1 :]), kwargs
    return args, kwargs | {key: x}


def _leave(w: _Watched, module: nn.Module, args: tuple, output: Any) -> Tensor:
    _put(w.copies)
    if not isinstance(output, Tensor) or not output.is_floating_point():
        raise NotImplementedError(
            f"{w.name} returns {type(output).__name__} and not a tensor of numbers, so that no adapter can stand "
            "beside it: leave it out of the method's modules"
        )
    y = output if output.requires_grad else output.detach().requires_grad_()
    w.calls[-1] = (w.calls[-1][0], y)
    return y.clone()  # the model may write into its output, and must not change the tensor that is kept
