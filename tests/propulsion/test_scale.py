"""Scales of several vectors, how they start, and what is kept for their gradients."""

import pytest
import torch
from torch import nn

from propulsion import PropulsionConfig
from propulsion.layer import layer_class
from propulsion.lean import SMALLEST, multiply
from propulsion.scale import POOLINGS, initial_vectors, power, root, scale_of

DEGREES = [1, 2, 15, 2.5]


def start(pooling, *, vectors=4, degree=3, value=1.0, noise=0.0):
    torch.manual_seed(0)
    return initial_vectors(vectors, 6, degree=degree, pooling=pooling, value=value, noise=noise, dtype=torch.float64)


@pytest.mark.parametrize("degree", DEGREES)
@pytest.mark.parametrize("pooling", POOLINGS)
def test_several_vectors_start_apart_at_the_identity(pooling, degree):
    z = start(pooling, degree=degree)
    torch.testing.assert_close(scale_of(z, degree, pooling), torch.ones(6, dtype=torch.float64), rtol=1e-14, atol=0)
    assert (z.std(dim=0) > 0).all()
    torch.testing.assert_close(
        scale_of(start(pooling, degree=degree, value=0.5), degree, pooling),
        torch.full((6,), 0.5, dtype=torch.float64) ** degree,
        rtol=1e-13,
        atol=0,
    )


def test_one_vector_starts_at_its_value_exactly():
    assert torch.equal(start("mean", vectors=1, value=0.9), torch.full((6,), 0.9, dtype=torch.float64))
    assert start("mean", vectors=1, noise=0.1).std() > 0.01


@pytest.mark.parametrize("pooling", POOLINGS)
@pytest.mark.parametrize("equal", [True, False])
def test_equal_vectors_stay_equal_for_ever_and_those_that_start_apart_do_not(pooling, equal):
    """The reason for the spread."""
    z = start(pooling)
    if equal:
        z = torch.ones_like(z)
    z.requires_grad_(True)
    optimizer = torch.optim.Adam([z], lr=0.01)
    target = torch.linspace(0.5, 2, 6, dtype=torch.float64)
    for _ in range(20):
        optimizer.zero_grad()
        (scale_of(z, 3, pooling) - target).square().sum().backward()
        optimizer.step()
    apart = (z - z[0]).abs().max()
    assert (apart < 1e-12) if equal else (apart > 1e-3)


@pytest.mark.parametrize(("pooling", "expected"), [("mean", 2.5), ("max", 4.0), ("min", 1.0), ("l2", 7.5**0.5)])
def test_poolings_are_their_names(pooling, expected):
    z = torch.tensor([[1.0], [2.0], [3.0], [4.0]])
    torch.testing.assert_close(scale_of(z, 1, pooling), torch.tensor([expected]))


def test_the_gradient_of_l2_pooling_is_finite_at_zero():
    z = torch.zeros(3, 2, requires_grad=True)
    scale_of(z, 1, "l2").sum().backward()
    assert z.grad is not None
    assert z.grad.isfinite().all()


@pytest.mark.parametrize("degree", [1, 3, 2.5, 0.5])
def test_the_root_undoes_the_power(degree):
    scale = torch.linspace(-2, 2, 9, dtype=torch.float64)
    torch.testing.assert_close(power(root(scale, degree), degree), scale, rtol=1e-14, atol=1e-14)


def test_an_even_root_of_a_negative_scale_is_refused():
    with pytest.raises(ValueError, match=r"no z has a negative z\*\*2"):
        root(torch.tensor([-1.0]), 2)


@pytest.mark.parametrize("pooling", POOLINGS)
def test_every_pooling_merges(pooling):
    torch.manual_seed(0)
    base = nn.Linear(5, 4).double()
    layer = layer_class(base)(base, "default", PropulsionConfig(degree=3, vectors=3, pooling=pooling, init_noise=0.2))
    assert layer.propulsion_z["default"].shape == (3, 4)
    x = torch.randn(2, 5, dtype=torch.float64)
    before = layer(x)
    assert not torch.allclose(before, base(x))
    layer.merge()
    torch.testing.assert_close(layer(x), before, rtol=1e-13, atol=1e-13)


# What is kept for the backward pass.


@pytest.mark.parametrize("shape", [(4,), (4, 1, 1)])
def test_the_lean_product_has_the_same_gradients(shape):
    torch.manual_seed(0)
    v = torch.randn(3, 5, *shape, dtype=torch.float64, requires_grad=True)
    s = (1 + 0.5 * torch.randn(shape, dtype=torch.float64).clamp(-1.5, 1.5)).requires_grad_(True)
    g = torch.randn(3, 5, *shape, dtype=torch.float64)
    plain = multiply(v, s, lean=False)
    lean = multiply(v, s, lean=True)
    assert torch.equal(plain, lean)
    for a, b in zip(torch.autograd.grad(plain, (v, s), g), torch.autograd.grad(lean, (v, s), g), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-13, atol=1e-13)
    assert torch.autograd.gradcheck(lambda v, s: multiply(v, s, lean=True), (v, s))
    assert torch.autograd.gradgradcheck(lambda v, s: multiply(v, s, lean=True), (v, s))


def kept(lean: bool, value: float = 1.0) -> set[int]:
    """Bytes of the distinct tensors of a token's size that autograd keeps in a small feed-forward layer."""
    torch.manual_seed(0)
    inner, outer = nn.Linear(8, 64), nn.Linear(64, 8)
    config = PropulsionConfig(degree=3, lean=lean, init_value=value)
    layers = [layer_class(m)(m.requires_grad_(False), "default", config) for m in (inner, outer)]
    model = nn.Sequential(layers[0], nn.GELU(), layers[1]).train()
    sizes: dict[int, int] = {}

    def pack(t: torch.Tensor) -> torch.Tensor:
        sizes[t.untyped_storage().data_ptr()] = t.numel()
        alive.append(t)
        return t

    alive: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        model(torch.randn(100, 8)).sum().backward()
    return {n for n in sizes.values() if n >= 800} | {len([n for n in sizes.values() if n == 6400])}


def test_the_lean_layer_keeps_one_tensor_where_two_were():
    assert 1 in kept(lean=True)  # the scaled output, which GELU keeps as well
    assert 2 in kept(lean=False)  # and the unscaled one


def test_near_zero_the_unscaled_output_is_kept_and_gradients_are_exact():
    """There y / s would be 0 / 0."""
    assert 2 in kept(lean=True, value=0.0)
    for value in (0.0, 0.9 * SMALLEST ** (1 / 3), 1.1 * SMALLEST ** (1 / 3)):
        gradients = []
        for lean in (True, False):
            torch.manual_seed(0)
            base = nn.Linear(5, 4).double()
            layer = layer_class(base)(base, "default", PropulsionConfig(degree=3, init_value=value, lean=lean)).train()
            layer(torch.ones(2, 5, dtype=torch.float64)).square().sum().backward()
            gradients.append(layer.propulsion_z["default"].grad)
        torch.testing.assert_close(*gradients, rtol=1e-13, atol=0)


def test_a_scale_that_reaches_zero_is_noticed():
    base = nn.Linear(5, 4).double()
    layer = layer_class(base)(base, "default", PropulsionConfig(degree=1, lean=True)).train()
    x = torch.ones(2, 5, dtype=torch.float64)
    layer(x).sum().backward()
    with torch.no_grad():
        layer.propulsion_z["default"].zero_()
    layer.zero_grad()
    layer(x).sum().backward()
    torch.testing.assert_close(layer.propulsion_z["default"].grad, base(x).sum(dim=0))


def test_torch_func_takes_a_training_layer():
    torch.manual_seed(0)
    base = nn.Linear(5, 4).double()
    layer = layer_class(base)(base, "default", PropulsionConfig(degree=2, lean=True)).train()
    p = {"propulsion_z.default": torch.rand(4, dtype=torch.float64) + 0.5}
    x = torch.randn(6, 5, dtype=torch.float64)

    def loss(p, row):
        return torch.func.functional_call(layer, p, (row,)).square().sum()

    found = torch.func.vmap(torch.func.grad(loss), (None, 0))(p, x)["propulsion_z.default"]
    z = p["propulsion_z.default"]
    torch.testing.assert_close(found, 4 * z**3 * base(x) ** 2, rtol=1e-12, atol=1e-12)
