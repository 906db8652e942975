"""Neural tangent kernels: tensors in, kernels out.

The one convention, referred to everywhere else. For n examples, c outputs and P parameters theta,

    K[i, j, a, b] = < d f_a(x_i)/d theta, d f_b(x'_j)/d theta >,   shape (n1, n2, c, c),

examples first, then outputs, neither averaged nor divided by anything, in the parametrisation the model stores
(Jacot, Gabriel and Hongler 2018; Novak, Sohl-Dickstein and Schoenholz 2022). One letter per dimension: n examples,
t tokens, c outputs, p parameters of one tensor, P all of them.
"""

from ntk import adapters, bounds, dynamics, infinite, inputs, kernels, metrics, networks, nulls, outputs
from ntk.empirical import METHODS, adapter_kernels, empirical_ntk, layer_kernels
from ntk.layout import flatten, reduce_outputs
from ntk.metrics import (
    UndefinedMetricError,
    best_scale,
    center,
    cka,
    effective_rank,
    eigenspace_overlap,
    kernel_alignment,
    kernel_distance,
    matching_degree,
    principal_angles,
    spectrum,
    trace,
    trace_ratio,
)
from ntk.nulls import gaussian_sketch, hidden_state_kernel, permuted, random_subset_ntk
from ntk.sign_gradient import sign_gradient_kernels, sign_gradient_regression

__all__ = [
    "METHODS",
    "UndefinedMetricError",
    "adapter_kernels",
    "adapters",
    "best_scale",
    "bounds",
    "center",
    "cka",
    "dynamics",
    "effective_rank",
    "eigenspace_overlap",
    "empirical_ntk",
    "flatten",
    "gaussian_sketch",
    "hidden_state_kernel",
    "infinite",
    "inputs",
    "kernel_alignment",
    "kernel_distance",
    "kernels",
    "layer_kernels",
    "matching_degree",
    "metrics",
    "networks",
    "nulls",
    "outputs",
    "permuted",
    "principal_angles",
    "random_subset_ntk",
    "reduce_outputs",
    "sign_gradient_kernels",
    "sign_gradient_regression",
    "spectrum",
    "trace",
    "trace_ratio",
]
