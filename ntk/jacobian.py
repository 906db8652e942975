"""The reference: Jacobians by reverse mode, contracted tile by tile.

    K[i, j, a, b] = sum_theta  d f_a(x_i)/d theta * d f_b(x_j)/d theta

Jacobian contraction as in Novak, Sohl-Dickstein and Schoenholz (2022, sec. 3.1), by ``torch.func``. Slow, large and
simple: it is what every faster kernel is compared with. For n examples, c outputs, P parameters and tiles of b
examples: time (n c)^2 P for the contraction and (1 + n/2b) n Jacobians; memory 2 b c P beside the model and kernel.
"""

import logging
from collections.abc import Callable, Iterator
from typing import Any

import psutil
import torch
from torch import Tensor, nn
from torch.func import jacrev, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel
from tqdm import tqdm

from ntk import inputs as _inputs
from ntk.functional import Parameters, is_encoder_decoder, output_function
from ntk.inputs import Group, Inputs
from ntk.kernels import Layout, mirrored
from ntk.outputs import Output

logger = logging.getLogger(__name__)

Jacobian = dict[str, Tensor]  # parameter name -> (b, c, *parameter shape)


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
    """Kernel of each parameter, ``{name: (n1, n2, ...)}``; with ``summed`` only their sum, under the name ``""``.

    The output axes are those of ``layout``.

    Raises:
        MemoryError: the kernels, or the Jacobians of two single examples, exceed ``memory_budget``; says which.
    """
    groups1 = _inputs.group_examples(inputs, encoder_decoder=is_encoder_decoder(model))
    symmetric = inputs2 is None
    groups2 = groups1 if inputs2 is None else _inputs.group_examples(inputs2, encoder_decoder=is_encoder_decoder(model))
    n1, n2 = (sum(len(g.indices) for g in groups) for groups in (groups1, groups2))
    jacobian = jacobian_function(model, output)

    c = _number_of_outputs(model, groups1[0], output, params)
    names = [""] if summed else list(params)
    dtype = _accumulation_dtype(params)
    size = _tile_size(params, n1, n2, c, layout, len(names), dtype, memory_budget)
    device = next(iter(params.values())).device
    kernels = {name: torch.zeros(n1, n2, *layout.shape(c), dtype=dtype, device=device) for name in names}

    tiles1 = _inputs.tiles(groups1, size)
    tiles2 = tiles1 if symmetric else _inputs.tiles(groups2, size)
    pairs = [(i, j) for i in range(len(tiles1)) for j in range(i if symmetric else 0, len(tiles2))]
    with tqdm(total=len(pairs), desc="kernel tiles", disable=None if progress else True, leave=False) as bar:
        for i, tile1 in enumerate(tiles1):
            rows, jacobian1 = jacobian(params, tile1)
            for j in range(i if symmetric else 0, len(tiles2)):
                diagonal = symmetric and i == j
                columns, jacobian2 = (rows, jacobian1) if diagonal else jacobian(params, tiles2[j])
                for name in params:
                    block = layout.contract(jacobian1[name].to(dtype), jacobian2[name].to(dtype))
                    kernel = kernels["" if summed else name]
                    kernel[rows[:, None], columns[None, :]] += block
                    if symmetric and not diagonal:
                        kernel[columns[:, None], rows[None, :]] += mirrored(block)
                bar.update()
    return kernels


def jacobian_function(
    model: nn.Module, output: Output | None
) -> Callable[[Parameters, list[Group]], tuple[Tensor, Jacobian]]:
    """J(params, tile) -> (indices of the tile's examples, their Jacobians ``{name: (b, c, *shape)}``).

    Runs ``vmap(jacrev(f))`` on each group of the tile. Some models cannot be traced by ``torch.func`` (an
    ``autograd.Function`` without its rules in BLOOM, a data-dependent shape in BART): for those each example and output
    takes its own backward pass, which is slower and just as exact. Which one ran is logged at level INFO.
    """
    f = output_function(model, output)
    traceable: list[bool] = []  # decided by the first group that settles it

    def per_group(params: Parameters, group: Group) -> Jacobian:
        if traceable != [False]:
            try:
                # The fused attention kernels have no batching rule; the plain formula has.
                with sdpa_kernel(SDPBackend.MATH):
                    result = vmap(jacrev(lambda p, x: f(p, x, group.constant)), in_dims=(None, 0))(
                        params, group.batched
                    )
                traceable[:] = [True]
                return result
            except (RuntimeError, NotImplementedError) as error:
                # A model that torch.func could trace before fails for a reason of its own, which must be seen; so does
                # one that fails in the loop as well.
                if traceable:
                    raise
                _check_randomness(error)
                why = str(error).partition(". ")[0]
                logger.info("no vmap over %s (%s): one backward pass per output instead", type(model).__name__, why)
                traceable[:] = [False]
        return _looped_jacobian(f, params, group)

    def jacobian(params: Parameters, tile: list[Group]) -> tuple[Tensor, Jacobian]:
        device = next(iter(params.values())).device
        rows = torch.tensor([i for group in tile for i in group.indices], device=device)
        parts = [per_group(params, group) for group in tile]
        if len(parts) == 1:
            return rows, parts[0]
        # Parameter by parameter, freeing the parts, so that the tile is never held twice.
        return rows, {name: torch.cat([part.pop(name) for part in parts]) for name in params}

    return jacobian


def _check_randomness(error: Exception) -> None:
    if "randomness" in str(error):
        raise ValueError(
            "the model draws random numbers in evaluation mode, so it has no tangent kernel; switch its noise off"
        ) from error


def _looped_jacobian(f: Callable[..., Tensor], params: Parameters, group: Group) -> Jacobian:
    """As ``vmap(jacrev(f))``, by ``torch.autograd.grad`` alone."""
    rows: dict[str, list[Tensor]] = {name: [] for name in params}
    with torch.enable_grad():
        leaves = {name: p.detach().requires_grad_() for name, p in params.items()}
        for position in range(len(group.indices)):
            values = f(leaves, {key: value[position] for key, value in group.batched.items()}, group.constant)
            for value in values:
                gradients = torch.autograd.grad(
                    value, list(leaves.values()), retain_graph=True, allow_unused=True, materialize_grads=True
                )
                for name, gradient in zip(leaves, gradients, strict=True):
                    rows[name].append(gradient)
    g = len(group.indices)
    return {name: torch.stack(r).unflatten(0, (g, len(r) // g)) for name, r in rows.items()}


def _number_of_outputs(model: nn.Module, group: Group, output: Output | None, params: Parameters) -> int:
    example: dict[str, Any] = {key: value[0] for key, value in group.batched.items()}
    return len(output_function(model, output)(params, example, group.constant))


def _accumulation_dtype(params: Parameters) -> torch.dtype:
    """The widest parameter dtype, and never less than float32: sums over millions of products."""
    dtype = torch.float32
    for p in params.values():
        dtype = torch.promote_types(dtype, p.dtype)
    return dtype


def _tile_size(
    params: Parameters, n1: int, n2: int, c: int, layout: Layout, kernels: int, dtype: torch.dtype,
    memory_budget: int | float | None,
) -> int:  # fmt: skip
    """Examples a tile, b, so that two tiles of Jacobians and the kernels fit the budget."""
    device = next(iter(params.values())).device
    budget = memory_budget if memory_budget is not None else default_memory_budget(device)
    # Twice: what is added to the kernels may be as large as they are.
    kernel_bytes = 2 * kernels * n1 * n2 * layout.size(c) * dtype.itemsize
    # One example's Jacobian, plus the copy that joining groups or changing dtype makes of the largest parameter.
    example_bytes = c * (
        sum(p.numel() * p.element_size() for p in params.values())
        + max(p.numel() for p in params.values()) * dtype.itemsize
    )
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
            f"needs at least {gigabytes(minimum)} but memory_budget is {gigabytes(budget)} "
            f"(kernels {gigabytes(kernel_bytes)}, Jacobians of two examples {gigabytes(2 * example_bytes)}): "
            f"use {reduce_by}, or raise memory_budget"
        )
    return min(max(n1, n2), int((budget - kernel_bytes) // (2 * example_bytes)))


def smaller_layout(layout: Layout, c: int) -> str:
    """What to ask for instead, in words, if a kernel of c outputs is larger than it must be."""
    return ", or reduce='trace'" if layout.size(c) > 1 else ""


def default_memory_budget(device: torch.device) -> int:
    """Half of the memory that is free now on the device, in bytes."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0] // 2
    return psutil.virtual_memory().available // 2


def gigabytes(size: int | float) -> str:
    """A number of bytes in words."""
    return f"{size / 1e9:.2f} GB" if size >= 1e7 else f"{size / 1e6:.3f} MB"


def selected_jacobian_rows(
    model: nn.Module,
    inputs: Inputs,
    params: Parameters,
    output: Output | None,
    chosen: dict[str, Tensor],
    progress: bool,
) -> Iterator[tuple[Tensor, Tensor]]:
    """(example indices, Jacobian at the chosen coordinates ``(b, c, m)``) by group; ``chosen`` is flat, by name."""
    jacobian = jacobian_function(model, output)
    groups = _inputs.group_examples(inputs, encoder_decoder=is_encoder_decoder(model))
    for tile in tqdm(_inputs.tiles(groups, 1), desc="Jacobians", disable=None if progress else True, leave=False):
        rows, blocks = jacobian({name: params[name] for name in chosen}, tile)
        yield rows, torch.cat([blocks[name].flatten(2)[:, :, index] for name, index in chosen.items()], dim=2)
