"""Infinitely wide networks: NNGP, NTK and Propulsion kernels, and the gap between the last two.

Call :func:`mlp_kernels`. :mod:`ntk.infinite.activations` has the table of activations, :mod:`.closed_forms` and
:mod:`.quadrature` the expectations, :mod:`.mlp` and :mod:`.residual` the recursions with their formulas, and
:mod:`.networks` finite networks that approach the limits. :mod:`.by_integration` has Propulsion's limit once more,
without closed forms.
"""

from ntk.infinite.activations import ACTIVATIONS, Activation, from_function, leaky_relu, relu_power
from ntk.infinite.by_integration import propulsion_by_integration
from ntk.infinite.gaussian import Moments, Pairs, pairs_of_rows
from ntk.infinite.input_position import relu_input_bias
from ntk.infinite.mlp import METHODS, Layers, MLPKernels, RandomTerm, mlp_kernels
from ntk.infinite.quadrature import (
    ConvergenceError,
    diagonal_moments,
    plane_moments,
    quadrature_moments,
    series_moments,
)
from ntk.infinite.residual import ResidualKernels, residual_kernels

__all__ = [
    "METHODS",
    "Layers",
    "MLPKernels",
    "RandomTerm",
    "ResidualKernels",
    "mlp_kernels",
    "propulsion_by_integration",
    "relu_input_bias",
    "residual_kernels",
]
__all__ += ["ACTIVATIONS", "Activation", "from_function", "leaky_relu", "relu_power"]
__all__ += ["Moments", "Pairs", "pairs_of_rows"]
__all__ += ["ConvergenceError", "diagonal_moments", "plane_moments", "quadrature_moments", "series_moments"]
