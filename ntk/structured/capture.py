"""Which operation used which parameter, with what input and what gradient at its output.

A forward pass runs under :class:`Capture`, which sees every torch operation. Tensors are told apart by what they
depend on: the batch (:class:`Data`), parameters alone (:class:`Derived`: transposed, raised to a power, sliced,
computed by an adapter), or neither. Where an operation mixes data with a parameter or a derived tensor, the rule of
that operation (:mod:`ntk.structured.rules`) says how the gradient at its output becomes a tangent feature; the
parameter itself enters detached. So any gradient that still reaches a parameter proves a use that was missed. Features
of derived tensors are pulled back to their parameters by autograd.

A pass can be confined to a segment of the uses. Before the segment nothing is recorded and autograd keeps nothing; at
its end the forward pass stops. Segments run from the last to the first, each handing the gradients at its cut down to
the next, so that only one segment's activations are held at a time (Chen et al. 2016, recomputation).
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map

from ntk.features import Dense, Feature, Lookup, Outer
from ntk.structured.autograd import Received, Root
from ntk.structured.independence import Independence
from ntk.tokens import Gradients, Packing

_STATE = "_ntk_state"

Place = tuple[int, int]  # a tensor's maker in the forward pass: the operation's number, and which of its results

# Functions by which values of a tensor reach Python, or code that torch does not see.
_LEAVING = {
    torch.Tensor.tolist, torch.Tensor.numpy, torch.Tensor.__array__, torch.Tensor.data_ptr, torch.Tensor.__dlpack__,
    torch.Tensor.untyped_storage, torch.Tensor.storage,
}  # fmt: skip


@dataclass(frozen=True)
class Data:
    """A tensor that depends on the batch.

    Attributes:
        active: it depends on a captured use, so that gradients must pass through it.
        place: where it was made.
    """

    active: bool = False
    place: Place = (0, 0)


@dataclass
class Derived:
    """What a tensor made of parameters is: in general nothing but that; sometimes a form with a cheaper feature.

    Attributes:
        names: the parameters it depends on.
        lookup: (parameter name, ids, padding index) if it is rows of an embedding at ids that are the same for every
            example, as position embeddings are.
        transpose: the name of the matrix it is the transpose of.
        layer: the watched module whose output it is, if it is a lookup and no more.
    """

    names: frozenset[str]
    lookup: tuple[str, Tensor, int | None] | None = None
    transpose: str | None = None
    layer: str | None = None


@dataclass
class Use:
    """One mixing of data with a parameter, or with a tensor derived from parameters.

    Attributes:
        names: the parameters whose feature this is.
        feature: turns the gradients at the output into a feature.
        derived: the tensor whose (dense) feature it is, if that is not a parameter itself.
        number: which of the forward pass's mixing operations it belongs to.
        received: the gradients at the operation's output, shared by its uses.
        output: what the operation returned, or what of that is the parameter's doing, if it was asked for.
        version: of the output, which writing in place would change.
        within: the innermost watched module in whose call it is.
        layer: the watched module of which it is all that a call does.
        arguments: addresses and sizes of the operation's tensors.
    """

    names: frozenset[str]
    feature: Callable[[Gradients], Feature]
    derived: Tensor | None = None
    number: int = 0
    received: Received | None = None
    output: Tensor | None = None
    version: int = 0
    within: str | None = None
    layer: str | None = None
    arguments: frozenset[tuple[int, int]] = frozenset()


@dataclass(frozen=True)
class Captured:
    """The feature of one use of one parameter.

    Attributes:
        name: of the parameter.
        number: which of the forward pass's mixing operations it is from.
        feature: the feature.
        derived: whether the parameter was changed into something else first.
        output: the operation's output at the feature's tokens, ``(N, r)``, if that was asked for and still is what it
            was.
        within: the innermost watched module (:mod:`ntk.structured.calls`) in whose call it is.
        layer: the watched module of which it is all that a call does.
    """

    name: str
    number: int
    feature: Feature
    derived: bool = False
    output: Tensor | None = None
    within: str | None = None
    layer: str | None = None


class SegmentEnd(Exception):
    """Ends a forward pass whose segment is complete."""


class Capture(TorchFunctionMode):
    """Records the uses of chosen parameters in a forward pass over n examples, and gradients in the passes after it.

    Attributes:
        uses: in the order of the forward pass.
        count: number of mixing operations seen.
        unhandled: name of a parameter -> why its features could not be captured.
        roots: tensors from which every gradient path starts, with the cut.
        cut: where the segment's incoming activations were made -> the leaf that stands for each.
        kept: the tensors made at the places that were asked for.
        coarsest: the machine epsilon of the least precise data seen.
        output: index of the output whose backward pass runs.
        entered: the watched modules whose calls are under way, with the number of uses before each.
        unmatched: watched modules of which a call was not all of one recorded use.
    """

    running: ClassVar[list["Capture"]] = []

    def __init__(
        self,
        parameters: Mapping[str, Tensor],
        n: int,
        *,
        outputs: int | None = None,
        segment: tuple[int, float] = (0, float("inf")),
        keep: frozenset[Place] = frozenset(),
        keep_outputs: bool = False,
        proof: Independence | None = None,
    ):
        """Prepare a capture.

        Args:
            parameters: whose uses are recorded.
            n: number of examples in the pass.
            outputs: c, if known already; else set before the first backward pass.
            segment: first mixing operation to record, and the first not to.
            keep: places of tensors wanted in ``kept``, the cut of the segment after this one.
            keep_outputs: also hold the outputs of the operations.
            proof: follows the examples through the same pass.
        """
        super().__init__()
        self.n = n
        self.names = {id(p): name for name, p in parameters.items()}
        self.uses: list[Use] = []
        self.count = 0
        self.unhandled: dict[str, str] = {}
        self.roots: list[Tensor] = []
        self.cut: dict[Place, Tensor] = {}
        self.kept: dict[Place, Tensor] = {}
        self.coarsest = 0.0
        self.output = 0
        self.outputs = outputs or 0
        self._segment = segment
        self._keep = keep
        self._keep_outputs = keep_outputs
        self._proof = proof
        self._operations = 0
        self.entered: list[tuple[str, int]] = []
        self.unmatched: set[str] = set()

    def __enter__(self) -> "Capture":
        self.running.append(self)
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        self.running.pop()
        super().__exit__(*error)

    def mark(self, inputs: Any) -> Any:
        """The inputs, known to depend on the example."""
        for t in tree_leaves(inputs):
            if isinstance(t, Tensor):
                setattr(t, _STATE, Data())
        return inputs

    def state(self, t: Any) -> Data | Derived | None:
        """What a tensor depends on; None for a constant."""
        name = self.names.get(id(t))
        if name is not None:
            return Derived(frozenset((name,)))
        return getattr(t, _STATE, None)

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        states = [s for t in _tensors(args, kwargs) if (s := self.state(t)) is not None]
        if not states:
            return func(*args, **kwargs)
        data = [s for s in states if isinstance(s, Data)]
        if not data or _picks_one(self, func, args):
            return self._derive(func, args, kwargs, states)
        if self._proof is not None and (func in _LEAVING or func is torch.Tensor.register_hook):
            self._proof.lose(f"its forward pass calls {_name(func)} on values of the batch")
        self._operations += 1
        mixed = len(data) < len(states) and torch.is_grad_enabled() and not _reads_metadata(func)
        if mixed and self.count >= self._segment[1]:
            raise SegmentEnd
        if self.count > self._segment[0] or (mixed and self.count == self._segment[0]):
            args, kwargs = self._enter(func, args, kwargs)
        if mixed:
            result = self._mix(func, args, kwargs)
            self.count += 1
        else:
            result = func(*args, **kwargs)
        written = args[0] if args and isinstance(args[0], Tensor) and (result is None or result is args[0]) else None
        self._mark(result if written is None else written, mixed or any(s.active for s in data))
        return result

    def _derive(self, func, args, kwargs, states) -> Any:
        result = func(*args, **kwargs)
        names = frozenset().union(*(s.names for s in states if isinstance(s, Derived)))
        for t in tree_leaves(result):
            if isinstance(t, Tensor) and t.requires_grad and id(t) not in self.names:
                setattr(t, _STATE, _special(self, func, args, kwargs, t, names))
        return result

    def _enter(self, func, args, kwargs) -> tuple[tuple, dict]:
        """The arguments, with activations from before the segment made leaves of its own graph."""
        if self._segment[0] == 0:
            return args, kwargs

        def leaf(t: Any) -> Any:
            state = getattr(t, _STATE, None)
            if not isinstance(state, Data) or not state.active or t.requires_grad or not t.is_floating_point():
                return t
            if state.place not in self.cut:
                self.cut[state.place] = t.detach().requires_grad_()
                setattr(self.cut[state.place], _STATE, state)
            return self.cut[state.place]

        if args and _writes(func) and leaf(args[0]) is not args[0]:
            # The model goes on to use the tensor that is written to: that itself must join the graph.
            state = getattr(args[0], _STATE)
            self.cut[state.place] = args[0].detach().clone().requires_grad_()
            args[0].copy_(self.cut[state.place])
        return _map(leaf, args, kwargs)

    def _mix(self, func, args, kwargs) -> Any:
        from ntk.structured import rules  # rules are written in terms of this module's tensors

        sources = [t for t in _tensors(args, kwargs) if isinstance(self.state(t), Derived)]
        detached = _map(self._detach, args, kwargs)
        result = func(*detached[0], **detached[1])
        if not isinstance(result, Tensor):
            self._refuse(sources, f"{_name(func)} returns several tensors")
        elif not result.dtype.is_floating_point:
            pass
        elif result is (args[0] if args else None):
            self._refuse(sources, f"{_name(func)} works in place")
        elif result.shape[:1].numel() % self.n or result.ndim == 0:
            self._refuse(sources, f"{_name(func)} returns shape {tuple(result.shape)} for {self.n} examples")
        elif self._proof is not None and self._proof.why is None and not self._proof.in_order(result):
            self._refuse(sources, f"{_name(func)} returns the examples in another order")
        elif self.count >= self._segment[0]:
            found = rules.features_of(self, func, args, kwargs, result)
            result = self._record(found, sources, func, result)
            if self.entered and found:
                arguments = frozenset((t.data_ptr(), t.numel()) for t in _tensors(args, kwargs))
                for use in found.values():
                    use.within, use.arguments = self.entered[-1][0], arguments
        return result

    def _record(self, found: dict[int, Use] | None, sources: list[Tensor], func, result: Tensor) -> Tensor:
        for t in {id(t): t for t in sources}.values():
            if found is None or id(t) not in found:
                self._refuse([t], f"no rule for {_name(func)}")
        if not found:
            return result
        if result._is_view():
            result = result.clone()
        if not result.requires_grad:
            anchor = torch.zeros((), dtype=result.dtype, device=result.device, requires_grad=True)
            self.roots.append(anchor)
            result = Root.apply(result, anchor)
        received = Received()
        for use in found.values():
            use.number, use.received = self.count, received
            if self._keep_outputs:
                use.output = (result if use.output is None else use.output).detach()
                use.version = use.output._version
        self.uses.extend(found.values())

        def receive(gradient: Tensor) -> None:
            received.by_output[self.output] = gradient
            received.real.pop(self.output, None)

        result.register_hook(receive)
        return result

    def _detach(self, a: Any) -> Any:
        return a.detach() if isinstance(a, Tensor) and isinstance(self.state(a), Derived) else a

    def _refuse(self, sources: list[Tensor], why: str) -> None:
        for t in sources:
            state = self.state(t)
            assert isinstance(state, Derived)
            for name in state.names:
                self.unhandled.setdefault(name, why)

    def _mark(self, result: Any, active: bool) -> None:
        for position, t in enumerate((result,) if isinstance(result, Tensor) else tree_leaves(result)):
            if not isinstance(t, Tensor):
                continue
            place = (self._operations, position)
            if t.is_floating_point():
                setattr(t, _STATE, Data(active, place))
                self.coarsest = max(self.coarsest, torch.finfo(t.dtype).eps)
                if place in self._keep:
                    self.kept[place] = t
            else:
                # Masks and indices carry no gradient, and what they select is judged where they are used.
                setattr(t, _STATE, Data(place=place))


def collect(uses: list[Use], parameters: Mapping[str, Tensor], n: int, c: int) -> Iterator[Captured]:
    """The features that the uses left; those of derived tensors pulled back to their parameters."""
    packing = Packing(n)
    while uses:
        use = uses.pop()
        gradients = use.received.all(c, packing) if use.received else None
        if gradients is None:
            continue
        feature = use.feature(gradients)
        use.received = None
        if use.derived is None:
            output = None
            if use.output is not None and use.output._version == use.version and isinstance(feature, (Outer, Lookup)):
                output = gradients.tokens.pick(use.output.reshape(-1, use.output.shape[-1]))
            name = next(iter(use.names))
            yield Captured(name, use.number, feature, output=output, within=use.within, layer=use.layer)
            continue
        assert isinstance(feature, Dense)
        names = sorted(use.names)
        values = feature.value.flatten(0, 1)
        pulled = torch.autograd.grad(
            use.derived, [parameters[name] for name in names], values.to(use.derived.dtype),
            is_grads_batched=True, retain_graph=True, allow_unused=True,
        )  # fmt: skip
        for name, value in zip(names, pulled, strict=True):
            if value is not None:
                yield Captured(name, use.number, Dense(value.unflatten(0, (n, c))), derived=True, within=use.within)


def _tensors(args, kwargs) -> list[Tensor]:
    found = [a for a in args if isinstance(a, Tensor)]
    for a in args:
        if isinstance(a, (list, tuple)):
            found += [t for t in tree_leaves(a) if isinstance(t, Tensor)]
    if kwargs:
        found += [t for t in tree_leaves(kwargs) if isinstance(t, Tensor)]
    return found


def _map(f: Callable[[Any], Any], args: tuple, kwargs: dict) -> tuple[tuple, dict]:
    """f of every leaf among the arguments."""
    if kwargs or any(isinstance(a, (tuple, list, dict)) for a in args):
        return tree_map(f, (args, kwargs))
    return tuple(map(f, args)), kwargs


def _picks_one(capture: Capture, func, args) -> bool:
    """Whether a call takes one slice of a parameter for all, as a loop over experts does."""
    picks = func is torch.Tensor.__getitem__ and isinstance(capture.state(args[0]), Derived)
    return picks and isinstance(args[1], Tensor) and args[1].ndim == 0


def _special(capture: Capture, func, args, kwargs, result: Tensor, names: frozenset[str]) -> Derived:
    if func is torch.nn.functional.embedding and len(names) == 1:
        ids, weight = (*args, kwargs.get("weight"))[:2]
        if id(weight) in capture.names:
            return Derived(names, lookup=(capture.names[id(weight)], ids, _argument(args, kwargs, 2, "padding_idx")))
    first = args[0] if args else None
    if func in _TRANSPOSES and isinstance(first, Tensor) and id(first) in capture.names and first.ndim == 2:
        return Derived(names, transpose=capture.names[id(first)])
    before = getattr(first, _STATE, None)
    copied = func in (torch.Tensor.to, torch.Tensor.contiguous)
    if isinstance(before, Derived) and before.lookup and copied and result.dtype == first.dtype:  # pyright: ignore[reportOptionalMemberAccess]
        return before
    return Derived(names)


_TRANSPOSES = {torch.Tensor.t, torch.t, torch.Tensor.T.__get__, torch.Tensor.mT.__get__}  # pyright: ignore[reportAttributeAccessIssue]


def _argument(args, kwargs, position: int, name: str) -> Any:
    return args[position] if len(args) > position else kwargs.get(name)


def _reads_metadata(func) -> bool:
    return _name(func) in ("size", "type_as", "expand_as", "view_as", "reshape_as", "__set__")


def _writes(func) -> bool:
    name = _name(func)
    return (name.endswith("_") and not name.endswith("__")) or name.startswith("__i") or name == "__setitem__"


def _name(func) -> str:
    return getattr(func, "__name__", str(func))
