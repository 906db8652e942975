"""What a model's structured kernel will take, found on one or two examples, and whether it will be right.

Nothing is taken on trust: the captured features are compared with the gradients of ordinary passes, each example alone
and unpadded. A parameter whose features do not add up, or which a gradient reaches by a way that was not captured, is
refused.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ntk import inputs as _inputs
from ntk.features import Feature, subtract
from ntk.functional import call
from ntk.inputs import Group
from ntk.outputs import Output
from ntk.structured.capture import Place
from ntk.structured.memory import Cost, charge, cost_of, measured
from ntk.structured.passes import WHOLE, Leaves, Pass, Segment, alone, batch_of, length
from ntk.structured.targets import Wanted

# How far, in units of the machine epsilon, the sum of captured features may be from an ordinary gradient. Both sum the
# same few thousand terms in another order; a feature that is missing or misplaced is off by its own size.
_ROUNDING = 2e3
# Half precision rounds so coarsely that only this is told from a mistake.
_COARSE = 0.05
# A parameter's own gradient may vanish but for rounding (a key's bias); then this share of all gradients counts.
_SHARE = 1e-2
_MISMATCH = "its features do not add up to its gradient"


@dataclass
class Plan:
    """What the check found.

    Attributes:
        outputs: c.
        rounding: the machine epsilon of the least precise tensor in the model's computation.
        padding: token id that fills up the shorter examples of a batch; None where lengths must not be mixed: where
            padding would change the outputs, or would show in the rounding of a model of high precision that sums over
            tokens in a lower one.
        largest: most examples that the model takes at once.
        reads: values of attention masks, as a forward pass of a batch reads them, with which examples were compared.
        refused: parameter name -> why the reference has to take it.
        costs: of each mixing operation, in their order.
        checked: the batch it was found on, and its examples alone.
    """

    outputs: int
    device: torch.device
    dtype: torch.dtype
    rounding: float = 0.0
    padding: int | None = None
    largest: int | None = None
    reads: set[tuple] = field(default_factory=lambda: {()})
    refused: dict[str, str] = field(default_factory=dict)
    costs: list[Cost] = field(default_factory=list)
    checked: tuple[Group, list[Group]] | None = None


def check_together(
    model: nn.Module, output: Output | None, leaves: Leaves, groups: list[Group], wanted: Wanted
) -> Plan:
    """Find out how examples can run together: padded if that is right for every parameter, else at equal lengths."""
    padding = _inputs.padding_token(model)
    shortest = sorted(groups, key=length)
    plan = None
    if padding is not None and len(shortest) > 1:
        pair = [shortest[0].take(slice(0, 1)), shortest[1].take(slice(0, 1))]
        together = _inputs.pad_together(pair, padding)
        if len(together) == 1:
            plan = compare(model, output, leaves, wanted, together[0], pair)
            plan.padding = padding if plan.rounding <= torch.finfo(plan.dtype).eps else None
            if plan.padding is not None and not plan.refused:
                return plan
    # Two examples show, where one cannot, a rule that mistakes one for the other.
    group = max(groups, key=lambda g: (min(2, len(g.indices)), -length(g))).take(slice(0, 2))
    try:
        single = [group.take(slice(i, i + 1)) for i in range(len(group.indices))]
        exact = compare(model, output, leaves, wanted, group, single)
    except ValueError:
        if len(group.indices) == 1:
            raise
        # Some models refuse several examples at once where one is fine (decoders that know no padding token).
        return check_alone(model, output, leaves, groups, wanted)
    return exact if plan is None or plan.padding is None or len(exact.refused) < len(plan.refused) else plan


def check_alone(model: nn.Module, output: Output | None, leaves: Leaves, groups: list[Group], wanted: Wanted) -> Plan:
    """Find out which parameters can be captured if every example runs alone."""
    example = min(groups, key=length).take(slice(0, 1))
    plan = compare(model, output, leaves, wanted, example, [example])
    plan.largest = 1
    return plan


def check_one(model: nn.Module, output: Output | None, group: Group, values: Tensor, plan: Plan) -> None:
    """Compare the outputs ``(n, c)`` of a batch with those of its shortest example, alone.

    Raises:
        NotImplementedError: they differ, so that the model's outputs depend on how many examples there are.
    """
    single = [alone(group, i) for i in range(len(group.indices))]
    position = min(range(len(single)), key=lambda i: length(single[i]))
    expected = call(model, output, batch_of(single[position]), 1)[0]
    difference = values[position].to(expected) - expected
    tolerance = min(_ROUNDING * plan.rounding, _COARSE) * max(float(expected.norm()), float(values.norm(dim=1).max()))
    if not float(difference.norm()) <= tolerance:
        raise NotImplementedError("its outputs depend on the number of examples")


def compare(
    model: nn.Module,
    output: Output | None,
    leaves: Leaves,
    wanted: Wanted,
    group: Group,
    single: list[Group],
    segments: Sequence[Segment] = (WHOLE,),
) -> Plan:
    """Compare the captured features of a group with ordinary gradients, of each example alone.

    Args:
        model: in evaluation mode.
        output: as in :func:`ntk.empirical_ntk`.
        leaves: the parameters to capture.
        wanted: what the features are for.
        group: one or two examples.
        single: the same, each alone.
        segments: cover the model, from the last to the first.
    """
    first = next(iter(leaves.values()))
    dtype = torch.float32
    for p in leaves.values():
        dtype = torch.promote_types(dtype, p.dtype)
    plan = Plan(0, first.device, dtype, torch.finfo(first.dtype).eps, checked=(group, single))
    n, tokens = len(group.indices), len(group.indices) * length(group)
    real = sum(len(g.indices) * length(g) for g in single)  # padding leaves no features
    gradients: dict[str, Tensor] = {}
    norms: dict[str, float] = {}
    weights = torch.zeros(())
    above: dict[Place, Tensor] | None = None
    buffers: set[int] = set()
    shared: set[int] = set()
    for segment in segments:
        alive: list[Feature] = []  # so that no two tensors are seen at one address
        observe = partial(measured, leaves=leaves, costs=plan.costs, tokens=tokens)
        done = Pass(model, output, leaves, group, segment, above, bool(wanted.methods), observe)
        above, capture = done.below, done.capture
        if done.mixing is not None:
            plan.refused = dict.fromkeys(leaves, done.mixing)
            return plan
        plan.reads.add(done.reads)
        plan.refused.update(done.missed)
        plan.rounding = max(plan.rounding, capture.coarsest)
        if not plan.outputs:
            plan.outputs = capture.outputs
            weights = torch.randn(n, plan.outputs, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
            weights = weights.to(first.device)
            gradients = _ordinary_gradients(model, output, leaves, single, weights)
            norms = {name: float(gradient.norm()) for name, gradient in gradients.items()}
        for use in capture.uses:
            for held in use.received.by_output.values() if use.received else ():
                if held.data_ptr() not in buffers:
                    buffers.add(held.data_ptr())
                    cost_of(plan.costs, use.number).graph += held.numel() * held.element_size() / tokens
        for found in done.features(leaves):
            left = gradients.get(found.name)
            if left is None:
                left = gradients[found.name] = torch.zeros_like(leaves[found.name])
            gradients[found.name] = subtract(found.feature, weights, left)
            cost = cost_of(plan.costs, found.number)
            cost.names.add(found.name)
            if found.output is not None:
                cost.graph += found.output.numel() * found.output.element_size() / tokens
            for piece in wanted.pieces(found, left.shape):
                alive.append(piece.feature)
                charge(cost, piece.feature, n, real, shared)
    everything = sum(norm**2 for norm in norms.values()) ** 0.5
    for name, left in gradients.items():
        tolerance = min(_ROUNDING * plan.rounding, _COARSE) * (norms.get(name, 0.0) + _SHARE * everything)
        if not float(left.norm()) <= tolerance and name not in plan.refused:
            plan.refused[name] = _MISMATCH
    if n > 1 and _MISMATCH in plan.refused.values():
        # Examples that change one another's outputs may leave some features right on these two, and on no others.
        plan.refused = dict.fromkeys(leaves, _MISMATCH) | plan.refused
    return plan


def _ordinary_gradients(
    model: nn.Module, output: Output | None, leaves: Leaves, single: list[Group], weights: Tensor
) -> dict[str, Tensor]:
    """Gradients of sum_ia weights[i, a] f_a(x_i), by the name of every parameter that has one."""
    with torch.enable_grad(), _SparseRows(leaves):
        total = torch.zeros((), device=weights.device)
        for example, weight in zip(single, weights, strict=True):
            values = call(model, output, batch_of(example), 1)
            total = total + (values[0] * weight.to(values)).sum()
        if not total.requires_grad:
            return {}
        found = torch.autograd.grad(total, list(leaves.values()), allow_unused=True)
    return {
        name: g.coalesce() if g.is_sparse else g.contiguous()
        for name, g in zip(leaves, found, strict=True)
        if g is not None
    }


class _SparseRows(TorchFunctionMode):
    """Embeddings keep their gradients as the rows that were read, where torch can: a whole table takes long to fill."""

    def __init__(self, leaves: Leaves):
        super().__init__()
        self._tables = {id(p) for p in leaves.values()}

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is torch.nn.functional.embedding and len(args) == 2 and id(args[1]) in self._tables:
            plain = {"max_norm": None, "scale_grad_by_freq": False}
            if all(not kwargs.get(key, default) for key, default in plain.items()):
                kwargs = kwargs | {"sparse": True}
        return func(*args, **kwargs)
