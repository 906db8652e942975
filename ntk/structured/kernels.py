"""The fast exact kernel: forward and backward passes of the model itself, and no Jacobian.

One forward pass and c backward passes under :class:`ntk.structured.capture.Capture` leave, for every use of a
parameter, what its tangent feature is made of: the inputs and output gradients of a matrix product (Novak et al. 2022,
"structured derivatives"; per-example gradients as in Goodfellow 2015). :func:`ntk.structured.gram.gram` contracts them.
It forms features slice by slice or not at all, whichever takes fewer multiplications. Examples of similar length run
together. Where the features of all parameters do not fit in memory at once, the passes go segment by segment, from the
outputs down.

:mod:`ntk.structured.independence` shows of each batch that every example gets what it gets alone. What that or
:mod:`ntk.structured.verification` refuses is tried once more with one example at a time, and goes to the reference
after that.
"""

import itertools
import logging
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor
from tqdm import tqdm

from ntk import reference
from ntk.counts import PASSES, note
from ntk.functional import Leaves, Parameters, first_line, requiring_gradients
from ntk.inputs import Group, tiles
from ntk.layout import mirrored
from ntk.request import Request
from ntk.structured.capture import Segment
from ntk.structured.dependence import Origin
from ntk.structured.gram import CHUNK, gram
from ntk.structured.memory import IN_PROGRESS, bytes_per_token, cut, least_room
from ntk.structured.merging import Pending, Vectors
from ntk.structured.passes import run
from ntk.structured.targets import Targets, parameter_kernels
from ntk.structured.verification import Plan, batches, check_alone, check_batch, check_together, compare
from ntk.structured.work import slow_parameters

logger = logging.getLogger(__name__)

# The fraction of a small budget for the temporaries of contractions.
_TEMPORARY = 0.1


def layer_kernels(request: Request, params: Parameters, *, summed: bool) -> dict[str, Tensor]:
    """As :func:`ntk.reference.layer_kernels`, which takes the parameters that cannot be captured.

    Cost and memory as :func:`kernels`.
    """
    captured: dict[str, Tensor] = {}
    try:
        captured, uncaptured = kernels(request, parameter_kernels(params, summed=summed))
    except ValueError as error:
        # The reference may work where the capture fails; a mistake of the caller's is an error there too.
        logger.info("not captured: all parameters (%s)", first_line(error))
        uncaptured = dict.fromkeys(params, first_line(error))
    if uncaptured:
        logger.info("by the reference instead: %s", ", ".join(uncaptured))
        request.reference.update(uncaptured)
        rest = reference.layer_kernels(request, {name: params[name] for name in uncaptured}, summed=summed)
        _add(captured, rest)
    return captured if summed else {name: captured[name] for name in params}


def kernels(request: Request, targets: Targets, *, signed: bool = False) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The target kernels as far as they can be captured, and the parameters that they lack, with the reasons.

    Cost: one forward and c backward passes, the contractions, and a check on two examples. Memory: the inputs and c
    output gradients of every captured use, on all examples. Where that exceeds the memory budget, S segments of the
    model take turns, at the cost of (S + 1) / 2 forward passes; where even one layer's do not fit, tiles of examples.

    With ``signed``, columns' features are replaced by their signs (:mod:`ntk.sign_gradient`); there are no tiles then.

    Raises:
        MemoryError: the memory budget is too small for two examples; says the least that is needed. With ``signed``,
            too small for all examples at once.
    """
    uncaptured = dict.fromkeys([*targets.weights, *targets.layers_of_weight], "")
    captured: dict[str, Tensor] = {}
    try:
        # Together, then one example at a time, where rows of different examples cannot be mistaken for one another.
        for check in (check_together, check_alone):
            with requiring_gradients(request.model, uncaptured) as leaves:
                plan = check(request, leaves, targets)
            names = [name for name in uncaptured if name not in plan.uncaptured]
            if names:
                with requiring_gradients(request.model, names) as leaves:
                    try:
                        budget, sides = request.budget(plan.device), (request.rows, request.columns)
                        _add(captured, _Tile(request, targets, leaves, plan, *sides, budget, signed).run())
                        taken = [work for work in plan.works if work.name in leaves]
                        request.slow.update(slow_parameters(taken))
                    except NotImplementedError as error:
                        plan.uncaptured = dict.fromkeys(uncaptured, str(error))
            uncaptured = plan.uncaptured
            if not uncaptured:
                break
            logger.info("not captured: %s", "; ".join(f"{name} ({why})" for name, why in uncaptured.items()))
        return captured, uncaptured
    except (ValueError, MemoryError):
        raise
    except Exception as error:  # the model cannot be captured, whatever the parameter
        own = isinstance(error, NotImplementedError) and "\n" not in str(error)
        why = str(error) if own else first_line(error)
        logger.info("not captured: all parameters (%s)", why)
        return {}, dict.fromkeys([*targets.weights, *targets.layers_of_weight], why)


def _add(kernels: dict[str, Tensor], more: Mapping[str, Tensor]) -> None:
    for name, kernel in more.items():
        kernels[name] = kernels[name].add_(kernel) if name in kernels else kernel


@dataclass
class _Tile:
    """The kernels of all captured parameters, over all examples or a tile of them.

    Attributes:
        rows: the examples of the rows, grouped.
        columns: the examples of the columns, grouped; none for a symmetric kernel.
        budget: bytes for everything here.
        signed: whether columns' features are replaced by their signs.
        held: bytes already held by the enclosing tiles.
        totals: kernel -> ``(k, n1 m, n2 m)``, the examples in the batches' order.
    """

    request: Request
    targets: Targets
    leaves: Leaves
    plan: Plan
    rows: list[Group]
    columns: list[Group]
    budget: float
    signed: bool
    held: float = 0.0
    totals: dict[str, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.layout = self.request.layout
        self.n1, self.n2 = (sum(len(g.indices) for g in groups) for groups in (self.rows, self.columns))
        self.size = self.n1, self.n2 or self.n1
        self.chunk = int(min(CHUNK, _TEMPORARY / 3 * self.budget / self.plan.dtype.itemsize))

    def run(self) -> dict[str, Tensor]:
        """What the captured parameters contribute to the target kernels."""
        groups = [*self.rows, *self.columns]
        tokens = sum(len(g.indices) * g.length for g in groups)
        room = self._room()
        segments = cut(self.plan.costs, tokens, self.n1 + self.n2, room * (1 - IN_PROGRESS)) if room > 0 else None
        if segments is None:
            return self._tiled()
        if len(segments) > 1:
            # A tensor that escapes the capture would not hand its gradient down from segment to segment.
            assert self.plan.checked is not None
            if compare(self.request, self.leaves, self.targets, *self.plan.checked, segments).uncaptured:
                raise NotImplementedError("the passes of this model cannot be cut into segments")
        heaviest = max(bytes_per_token(self.plan.costs, segment) for segment in segments)
        most = max(max(g.length for g in groups), int(room * IN_PROGRESS / max(1.0, heaviest)))
        rows, columns = (batches(self.plan, side, most) for side in (self.rows, self.columns))
        self._passes(segments, [*rows, *columns])
        kernels = {key: self._in_order(total, rows, columns) for key, total in self.totals.items()}
        self.totals.clear()
        captured = [name for name in self.leaves if name not in self.plan.uncaptured]  # A set has no order to repeat.
        for key in (key for name in captured for key in self.targets.weights.get(name, ())):
            if key not in kernels:
                kernels[key] = self._zeros()
        return kernels

    def _passes(self, segments: list[Segment], batches: list[Group]) -> None:
        """Run all batches over each segment, and contract the features of the parameters that are finished."""
        above: list[dict[Origin, Tensor] | None] = [None] * len(batches)
        pending: dict[str, dict[str, Pending]] = {}  # parameter of the model -> trained parameter -> features
        finished: set[str] = set()
        vectors = Vectors(self.chunk)
        layers = self.targets.watched
        largest = max(batches, key=lambda batch: len(batch.indices))
        disable = None if self.request.progress else True
        note(PASSES, "batches", len(batches))
        note(PASSES, "segments", len(segments))
        with tqdm(total=len(segments) * len(batches), desc="kernel passes", disable=disable, leave=False) as bar:
            for segment in segments:
                for i, batch in enumerate(batches):
                    done = run(self.request, self.leaves, batch, layers, segment, above[i])
                    checked = (self.request, self.leaves, self.targets, self.plan)
                    check_batch(*checked, done, batch, largest=batch is largest)
                    self.plan.uncaptured.update(done.missed)
                    for captured in done.features():
                        trained = pending.setdefault(captured.name, {})
                        for each in self.targets.contributions(captured, self.leaves[captured.name].shape):
                            features = trained.setdefault(each.trained, Pending(each.shape, each.weights)).features
                            features.setdefault(i, []).append(each.feature)
                    above[i] = done.below
                    bar.update()
                further_down = {name for cost in self.plan.costs[: segment[0]] for name in cost.names}
                for name in [name for name in pending if name not in further_down]:
                    if name in finished:
                        raise NotImplementedError("parameters are not used in the same order by all examples")
                    finished.add(name)
                    for each in pending.pop(name).values():
                        if not vectors.take(each):
                            self._contract(each, batches)
                    for each in vectors.merged():
                        self._contract(each, batches)
                for each in vectors.merged(everything=True):
                    self._contract(each, batches)
        if wrong := finished & self.plan.uncaptured.keys():
            # A sum over several parameters cannot be freed of one of them.
            if len(self.targets.kernels) < len(self.leaves) or self.targets.methods:
                raise NotImplementedError(f"some examples use {min(wrong)} in a way that others do not")
            for name in wrong:
                self.totals.pop(name, None)

    def _tiled(self) -> dict[str, Tensor]:
        """The kernels, tile by tile: halves of the examples against themselves and each other.

        Raises:
            MemoryError: two examples are too many.
        """
        if self.signed:
            raise MemoryError(
                f"the features of one layer on all {self.n1 + self.n2} examples do not fit memory_budget, "
                f"{reference.gigabytes(self.budget)}: use fewer examples, or raise memory_budget"
            )
        if self.size == (1, 1):
            raise self._too_little()
        first, second = tiles(self.rows, -(-self.n1 // 2)), tiles(self.columns, -(-self.n2 // 2))
        pairs = list(itertools.product(first, second)) if self.n2 else [(first[0], []), tuple(first), (first[1], [])]
        kernels: dict[str, Tensor] = {}
        kept = len(self.targets.kernels) * self._kernel_bytes()
        note(PASSES, "tiles", len(pairs))
        budget, held = self.budget - kept, self.held + kept
        for row_groups, column_groups in pairs:
            (rows, i), (columns, j) = _renumbered(row_groups), _renumbered(column_groups)
            tile = replace(self, rows=rows, columns=columns, budget=budget, held=held, totals={})
            for key, kernel in tile.run().items():
                whole = kernels[key] if key in kernels else kernels.setdefault(key, self._zeros())
                whole[i[:, None], (j if column_groups else i)[None, :]] = kernel
                if column_groups and self.n2 == 0:
                    whole[j[:, None], i[None, :]] = mirrored(kernel)
        if wrong := self.plan.uncaptured.keys() & self.leaves.keys():
            raise NotImplementedError(f"some examples use {min(wrong)} in a way that others do not")
        return kernels

    def _too_little(self) -> MemoryError:
        rows, columns = self.request.rows, self.request.columns
        room = least_room(self.plan.costs, 2 * max(group.length for group in (*rows, *columns)), 2)
        kernels = self.budget * (1 - _TEMPORARY) - self._room()
        kept = self.held + kernels / (1 - _TEMPORARY)
        least = kept + room / (1 - IN_PROGRESS) / (1 - _TEMPORARY)
        parameters = self.request.model.named_parameters()
        if refused := {name: p.detach() for name, p in parameters if name in self.plan.uncaptured}:
            # What the reference needs for the parameters that are not captured.
            count = len({key for name in refused for key in self.targets.weights.get(name, ())})
            n1, n2 = (sum(len(g.indices) for g in groups) for groups in (rows, columns or rows))
            sizes = reference.memory(refused, n1, n2, self.plan.outputs, self.layout, count)
            least = max(least, sizes[0] + 2 * sizes[1])
        use = (
            f"fewer examples or outputs{reference.smaller_layout(self.layout, self.plan.outputs)}"
            if 2 * kept > least
            else "shorter examples, fewer outputs or fewer parameters"
        )
        return MemoryError(
            f"two examples need at least {reference.at_least(least)} but memory_budget is "
            f"{reference.gigabytes(self.budget + self.held)} (kernels {reference.gigabytes(kept)}): use {use}, "
            "or raise memory_budget"
        )

    def _room(self) -> float:
        """Bytes for features and activations, beside kernels and temporaries."""
        # The running sum or all of them, one more in the making, and its Gram matrix.
        kernels = (2 + len(self.targets.kernels)) * self._kernel_bytes()
        return self.budget - kernels - 3 * self.chunk * self.plan.dtype.itemsize

    def _kernel_bytes(self) -> int:
        n1, n2 = self.size
        return n1 * n2 * self.layout.size(self.plan.outputs) * self.plan.dtype.itemsize

    def _contract(self, pending: Pending, batches: list[Group]) -> None:
        """Add one trained parameter's kernel to the totals; rows of batches that do not use it are zero."""
        sizes = [len(g.indices) for g in batches]
        starts = [0, *itertools.accumulate(sizes)]
        used = sorted(pending.features)
        split = sum(sizes[i] for i in used if starts[i] < self.n1) if self.n2 else None
        if split == 0 or split == sum(sizes[i] for i in used):
            return
        features = [pending.features[i] for i in used]
        matrix = gram(features, pending.shape, split, self.layout, self.chunk, signed=self.signed).to(self.plan.dtype)
        if len(used) < len(batches):
            k, m, _ = self.layout.factors(self.plan.outputs)
            entries = torch.cat([torch.arange(starts[i] * m, starts[i + 1] * m) for i in used]).to(self.plan.device)
            rows, columns = (entries, entries) if split is None else (entries[: split * m], entries[split * m :])
            whole = matrix.new_zeros(k, self.n1 * m, self.size[1] * m)
            whole[:, rows[:, None], (columns - (self.n1 * m if self.n2 else 0))[None, :]] = matrix
            matrix = whole
        for key, weight in pending.weights.items():
            if key in self.totals:
                self.totals[key].add_(matrix, alpha=weight)
            else:
                self.totals[key] = matrix * weight

    def _in_order(self, total: Tensor, rows: list[Group], columns: list[Group]) -> Tensor:
        """The kernel ``(n1, n2, ...)``, with the examples in the order of the inputs."""
        i, j = (torch.tensor([i for group in side for i in group.indices]) for side in (rows, columns or rows))
        kernel = self._zeros()
        kernel[i.to(total.device)[:, None], j.to(total.device)[None, :]] = self.layout.kernel(total, self.plan.outputs)
        return kernel

    def _zeros(self) -> Tensor:
        shape = *self.size, *self.layout.shape(self.plan.outputs)
        return torch.zeros(shape, dtype=self.plan.dtype, device=self.plan.device)


def _renumbered(groups: list[Group]) -> tuple[list[Group], Tensor]:
    """The groups with their examples numbered from 0 in their order, and the numbers that they had."""
    starts = [0, *itertools.accumulate(len(g.indices) for g in groups)]
    local = [replace(g, indices=list(range(a, b))) for g, a, b in zip(groups, starts, starts[1:], strict=False)]
    return local, torch.tensor([i for g in groups for i in g.indices])
