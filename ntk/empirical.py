"""Empirical tangent kernels of any PyTorch or Hugging Face model: the public functions, and the table of methods."""

import logging
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ntk import reference
from ntk.adapters import Method, layers_of
from ntk.functional import ParameterChoice, evaluation, nonfinite_cause, select_parameters
from ntk.inputs import Inputs
from ntk.outputs import Output
from ntk.request import Request
from ntk.structured import kernels as structured
from ntk.structured import layer_calls
from ntk.structured.calls import find_lost_layers
from ntk.structured.targets import Targets, method_kernels
from ntk.structured.work import warn_of_slow_parameters

logger = logging.getLogger(__name__)

# name -> function(request, params, *, summed) -> {name: kernel}
METHODS: dict[str, Callable[..., dict[str, Tensor]]] = {
    "jacobian": reference.layer_kernels,
    "structured": structured.layer_kernels,
    # The structured path checks itself on every call, and the reference takes the parameters that it cannot capture.
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
    """The exact empirical neural tangent kernel.

        K[i, j, a, b] = < d f_a(x_i)/d theta, d f_b(x'_j)/d theta >

    unnormalised, over the chosen parameters theta in their own (standard) parametrisation (Jacot, Gabriel and Hongler
    2018). The model runs in evaluation mode and is left as it was found.

    Args:
        model: any module that takes tensors, or a Hugging Face model that takes the entries of ``inputs``.
        inputs: a batch of n1 examples: a tensor ``(n1, ...)``, a tuple of tensors in the order of the arguments of
            ``model.forward``, or a mapping of batched tensors (a tokenizer's output), padded on either side. An example
            is its real tokens: see :mod:`ntk.inputs`.
        inputs2: n2 examples for the columns; None for the symmetric kernel.
        params: ``"all"``, ``"trainable"``, names of parameters or modules, patterns such as ``"*.bias"``, or a
            predicate ``(name, parameter) -> bool``: see :func:`ntk.functional.select_parameters`. Tied parameters count
            once.
        output: ``(model_output, inputs) -> (n, c)``; a classifier's logits if None. See :mod:`ntk.outputs`.
        reduce: None, ``"trace"``, ``"diagonal"`` or ``"sum"``: see :func:`ntk.layout.reduce_outputs`. The kernel
            is never formed with its c^2 entries of each pair; ``"sum"`` takes one backward pass instead of c.
        method: ``"jacobian"`` is the reference (:mod:`ntk.reference`), ``"structured"`` the fast way
            (:mod:`ntk.structured.kernels`; costs there). ``"auto"`` takes the fast way for every parameter whose
            captured features add up to ordinary gradients, on one or two examples, and the reference for the others.
            Examples run together where :mod:`ntk.structured.independence` shows that they do not change one another,
            else one at a time. The logger ``ntk`` reports at level INFO which parameters took the reference, and why;
            one `SlowKernelWarning` names a parameter with more than a hundredth of the work that goes a slow way.
            :func:`ntk.explain` says the same before anything is computed.
        memory_budget: bytes for Jacobians or features, and kernels, beside the model itself; None for half of the free
            memory.
        progress: show a progress bar.

    Returns:
        ``(n1, n2, c, c)`` or its reduction, on the model's device, in the widest parameter dtype (at least float32).

    Raises:
        ValueError: unusable arguments; inputs on another device than the model; no output of shape (n, c); NaN or
            infinite values, with their cause.
        MemoryError: more memory is needed than ``memory_budget``; the message says how much.

    Example:
        >>> model = torch.nn.Linear(3, 2, bias=False).double()
        >>> x = torch.eye(3, dtype=torch.float64)[:2]
        >>> empirical_ntk(model, x, reduce="trace")
        tensor([[2., 0.],
                [0., 2.]], dtype=torch.float64)
    """
    request = Request(model, inputs, inputs2, output, reduce, memory_budget, progress)
    return _kernels(request, params, method, summed=True)[""]


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
    request = Request(model, inputs, inputs2, output, reduce, memory_budget, progress)
    return _kernels(request, params, method, summed=False)


def adapter_kernels(
    model: nn.Module,
    inputs: Inputs,
    methods: Mapping[str, Any],
    inputs2: Inputs | None = None,
    *,
    output: Output | None = None,
    reduce: str | None = None,
    method: str = "auto",
    memory_budget: int | float | None = None,
    progress: bool = False,
) -> dict[str, Float[Tensor, "..."]]:
    """The kernel of each parameter-efficient method at its initialisation, all from the same passes.

    Arguments as in :func:`empirical_ntk`, and:

    Args:
        model: the bare model; its head is not adapted, but ``Full`` and ``BitFit`` count its parameters.
        methods: methods of :mod:`ntk.adapters` by any name.
        method: ``"jacobian"`` is the reference: Jacobians of the network's own parameters, and each adapted layer's
            calls, one example at a time (:mod:`ntk.structured.layer_calls`). ``"structured"`` and ``"auto"`` take the
            fast way for every parameter and layer for which it is found exact, and the reference for the others, which
            the logger ``ntk`` reports at level INFO.

    Returns:
        One kernel for each name, of the shape that :func:`empirical_ntk` gives.

    Raises:
        ValueError: as :func:`empirical_ntk`; a method trains nothing in this model.
        TypeError: ``methods`` is no mapping from names to methods.
        NotImplementedError: a method chooses a layer that cannot carry its adapter; the message says what to do.
        MemoryError: as :func:`empirical_ntk`.
    """
    if not isinstance(methods, Mapping) or not all(isinstance(each, Method) for each in methods.values()):
        raise TypeError(f"methods must map names to methods such as ntk.adapters.LoRA(rank=8); got {methods!r}")
    request = Request(model, inputs, inputs2, output, reduce, memory_budget, progress)
    kernels = kernels_of_methods(request, methods, method)
    if absent := [key for key in methods if key not in kernels]:
        raise ValueError(
            f"method {absent[0]!r} ({methods[absent[0]]}) trains nothing in this model that its output depends on: see "
            "its choice of modules"
        )
    return {key: kernels[key] for key in methods}


def kernels_of_methods(request: Request, methods: Mapping[str, Method], method: str) -> dict[str, Tensor]:
    """As :func:`adapter_kernels`, without the methods that train nothing on which the output depends."""
    _check_method(method)
    model = request.model
    method_kernels(model, methods)  # raises before anything runs if a method trains nothing
    with evaluation(model, request.inputs, request.inputs2):
        kernels, uncaptured, targets = _captured(request, methods, method)
        rest = {name: weights for name, weights in targets.weights.items() if name in uncaptured}
        if rest:
            if method != "jacobian":
                request.reference.update({name: uncaptured[name] for name in rest})
            params = {name: p for name, p in select_parameters(model).items() if name in rest}
            for name, kernel in reference.layer_kernels(request, params, summed=False).items():
                for key, weight in rest[name].items():
                    kernels[key] = kernels.get(key, torch.zeros_like(kernel)) + weight * kernel
        if targets.lost:
            logger.info("layers by their calls: %s", "; ".join(f"{name} ({why})" for name, why in targets.lost.items()))
            layers = {name: module for name, module in layers_of(model).items() if name in targets.lost}
            added, read = layer_calls.adapter_kernels(request, layers, methods)
            _warn_of_reads(methods, read)
            for key, kernel in added.items():
                kernels[key] = kernels[key] + kernel if key in kernels else kernel
    check_finite_kernels(request, kernels)
    warn_of_slow_parameters(request.slow, request.reference, request.examples, stacklevel=3)
    return kernels


def _captured(
    request: Request, methods: Mapping[str, Method], method: str
) -> tuple[dict[str, Tensor], dict[str, str], Targets]:
    """Kernels of the structured path, parameters that it did not capture and why, and targets with lost layers."""
    model = request.model
    if method == "jacobian":
        targets = method_kernels(model, methods, dict.fromkeys(layers_of(model), "by the reference"))
        return {}, dict.fromkeys(targets.weights, "by the reference"), targets
    targets = method_kernels(model, methods)
    if targets.layers:
        find_lost_layers(model, request.output, request.rows[0].take(slice(0, 1)), targets)
    while True:
        targets = method_kernels(model, methods, targets.lost)
        before = set(targets.lost)
        if not (targets.weights or targets.layers):
            return {}, {}, targets
        kernels, uncaptured = structured.kernels(request, targets)
        # If only a later batch shows that a layer is lost, features of earlier batches are in the kernels already.
        if all(targets.layers[name][1] in uncaptured for name in targets.lost.keys() - before):
            break
    for parameter, why in uncaptured.items():
        for name in targets.layers_of_weight.get(parameter, ()):
            targets.lost.setdefault(name, why)
    return kernels, uncaptured, method_kernels(model, methods, targets.lost)


def _warn_of_reads(methods: Mapping[str, Method], read: set[str]) -> None:
    """Warn of layers whose weight the model reads without calling them, where an adapter acts on calls only."""
    for name in sorted(read):
        silent = [key for key, method in methods.items() if method.adapts(name) and not method.in_reads]
        if silent:
            warnings.warn(
                f"the model reads the weight of {name} and does not call the layer: an adapter of {', '.join(silent)} "
                "acts on calls alone, so this use adds nothing to the kernel; leave the layer out of its modules, or "
                "take ntk.adapters.Full",
                stacklevel=4,
            )


def _kernels(request: Request, params: ParameterChoice, method: str, *, summed: bool) -> dict[str, Tensor]:
    _check_method(method)
    chosen = select_parameters(request.model, params)
    with evaluation(request.model, request.inputs, request.inputs2):
        kernels = METHODS[method](request, chosen, summed=summed)
    check_finite_kernels(request, kernels)
    warn_of_slow_parameters(request.slow, request.reference, request.examples, stacklevel=3)
    return kernels


def _check_method(method: str) -> None:
    if method not in METHODS:
        raise ValueError(f"method must be one of {', '.join(map(repr, METHODS))}; got {method!r}")


def check_finite_kernels(request: Request, kernels: dict[str, Tensor]) -> None:
    """Raise ValueError, with the cause, if a kernel holds NaN or infinite values."""
    if not all(torch.isfinite(kernel).all() for kernel in kernels.values()):
        raise ValueError(f"the kernel holds NaN or infinite values: {nonfinite_cause(request.model, request.inputs)}")
