"""Propulsion's kernel in the infinitely wide perceptron from its definition, every expectation by integration.

:func:`ntk.infinite.mlp_kernels` has closed forms, and for positively homogeneous activations some of its expectations
are one formula, since h phi'(h) = phi(h). A comparison of its two kernels would then compare a number with itself. Here
each expectation is integrated numerically over the plane, and no formula of an activation but phi and phi' is used.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from ntk.infinite.activations import Activation
from ntk.infinite.quadrature import plane_moments


def propulsion_by_integration(
    x: Float[Tensor, "n n_in"], *, depth: int, activation: Activation, sigma_w: float, sigma_b: float, on_input: bool
) -> Float[Tensor, "n n"]:
    """K_P at degree 1 and z = 1 of the perceptron of :mod:`ntk.infinite.mlp`, with scales on every hidden layer:

        K_P = sum_l E[h h' phi'(h) phi'(h')] sigma_w^2 D^{l+1} + (Sigma^1 - sigma_b^2) D^1

    The last term is the scales on the input (in the mean, as in :class:`ntk.infinite.MLPKernels`).

    Args:
        x: Inputs, float64; no two of them parallel, since the angle between nearly parallel ones loses digits here.
        depth: Number of hidden layers.
        activation: phi and phi'; its closed forms are not used.
        sigma_w: Standard deviation of the weights in NTK parametrisation.
        sigma_b: Standard deviation of the biases.
        on_input: Whether the input has scales too.

    Raises:
        ConvergenceError: An integral does not reach a relative error of 1e-12.

    Cost: about 10^5 values of phi for each pair of inputs and layer.
    """
    first = sigma_w**2 / x.shape[1] * x @ x.T
    covariance, slopes, products = first + sigma_b**2, [], []
    for _ in range(depth):
        deviations = covariance.diagonal().sqrt()
        s1, s2 = (s.reshape(-1) for s in torch.broadcast_tensors(deviations[:, None], deviations[None]))
        cosines = (covariance / deviations[:, None] / deviations[None]).clamp(-1, 1)
        angles = cosines.fill_diagonal_(1).arccos().reshape(-1)
        moments = [m.reshape(covariance.shape) for m in plane_moments(activation, s1, s2, angles)]
        outputs, slope, product = (sigma_w**2 * m for m in moments)
        slopes.append(slope)
        products.append(product)
        covariance = outputs + sigma_b**2
    total, after = torch.zeros_like(first), torch.ones_like(first)
    for slope, product in zip(reversed(slopes), reversed(products), strict=True):
        total = total + product * after
        after = after * slope
    return total + first * after if on_input else total
