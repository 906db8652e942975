"""Random networks in both parametrisations."""

import math

import pytest
import torch

import ntk
from ntk.infinite.networks import MLP, Recipe, ResidualMLP, Transformer, is_multiplier


def recipe(seed: int = 0, **changes) -> Recipe:
    options = {"sigma_w": 1.4, "sigma_b": 0.3, "multipliers": "all"} | changes
    return Recipe(generator=torch.Generator().manual_seed(seed), **options)


NETWORKS = {
    "mlp": lambda r: MLP(3, width=8, depth=2, activation="gelu", recipe=r, n_out=2),
    "residual": lambda r: ResidualMLP(3, width=8, depth=3, activation="relu", recipe=r, n_out=2, branch_scale=0.5),
    "transformer": lambda r: Transformer(3, width=8, depth=2, recipe=r, n_out=2),
    "linear attention scale": lambda r: Transformer(
        3, width=8, depth=1, recipe=r, tokens_mix="linear", layer_norm=False
    ),
}


def inputs(name: str) -> torch.Tensor:
    shape = (4, 3) if name in ("mlp", "residual") else (4, 5, 3)
    return torch.randn(shape, generator=torch.Generator().manual_seed(9), dtype=torch.float64)


@pytest.mark.parametrize("name", NETWORKS)
def test_both_parametrisations_are_one_function_with_kernels_in_the_ratio_of_the_table(name):
    x = inputs(name)
    first, second = (NETWORKS[name](recipe(parametrization=p)) for p in ("ntk", "standard"))
    torch.testing.assert_close(first(x), second(x))
    found, other = (ntk.layer_kernels(network, x) for network in (first, second))
    shapes = {key: p.shape for key, p in first.named_parameters()}
    for key, kernel in found.items():
        if "norm" in key or key.endswith("z"):
            ratio = 1.0
        else:
            ratio = shapes[key][1] / 1.4**2 if key.endswith("weight") else 1 / 0.3**2
        torch.testing.assert_close(other[key], ratio * kernel, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", NETWORKS)
def test_multipliers_stand_where_they_are_asked_for_and_change_nothing_at_first(name):
    network = NETWORKS[name](recipe())
    names = [n for n, p in network.named_parameters() if is_multiplier(n, p)]
    assert len(names) == len(network.positions)
    torch.testing.assert_close(network(inputs(name)), NETWORKS[name](recipe(multipliers=()))(inputs(name)))
    some = NETWORKS[name](recipe(multipliers=[network.positions[1]]))
    assert sum(is_multiplier(n, p) for n, p in some.named_parameters()) == 1


@pytest.mark.parametrize("name", NETWORKS)
def test_merging_a_multiplier_into_its_layer_leaves_the_function(name):
    """Replacing W, b and z by z^k W, z^k b and 1 does not change y = z^k (W a + b)."""
    network, merged = (NETWORKS[name](recipe(degree=3)) for _ in range(2))
    layers = [m for m in network.modules() if hasattr(m, "weight_scale")]
    assert len(layers) == len(network.positions) - 1  # The input has no layer to merge into.
    for layer, other in zip(layers, (m for m in merged.modules() if hasattr(m, "weight_scale")), strict=True):
        with torch.no_grad():
            z = layer.multiplier.z.uniform_(0.5, 1.5, generator=torch.Generator().manual_seed(1))
            other.weight.mul_(z[:, None] ** 3)
            other.bias.mul_(z**3)
    x = inputs(name)
    torch.testing.assert_close(network(x), merged(x))
    assert not torch.allclose(network(x), NETWORKS[name](recipe())(x))


def test_degree_scales_the_kernel_of_multipliers_by_its_square():
    x = inputs("mlp")
    one, five = (ntk.empirical_ntk(NETWORKS["mlp"](recipe(degree=k)), x, params=is_multiplier) for k in (1, 5))
    torch.testing.assert_close(five, 25 * one)


def test_variances_of_weights_and_outputs():
    wide = MLP(4, width=400, depth=1, activation="linear", recipe=recipe(parametrization="standard"))
    assert float(wide.layers[1].weight.std()) == pytest.approx(1.4 / math.sqrt(400), rel=0.15)
    assert float(wide.layers[0].bias.std()) == pytest.approx(0.3, rel=0.15)
    assert MLP(4, width=5, depth=1, activation="relu", recipe=recipe(sigma_b=0)).layers[0].bias is None


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: recipe(parametrization="mup"), "parametrization must be one of 'ntk', 'standard'"),
        (lambda: recipe(sigma_w=0), "sigma_w > 0"),
        (lambda: NETWORKS["mlp"](recipe(multipliers=[7])), "multipliers must be 'all', 'hidden' or among"),
        (lambda: NETWORKS["mlp"](recipe(multipliers="readout")), "multipliers must be"),
        (lambda: MLP(3, width=0, depth=1, activation="relu", recipe=recipe()), "at least one input and one output"),
        (lambda: MLP(3, width=2, depth=-1, activation="relu", recipe=recipe()), "at least 0"),
        (lambda: ResidualMLP(3, width=2, depth=0, activation="relu", recipe=recipe()), "at least one hidden layer"),
        (lambda: Transformer(3, width=5, depth=1, recipe=recipe()), "multiple of the number of heads"),
        (lambda: Transformer(3, width=4, depth=1, recipe=recipe(), tokens_mix="none"), "'sqrt' or 'linear'"),
    ],
)
def test_mistakes(call, message):
    with pytest.raises(ValueError, match=message):
        call()
