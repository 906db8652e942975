"""Sign-gradient kernels of methods at their initialisation: the effect of a step of sign descent on other examples.

    K[i, j, a, b] = < d f_a(x_i)/d theta, sign(d f_b(x'_j)/d theta) >

Adam's first steps, and all its steps while its averages follow the gradient, are close to sign descent (Malladi et al.
2023, def. 3.4). The sign applies to each entry of an example's whole gradient, so features are formed as whole tensors,
one parameter at a time, slice by slice. :func:`ntk.dynamics.sign_gradient_kernel` is the reference, from Jacobians.
"""

import math
from collections.abc import Mapping

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ntk.adapters import Method
from ntk.checks import not_overflown, real_and_finite
from ntk.dynamics.regression import SINGULAR
from ntk.empirical import check_finite_kernels
from ntk.functional import evaluation
from ntk.inputs import Inputs
from ntk.outputs import Output
from ntk.request import Request
from ntk.structured import kernels as structured
from ntk.structured.targets import method_kernels


def sign_gradient_kernels(
    model: nn.Module,
    inputs: Inputs,
    methods: Mapping[str, Method],
    inputs2: Inputs | None = None,
    *,
    output: Output | None = None,
    memory_budget: int | float | None = None,
    progress: bool = False,
) -> dict[str, Float[Tensor, "n1 n2 c c"]]:
    """The sign-gradient kernel of each method, with signs on the side of the columns; it is not symmetric.

    Args:
        model: the bare model, as in :func:`ntk.adapter_kernels`.
        inputs: n1 examples, the rows.
        methods: methods of :mod:`ntk.adapters` by any name.
        inputs2: n2 examples, the columns; the rows' examples if None.
        output: as in :func:`ntk.empirical_ntk`.
        memory_budget: bytes; the features of one layer on all examples must fit, and the kernels.
        progress: show a progress bar.

    Cost: one forward and c backward passes, and n1 n2 c^2 P multiplications for P parameters.

    Raises:
        ValueError: as :func:`ntk.adapter_kernels`; a method that gives parameters a weight other than 1, such as LoRA
            in its mean over A.
        NotImplementedError: a parameter's gradient cannot be captured.
        MemoryError: more memory is needed than ``memory_budget``.
    """
    targets = method_kernels(model, methods)
    for name, weights in targets.weights.items():
        if weighed := [key for key, weight in weights.items() if weight != 1]:
            raise ValueError(
                f"method {weighed[0]!r} weighs {name} by {weights[weighed[0]]:.3g}: a sign has no weight, and no mean "
                "over draws; take a method of single draws, such as ntk.adapters.LoRA(a='random')"
            )
    request = Request(model, inputs, inputs2, output, None, memory_budget, progress)
    with evaluation(model, request.inputs, request.inputs2):
        kernels, uncaptured = structured.kernels(request, targets, signed=True)
    if uncaptured := uncaptured | targets.lost:
        name, why = next(iter(uncaptured.items()))
        raise NotImplementedError(
            f"the gradient of {name} cannot be captured ({why}): take ntk.dynamics.sign_gradient_kernel of Jacobians"
        )
    check_finite_kernels(request, kernels)
    return {key: kernels[key] for key in methods}


def sign_gradient_regression(
    kernel: Float[Tensor, "n n"],
    targets: Float[Tensor, "_"],
    initial: Float[Tensor, "_"],
    *,
    cross: Float[Tensor, "_ _"],
    initial_cross: Float[Tensor, "m"],
    ridge: int | float,
) -> Float[Tensor, "m"]:
    """f(x) = f_0(x) + K(x, X) (K + ridge I)^-1 (y - f_0(X)) for a kernel of one output that is not symmetric.

    A step of sign descent on example j alone, of size a_j, moves f(x) by a_j K(x, x_j); the sizes a are those with
    which the steps reach the targets. Least squares with asymmetric kernels: He et al. 2023. Float64.

    Raises:
        ValueError: shapes that do not fit, numbers that are complex or not finite, a negative ridge.
        ArithmeticError: the kernel with its ridge is singular up to rounding; the predictions overflow.
    """
    n, m = len(targets), len(initial_cross)
    if kernel.shape != (n, n) or cross.shape != (m, n) or initial.shape != targets.shape:
        raise ValueError(
            f"expected kernels {(n, n)} and {(m, n)} for {n} targets and {m} new inputs; got {tuple(kernel.shape)} and "
            f"{tuple(cross.shape)}"
        )
    if not (math.isfinite(ridge) and ridge >= 0):
        raise ValueError(f"ridge must be at least 0; got {ridge}")
    kernel, cross = real_and_finite(kernel, "kernel"), real_and_finite(cross, "cross")
    y, f0 = real_and_finite(targets, "targets"), real_and_finite(initial, "initial")
    shifted = kernel + ridge * torch.eye(n, dtype=torch.float64, device=kernel.device)
    condition = float(torch.linalg.cond(shifted, 1))
    if not condition * SINGULAR < 1:
        raise ArithmeticError(
            f"the sign-gradient kernel is singular up to rounding (condition number {condition:.3g}): give a larger "
            "ridge"
        )
    moved = cross @ torch.linalg.solve(shifted, y - f0)
    predicted = real_and_finite(initial_cross, "initial_cross") + moved
    return not_overflown(predicted, "the predictions", "scale the outputs, or give a larger ridge")
