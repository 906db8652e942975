"""Propulsion's limit from its definition by integration: against closed forms, against networks, and Theorem 5."""

import pytest
import torch

import ntk
from ntk.infinite import ACTIVATIONS, Activation, leaky_relu, mlp_kernels, propulsion_by_integration, relu_power
from ntk.infinite.networks import MLP, Recipe, is_multiplier

NETWORK = {"depth": 2, "sigma_w": 1.3, "sigma_b": 0.4}
HOMOGENEOUS = {
    "linear": ACTIVATIONS["linear"],
    "relu": ACTIVATIONS["relu"],
    "leaky_relu": ACTIVATIONS["leaky_relu"],
    "absolute": leaky_relu(-1.0),
    "steep": leaky_relu(2.5),
}


def inputs(n: int = 3, n_in: int = 7) -> torch.Tensor:
    return torch.randn(n, n_in, generator=torch.Generator().manual_seed(5), dtype=torch.float64)


def distance(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).norm() / b.norm())


def by_integration(activation: Activation, *, on_input: bool = True, **changes) -> torch.Tensor:
    return propulsion_by_integration(inputs(), activation=activation, on_input=on_input, **NETWORK | changes)


@pytest.mark.parametrize("positions", ["all", "hidden"])
@pytest.mark.parametrize("name", ["linear", "relu", "leaky_relu", "erf", "gelu"])
def test_it_equals_the_closed_forms(name, positions):
    closed = mlp_kernels(inputs(), activation=name, method="closed", positions=positions, **NETWORK)
    found = by_integration(ACTIVATIONS[name], on_input=positions == "all")
    assert distance(found, closed.propulsion) < 1e-12


@pytest.mark.parametrize("activation", HOMOGENEOUS.values(), ids=HOMOGENEOUS.keys())
@pytest.mark.parametrize("sigma_b", [0.0, 0.4])
def test_the_corrected_theorem_between_computations_that_share_no_formula(activation, sigma_b):
    network = NETWORK | {"sigma_b": sigma_b}
    full = mlp_kernels(inputs(), activation=activation, method="closed", **network)
    assert distance(by_integration(activation, sigma_b=sigma_b), full.ntk_weights) < 1e-12


@pytest.mark.parametrize("case", ["gelu", "erf", "relu, not on the input", "squared relu", "relu, biases"])
def test_it_fails_where_a_condition_is_missing(case):
    name = case.partition(",")[0]
    activation = relu_power(2) if name == "squared relu" else ACTIVATIONS[name]
    full = mlp_kernels(inputs(), activation=activation, **NETWORK)
    found = by_integration(activation, on_input="not on" not in case)
    assert distance(found, full.ntk if "biases" in case else full.ntk_weights) > 1e-2


def test_without_closed_forms_nothing_changes():
    plain = Activation("plain", torch.relu, lambda h: (h > 0).to(h))
    assert torch.equal(by_integration(plain), by_integration(ACTIVATIONS["relu"]))


def test_wide_networks_have_that_kernel():
    x, kernels = inputs(), []
    for draw in range(12):
        recipe = Recipe(
            generator=torch.Generator().manual_seed(draw), sigma_w=1.3, sigma_b=0.4, multipliers="hidden"
        )  # fmt: skip
        network = MLP(x.shape[1], width=256, depth=2, activation="gelu", recipe=recipe)
        parameters = dict(network.named_parameters())
        layers = ntk.layer_kernels(network, x, params="trainable", reduce="trace")
        kernels.append(sum(k for name, k in layers.items() if is_multiplier(name, parameters[name])))
    mean, spread = torch.stack(kernels).mean(0), torch.stack(kernels).std(0) / 12**0.5
    limit = by_integration(ACTIVATIONS["gelu"], on_input=False)
    # Four standard errors, and a bias of the order of 1 / width.
    assert bool(((mean - limit).abs() < 4 * spread + 0.02 * limit.diagonal().max()).all())


def test_an_activation_that_jumps_is_refused():
    hard = Activation("hardtanh", lambda h: h.clamp(-1, 1), lambda h: (h.abs() < 1).to(h))
    with pytest.raises(ValueError, match="do not converge"):
        by_integration(hard)
