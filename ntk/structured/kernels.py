"""The fast exact kernel: forward and backward passes of the model itself, and no Jacobian.

One forward pass and c backward passes under :class:`ntk.structured.capture.Capture` leave, for every use of a
parameter, what its tangent feature is made of: the inputs and output gradients of a matrix product (Novak et al. 2022,
"structured derivatives"; per-example gradients as in Goodfellow 2015). :func:`ntk.structured.gram.gram` contracts them,
forming features slice by slice or not at all, whichever takes fewer multiplications. Examples of similar length run
together. Where the features of all parameters do not fit in memory at once, the passes go segment by segment, from the
outputs down.

Each batch is shown to give every example what it gives alone (:mod:`ntk.structured.independence`). What that or
:mod:`ntk.structured.verification` refuses is tried once more with one example at a time, and goes to the reference
after that.
"""

import itertools
import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn
from tqdm import tqdm

from ntk import inputs as _inputs
from ntk import jacobian
from ntk.counts import PASSES, note
from ntk.features import Dense, Feature
from ntk.functional import Parameters, first_line, is_encoder_decoder
from ntk.inputs import Group, Inputs
from ntk.layout import Layout, mirrored
from ntk.outputs import Output
from ntk.structured.capture import Place
from ntk.structured.gram import CHUNK, gram
from ntk.structured.memory import IN_PROGRESS, cut, least_room, weight
from ntk.structured.passes import Leaves, Pass, Segment, alone, length, requiring_gradients
from ntk.structured.targets import Wanted, parameter_kernels
from ntk.structured.verification import Plan, check_alone, check_one, check_together, compare

logger = logging.getLogger(__name__)

# A batch costs about as much before its first token as these many tokens do: on a processor, and on an accelerator,
# which waits for a small batch's launches.
_OVERHEAD, _OVERHEAD_OF_LAUNCHES = 48, 2048
# Elements of the largest parameter whose features are put together with others'.
_VECTOR = 1 << 16
# Share of a small budget for the temporaries of contractions.
_TEMPORARY = 0.1


def layer_kernels(
    model: nn.Module,
    inputs: Inputs,
    inputs2: Inputs | None,
    *,
    params: Parameters,
    output: Output | None,
    layout: Layout,
    memory_budget: int | float | None,
    progress: bool,
    summed: bool = False,
) -> dict[str, Tensor]:
    """As :func:`ntk.jacobian.layer_kernels`; parameters that could not be captured come from there.

    Cost and memory as :func:`kernels`.
    """
    options = {"output": output, "layout": layout, "memory_budget": memory_budget, "progress": progress}
    found: dict[str, Tensor] = {}
    try:
        found, left = kernels(model, inputs, inputs2, wanted=parameter_kernels(params, summed=summed), **options)
    except ValueError as error:
        # What the capture stumbles over, the reference may not; and a mistake of the caller's is one there too.
        logger.info("not captured: all parameters (%s)", first_line(error))
        left = dict.fromkeys(params, first_line(error))
    if left:
        logger.info("by the reference instead: %s", ", ".join(left))
        rest = jacobian.layer_kernels(
            model,
            inputs,
            inputs2,
            params={name: params[name] for name in left},
            summed=summed,
            **options,
        )
        _merge(found, rest)
    return found if summed else {name: found[name] for name in params}


def kernels(
    model: nn.Module,
    inputs: Inputs,
    inputs2: Inputs | None,
    *,
    wanted: Wanted,
    output: Output | None,
    layout: Layout,
    memory_budget: int | float | None,
    progress: bool,
    signed: bool = False,
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The wanted kernels as far as they can be captured, and the parameters that are missing in them, with the reason.

    Cost: one forward and c backward passes, the contractions, and a check on two examples. Memory: the inputs and c
    output gradients of every captured use, on all examples. Where that exceeds ``memory_budget``, S segments of the
    model take turns, at the cost of (S + 1) / 2 forward passes; where even one layer's do not fit, tiles of examples.

    With ``signed``, columns' features are replaced by their signs (:mod:`ntk.sign_gradient`); there are no tiles then.

    Raises:
        MemoryError: ``memory_budget`` is too small for two examples; says the least that is needed. With ``signed``,
            too small for all examples at once.
    """
    left = dict.fromkeys([*wanted.shares, *wanted.weights], "")  # parameters still to be done -> why they were not
    try:
        return _kernels(model, inputs, inputs2, left, wanted, output, layout, memory_budget, progress, signed)
    except (ValueError, MemoryError):
        raise
    except Exception as error:  # of models that are not captured, whatever the parameter
        own = isinstance(error, NotImplementedError) and "\n" not in str(error)
        why = str(error) if own else first_line(error)
        logger.info("not captured: all parameters (%s)", why)
        return {}, dict.fromkeys(left, why)


def _kernels(
    model: nn.Module, inputs: Inputs, inputs2: Inputs | None, left: dict[str, str], wanted: Wanted,
    output: Output | None, layout: Layout, memory_budget: int | float | None, progress: bool, signed: bool,
) -> tuple[dict[str, Tensor], dict[str, str]]:  # fmt: skip
    """As :func:`kernels`; ``left`` are the parameters to be done."""
    encoder_decoder = is_encoder_decoder(model)
    groups1 = _inputs.group_examples(inputs, encoder_decoder=encoder_decoder)
    groups2 = [] if inputs2 is None else _inputs.group_examples(inputs2, encoder_decoder=encoder_decoder)
    found: dict[str, Tensor] = {}
    # Together, then one example at a time, where rows of different examples cannot be mistaken for one another.
    for check in (check_together, check_alone):
        with requiring_gradients(model, left) as leaves:
            plan = check(model, output, leaves, [*groups1, *groups2], wanted)
        captured = [name for name in left if name not in plan.refused]
        if captured:
            with requiring_gradients(model, captured) as leaves:
                job = _Job(
                    model, output, leaves, plan, wanted, layout, groups1, groups2, memory_budget, progress, signed
                )
                try:
                    _merge(found, job.run())
                except NotImplementedError as error:
                    plan.refused = dict.fromkeys(left, str(error))
        left = plan.refused
        if not left:
            break
        logger.info("not captured: %s", "; ".join(f"{name} ({why})" for name, why in left.items()))
    return found, left


def _merge(kernels: dict[str, Tensor], more: dict[str, Tensor]) -> None:
    for name, kernel in more.items():
        kernels[name] = kernels[name].add_(kernel) if name in kernels else kernel


@dataclass
class _Pending:
    """Features of one trained parameter, by batch, until all are there."""

    shape: torch.Size
    shares: Mapping[str, float]
    features: dict[int, list[Feature]] = field(default_factory=dict)


class _Vectors:
    """Small features of many parameters that have the same share in the same kernels, put together as one."""

    def __init__(self, most: int):
        """Of at most so many elements."""
        self._most = most
        self._held: dict[tuple, list[_Pending]] = {}

    def take(self, slot: _Pending) -> bool:
        """Keep a parameter's features for later, if they are vectors."""
        if not all(isinstance(f, Dense) for features in slot.features.values() for f in features):
            return False
        if slot.shape.numel() > _VECTOR:
            return False
        self._held.setdefault((*slot.shares.items(), *sorted(slot.features)), []).append(slot)
        return True

    def full(self, limit: int | None = None) -> Iterator[_Pending]:
        """Those that have become large, more than ``limit`` elements, as one parameter's."""
        for key, slots in list(self._held.items()):
            elements = sum(slot.shape.numel() for slot in slots) * sum(
                features[0].shape[0] * features[0].shape[1] for features in slots[0].features.values()
            )
            if elements > (self._most if limit is None else limit):
                del self._held[key]
                yield _together(slots)


def _together(slots: list[_Pending]) -> _Pending:
    """One vector of all entries of several parameters' dense features."""
    found = {}
    for batch in slots[0].features:
        values = []
        for slot in slots:
            first, *others = (f.value for f in slot.features[batch] if isinstance(f, Dense))
            for other in others:
                first = first + other
            values.append(first.reshape(*first.shape[:2], slot.shape.numel()))
        found[batch] = [Dense(torch.cat(values, dim=-1))]
    length = next(iter(found.values()))[0].value.shape[-1]
    return _Pending(torch.Size((length,)), slots[0].shares, found)


class _Job:
    """The kernels of all captured parameters, over all examples or a tile of them."""

    def __init__(
        self, model: nn.Module, output: Output | None, leaves: Leaves, plan: Plan, wanted: Wanted, layout: Layout,
        groups1: list[Group], groups2: list[Group], memory_budget: int | float | None, progress: bool,
        signed: bool = False,
    ):  # fmt: skip
        self.model, self.output, self.leaves, self.plan, self.wanted = model, output, leaves, plan, wanted
        self.layout, self.groups1, self.groups2 = layout, groups1, groups2
        self.n1, self.n2 = (sum(len(g.indices) for g in groups) for groups in (groups1, groups2))
        self.progress, self.signed = progress, signed
        self.shared = len(wanted.keys) < len(leaves)  # several parameters' kernels are summed
        self.budget = memory_budget if memory_budget is not None else jacobian.default_memory_budget(plan.device)
        self.chunk = int(min(CHUNK, _TEMPORARY / 3 * self.budget / plan.dtype.itemsize))
        self.totals: dict[str, Tensor] = {}  # kernel (k, n1 m, n2 m), the examples in the batches' order
        self.vectors = _Vectors(self.chunk)
        self.longest = max(length(g) for g in (*groups1, *groups2))
        self.spent = 0.0  # of the caller's budget, on kernels of which this job computes a tile
        self.reference = self._reference()

    def run(self) -> dict[str, Tensor]:
        """The captured parameters' part of every wanted kernel that they have a part in."""
        groups = [*self.groups1, *self.groups2]
        tokens = sum(len(g.indices) * length(g) for g in groups)
        room = self._room()
        segments = cut(self.plan.costs, tokens, self.n1 + self.n2, room * (1 - IN_PROGRESS)) if room > 0 else None
        if segments is None:
            return self._tiled()
        if len(segments) > 1:
            self._check(segments)
        heaviest = max(weight(self.plan.costs, segment) for segment in segments)
        most = max(max(length(g) for g in groups), int(room * IN_PROGRESS / max(1.0, heaviest)))
        batches = [self._batches(side, most) for side in (self.groups1, self.groups2)]
        self._passes(segments, [*batches[0], *batches[1]])
        kernels = {key: self._in_order(total, *batches) for key, total in self.totals.items()}
        self.totals.clear()
        for name in self.leaves:
            for key in self.wanted.shares.get(name, ()) if name not in self.plan.refused else ():
                if key not in kernels:
                    kernels[key] = self._zeros()
        return kernels

    def _passes(self, segments: list[Segment], batches: list[Group]) -> None:
        above: list[dict[Place, Tensor] | None] = [None] * len(batches)
        pending: dict[str, dict[str, _Pending]] = {}  # parameter -> slot
        finished: set[str] = set()
        largest = max(batches, key=lambda batch: len(batch.indices))
        disable = None if self.progress else True
        note(PASSES, "batches", len(batches))
        note(PASSES, "segments", len(segments))
        with tqdm(total=len(segments) * len(batches), desc="kernel passes", disable=disable, leave=False) as bar:
            for segment in segments:
                for i, batch in enumerate(batches):
                    done = Pass(
                        self.model, self.output, self.leaves, batch, segment, above[i], bool(self.wanted.methods)
                    )
                    self._check_batch(done, batch, largest=batch is largest)
                    self.plan.refused.update(done.missed)
                    for found in done.features(self.leaves):
                        slots = pending.setdefault(found.name, {})
                        for piece in self.wanted.pieces(found, self.leaves[found.name].shape):
                            slot = slots.setdefault(piece.slot, _Pending(piece.shape, piece.shares))
                            slot.features.setdefault(i, []).append(piece.feature)
                    above[i] = done.below
                    bar.update()
                further_down = {name for cost in self.plan.costs[: segment[0]] for name in cost.names}
                for name in [name for name in pending if name not in further_down]:
                    if name in finished:
                        raise NotImplementedError("parameters are not used in the same order by all examples")
                    finished.add(name)
                    for slot in pending.pop(name).values():
                        if not self.vectors.take(slot):
                            self._add(slot, batches)
                    for slot in self.vectors.full():
                        self._add(slot, batches)
                for slot in self.vectors.full(0):
                    self._add(slot, batches)
        if wrong := finished & self.plan.refused.keys():
            if self.shared or self.wanted.methods:
                raise NotImplementedError(f"some examples use {min(wrong)} in a way that others do not")
            for name in wrong:
                self.totals.pop(name, None)

    def _check_batch(self, done: Pass, batch: Group, *, largest: bool) -> None:
        """See that the batch gave each example what the example gives alone.

        Operation by operation the pass has shown that no example depends on another. What is left is how the forward
        pass depends on the padding, which two examples show for every way that it takes, and on the number of examples,
        which one example of the largest batch shows.
        """
        if done.values is None or len(batch.indices) == 1:
            return
        if done.mixing is not None:
            raise NotImplementedError(done.mixing)
        if done.reads not in self.plan.reads:
            self._check_reads(done.reads, batch)
        if largest:
            check_one(self.model, self.output, batch, done.values, self.plan)

    def _check_reads(self, reads: tuple, batch: Group) -> None:
        """Compare two examples with the same examples alone, where a batch's masks were read as never before."""
        shortest, *_, longest = sorted((alone(batch, i) for i in range(len(batch.indices))), key=length)
        pair = _inputs.pad_together([shortest, longest], self.plan.padding or 0)
        if len(pair) == 1:
            found = compare(self.model, self.output, self.leaves, self.wanted, pair[0], [shortest, longest])
            if not found.refused.keys() - self.plan.refused.keys():
                self.plan.reads |= found.reads
        if reads not in self.plan.reads:
            raise NotImplementedError("its forward pass reads the padding of the whole batch, and may branch on it")

    def _check(self, segments: list[Segment]) -> None:
        """See that the passes can be cut so, which tensors that escape the capture would prevent."""
        assert self.plan.checked is not None
        group, single = self.plan.checked
        found = compare(self.model, self.output, self.leaves, self.wanted, group, single, segments)
        if found.refused:
            raise NotImplementedError("the passes of this model cannot be cut into segments")

    def _tiled(self) -> dict[str, Tensor]:
        """The kernels, tile by tile: halves of the examples against themselves and each other.

        Raises:
            MemoryError: two examples are too many.
        """
        n2 = self.n2 or self.n1
        kept = len(self.wanted.keys) * self._kernel_bytes()
        if self.signed:
            raise MemoryError(
                f"the features of one layer on all {self.n1 + self.n2} examples do not fit memory_budget, "
                f"{jacobian.gigabytes(self.budget)}: use fewer examples, or raise memory_budget"
            )
        if max(self.n1, n2) == 1:
            raise self._too_little()
        sides = [_halves(groups, n) for groups, n in ((self.groups1, self.n1), (self.groups2, self.n2))]
        if self.n2 == 0:
            first, second = sides[0]
            tiles = [(first, []), (first, second), (second, [])]
        else:
            tiles = [(left, right) for left in sides[0] for right in sides[1]]
        kernels: dict[str, Tensor] = {}
        note(PASSES, "tiles", len(tiles))
        for left, right in tiles:
            (local1, rows), (local2, columns) = _renumbered(left), _renumbered(right)
            job = _Job(
                self.model, self.output, self.leaves, self.plan, self.wanted, self.layout, local1, local2,
                self.budget - kept, self.progress,
            )  # fmt: skip
            job.longest, job.spent, job.reference = self.longest, self.spent + kept, self.reference
            part = job.run()
            for key, kernel in part.items():
                whole = kernels[key] if key in kernels else kernels.setdefault(key, self._zeros())
                whole[rows[:, None], (columns if right else rows)[None, :]] = kernel
                if right and self.n2 == 0:
                    whole[columns[:, None], rows[None, :]] = mirrored(kernel)
        if wrong := self.plan.refused.keys() & self.leaves.keys():
            raise NotImplementedError(f"some examples use {min(wrong)} in a way that others do not")
        return kernels

    def _too_little(self) -> MemoryError:
        room = least_room(self.plan.costs, 2 * self.longest, 2)
        kernels = self.budget * (1 - _TEMPORARY) - self._room()
        kept = self.spent + kernels / (1 - _TEMPORARY)
        least = max(self.reference, kept + room / (1 - IN_PROGRESS) / (1 - _TEMPORARY))
        use = (
            f"fewer examples or outputs{jacobian.smaller_layout(self.layout, self.plan.outputs)}"
            if 2 * kept > least
            else "shorter examples, fewer outputs or fewer parameters"
        )
        return MemoryError(
            f"two examples need at least {jacobian.at_least(least)} but memory_budget is "
            f"{jacobian.gigabytes(self.budget + self.spent)} (kernels {jacobian.gigabytes(kept)}): use {use}, or raise "
            "memory_budget"
        )

    def _reference(self) -> float:
        """The least that the reference needs in bytes, for what it will have to take."""
        refused = {name: p.detach() for name, p in self.model.named_parameters() if name in self.plan.refused}
        if not refused:
            return 0.0
        count = len({key for name in refused for key in self.wanted.shares.get(name, ())})
        kernels, example = jacobian.memory(refused, self.n1, self.n2 or self.n1, self.plan.outputs, self.layout, count)
        return kernels + 2 * example

    def _room(self) -> float:
        """Bytes left for features and activations beside kernels and temporaries."""
        # The running sum or all of them, one more in the making, and its Gram matrix.
        kernels = (2 + len(self.wanted.keys)) * self._kernel_bytes()
        return self.budget - kernels - 3 * self.chunk * self.plan.dtype.itemsize

    def _kernel_bytes(self) -> int:
        entries = self.n1 * (self.n2 or self.n1) * self.layout.size(self.plan.outputs)
        return entries * self.plan.dtype.itemsize

    def _batches(self, groups: list[Group], most_tokens: int) -> list[Group]:
        """Groups of similar length run together, cut to what fits in memory."""
        if self.plan.padding is not None:
            overhead = _OVERHEAD if self.plan.device.type == "cpu" else _OVERHEAD_OF_LAUNCHES
            groups = _inputs.pad_together(groups, self.plan.padding, overhead=overhead)
        result = []
        for group in groups:
            size = max(1, most_tokens // length(group))
            size = min(size, self.plan.largest or size)
            result += [group.take(slice(i, i + size)) for i in range(0, len(group.indices), size)]
        return result

    def _add(self, slot: _Pending, batches: list[Group]) -> None:
        """Contract one trained parameter's features; batches that do not use it have no share."""
        sizes = [len(g.indices) for g in batches]
        starts = [0, *itertools.accumulate(sizes)]
        used = sorted(slot.features)
        split = sum(sizes[i] for i in used if starts[i] < self.n1) if self.n2 else None
        count = sum(sizes[i] for i in used)
        if split == 0 or split == count:
            return
        features = [slot.features[i] for i in used]
        matrix = gram(features, slot.shape, split, self.layout, self.chunk, signed=self.signed).to(self.plan.dtype)
        if len(used) < len(batches):
            k, m, _ = self.layout.places(self.plan.outputs)
            places = torch.cat([torch.arange(starts[i] * m, starts[i + 1] * m) for i in used]).to(self.plan.device)
            rows, columns = (places, places) if split is None else (places[: split * m], places[split * m :])
            whole = matrix.new_zeros(k, self.n1 * m, (self.n2 or self.n1) * m)
            whole[:, rows[:, None], (columns - (self.n1 * m if self.n2 else 0))[None, :]] = matrix
            matrix = whole
        for key, share in slot.shares.items():
            if key in self.totals:
                self.totals[key].add_(matrix, alpha=share)
            else:
                self.totals[key] = matrix * share

    def _in_order(self, total: Tensor, left: list[Group], right: list[Group]) -> Tensor:
        """The kernel ``(n1, n2, ...)``, the examples in their own order."""
        rows, columns = (
            torch.tensor([i for g in side for i in g.indices], device=total.device) for side in (left, right or left)
        )
        kernel = self._zeros()
        kernel[rows[:, None], columns[None, :]] = self.layout.kernel(total, self.plan.outputs)
        return kernel

    def _zeros(self) -> Tensor:
        shape = self.n1, self.n2 or self.n1, *self.layout.shape(self.plan.outputs)
        return torch.zeros(shape, dtype=self.plan.dtype, device=self.plan.device)


def _halves(groups: list[Group], n: int) -> list[list[Group]]:
    return _inputs.tiles(groups, -(-n // 2)) if n > 1 else [groups]


def _renumbered(groups: list[Group]) -> tuple[list[Group], Tensor]:
    """The groups with their examples numbered from 0 in their order, and the numbers that they had."""
    starts = [0, *itertools.accumulate(len(g.indices) for g in groups)]
    local = [replace(g, indices=list(range(a, b))) for g, a, b in zip(groups, starts, starts[1:], strict=False)]
    return local, torch.tensor([i for g in groups for i in g.indices])
