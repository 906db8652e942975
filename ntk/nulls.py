"""Null models: kernels with which the alignment of a method's kernel is compared.

Each null model ignores the method, but has as many parameters m, or the same inputs. If a method's kernel aligns with
the full kernel no better than the null models do, chance explains its alignment.
"""

from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ntk.checks import as_tensor, check_count, check_numbers, not_overflown
from ntk.empirical import check_finite_kernels
from ntk.functional import ParameterChoice, evaluation, fresh, select_parameters
from ntk.inputs import Inputs, by_name, group_examples, one_by_one
from ntk.layout import Kernel, check_semidefinite, kernel_matrix
from ntk.outputs import Output
from ntk.reference import accumulation_dtype, selected_jacobian_rows
from ntk.request import Request


def random_subset_ntk(
    model: nn.Module,
    inputs: Inputs,
    m: int,
    *,
    generator: torch.Generator,
    params: ParameterChoice = "all",
    output: Output | None = None,
    reduce: str | None = None,
    draws: int = 1,
    progress: bool = False,
) -> list[Float[Tensor, "..."]]:
    """Kernels of ``draws`` random sets of m scalar parameters, drawn without replacement from the selected parameters.

    Each is the kernel of fine-tuning a random sparse mask. One Jacobian for each example serves all draws; memory
    n c m ``draws``.

    Raises:
        ValueError: m is not between 1 and the number of selected parameters; inputs on another device than
            the model; NaN or infinite values, with their cause.
    """
    request = Request(model, inputs, None, output, reduce, None, progress)
    chosen = select_parameters(model, params)
    total = sum(p.numel() for p in chosen.values())
    if not 1 <= m <= total:
        raise ValueError(f"m must be between 1 and the {total:,} selected parameters; got {m}")
    subsets = [
        torch.randperm(total, generator=generator, device=generator.device)[:m].sort().values for _ in range(draws)
    ]
    union = torch.cat(subsets).unique()
    with evaluation(model, request.inputs):
        rows, features = zip(*selected_jacobian_rows(request, chosen, _by_parameter(union, chosen)), strict=True)
    jacobian = torch.cat(features)[torch.cat(rows).argsort()].to(accumulation_dtype(chosen))  # (n, c, |union|)
    blocks = (jacobian[:, :, torch.searchsorted(union, subset).to(jacobian.device)] for subset in subsets)
    kernels = [request.layout.contract(J, J) for J in blocks]
    check_finite_kernels(request, {str(draw): kernel for draw, kernel in enumerate(kernels)})
    return kernels


def _by_parameter(flat: Tensor, params: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Positions within each parameter that has any, from sorted positions in the concatenation of all."""
    result, start = {}, 0
    for name, p in params.items():
        inside = flat[(flat >= start) & (flat < start + p.numel())] - start
        if len(inside):
            result[name] = inside.to(p.device)
        start += p.numel()
    return result


def gaussian_sketch(kernel: Kernel, m: int, *, generator: torch.Generator) -> Float[Tensor, "_ _ ..."]:
    """A random draw of J R R^T J^T, where kernel = J J^T and R (P, m) has iid N(0, 1/m) entries.

    J R has iid columns N(0, K / m), so the draw is K^(1/2) G G^T K^(1/2) / m with G (n c, m) standard normal: the exact
    distribution of a sketch by m random directions, computed without J. Expectation K; cost O((n c)^2 m).

    Raises:
        ValueError: m < 1; a kernel that is not real, finite, symmetric and positive semi-definite.
        OverflowError: the draw overflows the kernel's dtype.
    """
    check_count(m, "m, the number of directions of a sketch,")
    kernel = as_tensor(kernel)
    K = kernel_matrix(kernel, symmetric=True)
    eigenvalues, vectors = torch.linalg.eigh(K)
    check_semidefinite(eigenvalues, 1e-4)
    root = (vectors * eigenvalues.clamp(min=0).sqrt()) @ vectors.T
    wishart = torch.zeros_like(K)
    step = max(1, 10**7 // len(K))  # bounds the memory of G, whose m columns are summed block by block
    for start in range(0, m, step):
        G = torch.randn(len(K), min(step, m - start), dtype=torch.float64, generator=generator, device=generator.device)
        wishart += (G @ G.T).to(K.device)
    sketch = root @ wishart @ root / m
    if kernel.ndim == 4:
        n, _, c, _ = kernel.shape
        sketch = sketch.reshape(n, c, n, c).transpose(1, 2)
    sketch = sketch.to(kernel.dtype) if kernel.is_floating_point() else sketch
    return not_overflown(sketch, "entries of the sketch", "pass the kernel in float64, or scaled")


def permuted(kernel: Kernel, *, generator: torch.Generator) -> Float[Tensor, "_ _ ..."]:
    """The kernel with its examples in random order, K[pi(i), pi(j)], which has the same spectrum.

    Raises:
        ValueError: a kernel that is not real, finite and square over the examples.
    """
    kernel = as_tensor(kernel)
    check_numbers(kernel, "the kernel")
    if kernel.ndim < 2 or kernel.shape[0] != kernel.shape[1]:
        raise ValueError(f"expected a kernel of the examples with themselves, (n, n, ...); got {tuple(kernel.shape)}")
    order = torch.randperm(len(kernel), generator=generator, device=generator.device).to(kernel.device)
    return kernel[order][:, order]


def hidden_state_kernel(model: nn.Module, inputs: Inputs) -> Float[Tensor, "n n"]:
    """Inner products of the examples' last hidden states, averaged over their real tokens.

    Raises:
        ValueError: the model does not return hidden states, as Hugging Face models do; inputs on another device than
            the model; hidden states that are complex or not finite.
    """
    states = []
    with evaluation(model, inputs):
        for one in one_by_one(group_examples(by_name(model, inputs))):
            example: dict[str, Any] = fresh(one.example(0))
            example.pop("labels", None)
            result = None if "" in example else model(**example, output_hidden_states=True)
            hidden = getattr(result, "hidden_states", None) or getattr(result, "encoder_hidden_states", None)
            if not hidden:
                raise ValueError("hidden_state_kernel needs a Hugging Face model that returns its hidden states")
            state = hidden[-1][0].flatten(0, -2)
            check_numbers(state, "the last hidden state")
            states.append(state.to(torch.promote_types(state.dtype, torch.float32)).mean(0))
    H = torch.stack(states)
    return not_overflown(H @ H.T, "inner products of hidden states", "run the model in float64")
