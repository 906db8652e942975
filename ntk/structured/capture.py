"""Which operation used which parameter, with what input and what gradient at its output.

A forward pass runs under :class:`Capture`, which sees every torch operation and notes what each tensor depends on
(:mod:`ntk.structured.dependence`). Where an operation mixes data with a parameter, or with a tensor derived from
parameters, the rule of that operation (:mod:`ntk.structured.rules`) says how the gradient at its output becomes a
tangent feature. The parameter itself enters detached, so a gradient that still reaches a parameter proves that a use
was missed. Features of derived tensors are pulled back to their parameters by autograd.

A pass can be confined to a segment of the uses. Before the segment nothing is recorded and autograd keeps nothing; at
its end the forward pass stops. Segments run from the last to the first, each handing the gradients at its cut down to
the next, so that only one segment's activations are held at a time (Chen et al. 2016, recomputation).
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map

from ntk.structured import recurrent, rules
from ntk.structured.autograd import Received, Root
from ntk.structured.dependence import Data, Dependence, Derived, Origin, Use
from ntk.structured.independence import Independence

Segment = tuple[int, float]
"""The first mixing operation of a segment, and the first one after it."""

WHOLE: Segment = (0, float("inf"))

# Functions by which values of a tensor reach Python, or code that torch does not see.
_LEAVING = {
    torch.Tensor.tolist, torch.Tensor.numpy, torch.Tensor.__array__, torch.Tensor.data_ptr, torch.Tensor.__dlpack__,
    torch.Tensor.untyped_storage, torch.Tensor.storage,
}  # fmt: skip
_READING_METADATA = {"size", "type_as", "expand_as", "view_as", "reshape_as", "__set__"}
_TRANSPOSES = {torch.Tensor.t, torch.t, torch.Tensor.T.__get__, torch.Tensor.mT.__get__}  # pyright: ignore[reportAttributeAccessIssue]


class SegmentEnd(Exception):
    """Ends a forward pass whose segment is complete."""


class Capture(TorchFunctionMode):
    """Records the uses of chosen parameters in a forward pass over n examples, and gradients in the passes after it.

    Attributes:
        dependence: what the tensors of the pass depend on.
        uses: in the order of the forward pass.
        count: number of mixing operations seen.
        unhandled: name of a parameter -> why its features could not be captured.
        roots: tensors from which every gradient path starts, with the cut.
        cut: where the segment's incoming activations were made -> the leaf that stands for each.
        kept: the tensors made where ``keep`` asked for them.
        coarsest: the machine epsilon of the least precise data seen.
        outputs: c.
        output: index of the output whose backward pass runs.
        within: the watched modules whose calls are under way (:mod:`ntk.structured.calls`), innermost last.
    """

    def __init__(
        self,
        parameters: Mapping[str, Tensor],
        n: int,
        *,
        outputs: int = 0,
        segment: Segment = WHOLE,
        keep: frozenset[Origin] = frozenset(),
        keep_outputs: bool = False,
        proof: Independence | None = None,
    ):
        """Record the uses of parameters in a segment of a pass of n examples; with ``keep_outputs``, their outputs too.

        The number of outputs is given if it is known already; else it is set before the first backward pass. ``keep``
        holds origins of the tensors wanted in ``kept``, the cut of the segment after this one; ``proof`` follows the
        examples through the same pass.
        """
        super().__init__()
        self.dependence = Dependence(parameters, n)
        self.uses: list[Use] = []
        self.count = 0
        self.unhandled: dict[str, str] = {}
        self.roots: list[Tensor] = []
        self.cut: dict[Origin, Tensor] = {}
        self.kept: dict[Origin, Tensor] = {}
        self.coarsest = 0.0
        self.outputs = outputs
        self.output = 0
        self.within: list[str] = []
        self._segment = segment
        self._keep = keep
        self._keep_outputs = keep_outputs
        self._proof = proof
        self._operations = 0

    def mark(self, inputs: Any) -> Any:
        """Note that the inputs depend on the batch, and return them."""
        for t in tree_leaves(inputs):
            if isinstance(t, Tensor):
                self.dependence[t] = Data()
        return inputs

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        present = [d for t in _tensors(args, kwargs) if (d := self.dependence[t]) is not None]
        if not present:
            return func(*args, **kwargs)
        data = [d for d in present if isinstance(d, Data)]
        if not data or self._picks_one(func, args):
            return self._derive(func, args, kwargs, present)
        if self._proof is not None and (func in _LEAVING or func is torch.Tensor.register_hook):
            self._proof.lose(f"its forward pass calls {_name(func)} on values of the batch")
        self._operations += 1
        mixed = len(data) < len(present) and torch.is_grad_enabled() and _name(func) not in _READING_METADATA
        if mixed and self.count >= self._segment[1]:
            raise SegmentEnd
        if self.count > self._segment[0] or (mixed and self.count == self._segment[0]):
            args, kwargs = self._enter(func, args, kwargs)
        if mixed:
            recurrent_ = func in recurrent.LAYERS or func in recurrent.CELLS
            result = (self._recur if recurrent_ else self._mix)(func, args, kwargs)
            self.count += 1
        else:
            result = func(*args, **kwargs)
        written = args[0] if args and isinstance(args[0], Tensor) and (result is None or result is args[0]) else None
        self._mark_result(result if written is None else written, mixed or any(d.active for d in data))
        return result

    def _picks_one(self, func, args) -> bool:
        """Whether a call takes one slice of a parameter for all examples, as a loop over experts does."""
        if func is not torch.Tensor.__getitem__ or not self.dependence.is_derived(args[0]):
            return False
        return isinstance(args[1], Tensor) and args[1].ndim == 0

    def _derive(self, func, args, kwargs, present) -> Any:
        result = func(*args, **kwargs)
        names = frozenset().union(*(d.names for d in present if isinstance(d, Derived)))
        for t in tree_leaves(result):
            if isinstance(t, Tensor) and t.requires_grad and not self.dependence.is_parameter(t):
                self.dependence[t] = self._form(func, args, kwargs, t, names)
        return result

    def _form(self, func, args, kwargs, result: Tensor, names: frozenset[str]) -> Derived:
        """The dependence of a tensor made of parameters, with its form if that has a cheaper feature."""
        parameters = self.dependence.names
        if func is torch.nn.functional.embedding and len(names) == 1:
            ids, weight = (*args, kwargs.get("weight"))[:2]
            if id(weight) in parameters:
                padding = args[2] if len(args) > 2 else kwargs.get("padding_idx")
                return Derived(names, lookup=(parameters[id(weight)], ids, padding))
        first = args[0] if args else None
        if func in _TRANSPOSES and isinstance(first, Tensor) and id(first) in parameters and first.ndim == 2:
            return Derived(names, transpose=parameters[id(first)])
        before = self.dependence[first]
        copied = func in (torch.Tensor.to, torch.Tensor.contiguous)
        if isinstance(before, Derived) and before.lookup and copied and result.dtype == first.dtype:  # pyright: ignore[reportOptionalMemberAccess]
            return before
        return Derived(names)

    def _enter(self, func, args, kwargs) -> tuple[tuple, dict]:
        """The arguments, with activations from before the segment made leaves of its own graph."""
        if self._segment[0] == 0:
            return args, kwargs

        def leaf(t: Any) -> Any:
            data = self.dependence[t]
            if not isinstance(data, Data) or not data.active or t.requires_grad or not t.is_floating_point():
                return t
            if data.origin not in self.cut:
                self.cut[data.origin] = t.detach().requires_grad_()
                self.dependence[self.cut[data.origin]] = data
            return self.cut[data.origin]

        if args and _writes(func) and leaf(args[0]) is not args[0]:
            # The model goes on to use the tensor that is written to, so that tensor itself must join the graph.
            data = self.dependence[args[0]]
            assert isinstance(data, Data)
            self.cut[data.origin] = args[0].detach().clone().requires_grad_()
            args[0].copy_(self.cut[data.origin])
        return _map(leaf, args, kwargs)

    def _mix(self, func, args, kwargs) -> Any:
        sources = [t for t in _tensors(args, kwargs) if self.dependence.is_derived(t)]
        detached = _map(lambda a: a.detach() if self.dependence.is_derived(a) else a, args, kwargs)
        result = func(*detached[0], **detached[1])
        if not isinstance(result, Tensor):
            self._refuse(sources, f"{_name(func)} returns several tensors")
        elif not result.dtype.is_floating_point:
            pass
        elif result is (args[0] if args else None):
            self._refuse(sources, f"{_name(func)} works in place")
        elif result.shape[:1].numel() % self.dependence.n or result.ndim == 0:
            shape = tuple(result.shape)
            self._refuse(sources, f"{_name(func)} returns shape {shape} for {self.dependence.n} examples")
        elif self._proof is not None and self._proof.why is None and not self._proof.in_order(result):
            self._refuse(sources, f"{_name(func)} returns the examples in another order")
        elif self.count >= self._segment[0]:
            uses = rules.uses_of(self.dependence, func, args, kwargs, result)
            result = self._record(uses, sources, func, result)
            if self.within:
                arguments = frozenset((t.data_ptr(), t.numel()) for t in _tensors(args, kwargs))
                for use in uses.values():
                    use.within, use.arguments = self.within[-1], arguments
        return result

    def _recur(self, func, args, kwargs) -> Any:
        """A recurrent layer or cell, whose steps are taken one by one so that their gradients can be recorded."""
        detached = _map(lambda a: a.detach() if self.dependence.is_derived(a) else a, args, kwargs)
        if self.count < self._segment[0]:
            return func(*detached[0], **detached[1])

        def record(uses: rules.Uses, result: Tensor) -> Tensor:
            return self._record(rules.named(self.dependence, func, uses, result), [], func, result)

        unrolled = recurrent.Unrolled(self.dependence, record, self._proof)
        try:
            return unrolled(func, args, kwargs)
        except rules.Unsuitable as error:
            sources = [t for t in _tensors(args, kwargs) if self.dependence.is_derived(t)]
            self._refuse(sources, f"{_name(func)}: {error}")
            return func(*detached[0], **detached[1])

    def _record(self, uses: dict[int, Use], sources: list[Tensor], func, result: Tensor) -> Tensor:
        for t in sources:
            if id(t) not in uses:
                self._refuse([t], f"no rule for {_name(func)}")
        if not uses:
            return result
        if result._is_view():
            result = result.clone()
        if not result.requires_grad:
            anchor = torch.zeros((), dtype=result.dtype, device=result.device, requires_grad=True)
            self.roots.append(anchor)
            result = Root.apply(result, anchor)
        received = Received()
        for use in uses.values():
            use.number, use.received = self.count, received
            if self._keep_outputs:
                use.output = (result if use.output is None else use.output).detach()
                use.version = use.output._version
        self.uses.extend(uses.values())

        def receive(gradient: Tensor) -> None:
            received.by_output[self.output] = gradient
            received.real.pop(self.output, None)

        result.register_hook(receive)
        return result

    def _refuse(self, sources: list[Tensor], why: str) -> None:
        for t in sources:
            for name in self.dependence.derived(t).names:
                self.unhandled.setdefault(name, why)

    def _mark_result(self, result: Any, active: bool) -> None:
        for position, t in enumerate((result,) if isinstance(result, Tensor) else tree_leaves(result)):
            if not isinstance(t, Tensor):
                continue
            origin = (self._operations, position)
            if t.is_floating_point():
                self.dependence[t] = Data(active, origin)
                self.coarsest = max(self.coarsest, torch.finfo(t.dtype).eps)
                if origin in self._keep:
                    self.kept[origin] = t
            else:
                # Masks and indices carry no gradient. Operations that use them are judged where they happen.
                self.dependence[t] = Data(origin=origin)


def _tensors(args, kwargs) -> list[Tensor]:
    tensors = [a for a in args if isinstance(a, Tensor)]
    for a in args:
        if isinstance(a, (list, tuple)):
            tensors += [t for t in tree_leaves(a) if isinstance(t, Tensor)]
    if kwargs:
        tensors += [t for t in tree_leaves(kwargs) if isinstance(t, Tensor)]
    return tensors


def _map(f: Callable[[Any], Any], args: tuple, kwargs: dict) -> tuple[tuple, dict]:
    """f of every leaf among the arguments."""
    if kwargs or any(isinstance(a, (tuple, list, dict)) for a in args):
        return tree_map(f, (args, kwargs))
    return tuple(map(f, args)), kwargs


def _writes(func) -> bool:
    name = _name(func)
    return (name.endswith("_") and not name.endswith("__")) or name.startswith("__i") or name == "__setitem__"


def _name(func) -> str:
    return getattr(func, "__name__", str(func))
