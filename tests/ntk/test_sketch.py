"""`ntk.sketched_ntk`: unbiased, of the stated error, and made of the same hashes whatever else is computed."""

from unittest import mock

import numpy as np
import pytest
import torch
from cases import batch as batch_of_words
from cases import batch_for, classifier, relative_error, rows, tied_gpt2
from torch import Tensor, nn
from torch.nn import functional as F

import ntk
from ntk.features import Dense, Lookup, Outer, formed
from ntk.sketch import REPLICATES
from ntk.structured import sketching
from ntk.structured.sketching import ParameterSketch
from ntk.tokens import Tokens

DIMENSION = 512


class BothSides(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(6, 6)), nn.Parameter(torch.randn(()))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(torch.tanh(x @ self.weight + self.bias), self.weight).tanh().sum(dim=1)[:, :2]


def random(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def case(name: str):
    torch.manual_seed(0)
    if name == "both sides":
        return BothSides().double(), random(5, 9, 6), {}
    if name == "convolution":
        return (
            nn.Sequential(nn.Conv1d(2, 8, 3), nn.Tanh(), nn.Flatten(), nn.Linear(32, 3)).double(),
            random(6, 2, 6),
            {},
        )
    if name == "tied":
        return tied_gpt2(), batch_of_words(), {"output": ntk.outputs.label_words([3, 4])}
    return classifier(name), batch_for(name), {}


@pytest.fixture(params=["small", "large"])
def sizes(request):
    """Every matrix of the tiny models counts as small, or as large."""
    with mock.patch.object(sketching, "LARGE", sketching.LARGE if request.param == "small" else 0):
        yield request.param


def scaled(K: Tensor) -> Tensor:
    """sqrt(K[i, i, a, a] K[j, j, b, b]) for each entry."""
    own = torch.einsum("iiaa->ia", K)
    return (own[:, None, :, None] * own[None, :, None, :]).sqrt()


@pytest.mark.parametrize("name", ["bert", "both sides", "convolution", "tied"])
def test_unbiased_with_the_stated_errors(name, sizes):
    model, inputs, options = case(name)
    K = ntk.empirical_ntk(model, inputs, **options)
    errors, inside, stated = [], [], []
    seeds = 6
    for seed in range(seeds):
        sketch = ntk.sketched_ntk(model, inputs, dimension=DIMENSION, seed=seed, **options)
        errors.append((sketch.kernel() - K) / scaled(K))
        lower, upper = sketch.interval()
        inside.append(float(((lower <= K) & (upper >= K)).double().mean()))
        stated.append(sketch.standard_errors() / scaled(K))
    error, stated = torch.stack(errors), torch.stack(stated)
    size = float(error.square().mean().sqrt())
    gaussian = float(((1 + (K / scaled(K)) ** 2) / DIMENSION).mean().sqrt())
    assert size <= 2 * gaussian  # as random directions do, up to a factor
    assert 0.7 <= float(stated.square().mean().sqrt()) / size <= 1.4
    # Entries of one sketch err together, so that the mean over seeds has few independent terms.
    assert float(error.mean(dim=0).square().mean().sqrt()) <= 1.6 * size / seeds**0.5
    assert np.mean(inside) >= 0.85


def test_intervals_cover_what_they_state():
    """95 % intervals over many seeds; the guide has the coverage over 20 seeds of a real model."""
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(12, 30), nn.Tanh(), nn.Linear(30, 2)).double(), random(9, 12)
    K = ntk.empirical_ntk(model, x)
    inside = []
    for seed in range(60):
        lower, upper = ntk.sketched_ntk(model, x, dimension=256, seed=seed).interval()
        inside.append(float(((lower <= K) & (upper >= K)).double().mean()))
    assert 0.93 <= np.mean(inside) <= 0.97


@pytest.mark.parametrize("name", ["bert", "both sides", "convolution"])
def test_features_do_not_depend_on_batches_or_on_the_way(name, sizes):
    """Same hashes for examples alone, in small memory, in another call, and by the reference."""
    model, inputs, _ = case(name)
    whole = ntk.sketched_ntk(model, inputs, dimension=64, seed=3)
    part = inputs[1:3] if isinstance(inputs, Tensor) else rows(inputs, slice(1, 3))
    two = ntk.sketched_ntk(model, part, dimension=64, seed=3)
    torch.testing.assert_close(two.features, whole.features[1:3], rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(whole.kernel(two), whole.kernel()[:, 1:3], rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(whole.standard_errors(two), whole.standard_errors()[:, 1:3], rtol=1e-9, atol=1e-9)
    with mock.patch.object(sketching, "_CHUNK", 1):
        again = ntk.sketched_ntk(model, inputs, dimension=64, seed=3)
    torch.testing.assert_close(again.features, whole.features, rtol=1e-10, atol=1e-10)
    with mock.patch("ntk.structured.stages.check_together", side_effect=RuntimeError("by the reference")):
        by_reference = ntk.sketched_ntk(model, inputs, dimension=64, seed=3)
    torch.testing.assert_close(by_reference.features, whole.features, rtol=1e-9, atol=1e-9)
    other = ntk.sketched_ntk(model, inputs, dimension=64, seed=4)
    assert relative_error(other.features, whole.features) > 0.5
    with pytest.raises(ValueError, match="expected sketches of the same weights and parameters"):
        whole.kernel(other)
    with torch.no_grad():
        next(iter(model.parameters())).mul_(1 + 1e-9)
    with pytest.raises(ValueError, match="expected sketches of the same weights and parameters"):
        whole.kernel(ntk.sketched_ntk(model, part, dimension=64, seed=3))


@pytest.mark.parametrize("kind", ["outer", "transposed", "lookup"])
def test_tokens_and_formed_features_have_one_sketch(kind, sizes):
    tokens = Tokens(3, torch.tensor([0, 0, 1, 2, 2, 2]))
    g, x = random(2, 6, 5), random(6, 4)
    shape = torch.Size((7, 5)) if kind == "lookup" else torch.Size((4, 5) if kind == "transposed" else (5, 4))
    ids = torch.tensor([3, -1, 0, 6, 6, 2])
    feature = Lookup(ids, g, tokens) if kind == "lookup" else Outer(x, g, tokens, kind == "transposed")
    sketch = ParameterSketch.drawn("weight", shape, 0, 4, 10, g)
    results = []
    for each in (feature, formed(feature, shape)):
        buckets = torch.zeros(3, 2, 4, 10, dtype=torch.float64)
        waves = torch.fft.rfft(buckets, dim=3)
        sketch.add([each], waves, buckets)
        results.append(buckets + torch.fft.irfft(waves, n=10, dim=3))
    torch.testing.assert_close(*results)
    assert isinstance(formed(feature, shape), Dense)
    assert float(results[0].abs().sum()) > 0


def test_parameters_have_independent_hashes():
    """Two layers with one feature add up to its double only if their sketches are the same, which they must not be."""

    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = (nn.Parameter(torch.ones(3, 4, dtype=torch.float64)) for _ in range(2))

        def forward(self, x: Tensor) -> Tensor:
            return F.linear(x, self.a) + F.linear(x, self.b)

    sketch = ntk.sketched_ntk(Twice(), random(5, 4), dimension=64)
    one = ntk.sketched_ntk(Twice(), random(5, 4), dimension=64, params=lambda name, p: name == "a")
    two = ntk.sketched_ntk(Twice(), random(5, 4), dimension=64, params=lambda name, p: name == "b")
    torch.testing.assert_close(one.features + two.features, sketch.features)
    assert relative_error(one.features, two.features) > 0.5


def test_precision():
    model, inputs, _ = case("bert")
    double = ntk.sketched_ntk(model, inputs, dimension=64)
    single = ntk.sketched_ntk(model.float(), inputs, dimension=64)
    assert double.features.dtype == torch.float64
    assert single.features.dtype == torch.float32
    assert relative_error(single.features.double(), double.features) <= 1e-5


def test_a_planned_dimension():
    model, inputs, _ = case("bert")
    sketch = ntk.sketched_ntk(model, inputs, epsilon=0.2, confidence=0.9)
    assert sketch.plan is not None
    assert sketch.plan.gaussian == ntk.bounds.dimension_needed(0.2, 0.9, rho=1)
    assert sketch.plan.dimension == sketch.features.shape[2]
    assert sketch.plan.dimension % REPLICATES == 0
    assert 1 <= sketch.plan.ratio <= 3
    K = ntk.empirical_ntk(model, inputs)
    assert float((((sketch.kernel() - K) / scaled(K)).abs() < 0.2).double().mean()) >= 0.8


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({}, ValueError, "give one of dimension= and epsilon="),
        ({"dimension": 64, "epsilon": 0.1}, ValueError, "give one of dimension= and epsilon="),
        ({"dimension": 100}, ValueError, "multiple of 16, .* take 96"),
        ({"dimension": 16}, ValueError, "at least 32; got 16: take 32"),
        ({"epsilon": 2.0}, ValueError, r"epsilon must lie in \(0, 1\)"),
        ({"dimension": 1 << 20, "memory_budget": 1e6}, MemoryError, "the sketch and one example need at least"),
    ],
)
def test_what_is_refused(options, error, message):
    model, x = nn.Linear(3, 2).double(), random(4, 3)
    with pytest.raises(error, match=message):
        ntk.sketched_ntk(model, x, **options)
    with pytest.raises(ValueError, match="confidence must lie between 0 and 1"):
        ntk.sketched_ntk(model, x, dimension=32).interval(confidence=1.0)
