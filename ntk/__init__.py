"""Neural tangent kernels of PyTorch models, and functions that compare kernels.

All modules follow one convention. For n examples, c outputs and P parameters theta,

    K[i, j, a, b] = < d f_a(x_i)/d theta, d f_b(x'_j)/d theta >,   shape (n1, n2, c, c),

with the axes of the examples before those of the outputs, not averaged over anything, in the parametrisation that the
model stores (Jacot, Gabriel and Hongler 2018; Novak, Sohl-Dickstein and Schoenholz 2022). One letter a dimension:
n examples, t tokens, c outputs, p parameters of one tensor, P all parameters.
"""

from ntk import (
    adapters,
    bounds,
    certificates,
    dynamics,
    infinite,
    inputs,
    kernels,
    metrics,
    networks,
    nulls,
    outputs,
    store,
)
from ntk.dynamics import linearize
from ntk.empirical import METHODS, adapter_kernels, empirical_ntk, layer_kernels
from ntk.krylov import SpectralDensity, spectral_density
from ntk.layer_tokens import TokenGradients, token_gradients
from ntk.layerwise import Decomposition, decomposition
from ntk.layout import flatten, reduce_outputs
from ntk.low_rank_law import LoRALaw, lora_law
from ntk.metrics import (
    UndefinedMetricError,
    best_scale,
    center,
    cka,
    effective_rank,
    eigenspace_overlap,
    equivalent_directions,
    kernel_alignment,
    kernel_distance,
    matching_degree,
    participation_ratio,
    principal_angles,
    spectrum,
    trace,
    trace_ratio,
)
from ntk.nulls import gaussian_sketch, hidden_state_kernel, permuted, random_subset_ntk
from ntk.operator import NTKOperator
from ntk.reference import jacobian
from ntk.sign_gradient import sign_gradient_kernels, sign_gradient_regression
from ntk.sketch import SketchedNTK, sketched_ntk
from ntk.store import KernelStore, kernel_store
from ntk.structured.explanation import Explanation, ParameterCost, explain
from ntk.structured.work import SlowKernelWarning
from ntk.trace_estimation import RandomEstimate, stochastic_diagonal, stochastic_trace

__all__ = ["METHODS", "NTKOperator", "adapter_kernels", "empirical_ntk", "flatten", "layer_kernels", "reduce_outputs"]
__all__ += ["jacobian", "linearize"]
__all__ += ["Explanation", "ParameterCost", "SlowKernelWarning", "explain"]
__all__ += ["UndefinedMetricError", "best_scale", "center", "cka", "effective_rank", "eigenspace_overlap"]
__all__ += ["Decomposition", "LoRALaw", "TokenGradients", "decomposition", "lora_law", "token_gradients"]
__all__ += ["equivalent_directions", "participation_ratio"]
__all__ += ["kernel_alignment", "kernel_distance", "matching_degree", "principal_angles", "spectrum"]
__all__ += ["trace", "trace_ratio"]
__all__ += ["gaussian_sketch", "hidden_state_kernel", "permuted", "random_subset_ntk"]
__all__ += ["sign_gradient_kernels", "sign_gradient_regression"]
__all__ += ["RandomEstimate", "SketchedNTK", "SpectralDensity", "sketched_ntk"]
__all__ += ["spectral_density", "stochastic_diagonal", "stochastic_trace"]
__all__ += ["adapters", "bounds", "certificates", "dynamics", "infinite", "inputs", "kernels"]
__all__ += ["KernelStore", "kernel_store"]
__all__ += ["metrics", "networks", "nulls", "outputs", "store"]
