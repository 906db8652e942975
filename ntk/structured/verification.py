"""Captured features against ordinary gradients, before a kernel is computed from them.

The captured features of one or two examples are compared with the gradients of ordinary passes, each example alone and
unpadded. A parameter is refused if its features do not add up to its gradient, or if a gradient reaches it by a way
that was not captured. The same passes measure what the computation of the kernel will take.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from ntk.features import Feature, subtract
from ntk.functional import Leaves, batch_of, call
from ntk.inputs import Group, pad_together, padding_token
from ntk.reference import SHARE, accumulation_dtype, tolerance
from ntk.request import Request
from ntk.structured.capture import WHOLE, Segment
from ntk.structured.dependence import Origin
from ntk.structured.memory import Cost, charge, cost_of, measured
from ntk.structured.passes import Pass, run
from ntk.structured.targets import Targets
from ntk.structured.work import Work, work_of

# The cost of a batch beside its tokens, in tokens: on a processor, and on an accelerator, which waits for the launches
# of a small batch.
_OVERHEAD, _OVERHEAD_OF_LAUNCHES = 48, 2048
_MISMATCH = "its features do not add up to its gradient"


@dataclass
class Plan:
    """What the comparison showed.

    Attributes:
        outputs: c.
        rounding: the machine epsilon of the least precise tensor in the model's computation.
        padding: the token id that fills up the shorter examples of a batch. None if examples of different lengths must
            not run together: padding would change the outputs, or it would show in the rounding of a model of high
            precision that sums over tokens in a lower one.
        largest: the most examples that the model takes at once.
        reads: values of attention masks, as a forward pass of a batch reads them, with which examples were compared.
        uncaptured: parameter name -> why the reference has to take it.
        costs: of each mixing operation, in their order.
        checked: the batch that was compared, and its examples alone.
        works: what each use of a parameter costs on that batch.
    """

    outputs: int
    device: torch.device
    dtype: torch.dtype
    rounding: float = 0.0
    padding: int | None = None
    largest: int | None = None
    reads: set[tuple] = field(default_factory=lambda: {()})
    uncaptured: dict[str, str] = field(default_factory=dict)
    costs: list[Cost] = field(default_factory=list)
    checked: tuple[Group, list[Group]] | None = None
    works: list[Work] = field(default_factory=list)


def check_together(request: Request, leaves: Leaves, targets: Targets) -> Plan:
    """Find out how examples can run together: padded if that is right for every parameter, else at equal lengths."""
    groups = [*request.rows, *request.columns]
    padding = padding_token(request.model)
    shortest = sorted(groups, key=lambda group: group.length)
    plan = None
    if padding is not None and len(shortest) > 1:
        pair = [shortest[0].take(slice(0, 1)), shortest[1].take(slice(0, 1))]
        together = pad_together(pair, padding)
        if len(together) == 1:
            plan = compare(request, leaves, targets, together[0], pair)
            plan.padding = padding if plan.rounding <= torch.finfo(plan.dtype).eps else None
            if plan.padding is not None and not plan.uncaptured:
                return plan
    # A rule that takes one example for another shows on two examples, not on one.
    group = max(groups, key=lambda g: (min(2, len(g.indices)), -g.length)).take(slice(0, 2))
    try:
        single = [group.take(slice(i, i + 1)) for i in range(len(group.indices))]
        exact = compare(request, leaves, targets, group, single)
    except ValueError:
        if len(group.indices) == 1:
            raise
        # Some models refuse several examples at once where one is fine (decoders that know no padding token).
        return check_alone(request, leaves, targets)
    return exact if plan is None or plan.padding is None or len(exact.uncaptured) < len(plan.uncaptured) else plan


def check_alone(request: Request, leaves: Leaves, targets: Targets) -> Plan:
    """Find out which parameters can be captured if every example runs alone."""
    example = min([*request.rows, *request.columns], key=lambda group: group.length).take(slice(0, 1))
    plan = compare(request, leaves, targets, example, [example])
    plan.largest = 1
    return plan


def batches(plan: Plan, groups: list[Group], most_tokens: int) -> list[Group]:
    """Groups of similar length as batches that run together, cut to ``most_tokens``, which fit in memory."""
    if plan.padding is not None:
        overhead = _OVERHEAD if plan.device.type == "cpu" else _OVERHEAD_OF_LAUNCHES
        groups = pad_together(groups, plan.padding, overhead=overhead)
    result = []
    for group in groups:
        size = max(1, most_tokens // group.length)
        size = min(size, plan.largest or size)
        result += [group.take(slice(i, i + size)) for i in range(0, len(group.indices), size)]
    return result


def check_batch(
    request: Request, leaves: Leaves, targets: Targets, plan: Plan, done: Pass, batch: Group, *, largest: bool
) -> None:
    """Make sure that the batch gave each example what the example gives alone.

    Operation by operation the pass has shown that no example depends on another. What remains is how the forward
    pass depends on the padding, which two examples show for every way that it takes, and on the number of examples,
    which one example of the largest batch shows.

    Raises:
        NotImplementedError: it may not have; the message says why.
    """
    if done.values is None or len(batch.indices) == 1:
        return
    if done.mixing is not None:
        raise NotImplementedError(done.mixing)
    if done.reads not in plan.reads:
        _check_reads(request, leaves, targets, plan, done.reads, batch)
    if largest:
        check_outputs(request, batch, done.values, plan)


def _check_reads(request: Request, leaves: Leaves, targets: Targets, plan: Plan, reads: tuple, batch: Group) -> None:
    """Compare two examples with the same examples alone, after a forward pass that read new values of masks."""
    shortest, *_, longest = sorted((batch.alone(i) for i in range(len(batch.indices))), key=lambda one: one.length)
    pair = pad_together([shortest, longest], plan.padding or 0)
    if len(pair) == 1:
        other = compare(request, leaves, targets, pair[0], [shortest, longest])
        if not other.uncaptured.keys() - plan.uncaptured.keys():
            plan.reads |= other.reads
    if reads not in plan.reads:
        raise NotImplementedError("its forward pass reads the padding of the whole batch, and may branch on it")


def check_outputs(request: Request, group: Group, values: Tensor, plan: Plan) -> None:
    """Compare the outputs ``(n, c)`` of a batch with those of its shortest example, alone.

    Raises:
        NotImplementedError: they differ, so that the model's outputs depend on how many examples there are.
    """
    single = [group.alone(i) for i in range(len(group.indices))]
    position = min(range(len(single)), key=lambda i: single[i].length)
    expected = call(request.model, request.output, batch_of(single[position]), 1)[0]
    difference = values[position].to(expected) - expected
    allowed = tolerance(plan.rounding) * max(float(expected.norm()), float(values.norm(dim=1).max()))
    if not float(difference.norm()) <= allowed:
        raise NotImplementedError("its outputs depend on the number of examples")


def compare(
    request: Request,
    leaves: Leaves,
    targets: Targets,
    group: Group,
    single: list[Group],
    segments: Sequence[Segment] = (WHOLE,),
) -> Plan:
    """Compare the captured features of a group of one or two examples with ordinary gradients, of each example alone.

    ``single`` holds the same examples, each alone; the segments cover the model, from the last to the first.
    """
    first = next(iter(leaves.values()))
    plan = Plan(0, first.device, accumulation_dtype(leaves), torch.finfo(first.dtype).eps, checked=(group, single))
    n, tokens = len(group.indices), len(group.indices) * group.length
    real = sum(len(g.indices) * g.length for g in single)  # padding leaves no features
    remainders: dict[str, Tensor] = {}  # what the features leave of the gradients
    norms: dict[str, float] = {}
    weights = torch.zeros(())
    above: dict[Origin, Tensor] | None = None
    buffers: set[int] = set()
    shared: set[int] = set()
    for segment in segments:
        alive: list[Feature] = []  # so that no two tensors are seen at one address
        observe = partial(measured, leaves=leaves, costs=plan.costs, tokens=tokens)
        done = run(request, leaves, group, targets.watched, segment, above, observe)
        above, capture = done.below, done.capture
        if done.mixing is not None:
            plan.uncaptured = dict.fromkeys(leaves, done.mixing)
            return plan
        plan.reads.add(done.reads)
        plan.uncaptured.update(done.missed)
        plan.rounding = max(plan.rounding, capture.coarsest)
        if not plan.outputs:
            plan.outputs = capture.outputs
            weights = torch.randn(n, plan.outputs, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
            weights = weights.to(first.device)
            remainders = _ordinary_gradients(request, leaves, single, weights)
            norms = {name: float(gradient.norm()) for name, gradient in remainders.items()}
        for use in capture.uses:
            for held in use.received.by_output.values() if use.received else ():
                if held.data_ptr() not in buffers:
                    buffers.add(held.data_ptr())
                    cost_of(plan.costs, use.number).graph += held.nbytes / tokens
        for captured in done.features():
            remainder = remainders.get(captured.name)
            if remainder is None:
                remainder = torch.zeros_like(leaves[captured.name])
            remainders[captured.name] = subtract(captured.feature, weights, remainder)
            cost = cost_of(plan.costs, captured.use.number)
            cost.names.add(captured.name)
            plan.works.append(work_of(captured, leaves[captured.name].shape))
            if captured.output is not None:
                cost.graph += captured.output.nbytes / tokens
            for contribution in targets.contributions(captured, remainder.shape):
                alive.append(contribution.feature)
                charge(cost, contribution.feature, n, real, shared)
    everything = sum(norm**2 for norm in norms.values()) ** 0.5
    for name, remainder in remainders.items():
        # A feature that is missing or misplaced is off by its own size.
        if not float(remainder.norm()) <= tolerance(plan.rounding) * (norms.get(name, 0.0) + SHARE * everything):
            plan.uncaptured.setdefault(name, _MISMATCH)
    if n > 1 and _MISMATCH in plan.uncaptured.values():
        # Examples that change one another's outputs may leave some features right on these two, and on no others.
        plan.uncaptured = dict.fromkeys(leaves, _MISMATCH) | plan.uncaptured
    return plan


def _ordinary_gradients(request: Request, leaves: Leaves, single: list[Group], weights: Tensor) -> dict[str, Tensor]:
    """Gradients of sum_ia weights[i, a] f_a(x_i), by the name of every parameter that has one."""
    with torch.enable_grad(), _SparseRows(leaves):
        total = torch.zeros((), device=weights.device)
        for example, weight in zip(single, weights, strict=True):
            values = call(request.model, request.output, batch_of(example), 1)
            total = total + (values[0] * weight.to(values)).sum()
        if not total.requires_grad:
            return {}
        gradients = torch.autograd.grad(total, list(leaves.values()), allow_unused=True)
    return {
        name: g.coalesce() if g.is_sparse else g.contiguous()
        for name, g in zip(leaves, gradients, strict=True)
        if g is not None
    }


class _SparseRows(TorchFunctionMode):
    """Keeps an embedding's gradient as the rows that were read, where torch can: filling a whole table takes long."""

    def __init__(self, leaves: Leaves):
        super().__init__()
        self._tables = {id(p) for p in leaves.values()}

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        reads_table = func is torch.nn.functional.embedding and len(args) == 2 and id(args[1]) in self._tables
        if reads_table and not (kwargs.get("max_norm") or kwargs.get("scale_grad_by_freq")):
            kwargs = kwargs | {"sparse": True}
        return func(*args, **kwargs)
