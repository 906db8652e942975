"""The reference: Jacobians by reverse mode, contracted tile by tile.

    K[i, j, a, b] = sum_theta  d f_a(x_i)/d theta * d f_b(x_j)/d theta

Jacobian contraction as in Novak, Sohl-Dickstein and Schoenholz (2022, sec. 3.1), by ``torch.func``. It is simple, slow
and takes much memory; every faster kernel is compared with it. Its Jacobians are themselves compared, example by
example, with ordinary autograd, which replaces them where they differ. For n examples, c outputs, P parameters and
tiles of b examples: time (n c)^2 P for the contraction, (1 + n/2b) n Jacobians and n forward and backward passes for
the comparison; memory 2 b c P beside the model and kernel.
"""

import logging
import math
from collections.abc import Callable, Iterator, Mapping
from functools import reduce

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.func import jacrev, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel
from tqdm import tqdm

from ntk.counts import BY_REFERENCE, note
from ntk.functional import (
    Leaves,
    ParameterChoice,
    Parameters,
    RandomNumbers,
    call,
    evaluation,
    first_line,
    fresh,
    requiring_gradients,
    select_parameters,
)
from ntk.inputs import Group, Inputs, tiles
from ntk.layout import Layout, mirrored
from ntk.outputs import Output
from ntk.request import Request

logger = logging.getLogger(__name__)

Jacobian = dict[str, Tensor]  # parameter name -> (b, c, *parameter shape)
JacobianFunction = Callable[..., tuple[Tensor, Jacobian]]


def layer_kernels(request: Request, params: Parameters, *, summed: bool) -> dict[str, Tensor]:
    """Kernel of each parameter, ``{name: (n1, n2, ...)}``; with ``summed`` only their sum, under the name ``""``.

    The output axes are those of the request's layout.

    Raises:
        MemoryError: the kernels and the Jacobians of two examples exceed the memory budget; the message says how much.
    """
    symmetric, layout = request.inputs2 is None, request.layout
    groups1, groups2 = request.rows, request.rows if symmetric else request.columns
    n1, n2 = (sum(len(g.indices) for g in groups) for groups in (groups1, groups2))
    jacobian = jacobian_function(request.model, request.output)

    with torch.enable_grad(), requiring_gradients(request.model, ()):
        c = len(alone(request.model, request.output, groups1[0], 0))
    for name in params:
        note(BY_REFERENCE, name)
    names = [""] if summed else list(params)
    dtype = accumulation_dtype(params)
    device = next(iter(params.values())).device
    size = _tile_size(params, n1, n2, c, layout, len(names), request.budget(device))
    kernels = {name: torch.zeros(n1, n2, *layout.shape(c), dtype=dtype, device=device) for name in names}

    tiles1 = tiles(groups1, size)
    tiles2 = tiles1 if symmetric else tiles(groups2, size)
    pairs = [(i, j) for i in range(len(tiles1)) for j in range(i if symmetric else 0, len(tiles2))]
    with tqdm(total=len(pairs), desc="kernel tiles", disable=None if request.progress else True, leave=False) as bar:
        for i, tile1 in enumerate(tiles1):
            # Each tile is checked the first time that it runs.
            rows, jacobian1 = jacobian(params, tile1, check=i == 0 or not symmetric)
            for j in range(i if symmetric else 0, len(tiles2)):
                diagonal = symmetric and i == j
                columns, jacobian2 = (rows, jacobian1) if diagonal else jacobian(params, tiles2[j], check=i == 0)
                for name in params:
                    block = layout.contract(jacobian1[name].to(dtype), jacobian2[name].to(dtype))
                    kernel = kernels["" if summed else name]
                    kernel[rows[:, None], columns[None, :]] += block
                    if symmetric and not diagonal:
                        kernel[columns[:, None], rows[None, :]] += mirrored(block)
                bar.update()
    return kernels


def jacobian(
    model: nn.Module,
    inputs: Inputs,
    *,
    params: ParameterChoice = "all",
    output: Output | None = None,
    memory_budget: int | float | None = None,
) -> dict[str, Float[Tensor, "n c ..."]]:
    """The derivatives of a model's outputs by its parameters, d f_a(x_i)/d theta, by the names of the parameters.

    The tangent features whose inner products :func:`ntk.empirical_ntk` is, with the arguments of that function.

    Returns:
        For each parameter ``(n, c, *shape)``, in the dtype of the parameter.

    Raises:
        ValueError: as :func:`ntk.empirical_ntk`.
        MemoryError: they exceed ``memory_budget``; an :class:`ntk.NTKOperator` multiplies by them without.

    Example:
        >>> jacobian(torch.nn.Linear(2, 1), torch.tensor([[3.0, 4.0]]))
        {'weight': tensor([[[[3., 4.]]]]), 'bias': tensor([[[1.]]])}
    """
    request = Request(model, inputs, None, output, None, memory_budget, False)
    chosen = select_parameters(model, params)
    with evaluation(model, request.inputs):
        with torch.enable_grad(), requiring_gradients(model, ()):
            c = len(alone(model, output, request.rows[0], 0))
        device = next(iter(chosen.values())).device
        needed, budget = 2 * request.examples * c * sum(p.nbytes for p in chosen.values()), request.budget(device)
        if needed > budget:
            raise MemoryError(
                f"the Jacobians of {request.examples} examples and {c} outputs need at least {at_least(needed)} but "
                f"memory_budget is {gigabytes(budget)}: take fewer examples, outputs or parameters, or ntk.NTKOperator"
            )
        rows, values = jacobian_function(model, output)(chosen, request.rows)
    order = rows.argsort()
    return {name: value[order] for name, value in values.items()}


def jacobian_function(model: nn.Module, output: Output | None) -> JacobianFunction:
    """J(params, tile, check=True) -> (indices of the tile's examples, their Jacobians ``{name: (b, c, *shape)}``).

    ``params`` are the model's own, detached. J runs ``vmap(jacrev(f))`` on each group of the tile and, with ``check``,
    compares each example's with ordinary autograd, in a random direction of the outputs: one forward and one backward
    pass for each example. If they differ, or if ``torch.func`` cannot trace the model (an ``autograd.Function``
    without its rules in BLOOM, a data-dependent shape in BART), each output of each example takes its own backward
    pass, which is slower. The logger reports that at level INFO.
    """
    looping: list[str] = []  # why torch.func failed on the first group

    def per_group(params: Parameters, group: Group, check: bool) -> Jacobian:
        if not looping:
            try:
                result = _traced_jacobian(model, output, params, group)
                wrong = check and _mismatch(model, output, params, group, result)
                if not wrong:
                    return result
                looping.append(f"its derivative by {wrong} is not that of autograd")
            except Exception as error:  # the loop raises it too, or does not need what failed
                if "randomness" in str(error):
                    raise RandomNumbers from error
                looping.append(first_line(error))
            name = type(model).__name__
            logger.info("no vmap over %s (%s): one backward pass per output instead", name, looping[0])
        return _looped_jacobian(model, output, params, group)

    def jacobian(params: Parameters, tile: list[Group], *, check: bool = True) -> tuple[Tensor, Jacobian]:
        device = next(iter(params.values())).device
        rows = torch.tensor([i for group in tile for i in group.indices], device=device)
        parts = [per_group(params, group, check) for group in tile]
        if len(parts) == 1:
            return rows, parts[0]
        # Each parameter's parts are freed as they are joined, so that the tile is never held twice.
        return rows, {name: torch.cat([part.pop(name) for part in parts]) for name in params}

    return jacobian


def _traced_jacobian(model: nn.Module, output: Output | None, params: Parameters, group: Group) -> Jacobian:
    """Jacobians by ``vmap(jacrev(f))``, where f maps one example without its batch dimension to its outputs ``(c,)``.

    Gradients are enabled although none is recorded, since torch's derivatives of solvers and determinants are wrong
    without. The fused attention kernels have no batching rule; the plain formula has one.
    """

    def f(own: Parameters, example: dict[str, Tensor]) -> Tensor:
        inputs = fresh({key: value.unsqueeze(0) for key, value in example.items()} | group.constant)
        return call(model, output, inputs, 1, own).reshape(-1)

    with requiring_gradients(model, ()), torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):
        result = vmap(jacrev(f), in_dims=(None, 0))(params, group.batched)
    return {name: value.detach() for name, value in result.items()}


# A parameter's gradient may err by a fraction of its norm plus SHARE times the norm of the gradient by all parameters,
# since the gradients of some parameters consist of rounding errors only.
SHARE = 1e-2


def tolerance(rounding: float) -> float:
    """The largest relative difference that rounding explains between two sums of the same few thousand terms.

    It is 2,000 times the machine epsilon, but at most 0.05, which half precision would exceed.
    """
    return min(2e3 * rounding, 0.05)


def _mismatch(
    model: nn.Module, output: Output | None, params: Parameters, group: Group, jacobian: Jacobian
) -> str | None:
    """The first parameter for which an example's Jacobian differs from autograd's, in one random direction."""
    like = next(iter(jacobian.values()))
    g, c = like.shape[:2]
    weights = torch.randn(g, c, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(like.device)
    allowed = tolerance(max(torch.finfo(value.dtype).eps for value in params.values()))
    with requiring_gradients(model, params) as leaves, torch.enable_grad():
        for position in range(g):
            values = alone(model, output, group, position)
            expected = gradients((values * weights[position].to(values)).sum(), leaves)
            size = sum(float(value.double().norm()) ** 2 for value in expected.values()) ** 0.5
            for name, value in expected.items():
                traced = torch.tensordot(weights[position].to(value), jacobian[name][position].to(value), dims=1)
                if not float((traced - value).norm()) <= allowed * (float(value.norm()) + SHARE * size):
                    return name
    return None


def _looped_jacobian(model: nn.Module, output: Output | None, params: Parameters, group: Group) -> Jacobian:
    """The same as ``vmap(jacrev(f))``, by ``torch.autograd.grad`` of the model itself."""
    rows: dict[str, list[Tensor]] = {name: [] for name in params}
    with requiring_gradients(model, params) as leaves, torch.enable_grad():
        for position in range(len(group.indices)):
            for value in alone(model, output, group, position):
                for name, gradient in gradients(value, leaves).items():
                    rows[name].append(gradient)
    g = len(group.indices)
    return {name: torch.stack(r).unflatten(0, (g, len(r) // g)) for name, r in rows.items()}


def alone(model: nn.Module, output: Output | None, group: Group, position: int) -> Tensor:
    """The outputs ``(c,)`` of one example of a group, in a batch of its own.

    Raises:
        ValueError: the model or ``output`` fails on it; the message holds the error.
    """
    try:
        return call(model, output, fresh(group.example(position)), 1)[0]
    except (ValueError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        raise ValueError(
            f"the model, or output=, fails on example {group.indices[position]} by itself: {first_line(error)}"
        ) from error


def gradients(value: Tensor, leaves: Leaves) -> dict[str, Tensor]:
    """d value / d leaf, dense; zero for a leaf on which the value does not depend.

    Raises:
        ValueError: autograd fails; the message holds its error.
    """
    if not value.requires_grad:
        return {name: torch.zeros_like(p) for name, p in leaves.items()}
    try:
        rows = torch.autograd.grad(value, list(leaves.values()), retain_graph=True, allow_unused=True)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        raise ValueError(f"the model cannot be differentiated: {first_line(error)}") from error
    dense = [g.to_dense() if g is not None and g.layout != torch.strided else g for g in rows]
    return {n: torch.zeros_like(p) if g is None else g for (n, p), g in zip(leaves.items(), dense, strict=True)}


def accumulation_dtype(params: Mapping[str, Tensor]) -> torch.dtype:
    """The widest parameter dtype, and at least float32, for sums over millions of products."""
    return reduce(torch.promote_types, (p.dtype for p in params.values()), torch.float32)


def memory(params: Parameters, n1: int, n2: int, c: int, layout: Layout, kernels: int) -> tuple[int, int]:
    """Bytes of the kernels, and of one example's Jacobian; at least the kernels and two Jacobians must fit."""
    dtype = accumulation_dtype(params)
    # The factor 2 is for the block that is added to the kernels, which may be as large as they are.
    kernel_bytes = 2 * kernels * n1 * n2 * layout.size(c) * dtype.itemsize
    # Joining groups or changing dtype makes a copy of the largest parameter's Jacobian.
    example_bytes = c * (
        sum(p.nbytes for p in params.values()) + max(p.numel() for p in params.values()) * dtype.itemsize
    )
    return kernel_bytes, example_bytes


def _tile_size(params: Parameters, n1: int, n2: int, c: int, layout: Layout, kernels: int, budget: int | float) -> int:
    """Number b of examples of a tile, such that two tiles of Jacobians and the kernels fit the budget."""
    kernel_bytes, example_bytes = memory(params, n1, n2, c, layout, kernels)
    minimum = kernel_bytes + 2 * example_bytes
    if budget < minimum:
        total = sum(p.numel() for p in params.values())
        reduce_by = (
            f"fewer examples or outputs{smaller_layout(layout, c)}"
            if kernel_bytes > 2 * example_bytes
            else "fewer parameters (params=) or outputs"
        )
        raise MemoryError(
            f"the kernel of {n1} x {n2} examples, {c} outputs and {total:,} parameters "
            f"needs at least {at_least(minimum)} but memory_budget is {gigabytes(budget)} "
            f"(kernels {gigabytes(kernel_bytes)}, Jacobians of two examples {gigabytes(2 * example_bytes)}): "
            f"use {reduce_by}, or raise memory_budget"
        )
    return min(max(n1, n2), int((budget - kernel_bytes) // (2 * example_bytes)))


def smaller_layout(layout: Layout, c: int) -> str:
    """The end of a sentence that recommends a smaller layout; empty if there is none."""
    return ", or reduce='trace'" if layout.size(c) > 1 else ""


def at_least(size: int | float) -> str:
    """A number of bytes in words, rounded up."""
    unit = 1e7 if size >= 1e7 else 1e3
    return gigabytes(math.ceil(size / unit) * unit)


def gigabytes(size: int | float) -> str:
    """A number of bytes in words."""
    return f"{size / 1e9:.2f} GB" if size >= 1e7 else f"{size / 1e6:.3f} MB"


def selected_jacobian_rows(
    request: Request, params: Parameters, chosen: dict[str, Tensor]
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield the rows' indices and their Jacobian ``(b, c, m)`` at chosen flat coordinates of the parameters."""
    own = {name: params[name] for name in chosen}
    disable = None if request.progress else True
    # One example at a time, for which vmap(jacrev(f)) would only add its check.
    for (group,) in tqdm(tiles(request.rows, 1), desc="Jacobians", disable=disable, leave=False):
        blocks = _looped_jacobian(request.model, request.output, own, group)
        rows = torch.tensor(group.indices, device=next(iter(own.values())).device)
        yield rows, torch.cat([blocks[name].flatten(2)[:, :, index] for name, index in chosen.items()], dim=2)
