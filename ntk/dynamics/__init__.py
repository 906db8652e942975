"""Predictions of training from a kernel: regression, gradient flow, and the linearised model."""

from ntk.dynamics.linearized import Linearized, linearization_error, linearize, relative_drift
from ntk.dynamics.regression import Spectrum, cross_entropy_flow, gradient_flow, kernel_regression, sign_gradient_kernel

__all__ = ["Spectrum", "cross_entropy_flow", "gradient_flow", "kernel_regression", "sign_gradient_kernel"]
__all__ += ["Linearized", "linearization_error", "linearize", "relative_drift"]
