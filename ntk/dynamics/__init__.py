"""What a kernel predicts of training: regression, gradient flow, the linearised model, and how lazy training was."""

from ntk.dynamics.linearized import Linearized, linearization_error, relative_drift
from ntk.dynamics.regression import Spectrum, cross_entropy_flow, gradient_flow, kernel_regression, sign_gradient_kernel

__all__ = [
    "Linearized",
    "Spectrum",
    "cross_entropy_flow",
    "gradient_flow",
    "kernel_regression",
    "linearization_error",
    "relative_drift",
    "sign_gradient_kernel",
]
