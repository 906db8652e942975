"""Empirical tangent kernels of any PyTorch or Hugging Face model: validation and the table of methods."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ntk import jacobian, structured
from ntk.adapters import Method
from ntk.functional import ParameterChoice, evaluation, nonfinite_cause, select_parameters
from ntk.inputs import Inputs
from ntk.kernels import layout_of
from ntk.outputs import Output, summed_outputs
from ntk.wanted import method_kernels

# name -> function(model, inputs, inputs2, *, params, output, layout, memory_budget, progress, summed) -> {name: kernel}
METHODS: dict[str, Callable[..., dict[str, Tensor]]] = {
    "jacobian": jacobian.layer_kernels,
    "structured": structured.layer_kernels,
    # The structured path checks itself on every call, and hands what it cannot capture to the reference.
    "auto": structured.layer_kernels,
}


def empirical_ntk(
    model: nn.Module,
    inputs: Inputs,
    inputs2: Inputs | None = None,
    *,
    params: ParameterChoice = "all",
    output: Output | None = None,
    reduce: str | None = None,
    method: str = "auto",
    memory_budget: int | float | None = None,
    progress: bool = False,
) -> Float[Tensor, "..."]:
    """The empirical neural tangent kernel, exactly.

        K[i, j, a, b] = < d f_a(x_i)/d theta, d f_b(x'_j)/d theta >

    unnormalised, over the chosen parameters theta in their own (standard) parametrisation (Jacot, Gabriel and Hongler
    2018). The model runs in evaluation mode and is left as it was found.

    Args:
        model: any module that takes one tensor, or a Hugging Face model that takes the entries of ``inputs``.
        inputs: a batch of n1 examples: a tensor ``(n1, ...)`` or a mapping of batched tensors (a tokenizer's output),
            padded on either side. An example is its real tokens: see :mod:`ntk.inputs`.
        inputs2: n2 examples for the columns; None for the symmetric kernel.
        params: ``"all"``, ``"trainable"`` or a predicate ``(name, parameter) -> bool``. Tied parameters count once.
        output: ``(model_output, inputs) -> (n, c)``; a classifier's logits if None. See :mod:`ntk.outputs`.
        reduce: None, ``"trace"``, ``"diagonal"`` or ``"sum"``: see :func:`ntk.kernels.reduce_outputs`. What is reduced
            is formed as such: nothing has the c^2 entries of each pair; ``"sum"`` takes one backward pass instead of c.
        method: ``"jacobian"`` is the reference (:mod:`ntk.jacobian`), ``"structured"`` the fast way
            (:mod:`ntk.structured`; costs there). ``"auto"`` takes the fast way for every parameter whose captured
            features add up to ordinary gradients, on one or two examples, and the reference for the others. Examples
            run together where :mod:`ntk.independence` shows that they do not change one another, else one at a time.
            The logger ``ntk`` says at level INFO what went another way, and why.
        memory_budget: bytes for Jacobians or features, and kernels, beside the model itself; None for half of the free
            memory.
        progress: show a progress bar.

    Returns:
        ``(n1, n2, c, c)`` or its reduction, on the model's device, in the widest parameter dtype (at least float32).

    Raises:
        ValueError: unusable arguments; inputs on another device than the model; no output of shape (n, c); NaN or
            infinite values, with their cause.
        MemoryError: more memory is needed than ``memory_budget``, with the size needed.

    Example:
        >>> model = torch.nn.Linear(3, 2, bias=False).double()
        >>> x = torch.eye(3, dtype=torch.float64)[:2]
        >>> empirical_ntk(model, x, reduce="trace")
        tensor([[2., 0.],
                [0., 2.]], dtype=torch.float64)
    """
    kernels = _kernels(model, inputs, inputs2, params, output, reduce, method, memory_budget, progress, summed=True)
    return kernels[""]


def layer_kernels(
    model: nn.Module,
    inputs: Inputs,
    inputs2: Inputs | None = None,
    *,
    params: ParameterChoice = "all",
    output: Output | None = None,
    reduce: str | None = None,
    method: str = "auto",
    memory_budget: int | float | None = None,
    progress: bool = False,
) -> dict[str, Float[Tensor, "..."]]:
    """The kernel of each parameter, by its name; they sum to :func:`empirical_ntk`, whose arguments these are."""
    return _kernels(model, inputs, inputs2, params, output, reduce, method, memory_budget, progress, summed=False)


def adapter_kernels(
    model: nn.Module,
    inputs: Inputs,
    methods: Mapping[str, Any],
    inputs2: Inputs | None = None,
    *,
    output: Output | None = None,
    reduce: str | None = None,
    memory_budget: int | float | None = None,
    progress: bool = False,
) -> dict[str, Float[Tensor, "..."]]:
    """The kernel of each parameter-efficient method at its initialisation, all from the same passes.

    Args:
        model: the bare model; its head is not adapted, but ``Full`` and ``BitFit`` count its parameters.
        inputs: as in :func:`empirical_ntk`.
        methods: methods of :mod:`ntk.adapters` by any name.
        inputs2: as in :func:`empirical_ntk`.
        output: as in :func:`empirical_ntk`.
        reduce: as in :func:`empirical_ntk`.
        memory_budget: as in :func:`empirical_ntk`.
        progress: show a progress bar.

    Returns:
        One kernel for each name, of the shape that :func:`empirical_ntk` gives.

    Raises:
        ValueError: as :func:`empirical_ntk`; a method trains nothing in this model.
        TypeError: ``methods`` is no mapping from names to methods.
        NotImplementedError: a layer that should be adapted uses its weight in a way that cannot be captured.
        MemoryError: as :func:`empirical_ntk`.
    """
    if not isinstance(methods, Mapping) or not all(isinstance(method, Method) for method in methods.values()):
        raise TypeError(f"methods must map names to methods such as ntk.adapters.LoRA(rank=8); got {methods!r}")
    layout = layout_of(reduce)
    options = {
        "output": summed_outputs(output) if layout.summed else output,
        "layout": layout,
        "memory_budget": memory_budget,
        "progress": progress,
    }
    wanted = method_kernels(model, methods)
    with evaluation(model, inputs, inputs2):
        kernels, left = structured.kernels(model, inputs, inputs2, wanted=wanted, **options)
        if lost := [name for name, _ in wanted.layers if name in left]:
            raise NotImplementedError(
                f"the kernels of adapters beside {lost[0]} cannot be captured ({left[lost[0]]}); "
                "wrap the model by peft, and take empirical_ntk(..., params='trainable') of that"
            )
        if left:
            params = {name: p for name, p in select_parameters(model).items() if name in left}
            rest = jacobian.layer_kernels(model, inputs, inputs2, params=params, **options)
            for name, kernel in rest.items():
                for key, share in wanted.shares[name].items():
                    kernels[key] = kernels.get(key, torch.zeros_like(kernel)) + share * kernel
    _check_finite(model, kernels, inputs, inputs2)
    return {key: kernels[key] for key in methods}


def _kernels(model, inputs, inputs2, params, output, reduce, method, memory_budget, progress, *, summed):
    layout = layout_of(reduce)
    compute = METHODS.get(method)
    if compute is None:
        raise ValueError(f"method must be one of {', '.join(map(repr, METHODS))}; got {method!r}")
    chosen = select_parameters(model, params)
    with evaluation(model, inputs, inputs2):
        kernels = compute(
            model,
            inputs,
            inputs2,
            params=chosen,
            output=summed_outputs(output) if layout.summed else output,
            layout=layout,
            memory_budget=memory_budget,
            progress=progress,
            summed=summed,
        )
    _check_finite(model, kernels, inputs, inputs2)
    return kernels


def _check_finite(model: nn.Module, kernels: dict[str, Tensor], *batches: Inputs | None) -> None:
    if not all(torch.isfinite(kernel).all() for kernel in kernels.values()):
        causes = [nonfinite_cause(model, batch) for batch in batches if batch is not None]
        raise ValueError(f"the kernel holds NaN or infinite values: {causes[0]}")
