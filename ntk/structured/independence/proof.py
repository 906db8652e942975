"""The examples of a batch, followed through a forward pass operation by operation.

A forward pass over n examples runs under :class:`Independence`, which sees every operation that torch dispatches. It
knows along which axis of every tensor the examples lie, and whether the result of every operation at example i depends
on its arguments at example i alone. If that holds from the inputs to the outputs, the outputs of example i are a
function of example i, and their gradients have no entries at other examples. Nothing is inferred from values, so equal
examples, or examples that happen not to trigger a branch, prove as much as any others.

Where the examples lie is kept for each storage, as the distance in bytes from one example to the next. Views therefore
need no rules: the axis of a view is the one whose stride covers that distance.

The proof ends at an operation that is not known, at an axis that is lost, and at a value of the data that the model's
Python code reads, since a branch may follow from it. The batch then runs one example at a time, which needs no proof.
Values read from attention masks alone, as transformers reads whether there is padding, are kept instead: a batch is
right if two examples that lead to the same values were compared with the same examples alone
(:mod:`ntk.structured.verification`).

Cost: a few look-ups in Python for each operation of the forward pass, and none in the backward passes; no arithmetic on
activations. A constant that meets the data along the examples is checked to be the same for all of them.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode, _pop_mode_temporarily
from torch.utils._pytree import tree_leaves

from ntk.structured.autograd import Root
from ntk.structured.independence.call import Call, Lost, alike, tensors_of
from ntk.structured.independence.rules import FAMILIES, RULES, pointwise

# The derivative of ntk.structured.autograd.Root, which keeps the examples apart.
_OWN = {Root._backward_cls}  # pyright: ignore[reportAttributeAccessIssue]


@dataclass
class _Storage:
    """What a storage holds of the batch.

    Attributes:
        alive: keeps the storage's address from being used again, without keeping its memory.
        step: bytes from one example to the next; None where examples are mixed.
        mask: whether the values depend on attention masks and constants alone.
    """

    alive: StorageWeakRef
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
        self._held: dict[int, _Storage] = {}
        self._blank: dict[int, StorageWeakRef] = {}

    def mark(self, t: Tensor, *, mask: bool = False) -> None:
        """Note an input of the model, whose first axis runs over the examples."""
        self._set(t, 0, len(t), len(t) // self.n, mask)

    def in_order(self, t: Tensor) -> bool:
        """Whether the first axis of a tensor runs over the examples, and each row depends on its own example alone.

        True for a constant too: its values for different examples are compared where it meets the data.
        """
        with torch._C.DisableTorchFunction():
            if _address(t) not in self._held:
                return True
            try:
                axis, m = self._locate(t)
            except Lost:
                return False
            return axis == 0 and m * self.n == len(t)

    @contextmanager
    def aside(self, given: Sequence[Tensor]) -> Iterator[Callable[[Tensor], None]]:
        """Do not follow the operations inside, all of which keep rows along the first axis of what is given apart.

        Yields:
            A function to call with each result, whose first axis is that of what was given.
        """
        apart = self.why is None and all(self.in_order(t) and self._same_if_constant(t) for t in given)
        results: list[Tensor] = []
        with _pop_mode_temporarily():
            yield results.append
        with torch._C.DisableTorchFunction():
            for t in results:
                self._set(t, 0 if apart else None, len(t), max(1, len(t) // self.n), False)

    def _same_if_constant(self, t: Tensor) -> bool:
        """Whether a tensor is of the batch, or the same for every example along its first axis."""
        if _address(t) in self._held or t.stride(0) == 0:
            return True
        return len(t) % self.n == 0 and alike(t.detach().unflatten(0, (self.n, -1)), 0)

    def lose(self, why: str) -> None:
        """End the proof."""
        self.why = self.why or why

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        with torch._C.DisableTorchFunction():  # the capture must not see the look-ups here
            return self._follow(func, args, kwargs or {})

    def _follow(self, func: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
        """Run an operation, and note where the examples lie in its results."""
        if self.why is not None:
            return func(*args, **kwargs)
        kind = _kind(func)
        if kind.views and args and _strided(args[0]):
            # Most operations of a transformer are views, whose storage has its entry already.
            result = func(*args, **kwargs)
            if isinstance(result, Tensor) and _address(result) == _address(args[0]):
                return result
        tensors = list(tensors_of((*args, *kwargs.values())))
        if not all(map(_strided, tensors)):
            self.lose("its forward pass takes tensors that are not dense")
            return func(*args, **kwargs)
        held = {id(t): self._held[address] for t in tensors if (address := _address(t)) in self._held}
        if not held:
            if self._blank and kind.written:
                for t in tensors:
                    self._blank.pop(_address(t), None)
            return func(*args, **kwargs)
        located: dict[int, tuple[int, int]] = {}
        with suppress(Lost):
            located = {id(t): self._locate(t) for t in tensors if id(t) in held}
        axes = {key: axis for key, (axis, _) in located.items()}
        shapes = {(t.shape[axes[id(t)]], located[id(t)][1]) for t in tensors if id(t) in axes}
        mask = all(entry.mask for entry in held.values())
        written = list(tensors_of(args[i] if i < len(args) else kwargs.get(name) for i, name in kind.written))
        # A constant that is written to must have been the same for all examples before, so its bytes are copied.
        # There is nothing to compare in memory that has been reserved and not written to.
        before = [t for t in written if id(t) not in held and not kind.fresh and not self._is_blank(t)]
        constants = [_bytes(t).clone() for t in before]
        result = func(*args, **kwargs)
        # Most results are one tensor, for which tree_leaves would take as long as all the rest here.
        values = [result] if isinstance(result, Tensor) else [r for r in tree_leaves(result) if r is not None]
        # A mask decides how many entries are selected.
        masked = kind.selects and any(t.dtype in (torch.bool, torch.uint8) for t in tensors[1:])
        if kind.reads or masked or not all(isinstance(r, Tensor) for r in values):
            self._read(kind, values, mask)
        results = [r for r in values if isinstance(r, Tensor)]
        if kind.blank:
            self._blank |= {_address(r): StorageWeakRef(r.untyped_storage()) for r in results}
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

    def _is_blank(self, t: Tensor) -> bool:
        """Whether a tensor is memory that nothing has been written to."""
        held = self._blank.get(_address(t))
        return held is not None and not held.expired()

    def _check_constants(self, written: list[Tensor], constants: list[Tensor]) -> None:
        """Make sure that tensors which were constants were the same for all examples before they were written to."""
        for held in (self._held[_address(t)] for t in written):
            for before in constants:
                step = held.step
                if step and (len(before) % (self.n * step) or not alike(before.view(-1, self.n, step), 1)):
                    held.step = None

    def _read(self, kind: "_Kind", values: list[Any], mask: bool) -> None:
        """Note a value or a shape that Python reads from tensors."""
        if not mask:
            self.lose(f"its forward pass reads values of the batch ({kind.name}), and may branch on them")
            return
        self.reads.append(tuple(tuple(v.shape) if isinstance(v, Tensor) else v for v in values))

    def _locate(self, t: Tensor) -> tuple[int, int]:
        """(axis, m): the axis of the examples, and the number of consecutive entries of each example along it.

        The entries j with (j // m) % n = i are those of example i.

        Raises:
            Lost: there is no such axis.
        """
        step = self._held[_address(t)].step
        if step is None:
            raise Lost
        size = t.element_size()
        whole = step * self.n
        located = None
        start = int(t.storage_offset()) * size
        last = start % step + size  # how many of the bytes from one example to the next the other axes reach
        for axis, (length, stride) in enumerate(zip(t.shape, t.stride())):
            stride *= size
            if located is None and stride and step % stride == 0 and length > 1 and length * stride % whole == 0:
                located = axis, step // stride
                last += step - stride
            elif length > 1 and stride % whole:
                last += stride * (length - 1)
        if located is None or last > step or start // step % self.n:
            raise Lost
        return located

    def _set(self, t: Tensor, axis: int | None, length: int, m: int, mask: bool) -> None:
        """Note where the examples lie in a tensor that was written, and so in its storage."""
        step = None
        if axis is not None and axis < t.ndim and length > 0 and t.shape[axis] == length and length % (self.n * m) == 0:
            step = t.stride(axis) * t.element_size() * m or None
        before = self._held.get(_address(t))
        if before is None:
            self._held[_address(t)] = _Storage(StorageWeakRef(t.untyped_storage()), step, mask)
        else:
            before.step = before.step if before.step == step else None
            before.mask = before.mask and mask


def follows_torch(t: Tensor) -> bool:
    """Whether no derivative on the way to a tensor is that of a Python ``autograd.Function`` of the model's."""
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


def _strided(value: Any) -> bool:
    """Whether a value is a dense tensor."""
    return isinstance(value, Tensor) and value.layout is torch.strided


def _address(t: Tensor) -> int:
    """A number for the storage that a tensor is in."""
    return t.untyped_storage()._cdata


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
        fresh: whether it overwrites them completely.
        relabels: whether it changes the shape of its argument in place, and no values.
        constant: whether its results do not depend on its tensors' values.
        blank: whether it reserves memory without writing to it.
        reads: whether its result, or the shape of its result, reveals values of its tensors.
        selects: whether it does so where an index is a mask.
        views: whether it returns a view of an argument, which writes nothing and reveals no values.
        rule: gives the axis of the result; None if there is none.
    """

    name: str
    names: tuple[str, ...]
    written: tuple[tuple[int, str], ...]
    fresh: bool
    relabels: bool
    constant: bool
    blank: bool
    reads: bool
    selects: bool
    views: bool
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
    reads = torch.Tag.data_dependent_output in tags or (shaped and plain != "index")
    return _Kind(
        name,
        tuple(a.name for a in schema.arguments),
        tuple((i, a.name) for i, a in writes),
        bool(writes) and all(a.kwarg_only for _, a in writes),
        torch.Tag.inplace_view in tags,
        plain.startswith("new_") or (plain.endswith("_like") and plain != "rand_like"),
        plain in ("new_empty", "new_empty_strided", "empty_like"),
        reads,
        shaped and plain == "index",
        not writes and not reads and not shaped and any(r.alias_info is not None for r in schema.returns),
        rule,
    )  # fmt: skip


def _is_pointwise(func: Any, full: str, plain: str) -> bool:
    """Whether torch tags the operation as pointwise, or the version of it that does not write in place."""
    if torch.Tag.pointwise in func.tags:
        return True
    packet = getattr(getattr(torch.ops, full.partition("::")[0]), plain, None)
    return packet is not None and any(
        torch.Tag.pointwise in getattr(packet, overload).tags for overload in packet.overloads()
    )


def _shares(result: Tensor, args: tuple, kwargs: dict) -> bool:
    """Whether a result is a view of an argument, so that the storage has an entry already."""
    return any(_address(t) == _address(result) for t in tensors_of((*args, *kwargs.values())))
