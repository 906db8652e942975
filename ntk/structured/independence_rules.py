"""Rules of :mod:`.independence`: along which axis an operation's result has the examples of its arguments.

One function a kind of operation, and a table from operations to them. A rule gets a :class:`Call` and returns the axis
of the result, or raises :class:`Lost` where an example's part of the result does not follow from its part of the
arguments alone. Operations that torch tags as pointwise, and views, need no entry.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


class Lost(Exception):
    """The result's examples cannot be told apart, or depend on one another."""


@dataclass(frozen=True)
class Call:
    """One dispatched operation, as the rules see it.

    Attributes:
        arguments: by their names in the operation's schema.
        result: what it returned.
        n: number of examples.
        m: entries of one example in a row along the axis, the same for all tensors of the batch.
        axes: along which axis a tensor has the examples, by its id; constants have no entry.
        written: the arguments that it has written to.
    """

    arguments: Mapping[str, Any]
    result: Any
    n: int
    m: int
    axes: Mapping[int, int]
    written: list[Tensor]

    def __getitem__(self, name: str) -> Any:
        return self.arguments.get(name)

    @property
    def tensors(self) -> list[Tensor]:
        """All tensors among the arguments."""
        return list(tensors_of(self.arguments.values()))

    @property
    def first(self) -> Tensor:
        """The first tensor that the operation returned."""
        return next(tensors_of([self.result]))

    def axis(self, t: Any) -> int | None:
        """Along which axis a tensor has the examples; None for a constant."""
        return self.axes.get(id(t)) if isinstance(t, Tensor) else None

    def uniform(self, t: Tensor, axis: int) -> None:
        """Make sure that a constant holds the same for every example, if its ``axis`` runs along the examples."""
        if axis < 0 or t.shape[axis] == 1 or t.stride(axis) == 0 or any(t is other for other in self.written):
            return
        if t.shape[axis] % (self.n * self.m):
            raise Lost
        if not alike(t.detach().unflatten(axis, (-1, self.n, self.m)), axis + 1):
            raise Lost


def alike(t: Tensor, axis: int) -> bool:
    """Whether a tensor holds the same all along an axis."""
    return bool((t == t.narrow(axis, 0, 1)).all())


def tensors_of(values: Any) -> Iterator[Tensor]:
    """All tensors among values and lists of values."""
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, (list, tuple)):
            yield from tensors_of(value)


def pointwise(call: Call) -> int:
    """Entry by entry, after broadcasting: examples must lie along the same axis, counted from the last."""
    return _aligned(call, call.tensors, call.first)


def _aligned(call: Call, tensors: list[Tensor], result: Tensor) -> int:
    position = None
    for t in tensors:
        axis = call.axis(t)
        if axis is not None:
            if position not in (None, axis - t.ndim):
                raise Lost
            position = axis - t.ndim
    if position is None:
        raise Lost
    for t in tensors:
        if call.axis(t) is None:
            call.uniform(t, t.ndim + position)
    return result.ndim + position


def along_dimensions(call: Call) -> int:
    """Sums, softmax, sorting, and whatever else works along some dimensions and treats the others as a batch."""
    x = call["self"] if call["self"] is not None else call["input"]
    axis = call.axis(x)
    dims = call["dim"] if "dim" in call.arguments else call["dims"]
    if axis is None or dims is None or dims == [] or len(call.tensors) != 1 + len(_tensors_written(call)):
        raise Lost
    removed = {d % x.ndim for d in (dims if isinstance(dims, (list, tuple)) else [dims])}
    if axis in removed:
        raise Lost
    return axis if call.first.ndim == x.ndim else axis - sum(d < axis for d in removed)


def _tensors_written(call: Call) -> list[Tensor]:
    return list(tensors_of([call["out"], call["values"], call["indices"]]))


def _last_dimension(call: Call) -> int:
    """As above, where the dimension has a default of -1."""
    dims = call["dim"] if "dim" in call.arguments else -1
    return along_dimensions(Call({**call.arguments, "dim": dims}, call.result, call.n, call.m, call.axes, call.written))


def matrix_product(call: Call) -> int:
    """A B, and A B plus a third: rows of A, or columns of B."""
    a, b, added = _factors(call)
    if call.axis(a) == 0 and call.axis(b) is None:
        axis = 0
    elif call.axis(a) is None and call.axis(b) == 1:
        axis = 1
    else:
        raise Lost
    return _with_added(call, axis, added)


def batched_product(call: Call) -> int:
    """The same for a batch of matrices: examples along the batch, or along rows or columns of every product."""
    a, b, added = _factors(call)
    axes = {call.axis(a), call.axis(b)}
    if axes <= {0, None}:
        for t in (a, b):
            if call.axis(t) is None:
                call.uniform(t, 0)
        axis = 0
    elif call.axis(a) == 1 and call.axis(b) is None:
        axis = 1
    elif call.axis(b) == 2 and call.axis(a) is None:
        axis = 2
    else:
        raise Lost
    return _with_added(call, axis, added)


def _factors(call: Call) -> tuple[Tensor, Tensor, Tensor | None]:
    for names in (("mat1", "mat2"), ("batch1", "batch2")):
        if names[0] in call.arguments:
            return call[names[0]], call[names[1]], call["self"]
    return call["self"], call["mat2"] if "mat2" in call.arguments else call["vec"], None


def _with_added(call: Call, axis: int, added: Tensor | None) -> int:
    if added is not None:
        position = axis - call.first.ndim
        if call.axis(added) is None:
            call.uniform(added, added.ndim + position)
        elif call.axis(added) != added.ndim + position:
            raise Lost
    return axis


def copy(call: Call) -> int:
    """What was there before is gone."""
    source = call["src"]
    return _aligned(call, [source] if call.axis(source) is not None else [call["self"], source], call.first)


def layer_norm(call: Call) -> int:
    """Over the last dimensions, with a scale and a shift that all examples share."""
    x = call["input"]
    axis = call.axis(x)
    if axis is None or axis >= x.ndim - len(call["normalized_shape"]):
        raise Lost
    if any(call.axis(call[name]) is not None for name in ("weight", "bias")):
        raise Lost
    return axis


def batch_norm(call: Call) -> int:
    """With stored statistics; those of the batch mix it."""
    if call["training"] or call["running_mean"] is None:
        raise Lost
    return convolution(call)


def convolution(call: Call) -> int:
    """Examples first, and parameters that all of them share."""
    x, *others = call.tensors
    if call.axis(x) != 0 or any(call.axis(t) is not None for t in others):
        raise Lost
    return 0


def examples_first(call: Call) -> int:
    """Every tensor that has the rank of the first has the examples first: attention, pooling, resampling."""
    x, *others = call.tensors
    for t in (x, *others):
        axis = call.axis(t)
        if axis is None and t.ndim == x.ndim:
            call.uniform(t, 0)
        elif axis not in (0, None) or (axis == 0 and t.ndim != x.ndim):
            raise Lost
    return 0


def matrices(call: Call) -> int:
    """Linear algebra on the last two dimensions."""
    axis = _aligned(call, call.tensors, call.tensors[0])
    if any(t.ndim != call.tensors[0].ndim for t in call.tensors) or axis >= call.tensors[0].ndim - 2:
        raise Lost
    return axis


def embedding(call: Call) -> int:
    """Rows of a table that all examples share."""
    axis = call.axis(call["indices"])
    if call.axis(call["weight"]) is not None or axis is None:
        raise Lost
    return axis


def gather(call: Call) -> int:
    """Entries along one dimension, as indices of the same rank say; or entries written there."""
    x, index, dim = call["self"], call["index"], call["dim"]
    tensors = [t for t in (x, index, call["src"]) if isinstance(t, Tensor)]
    axis = _aligned(call, tensors, call.first)
    if dim % max(1, x.ndim) == axis or any(t.ndim != x.ndim for t in tensors):
        raise Lost
    if any(t.shape[axis] != call.first.shape[axis] for t in tensors):
        raise Lost
    return axis


def index_select(call: Call) -> int:
    """Slices along another dimension, the same for all examples."""
    x = call["self"]
    axis = call.axis(x)
    if axis is None or call.axis(call["index"]) is not None or call["dim"] % x.ndim == axis:
        raise Lost
    return axis


def index(call: Call) -> int:
    """Entries at indices, broadcast against one another.

    A dimension of examples may be indexed by 0 ... n - 1 in order, along the axis where the other indices, or the
    result, have the examples.
    """
    x, indices = call["self"], list(call["indices"])
    present = [k for k, i in enumerate(indices) if i is not None]
    chosen = [indices[k] for k in present]
    if any(i.dtype in (torch.bool, torch.uint8) for i in chosen) or present != list(range(present[0], present[-1] + 1)):
        raise Lost
    rank = max(i.ndim for i in chosen)
    axis = call.axis(x)
    positions = {call.axis(i) - i.ndim for i in chosen if call.axis(i) is not None}  # pyright: ignore[reportOptionalOperand]
    if axis is None or axis not in present:
        if axis is not None:
            # Examples lie along a dimension that is not indexed; indices are the same for all.
            if positions:
                raise Lost
            return axis if axis < present[0] else axis - len(present) + rank
        order = None
    else:
        order = indices[axis]
        if call.axis(order) is not None or x.shape[axis] != call.n or call.m != 1:
            raise Lost
        along = [k - order.ndim for k in range(order.ndim) if order.shape[k] == call.n]
        positions |= {k for k in along if _counts(order, k, call.n)}
    if len(positions) != 1:
        raise Lost
    (position,) = positions
    for i in chosen:
        if i is not order and call.axis(i) is None:
            call.uniform(i, i.ndim + position)
    if order is not None and not (-order.ndim <= position and _counts(order, position, call.n)):
        raise Lost
    return present[0] + rank + position


def _counts(order: Tensor, axis: int, n: int) -> bool:
    """Whether a tensor holds 0 ... n - 1 along an axis, whatever the others."""
    shape = [1] * order.ndim
    shape[axis] = n
    return order.shape[axis] == n and bool((order == torch.arange(n, device=order.device).view(shape)).all())


def index_put(call: Call) -> int:
    """One value written where a mask of the same rank says so."""
    x, indices, values = call["self"], call["indices"], call["values"]
    if len(indices) != 1 or indices[0] is None or indices[0].dtype != torch.bool or values.numel() != 1:
        raise Lost
    mask = indices[0]
    if call.axis(values) is not None or mask.ndim > x.ndim:
        raise Lost
    axes = {axis for axis in (call.axis(x), call.axis(mask)) if axis is not None}
    if len(axes) != 1:
        raise Lost
    for t in (x, mask):
        if call.axis(t) is None:
            call.uniform(t, next(iter(axes)))
    return axes.pop()


def cat(call: Call) -> int:
    """Along another dimension than that of the examples."""
    # Empty vectors fit everywhere, and add nothing.
    tensors = [t for t in tensors_of([call["tensors"]]) if t.shape != (0,)]
    rank = tensors[0].ndim
    axis = _aligned(call, tensors, tensors[0])
    if any(t.ndim != rank for t in tensors) or (call["dim"] or 0) % rank == axis:
        raise Lost
    return axis


def stack(call: Call) -> int:
    """Along a new dimension."""
    tensors = list(tensors_of([call["tensors"]]))
    axis = _aligned(call, tensors, tensors[0])
    return axis + ((call["dim"] or 0) % call.first.ndim <= axis)


def repeat(call: Call) -> int:
    """Copies along other dimensions."""
    x, repeats = call["self"], call["repeats"]
    axis = call.axis(x)
    if axis is None:
        raise Lost
    axis += len(repeats) - x.ndim
    if repeats[axis] != 1:
        raise Lost
    return axis


def pad(call: Call) -> int:
    """A border around other dimensions."""
    x, border = call["self"], call["pad"] if "pad" in call.arguments else call["padding"]
    axis = call.axis(x)
    if axis is None or axis >= x.ndim - len(border) // 2:
        raise Lost
    return axis


def triangle(call: Call) -> int:
    """Of the last two dimensions."""
    axis = call.axis(call["self"])
    if axis is None or axis >= call["self"].ndim - 2:
        raise Lost
    return axis


def recurrent(call: Call) -> int:
    """One recurrent layer over a sequence ``(t, n, d)``, with a state ``(..., n, d)``."""
    x, state, memory = call["input"], call["hx_"], call["cx_"]
    if call.axis(x) != 1 or call["batch_sizes"]:
        raise Lost
    for t in (state, memory):
        if call.axis(t) is None:
            call.uniform(t, t.ndim - 2)
        elif call.axis(t) != t.ndim - 2:
            raise Lost
    if any(call.axis(t) is not None for t in call.tensors if t is not x and t is not state and t is not memory):
        raise Lost
    return 1


# By the operation's name, without the underscore of one that works in place. Those that torch tags as pointwise need
# no entry.
RULES: dict[str, Callable[[Call], int]] = {
    **dict.fromkeys(("_to_copy", "fill", "masked_fill", "zero", "clone", "contiguous"), pointwise),
    **dict.fromkeys(
        ("sum", "nansum", "mean", "prod", "amax", "amin", "max", "min", "argmax", "argmin", "all", "any", "var", "std",
         "var_mean", "std_mean", "norm", "linalg_vector_norm", "logsumexp", "count_nonzero", "_softmax", "_log_softmax",
         "_safe_softmax", "cumsum", "cumprod", "cummax", "cummin", "_cummax_helper", "_cummin_helper", "logcumsumexp",
         "_logcumsumexp", "flip", "roll", "_fft_r2c", "_fft_c2r", "_fft_c2c"),
        along_dimensions,
    ),
    **dict.fromkeys(("sort", "argsort", "topk", "kthvalue", "median", "nanmedian", "mode", "glu"), _last_dimension),
    **dict.fromkeys(("mm", "addmm", "mv"), matrix_product),
    **dict.fromkeys(("bmm", "baddbmm"), batched_product),
    **dict.fromkeys(("native_layer_norm", "_fused_rms_norm", "rms_norm"), layer_norm),
    **dict.fromkeys(
        ("native_batch_norm", "_native_batch_norm_legit", "cudnn_batch_norm", "miopen_batch_norm"), batch_norm
    ),
    **dict.fromkeys(
        ("convolution", "_convolution", "mkldnn_convolution", "convolution_overrideable", "native_group_norm"),
        convolution,
    ),
    **dict.fromkeys(
        ("linalg_inv_ex", "linalg_solve_ex", "_linalg_solve_ex", "_linalg_det", "_linalg_slogdet", "linalg_cholesky_ex",
         "linalg_qr", "_linalg_svd", "_linalg_eigh", "linalg_lu_factor_ex", "linalg_solve_triangular",
         "linalg_matrix_exp"),
        matrices,
    ),
    "copy": copy,
    "embedding": embedding,
    **dict.fromkeys(("gather", "scatter", "scatter_add"), gather),
    "index_select": index_select,
    "index": index,
    **dict.fromkeys(("index_put", "_index_put_impl"), index_put),
    "cat": cat,
    "stack": stack,
    "repeat": repeat,
    "constant_pad_nd": pad,
    **dict.fromkeys(("tril", "triu"), triangle),
    "mkldnn_rnn_layer": recurrent,
}  # fmt: skip
# The same for all operations whose name begins so.
FAMILIES: dict[str, Callable[[Call], int]] = dict.fromkeys(
    ("_scaled_dot_product_", "max_pool", "avg_pool", "_adaptive_avg_pool", "adaptive_avg_pool", "adaptive_max_pool",
     "upsample_", "grid_sampler_", "im2col", "col2im"),
    examples_first,
)  # fmt: skip
FAMILIES |= dict.fromkeys(("reflection_pad", "replication_pad"), pad)
