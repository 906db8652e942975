"""The corrected Theorem 1 in residual networks, with norms, in transformers, at trained z, and at finite width."""

import math

import pytest
import torch
from torch import nn

import ntk
from ntk.infinite import leaky_relu, mlp_kernels, residual_kernels
from ntk.infinite.networks import MLP, Recipe, ResidualMLP, Transformer, is_multiplier


def inputs(n: int = 4, *shape: int) -> torch.Tensor:
    return torch.randn(n, *shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def recipe(seed: int, **changes) -> Recipe:
    return Recipe(
        generator=torch.Generator().manual_seed(seed), **({"sigma_w": 1.2, "multipliers": "hidden"} | changes)
    )


def distance(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


# --- residual networks -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("activation", ["relu", leaky_relu(-0.5)], ids=["relu", "steep"])
def test_residual_networks_approach_their_limits(activation):
    x, draws, layers = inputs(4, 5), 8, ["stem", "branches.0", "branches.1"]
    limit = residual_kernels(x, depth=3, activation=activation, sigma_w=1.2, sigma_b=0.3, branch_scale=0.7, degree=2)
    found = []
    for seed in range(draws):
        net = ResidualMLP(
            5, width=768, depth=3, activation=activation, recipe=recipe(seed, sigma_b=0.3, degree=2), branch_scale=0.7
        )
        kernels = ntk.layer_kernels(net, x, reduce="trace")
        names = {
            "multiplier.z": layers, "weight": [*layers, "readout"], "bias": [*layers, "readout"],
        }  # fmt: skip
        found.append([torch.stack([kernels[f"{layer}.{end}"] for layer in where]) for end, where in names.items()])
    for drawn, expected in zip(zip(*found, strict=True), (limit.propulsion, limit.weights, limit.biases), strict=True):
        values = torch.stack(drawn)
        for layer in range(len(expected)):
            errors = (values[:, layer] - expected[layer]).flatten(1).norm(dim=1)
            scatter = float(errors.square().mean().sqrt())
            assert (
                float((values[:, layer].mean(0) - expected[layer]).norm()) <= 2.5 * scatter / math.sqrt(draws) + 1e-12
            )
            assert scatter < 0.35 * float(expected[layer].norm())


def test_one_layer_without_branches_is_the_perceptron():
    x = inputs(4, 5)
    residual = residual_kernels(x, depth=1, activation="relu", sigma_w=1.3, sigma_b=0.2, degree=3)
    plain = mlp_kernels(x, depth=1, activation="relu", sigma_w=1.3, sigma_b=0.2, degree=3)
    for found, expected in (
        (residual.ntk, plain.ntk), (residual.nngp, plain.nngp), (residual.propulsion[0], plain.propulsion),
        (residual.propulsion_input, plain.propulsion_input.mean),
    ):  # fmt: skip
        assert distance(found, expected) < 1e-14


def test_residual_branches_have_a_gap_off_the_diagonal_and_the_corrected_theorem_fails():
    """This is expected: a branch's output enters several nonlinearities, and is only a part of each one's argument."""
    x = inputs(4, 5)
    x = torch.cat([x, -x[:1], x[:1]])  # an opposite input, and a repeated one
    kernels = residual_kernels(x, depth=4, activation="relu", sigma_w=1.4)
    own = kernels.weights[:4] + kernels.biases[:4]
    assert float((kernels.propulsion - own - kernels.gap).abs().max()) <= 1e-12 * float(own.max())
    assert float(kernels.gap.diagonal(dim1=1, dim2=2).abs().max()) <= 1e-12 * float(own.max())
    assert float(kernels.gap[:, 0, 5].abs().max()) <= 1e-12 * float(own.max())
    assert bool((kernels.gap[:, 0, 1:4] > 1e-3 * own[:, 0, 1:4].abs()).all())
    total = kernels.propulsion.sum(0) + kernels.propulsion_input
    assert distance(total, kernels.weights.sum(0)) > 0.05
    assert distance(total.diagonal(), kernels.weights.sum(0).diagonal()) < 1e-12  # Input's term = readout's.
    # As for the perceptron: linear networks have no gap.
    linear = residual_kernels(x, depth=4, activation="linear", sigma_w=0.8, sigma_b=0.3)
    assert float(linear.gap.abs().max()) <= 1e-12 * float(linear.weights.max())


# --- norms -----------------------------------------------------------------------------------------------------------


class Normed(nn.Module):
    """Two hidden layers with ReLU, a norm before or after it, and scales on every linear layer."""

    def __init__(self, width: int, seed: int, norm: str, sigma_b: float) -> None:
        super().__init__()
        made = recipe(seed, sigma_b=sigma_b, multipliers=(1, 2))
        self.layers = MLP(5, width=width, depth=2, activation="linear", recipe=made).layers
        self.norm = norm

    def activate(self, h: torch.Tensor) -> torch.Tensor:
        width = h.shape[-1:]
        if self.norm == "layer before":
            return nn.functional.layer_norm(h, width).relu()
        if self.norm == "layer after":
            return nn.functional.layer_norm(h.relu(), width)
        return nn.functional.rms_norm(h.relu(), width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.layers[0](x)
        return self.layers[2](self.activate(self.layers[1](self.activate(h))))


@pytest.mark.parametrize("norm", ["layer before", "rms after", "layer after"])
def test_norms_keep_the_corrected_theorem_unless_they_centre_what_the_activation_made(norm):
    x, draws, sigma_b = inputs(4, 5), 10, 0.2
    total: dict[str, torch.Tensor] = {}
    for seed in range(draws):
        for name, kernel in ntk.layer_kernels(Normed(1024, seed, norm, sigma_b), x, reduce="trace").items():
            total[name] = total.get(name, torch.zeros(4, 4, dtype=torch.float64)) + kernel / draws
    for layer in (0, 1):
        propulsion, following = total[f"layers.{layer}.multiplier.z"], total[f"layers.{layer + 1}.weight"]
        if norm != "layer after":
            assert distance(propulsion, following) < 0.12, layer
        else:
            # The excess is sigma_w^2 mu mu' / (s s') times the gradients' covariance: 1 / (pi - 1) for ReLU. The kernel
            # of the biases is that covariance times sigma_b^2.
            gradients = total[f"layers.{layer + 1}.bias"] / sigma_b**2
            assert distance(propulsion, following) > 0.3, layer
            assert distance(propulsion, following + 1.2**2 / (math.pi - 1) * gradients) < 0.12, layer


# --- transformers ----------------------------------------------------------------------------------------------------

BLIND = ("embedding", "query", "key", "value", "attention", "down")  # no elementwise nonlinearity follows


def by_position(
    width: int, activation: str, draws: int = 8, sigma_b: float = 0.0, own: tuple[str, ...] = ("weight",)
) -> dict[str, float]:
    """Distance of the scales' mean kernel from the mean kernel of the layer's own parameters, by position."""
    x, total = inputs(4, 5, 8), {}
    for seed in range(draws):
        made = recipe(seed, multipliers="all", sigma_b=sigma_b)
        net = Transformer(8, width=width, depth=1, recipe=made, activation=activation)
        for name, kernel in ntk.layer_kernels(net, x, reduce="trace").items():
            total[name] = total.get(name, 0) + kernel / draws
    ends = {
        name.removesuffix(".multiplier.z").rpartition(".")[2]: name for name in total if name.endswith(".multiplier.z")
    }
    return {
        position: distance(total[name], sum(total[name.replace("multiplier.z", part)] for part in own))
        for position, name in ends.items()
        if name.replace("multiplier.z", own[0]) in total
    }


def test_only_the_layer_before_the_activation_of_a_transformer_has_a_gap():
    narrow, wide = by_position(16, "gelu"), by_position(256, "gelu")
    assert set(wide) == {*BLIND, "up", "readout"}
    for position in BLIND:
        assert wide[position] < 0.2, position
    # Fluctuations fall with the width, fourfold in expectation, while the gap of the layer before GELU stays.
    assert sum(wide[p] for p in BLIND) < sum(narrow[p] for p in BLIND) / 2
    assert wide["up"] > 1
    assert by_position(256, "linear", draws=4)["up"] < 0.3


def test_the_own_parameters_of_a_blind_position_include_its_bias():
    """The outputs that Propulsion scales include the bias; only the key's bias has no effect, by the softmax."""
    both = by_position(256, "gelu", sigma_b=1.5, own=("weight", "bias"))
    weights = by_position(256, "gelu", sigma_b=1.5)
    assert both["key"] == weights["key"] < 0.25
    for position in ("query", "value", "attention", "down"):
        assert both[position] < 0.25, position
        assert weights[position] > 2 * both[position], position


# --- at a finite width, and at trained z -----------------------------------------------------------------------------


def test_one_hidden_layer_is_unbiased_at_any_width_with_variance_17_over_n():
    """K_P = k^2 sigma_w^2 mean_j w_j^2 phi(h_j)^2: its relative variance is (3 E[phi^4] / E[phi^2]^2 - 1) / n."""
    x, width, draws = inputs(1, 5), 32, 4000
    limit = float(mlp_kernels(x, depth=1, activation="relu", sigma_w=1.2, sigma_b=0).propulsion)
    generator = torch.Generator().manual_seed(3)
    h, w = torch.randn(2, draws, width, generator=generator, dtype=torch.float64)
    found = (1.2**2 * w**2 * (1.2 * float(x.norm()) / math.sqrt(5) * h).relu() ** 2).mean(1)
    net = MLP(5, width=width, depth=1, activation="relu", recipe=recipe(0))
    value = (net.layers[1].weight[0] * net.layers[0](x).relu()[0]).square().mean() * 1.2**2
    torch.testing.assert_close(ntk.empirical_ntk(net, x, params=is_multiplier)[0, 0, 0, 0], value.detach())
    assert abs(float(found.mean()) - limit) < 4 * float(found.std()) / math.sqrt(draws)
    assert float(found.var()) / limit**2 * width == pytest.approx(17, rel=0.2)


def test_the_kernel_at_trained_z_is_that_of_the_merged_network_weighted_by_z_to_the_minus_2():
    x, k = inputs(4, 5), 15
    options = {"width": 12, "depth": 2, "activation": "gelu"}
    trained = MLP(5, recipe=recipe(0, degree=k), **options)
    merged = MLP(5, recipe=recipe(0, degree=k), **options)
    z = []
    with torch.no_grad():
        for layer, other in zip(trained.layers[:2], merged.layers[:2], strict=True):
            z.append(layer.multiplier.z.uniform_(0.98, 1.02, generator=torch.Generator().manual_seed(1)))
            other.weight.mul_(z[-1][:, None] ** k)
    torch.testing.assert_close(trained(x), merged(x))
    J, J1 = (
        torch.stack([torch.cat(torch.autograd.grad(f, [p for n, p in net.named_parameters() if is_multiplier(n, p)],
                                                   retain_graph=True)) for f in net(x)[:, 0]])
        for net in (trained, merged)
    )  # fmt: skip
    flat = torch.cat([v.detach() for v in z])
    torch.testing.assert_close(J, J1 / flat)
    # So the kernel lies between max(z)^-2 and min(z)^-2 times the merged network's: 4 % at the paper's trained z.
    K, K1 = J @ J.T, J1 @ J1.T
    assert float(torch.linalg.eigvalsh(K - K1 / flat.max() ** 2)[0]) >= -1e-12
    assert float(torch.linalg.eigvalsh(K1 / flat.min() ** 2 - K)[0]) >= -1e-12


def test_scales_that_are_independent_of_the_weights_keep_the_layers_identity_up_to_their_mean_power():
    """K_P,l on the merged network is k^2 mean(z^2k) times the next layer's weights, z being the next layer's scales."""
    x, k, draws = inputs(4, 5), 15, 8
    found, expected = {1: 0.0, 2: 0.0}, {1: 0.0, 2: 0.0}
    for seed in range(draws):
        merged = MLP(5, width=1024, depth=2, activation="relu", recipe=recipe(seed, degree=k))
        z = 0.94 + 0.12 * torch.rand(2, 1024, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        with torch.no_grad():
            for layer, scales in zip(merged.layers[:2], z, strict=True):
                layer.weight.mul_(scales[:, None] ** k)
        kernels = ntk.layer_kernels(merged, x, reduce="trace")
        for layer, power in ((1, float((z[1] ** (2 * k)).mean())), (2, 1.0)):
            found[layer] += kernels[f"layers.{layer - 1}.multiplier.z"]
            expected[layer] += k**2 * power * kernels[f"layers.{layer}.weight"]
    assert power == 1
    assert float((z[1] ** (2 * k)).mean()) > 1.3  # so that leaving it out would show
    for layer in (1, 2):
        assert distance(found[layer], expected[layer]) < 0.1


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x: residual_kernels(x, depth=2, activation="gelu", sigma_w=1), "positively homogeneous .* got gelu"),
        (lambda x: residual_kernels(x, depth=0, activation="relu", sigma_w=1), "at least one hidden layer"),
        (lambda x: residual_kernels(x, depth=2, activation="relu", sigma_w=-1), "sigma_w must be positive"),
    ],
)
def test_mistakes(call, message):
    with pytest.raises(ValueError, match=message):
        call(inputs(2, 3))
