"""Rules of independence: along which axis an operation's result has the examples of its arguments.

There is one function for each kind of operation, and a table from operations to them. A rule takes a :class:`.Call` and
returns the axis of the result. It raises :class:`.Lost` where an example's part of the result does not follow from its
part of the arguments alone. Operations that torch tags as pointwise, and views, need no entry.
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from ntk.structured.independence.call import Call, Lost, tensors_of


def pointwise(call: Call) -> int:
    """An operation on each entry, after broadcasting: the axes of the examples, counted from the last, must agree."""
    return _aligned(call, call.tensors, call.first)


def _aligned(call: Call, tensors: list[Tensor], result: Tensor) -> int:
    positions = {call.axis_of(t) - t.ndim for t in tensors if not call.constant(t)}
    if len(positions) != 1:
        raise Lost
    (position,) = positions
    for t in tensors:
        call.agrees(t, t.ndim + position)
    return result.ndim + position


def along_dimensions(call: Call, default: int | None = None) -> int:
    """Sums, softmax, sorting, and whatever else works along some dimensions and treats the others as a batch."""
    x = call["self"] if call["self"] is not None else call["input"]
    axis = call.axis_of(x)
    dims = next((call[name] for name in ("dim", "dims") if name in call.arguments), default)
    written = list(tensors_of([call["out"], call["values"], call["indices"]]))
    if dims is None or dims == [] or len(call.tensors) != 1 + len(written):
        raise Lost
    removed = {d % x.ndim for d in (dims if isinstance(dims, (list, tuple)) else [dims])}
    if axis in removed:
        raise Lost
    return axis if call.first.ndim == x.ndim else axis - sum(d < axis for d in removed)


def matrix_product(call: Call) -> int:
    """A B, and A B plus a third matrix: the examples lie along rows of A, or along columns of B."""
    a, b, added = _factors(call)
    axes = call.axis(a), call.axis(b)
    if axes not in ((0, None), (None, 1)):
        raise Lost
    return _with_added(call, 0 if axes[1] is None else 1, added)


def batched_product(call: Call) -> int:
    """The same for a batch of matrices: examples lie along the batch, or along rows or columns of every product."""
    a, b, added = _factors(call)
    axes = call.axis(a), call.axis(b)
    if set(axes) <= {0, None}:
        for t in (a, b):
            call.agrees(t, 0)
        axis = 0
    elif axes in ((1, None), (None, 2)):
        axis = 1 if axes[1] is None else 2
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
        call.agrees(added, added.ndim + axis - call.first.ndim)
    return axis


def copy(call: Call) -> int:
    """The copy replaces what was there before."""
    source = call["src"]
    return _aligned(call, [call["self"], source] if call.constant(source) else [source], call.first)


def layer_norm(call: Call) -> int:
    """Normalisation over the last dimensions, with a scale and a shift that all examples share."""
    axis = call.axis_of(call["input"])
    if axis >= call["input"].ndim - len(call["normalized_shape"]) or not call.constant(call["weight"], call["bias"]):
        raise Lost
    return axis


def batch_norm(call: Call) -> int:
    """Normalisation with stored statistics; statistics of the batch would mix its examples.

    An instance norm has its examples along the channels, each of which has statistics of its own.
    """
    x, *others = call.tensors
    if call.axis(x) == 1:
        for t in others:
            call.agrees(t, 0)
        return 1
    if call["training"] or call["running_mean"] is None:
        raise Lost
    return convolution(call)


def convolution(call: Call) -> int:
    """Examples lie along the first axis, and share all parameters."""
    x, *others = call.tensors
    if call.axis(x) != 0 or not call.constant(*others):
        raise Lost
    return 0


def examples_first(call: Call) -> int:
    """Attention, pooling, resampling: tensors of the rank of the first have the examples along their first axis."""
    x, *others = call.tensors
    for t in (x, *others):
        if t.ndim == x.ndim:
            call.agrees(t, 0)
        elif not call.constant(t):
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
    if not call.constant(call["weight"]):
        raise Lost
    return call.axis_of(call["indices"])


def gather(call: Call) -> int:
    """Entries read or written along one dimension, at indices of the same rank."""
    x, index, dim = call["self"], call["index"], call["dim"]
    tensors = [t for t in (x, index, call["src"]) if isinstance(t, Tensor)]
    axis = _aligned(call, tensors, call.first)
    if dim % max(1, x.ndim) == axis or any(t.ndim != x.ndim for t in tensors):
        raise Lost
    if any(t.shape[axis] != call.first.shape[axis] for t in tensors):
        raise Lost
    return axis


def index_select(call: Call) -> int:
    """Slices along another dimension than the examples', the same for all of them."""
    axis = call.axis_of(call["self"])
    if not call.constant(call["index"]) or call["dim"] % call["self"].ndim == axis:
        raise Lost
    return axis


def index(call: Call) -> int:
    """Entries at indices, which are broadcast against one another.

    The examples' dimension may be indexed by 0 ... n - 1 in order, along the axis where the other indices, or the
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
        if not call.constant(order) or x.shape[axis] != call.n or call.m != 1:
            raise Lost
        along = [k - order.ndim for k in range(order.ndim) if order.shape[k] == call.n]
        positions |= {k for k in along if _counts(order, k, call.n)}
    if len(positions) != 1:
        raise Lost
    (position,) = positions
    for i in chosen:
        if i is not order and call.constant(i):
            call.uniform(i, i.ndim + position)
    if order is not None and not (-order.ndim <= position and _counts(order, position, call.n)):
        raise Lost
    return present[0] + rank + position


def _counts(order: Tensor, axis: int, n: int) -> bool:
    """Whether a tensor holds 0 ... n - 1 along an axis, at all indices of the other axes."""
    shape = [1] * order.ndim
    shape[axis] = n
    return order.shape[axis] == n and bool((order == torch.arange(n, device=order.device).view(shape)).all())


def index_put(call: Call) -> int:
    """One value written where a mask of the same rank is true."""
    x, indices, values = call["self"], call["indices"], call["values"]
    if len(indices) != 1 or indices[0] is None or indices[0].dtype != torch.bool or values.numel() != 1:
        raise Lost
    mask = indices[0]
    if not call.constant(values) or mask.ndim > x.ndim:
        raise Lost
    axes = {axis for axis in (call.axis(x), call.axis(mask)) if axis is not None}
    if len(axes) != 1:
        raise Lost
    (axis,) = axes
    for t in (x, mask):
        call.agrees(t, axis)
    return axis


def cat(call: Call) -> int:
    """Concatenation along another dimension than the examples'."""
    # torch lets empty vectors stand anywhere; they add nothing.
    tensors = [t for t in tensors_of([call["tensors"]]) if t.shape != (0,)]
    rank = tensors[0].ndim
    axis = _aligned(call, tensors, tensors[0])
    if any(t.ndim != rank for t in tensors) or (call["dim"] or 0) % rank == axis:
        raise Lost
    return axis


def stack(call: Call) -> int:
    """Concatenation along a new dimension."""
    tensors = list(tensors_of([call["tensors"]]))
    axis = _aligned(call, tensors, tensors[0])
    return axis + ((call["dim"] or 0) % call.first.ndim <= axis)


def repeat(call: Call) -> int:
    """Copies along other dimensions than the examples'."""
    repeats = call["repeats"]
    axis = call.axis_of(call["self"]) + len(repeats) - call["self"].ndim
    if repeats[axis] != 1:
        raise Lost
    return axis


def pad(call: Call) -> int:
    """A border around other dimensions than the examples'."""
    border = call["pad"] if "pad" in call.arguments else call["padding"]
    return _before_last(call, len(border) // 2)


def triangle(call: Call) -> int:
    """A triangle of the last two dimensions."""
    return _before_last(call, 2)


def _before_last(call: Call, count: int) -> int:
    """The examples' axis in ``self``, which must not be one of the last ``count`` dimensions."""
    axis = call.axis_of(call["self"])
    if axis >= call["self"].ndim - count:
        raise Lost
    return axis


def recurrent(call: Call) -> int:
    """A recurrent layer over a sequence ``(t, n, d)``, with a state ``(..., n, d)``."""
    x, state, memory = call["input"], call["hx_"], call["cx_"]
    if call.axis(x) != 1 or call["batch_sizes"]:
        raise Lost
    for t in (state, memory):
        call.agrees(t, t.ndim - 2)
    if not call.constant(*(t for t in call.tensors if t is not x and t is not state and t is not memory)):
        raise Lost
    return 1


# By the operation's name, without the final underscore of in-place operations.
RULES: dict[str, Callable[[Call], int]] = {
    **dict.fromkeys(("_to_copy", "fill", "masked_fill", "zero", "clone", "contiguous", "_prelu_kernel"), pointwise),
    **dict.fromkeys(
        ("sum", "nansum", "mean", "prod", "amax", "amin", "max", "min", "argmax", "argmin", "all", "any", "var", "std",
         "var_mean", "std_mean", "norm", "linalg_vector_norm", "logsumexp", "count_nonzero", "_softmax", "_log_softmax",
         "_safe_softmax", "cumsum", "cumprod", "cummax", "cummin", "_cummax_helper", "_cummin_helper", "logcumsumexp",
         "_logcumsumexp", "flip", "roll", "_fft_r2c", "_fft_c2r", "_fft_c2c"),
        along_dimensions,
    ),
    **dict.fromkeys(
        ("sort", "argsort", "topk", "kthvalue", "median", "nanmedian", "mode", "glu"),
        partial(along_dimensions, default=-1),
    ),
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
# By the beginning of the operation's name.
FAMILIES: dict[str, Callable[[Call], int]] = dict.fromkeys(
    ("_scaled_dot_product_", "max_pool", "avg_pool", "_adaptive_avg_pool", "adaptive_avg_pool", "adaptive_max_pool",
     "upsample_", "_upsample_", "grid_sampler_", "im2col", "col2im", "pixel_shuffle", "pixel_unshuffle",
     "channel_shuffle", "native_channel_shuffle", "max_unpool"),
    examples_first,
)  # fmt: skip
FAMILIES |= dict.fromkeys(("reflection_pad", "replication_pad"), pad)
