"""The mean kernel of scales on a ReLU network's input at a finite number of input coordinates."""

import math

import pytest
import torch

import ntk
from ntk.infinite import mlp_kernels, relu_input_bias
from ntk.infinite.networks import MLP, Recipe, is_multiplier


def inputs(n: int, n_in: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(n, n_in, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def finite_mean(x: torch.Tensor, sigma_w: float, sigma_b: float, depth: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    """The kernel at n_0 -> infinity and what n_0 adds to it."""
    limit = mlp_kernels(x, depth=depth, activation="relu", sigma_w=sigma_w, sigma_b=sigma_b, degree=3)
    above = mlp_kernels(x, depth=depth, activation="relu", sigma_w=sigma_w, sigma_b=sigma_b).layers.biases[1]
    d2 = above / sigma_b**2 if sigma_b else torch.ones(len(x), len(x), dtype=torch.float64)
    bias = relu_input_bias(x, sigma_w=sigma_w, sigma_b=sigma_b)
    return limit.propulsion_input.mean, 9 * sigma_w**4 / x.shape[1] * d2 * bias


@pytest.mark.parametrize("sigma_b", [0.0, 0.8])
@pytest.mark.parametrize("n_in", [2, 5, 40])
def test_the_mean_at_the_input_has_the_bias_stated(n_in, sigma_b):
    """Given the first layer, the mean over the readout is an average over units, drawn here a million times."""
    x = inputs(4, n_in)
    generator = torch.Generator().manual_seed(1)
    total, square, blocks, size = 0.0, 0.0, 40, 25_000
    for _ in range(blocks):
        w = torch.randn(size, n_in, generator=generator, dtype=torch.float64)
        b = torch.randn(size, 1, generator=generator, dtype=torch.float64)
        on = (1.3 / math.sqrt(n_in) * w @ x.T + sigma_b * b > 0).double()
        mean = torch.stack([(on * w[:, j : j + 1] ** 2).T @ on * x[:, j] * x[:, j : j + 1] for j in range(n_in)]).sum(0)
        value = 9 * 1.3**4 / n_in * mean / size
        total, square = total + value / blocks, square + value**2 / blocks
    error = ((square - total**2) / blocks).sqrt()
    limit, bias = finite_mean(x, 1.3, sigma_b)
    assert float(((total - limit - bias).abs() / error).max()) < 4.5
    # Without the bias the value is wrong by many standard errors, and by much of the kernel at few coordinates.
    assert float(((total - limit).abs() / error).max()) > 20
    assert float(bias.norm() / limit.norm()) > {2: 0.1, 5: 0.05, 40: 0.005}[n_in]


def input_kernels(w: torch.Tensor, c: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """The kernels of scales of degree 3 on the input of networks (draws, width, n_in), (draws, width)."""
    width, n_in = w.shape[1:]
    on = (torch.einsum("dij,nj->dni", w, x) > 0).double()
    features = 3 * x * 1.3**2 / math.sqrt(n_in * width) * torch.einsum("dni,di,dij->dnj", on, c, w)
    return features @ features.mT


def test_networks_have_that_mean_and_not_the_limits():
    """Over the draws of whole networks, with two inputs of two coordinates."""
    x, draws = inputs(2, 2, seed=3), 20_000
    generator = torch.Generator().manual_seed(0)
    w = torch.randn(draws, 64, 2, generator=generator, dtype=torch.float64)
    kernels = input_kernels(w, torch.randn(draws, 64, generator=generator, dtype=torch.float64), x)
    made = Recipe(generator=torch.Generator().manual_seed(5), sigma_w=1.3, multipliers=("input",), degree=3)
    net = MLP(2, width=64, depth=1, activation="relu", recipe=made)
    one = input_kernels(net.layers[0].weight.detach()[None], net.layers[1].weight.detach(), x)[0]
    torch.testing.assert_close(ntk.empirical_ntk(net, x, params=is_multiplier, reduce="trace"), one)
    error = kernels.std(dim=0) / math.sqrt(draws)
    limit, bias = finite_mean(x, 1.3, 0.0)
    assert float(((kernels.mean(0) - limit - bias).abs() / error).max()) < 4
    assert abs(float((kernels.mean(0) - limit)[0, 1] / error[0, 1])) > 8


def test_it_vanishes_on_the_diagonal_and_without_a_dominant_coordinate():
    x = inputs(3, 4)
    x[2] = x[1]
    bias = relu_input_bias(x, sigma_w=1.0)
    assert not bias.diagonal().any()
    assert bias[1, 2] == 0
    shares = []
    for n_in in (4, 64, 1024):
        limit, bias = finite_mean(inputs(6, n_in), 1.0, 0.0)
        shares.append(float(bias.norm() / limit.norm()))
    assert shares[0] > 5 * shares[1] > 50 * shares[2]
    dominated = inputs(6, 1024)
    dominated[:, 0] = 30 * inputs(6, 1, seed=5)[:, 0]
    limit, bias = finite_mean(dominated, 1.0, 0.0)
    assert float(bias.norm() / limit.norm()) > 20 * shares[2]


def test_a_deeper_network_multiplies_the_bias_by_the_gradients_above():
    x = inputs(3, 3)
    limit, bias = finite_mean(x, 1.3, 0.5, depth=3)
    shallow, shallow_bias = finite_mean(x, 1.3, 0.5, depth=1)
    torch.testing.assert_close(bias / shallow_bias.where(shallow_bias != 0, torch.ones_like(bias)),
                               (limit / shallow).where(bias != 0, torch.zeros_like(bias)))  # fmt: skip
    with pytest.raises(ValueError, match="NaN"):
        relu_input_bias(x * math.nan, sigma_w=1.0)
