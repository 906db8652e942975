"""What layers are given, return and get back when a model calls them: the reference for adapters.

Examples run one at a time, and autograd alone says the gradients at what a layer returned and at what it was given. So
it does not matter what the layer does, whether its output has an axis of examples, who writes into that output, or how
many layers share a weight. Where the model reads a layer's weight or bias outside of the layer's calls, it finds a
tensor of that layer's own, with its own gradient.

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

from ntk import inputs as _inputs
from ntk.adapters import Layer, Method, matrix_of
from ntk.features import Feature, Lookup, Outer
from ntk.functional import call, first_line, is_encoder_decoder
from ntk.inputs import Group, Inputs
from ntk.jacobian import default_memory_budget, gigabytes
from ntk.layout import Layout
from ntk.outputs import Output
from ntk.structured.gram import gram
from ntk.structured.passes import batch_of, length, requiring_gradients
from ntk.tokens import Tokens, not_zero

# Of a layer that only multiplies by its weight, outputs differ from W x + b by no more machine epsilons than this.
_ROUNDING = 64


@dataclass
class _Parts:
    """What one example leaves at a layer: ``(N, s)``, ``(N, r)``, ``(c, N, r)``, ``(c, N, s)`` and ``(c, r)``."""

    x: Tensor | None
    y: Tensor
    g: Tensor
    at_inputs: Tensor | None
    read: Tensor | None

    @property
    def size(self) -> int:
        """Bytes."""
        return sum(t.numel() * t.element_size() for t in vars(self).values() if t is not None)


@dataclass
class _Watched:
    """A layer while one example runs.

    Attributes:
        calls: what it was given (None for an embedding) and returned, in each call.
        apart: its parameters as the model finds them outside of its calls: (owner, name) -> that tensor.
    """

    name: str
    module: nn.Module
    calls: list[tuple[Tensor | None, Tensor]] = field(default_factory=list)
    apart: dict[tuple[nn.Module, str], nn.Parameter] = field(default_factory=dict)


def adapter_kernels(
    model: nn.Module,
    inputs: Inputs,
    inputs2: Inputs | None,
    *,
    layers: Mapping[str, nn.Module],
    methods: Mapping[str, Method],
    output: Output | None,
    layout: Layout,
    memory_budget: int | float | None,
) -> tuple[dict[str, Tensor], set[str]]:
    """The kernels of what methods add to layers, ``{method: (n1, n2, ...)}``; of methods that stand at one of them.

    Args:
        model: in evaluation mode.
        inputs: as in :func:`ntk.empirical_ntk`.
        inputs2: likewise.
        layers: by the names of their modules.
        methods: by name.
        output: as in :func:`ntk.empirical_ntk`.
        layout: what becomes of the outputs.
        memory_budget: bytes, likewise.

    Returns:
        The kernels, and the layers whose weight the model reads outside of their calls, where methods other than those
        with `in_reads` do not act.

    Raises:
        NotImplementedError: a layer returns no tensor, or is no layer of tokens; names it.
        MemoryError: one layer's inputs, outputs and gradients do not fit, with the size needed.
    """
    sides = [_examples(model, each) for each in (inputs, inputs2) if each is not None]
    n1, n2 = len(sides[0]), len(sides[-1])
    longest = max((example for side in sides for example in side), key=length)
    with requiring_gradients(model, []):
        first = _run(model, output, longest, layers)
        c = next(iter(first.values())).g.shape[0]
        dtype = next(iter(first.values())).g.dtype
        device = next(iter(first.values())).g.device
        budget = default_memory_budget(device) if memory_budget is None else memory_budget
        room = budget - (len(methods) + 2) * n1 * n2 * layout.size(c) * dtype.itemsize
        sizes = {name: parts.size * sum(map(len, sides)) for name, parts in first.items()}
        if (most := max(sizes.values())) > room:
            name = max(sizes, key=lambda name: sizes[name])
            raise MemoryError(
                f"the inputs, outputs and gradients of {name} on all {sum(map(len, sides))} examples need "
                f"{gigabytes(budget - room + most)} but memory_budget is {gigabytes(budget)}: raise memory_budget, or "
                "use fewer examples"
            )
        del first
        kernels: dict[str, Tensor] = {}
        read: set[str] = set()
        for names in _batches(sizes, room):
            chosen = {name: layers[name] for name in names}
            found = [[_run(model, output, example, chosen) for example in side] for side in sides]
            for name in names:
                joined = [_joined(name, layers[name], [parts.pop(name) for parts in side]) for side in found]
                if any(layer.read is not None for layer in joined):
                    read.add(name)
                    joined = [_with_read(layer, c) for layer in joined]
                for key, method in methods.items():
                    if method.adapts(name):
                        zeros = torch.zeros(n1, n2, *layout.shape(c), dtype=dtype, device=device)
                        for kernel in _kernels(method, joined, layout):
                            kernels[key] = kernels.setdefault(key, zeros).add_(kernel)
                        kernels.setdefault(key, zeros)
    return kernels, read


def _kernels(method: Method, layers: Sequence[Layer], layout: Layout) -> Iterator[Tensor]:
    """What each parameter that a method adds to one layer has for a kernel."""
    split = layers[0].feature.tokens.n if len(layers) > 1 else None
    for pieces in zip(*(method.features(layer) for layer in layers), strict=True):
        features: list[list[Feature]] = [[feature] for _, _, feature in pieces]
        if all(isinstance(f, Outer | Lookup) and not f.g.shape[1] for (f,) in features):
            continue  # never called
        yield layout.kernel(gram(features, pieces[0][1], split, layout), layers[0].feature.shape[1])


def _with_read(layer: Layer, c: int) -> Layer:
    """The layer with zeros for reads that no example did."""
    if layer.read is not None:
        return layer
    zeros = layer.y.new_zeros(layer.feature.tokens.n, c, layer.y.shape[-1])
    return Layer(**{**{name: getattr(layer, name) for name in Layer.__dataclass_fields__}, "read": zeros})


def _examples(model: nn.Module, inputs: Inputs) -> list[Group]:
    """Each alone, in their order."""
    groups = _inputs.group_examples(inputs, encoder_decoder=is_encoder_decoder(model))
    found = {i: group.take(slice(k, k + 1)) for group in groups for k, i in enumerate(group.indices)}
    return [found[i] for i in sorted(found)]


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


def _run(model: nn.Module, output: Output | None, example: Group, layers: Mapping[str, nn.Module]) -> dict[str, _Parts]:
    """What one example leaves at each layer, or in one line why that is not known."""
    try:
        return _followed(model, output, example, layers)
    except (ValueError, NotImplementedError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        raise NotImplementedError(
            f"what this model's layers do cannot be captured ({first_line(error)}): wrap the model by peft, and take "
            "empirical_ntk(..., params='trainable') of that"
        ) from error


def _followed(
    model: nn.Module, output: Output | None, example: Group, layers: Mapping[str, nn.Module]
) -> dict[str, _Parts]:
    with torch.enable_grad(), _watching(layers) as watched:
        values = call(model, output, batch_of(example), 1)[0]
        found: dict[str, _Parts] = {}
        tensors = [t for w in watched for t in (*(t for pair in w.calls for t in pair), *w.apart.values())]
        targets = [t for t in tensors if t is not None and t.requires_grad]  # not what a model computes under no_grad
        rows: list[Sequence[Tensor | None]] = []
        for a in range(len(values)):
            if values.requires_grad and targets:
                rows.append(torch.autograd.grad(values[a], targets, retain_graph=True, allow_unused=True))
            else:
                rows.append([None] * len(targets))
        gradients = {id(t): [row[i] for row in rows] for i, t in enumerate(targets)}
        for w in watched:
            found[w.name] = _parts(w, gradients, len(values), torch.promote_types(values.dtype, torch.float32))
    return found


def _parts(w: _Watched, gradients: Mapping[int, list[Tensor | None]], c: int, dtype: torch.dtype) -> _Parts:
    def at(t: Tensor) -> Tensor:
        """(c, N, d): the gradients at a tensor of tokens."""
        if t.requires_grad and id(t) not in gradients:  # called again by the backward pass, or on torch.func's tensors
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
    return _Parts(x, y, g, back, _read(w, gradients, dtype, c))


def _only_multiplies(x: Tensor, y: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Whether y = W x + b, to rounding."""
    if not weight.is_floating_point() or x.shape[-1] != weight.shape[1]:
        return False
    weight, bias = weight.to(x.dtype), None if bias is None else bias.to(x.dtype)
    sizes = nn.functional.linear(x.abs(), weight.abs(), None if bias is None else bias.abs())
    error = (nn.functional.linear(x, weight, bias) - y).abs()
    return bool((error <= _ROUNDING * torch.finfo(y.dtype).eps * sizes).all())


def _read(w: _Watched, gradients: Mapping[int, list[Tensor | None]], dtype: torch.dtype, c: int) -> Tensor | None:
    """(c, r): sum_k (df/dW_jk) W_jk + (df/db_j) b_j over what the model reads outside of the layer's calls.

    None if it reads nothing.

    Raises:
        NotImplementedError: it reads something else of the layer.
    """
    used = {key: p for key, p in w.apart.items() if any(g is not None for g in gradients[id(p)])}
    if not used:
        return None
    total: Tensor | int = 0
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
        total = total + product
    assert isinstance(total, Tensor)
    return total


def _joined(name: str, module: nn.Module, parts: Sequence[_Parts]) -> Layer:
    """The layer on all examples of one side."""
    weight, bias = matrix_of(module)
    g = torch.cat([p.g for p in parts], dim=1)
    counts = torch.tensor([p.g.shape[1] for p in parts], device=g.device)
    tokens = Tokens(len(parts), torch.arange(len(parts), device=g.device).repeat_interleave(counts))
    read = None
    if any(p.read is not None for p in parts):
        zeros = g.new_zeros(len(g), g.shape[-1])
        read = torch.stack([zeros if p.read is None else p.read for p in parts])
    y = torch.cat([p.y for p in parts])
    if isinstance(module, nn.Embedding):
        ids = torch.full((g.shape[1],), -1, device=g.device)
        return Layer(name, weight, bias, None, y, Lookup(ids, g, tokens), weighed=False, read=read)
    x = torch.cat([p.x for p in parts if p.x is not None])
    back = None
    if any(p.at_inputs is not None and p.g.shape[1] for p in parts):
        matrix = weight.to(g.dtype)
        back = torch.cat([p.g @ matrix if p.at_inputs is None else p.at_inputs for p in parts], dim=1)
    return Layer(name, weight, bias, x, y, Outer(x, g, tokens), weighed=False, at_inputs=back, read=read)


@contextmanager
def _watching(layers: Mapping[str, nn.Module]) -> Iterator[list[_Watched]]:
    """Note what layers are given and return, and set apart what the model reads of them outside of their calls."""
    watched = [_Watched(name, module) for name, module in layers.items()]
    hooks = []
    own = [(owner, name, p) for w in watched for owner, name, p in _parameters(w.module)]
    try:
        for w in watched:
            for owner, name, p in _parameters(w.module):
                w.apart[owner, name] = nn.Parameter(p.detach(), requires_grad=p.is_floating_point())
            _put(w.apart)
            inside = {(owner, name): p for owner, name, p in own if (owner, name) in w.apart}
            hooks.append(w.module.register_forward_pre_hook(partial(_enter, w, inside), with_kwargs=True))
            hooks.append(w.module.register_forward_hook(partial(_leave, w)))
        for w in watched:
            w.apart = {key: p for key, p in w.apart.items() if p.requires_grad}
        yield watched
    finally:
        for hook in hooks:
            hook.remove()
        for owner, name, p in own:
            owner._parameters[name] = p


def _parameters(module: nn.Module) -> list[tuple[nn.Module, str, nn.Parameter]]:
    return [(m, name, p) for m in module.modules() for name, p in m._parameters.items() if p is not None]


def _put(parameters: Mapping[tuple[nn.Module, str], nn.Parameter]) -> None:
    for (owner, name), p in parameters.items():
        owner._parameters[name] = p


def _enter(
    w: _Watched, inside: Mapping[tuple[nn.Module, str], nn.Parameter], module: nn.Module, args: tuple, kwargs: dict
) -> tuple[tuple, dict]:
    _put(inside)
    if isinstance(module, nn.Embedding):
        w.calls.append((None, torch.empty(0)))
        return args, kwargs
    key = next((k for k, v in (*enumerate(args), *kwargs.items()) if isinstance(v, Tensor)), None)
    if key is None:
        raise NotImplementedError(f"{w.name} is called without a tensor: leave it out of the method's modules")
    x = args[key] if isinstance(key, int) else kwargs[key]
    x = (x if x.requires_grad else x.detach().requires_grad_()).clone()  # a tensor of this call's own
    w.calls.append((x, torch.empty(0)))
    if isinstance(key, int):
        return (*args[:key], x, *args[key + 1 :]), kwargs
    return args, kwargs | {key: x}


def _leave(w: _Watched, module: nn.Module, args: tuple, output: Any) -> Tensor:
    _put(w.apart)
    if not isinstance(output, Tensor) or not output.is_floating_point():
        raise NotImplementedError(
            f"{w.name} returns {type(output).__name__} and not a tensor of numbers, so that no adapter can stand "
            "beside it: leave it out of the method's modules"
        )
    y = output if output.requires_grad else output.detach().requires_grad_()
    w.calls[-1] = (w.calls[-1][0], y)
    return y.clone()  # what the model writes into the output does not reach the tensor that is kept
