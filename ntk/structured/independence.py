"""Proof that a batched forward pass gives every example what the example gives alone, operation by operation.

A forward pass over n examples runs under :class:`Independence`, which sees every operation that torch dispatches. It
knows of every tensor along which axis the examples lie, and of every operation whether its result at example i depends
on its arguments at example i alone. If that holds from the inputs to the outputs, the outputs of example i are a
function of example i, and so their gradients have no entries at other examples. Nothing is inferred from values: equal
examples, or examples that happen not to trigger a branch, prove as much as any others.

Where the examples lie is kept for each storage, as the distance in bytes from one example to the next. Views need no
rules then: the axis of a view is the one whose stride covers that distance.

An operation that is not known, an axis that is lost, and a value of the data that the model's Python code reads (so
that a branch may follow from it) end the proof; the batch is then run one example at a time, which needs no proof.
Values read from attention masks alone, as transformers reads whether there is padding, are kept instead: a batch is
right if two examples that lead to the same values were compared with the same examples alone
(:mod:`ntk.structured.verification`).

Cost: a few look-ups in Python for each operation of the forward pass, and none in the backward passes; no arithmetic on
activations. Constants that meet the data along the examples are compared with themselves.
"""

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ntk.structured.autograd import Root
from ntk.structured.independence_rules import FAMILIES, RULES, Call, Lost, alike, pointwise, tensors_of

# The derivative of our own function.
_OWN = {Root._backward_cls}  # pyright: ignore[reportAttributeAccessIssue]


@dataclass
class _Held:
    """What a storage holds of the batch.

    Attributes:
        storage: keeps its address from being used again; does not keep its memory.
        step: bytes from one example to the next; None where examples are mixed.
        mask: whether it was made of attention masks and constants alone.
    """

    storage: StorageWeakRef
    step: int | None
    mask: bool


class Independence(TorchDispatchMode):
    """Follows the examples of a batch through a forward pass.

    Attributes:
        n: number of examples, at least 2.
        why: the reason why the proof failed; None as long as it holds.
        reads: values that were read from attention masks, in their order.
    """

    def __init__(self, n: int):
        super().__init__()
        self.n = n
        self.why: str | None = None
        self.reads: list[Any] = []
        self._held: dict[int, _Held] = {}

    def mark(self, t: Tensor, *, mask: bool = False) -> None:
        """An input of the model, whose first axis runs over the examples."""
        self._set(t, 0, len(t), len(t) // self.n, mask)

    def in_order(self, t: Tensor) -> bool:
        """Whether the first axis of a tensor runs over the examples, and each depends on its own example alone.

        That of a constant may: what it holds for one example is compared where it meets the data.
        """
        with torch._C.DisableTorchFunction():
            if _address(t) not in self._held:
                return True
            try:
                axis, m = self._place(t)
            except Lost:
                return False
            return axis == 0 and m * self.n == len(t)

    def lose(self, why: str) -> None:
        """End the proof."""
        self.why = self.why or why

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        with torch._C.DisableTorchFunction():  # What is looked at here is no part of the forward pass.
            return self._follow(func, args, kwargs or {})

    def _follow(self, func: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
        """Run an operation, and note where the examples lie in its results."""
        if self.why is not None:
            return func(*args, **kwargs)
        tensors = list(tensors_of((*args, *kwargs.values())))
        if any(t.layout is not torch.strided for t in tensors):
            self.lose("its forward pass takes tensors that are not dense")
            return func(*args, **kwargs)
        held = {id(t): self._held[address] for t in tensors if (address := _address(t)) in self._held}
        if not held:
            return func(*args, **kwargs)
        places: dict[int, tuple[int, int]] = {}
        with suppress(Lost):
            places = {id(t): self._place(t) for t in tensors if id(t) in held}
        axes = {key: axis for key, (axis, _) in places.items()}
        shapes = {(t.shape[axes[id(t)]], places[id(t)][1]) for t in tensors if id(t) in axes}
        mask = all(entry.mask for entry in held.values())
        kind = _kind(func)
        written = _written(kind, args, kwargs)
        # A constant that is written to must have been alike for all examples before; there is no looking afterwards.
        constants = [_bytes(t).clone() for t in written if id(t) not in held and not kind.fresh]
        result = func(*args, **kwargs)
        values = [r for r in tree_leaves(result) if r is not None]
        if kind.reads or (kind.selects and _by_truth(tensors)) or not all(isinstance(r, Tensor) for r in values):
            self._read(kind, values, mask)
        results = list(tensors_of([result]))
        if kind.constant or kind.relabels or (not written and all(_shares(r, args, kwargs) for r in results)):
            return result
        try:
            if len(shapes) != 1 or kind.rule is None:
                raise Lost
            ((length, m),) = shapes
            names = {**dict(zip(kind.names, args, strict=False)), **kwargs}
            axis = kind.rule(Call(names, result, self.n, m, axes, written))
        except Lost:
            axis, length, m = None, 0, 1
        for t in (*results, *written):
            self._set(t, axis, length, m, mask)
        if constants:
            self._check_constants(written, constants)
        return result

    def _check_constants(self, written: list[Tensor], constants: list[Tensor]) -> None:
        """Make sure that tensors which were constants held the same for all examples before they were written to."""
        for held in (self._held[_address(t)] for t in written):
            for before in constants:
                step = held.step
                if step and (len(before) % (self.n * step) or not alike(before.view(-1, self.n, step), 1)):
                    held.step = None

    def _read(self, kind: "_Kind", values: list[Any], mask: bool) -> None:
        """A value, or a shape, that leaves the tensors."""
        if not mask:
            self.lose(f"its forward pass reads values of the batch ({kind.name}), and may branch on them")
            return
        self.reads.append(tuple(tuple(v.shape) if isinstance(v, Tensor) else v for v in values))

    def _place(self, t: Tensor) -> tuple[int, int]:
        """(axis, m): along which axis the examples lie, and how many entries of each lie there in a row.

        Example i has the entries j with (j // m) % n = i.

        Raises:
            Lost: along none.
        """
        step = self._held[_address(t)].step
        if step is None:
            raise Lost
        size = t.element_size()
        whole = step * self.n
        found = None
        start = int(t.storage_offset()) * size
        last = start % step + size  # of the bytes from one example to the next, those that the other axes reach
        for axis, (length, stride) in enumerate(zip(t.shape, t.stride())):
            stride *= size
            if found is None and stride and step % stride == 0 and length > 1 and length * stride % whole == 0:
                found = axis, step // stride
                last += step - stride
            elif length > 1 and stride % whole:
                last += stride * (length - 1)
        if found is None or last > step or start // step % self.n:
            raise Lost
        return found

    def _set(self, t: Tensor, axis: int | None, length: int, m: int, mask: bool) -> None:
        """Note where the examples lie in a tensor that was written, and so in its storage."""
        step = None
        if axis is not None and axis < t.ndim and length > 0 and t.shape[axis] == length and length % (self.n * m) == 0:
            step = t.stride(axis) * t.element_size() * m or None
        before = self._held.get(_address(t))
        if before is None:
            self._held[_address(t)] = _Held(StorageWeakRef(t.untyped_storage()), step, mask)
        else:
            before.step = before.step if before.step == step else None
            before.mask = before.mask and mask


def follows_torch(t: Tensor) -> bool:
    """Whether every derivative on the way to a tensor is torch's own, and none a Python ``autograd.Function``'s.

    That of :mod:`ntk.structured.autograd` keeps to its example.
    """
    seen, waiting = set(), [t.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if isinstance(node, torch.autograd.function.BackwardCFunction) and type(node) not in _OWN:
            return False
        waiting += [following for following, _ in node.next_functions]
    return True


def _address(t: Tensor) -> int:
    """Which storage a tensor is in."""
    return t.untyped_storage()._cdata


def _by_truth(tensors: list[Tensor]) -> bool:
    """Whether a selection takes the entries where a mask is true, of which there may be any number."""
    return any(t.dtype in (torch.bool, torch.uint8) for t in tensors[1:])


def _bytes(t: Tensor) -> Tensor:
    """All bytes of a tensor's storage."""
    return torch.empty(0, dtype=torch.uint8, device=t.device).set_(t.untyped_storage())


@dataclass(frozen=True)
class _Kind:
    """What is known of an operation.

    Attributes:
        name: of the operation.
        names: of its arguments.
        written: positions and names of the arguments that it writes to.
        fresh: whether it overwrites them whole.
        relabels: it changes the shape of its argument in place, and no values.
        constant: its results do not depend on its tensors' values.
        reads: its result, or the shape of that, tells values of its tensors.
        selects: it does so where an index is a mask.
        rule: gives the axis of the result.
    """

    name: str
    names: tuple[str, ...]
    written: tuple[tuple[int, str], ...]
    fresh: bool
    relabels: bool
    constant: bool
    reads: bool
    selects: bool
    rule: Callable[[Call], int] | None


@lru_cache(maxsize=4096)
def _kind(func: Any) -> _Kind:
    schema = func._schema
    name = schema.name.partition("::")[2]
    plain = name if name.startswith("__") else name.rstrip("_")
    rule = RULES.get(plain) or next((r for prefix, r in FAMILIES.items() if plain.startswith(prefix)), None)
    if rule is None and _is_pointwise(func, schema.name, plain):
        rule = pointwise
    tags = set(func.tags)
    shaped = torch.Tag.dynamic_output_shape in tags
    writes = [(i, a) for i, a in enumerate(schema.arguments) if a.alias_info is not None and a.alias_info.is_write]
    return _Kind(
        name,
        tuple(a.name for a in schema.arguments),
        tuple((i, a.name) for i, a in writes),
        bool(writes) and all(a.kwarg_only for _, a in writes),
        torch.Tag.inplace_view in tags,
        plain.startswith("new_") or (plain.endswith("_like") and plain != "rand_like"),
        torch.Tag.data_dependent_output in tags or (shaped and plain != "index"),
        shaped and plain == "index",
        rule,
    )  # fmt: skip


def _is_pointwise(func: Any, full: str, plain: str) -> bool:
    """Whether torch says so, of the operation or of the one that does not write in place."""
    if torch.Tag.pointwise in func.tags:
        return True
    packet = getattr(getattr(torch.ops, full.partition("::")[0]), plain, None)
    return packet is not None and any(
        torch.Tag.pointwise in getattr(packet, overload).tags for overload in packet.overloads()
    )


def _written(kind: _Kind, args: tuple, kwargs: dict) -> list[Tensor]:
    found = (args[i] if i < len(args) else kwargs.get(name) for i, name in kind.written)
    return list(tensors_of(found))


def _shares(result: Tensor, args: tuple, kwargs: dict) -> bool:
    """Whether a result is a view of an argument, whose storage says it all."""
    return any(_address(t) == _address(result) for t in tensors_of((*args, *kwargs.values())))
