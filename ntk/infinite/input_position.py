"""Propulsion on the network's input at a finite number of input coordinates, for ReLU."""

import math

import torch
from jaxtyping import Float
from torch import Tensor

from ntk.infinite.gaussian import ratio
from ntk.infinite.mlp import checked_inputs, first_layer


def relu_input_bias(
    x1: Float[Tensor, "n1 n_0"], x2: Float[Tensor, "n2 n_0"] | None = None, *, sigma_w: float, sigma_b: float = 0.0
) -> Float[Tensor, "n1 n2"]:
    """What the mean kernel of scales on the input of a ReLU network exceeds its value at n_0 -> infinity by.

    The derivative at coordinate j of the input depends on the weights w_ij of that coordinate, and these turn the
    first layer's ReLUs on and off. In the limit of infinite width, with (h, h') the pre-activations of a unit,

        E[K_P,input] = k^2 (sigma_w^2 / n_0) sum_j x_j x'_j sigma_w^2 E[w_j^2 phi'(h) phi'(h')] D^2
                     = k^2 (Sigma^1 - sigma_b^2) D^1  +  k^2 (sigma_w^4 D^2 / n_0) * result
        result       = sum_j x_j x'_j (2 u_j u'_j - rho (u_j^2 + u'_j^2)) / (2 pi sin theta)

    with u = sigma_w x / sqrt(n_0 q) for q the variance of h, and theta = arccos(rho) the angle of (h, h'). On the
    diagonal it is 0. It vanishes relative to x.x' as n_0 grows if no coordinate dominates.

    Args:
        x1: inputs of the rows.
        x2: inputs of the columns; None for the symmetric kernel.
        sigma_w: standard deviation of the weights, in NTK parametrisation.
        sigma_b: standard deviation of the biases.

    Raises:
        ValueError: the inputs are no matrices of the same number of columns.
    """
    a, b = checked_inputs(x1, x2)
    pairs = first_layer(a, b, float(sigma_w), float(sigma_b), symmetric=x2 is None)[3]
    u, v = (
        ratio(sigma_w / math.sqrt(x.shape[1]) * x, q.reshape(-1, 1).sqrt()) for x, q in ((a, pairs.q1), (b, pairs.q2))
    )
    rho = (pairs.plus - pairs.minus) / 2
    numerator = 2 * (a * u) @ (b * v).T - rho * ((a * u**2) @ b.T + a @ (b * v**2).T)
    return torch.where(
        pairs.minus * pairs.plus < 1e-24, torch.zeros_like(rho), ratio(numerator, 2 * math.pi * pairs.sine)
    )
