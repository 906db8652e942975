"""Infinitely wide networks: NNGP, NTK and Propulsion limits, and the gap between them.

:func:`mlp_kernels` is the entry; :mod:`ntk.infinite.activations` the table of activations, :mod:`.closed_forms` and
:mod:`.quadrature` the expectations, :mod:`.mlp` the recursion and its formulas.
"""

from ntk.infinite.activations import ACTIVATIONS, Activation, from_function, leaky_relu
from ntk.infinite.gaussian import Moments, Pairs, pairs_of_rows
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
    "ACTIVATIONS",
    "METHODS",
    "Activation",
    "ConvergenceError",
    "Layers",
    "MLPKernels",
    "Moments",
    "Pairs",
    "RandomTerm",
    "ResidualKernels",
    "diagonal_moments",
    "from_function",
    "leaky_relu",
    "mlp_kernels",
    "pairs_of_rows",
    "plane_moments",
    "quadrature_moments",
    "residual_kernels",
    "series_moments",
]
