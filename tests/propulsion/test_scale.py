"""Scales of several vectors, and their initial values."""

import pytest
import torch
from torch import nn

from propulsion import PropulsionConfig
from propulsion.layers import layer_class
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
    """This is why initial vectors are spread."""
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
