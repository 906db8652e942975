"""Products of `ntk.NTKOperator` against the kernel of `ntk.empirical_ntk`, in float64, and in scipy's methods."""

from unittest import mock

import numpy as np
import pytest
import torch
from cases import batch, batch_for, classifier, rows, tied_gpt2
from scipy.sparse.linalg import cg, eigsh, lobpcg
from torch import Tensor, nn
from torch.nn import functional as F

import ntk
from ntk.structured import products

EXACT = 1e-12
MODES = ("held", "stream")


class BothSides(nn.Module):
    """One matrix multiplies from the left and from the right, with biases that are shared and scaled."""

    def __init__(self):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(6, 6)), nn.Parameter(torch.randn(()))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(torch.tanh(x @ self.weight + self.bias), self.weight).tanh().sum(dim=1)[:, :2]


class OwnStatistics(nn.Module):
    """Normalises by the statistics of the batch: the examples run one at a time."""

    def __init__(self):
        super().__init__()
        self.first, self.norm = nn.Conv1d(2, 3, 2), nn.BatchNorm1d(3, track_running_stats=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.first(x)).tanh().sum(dim=2)


class Rescaled(torch.autograd.Function):
    """Has no rules for torch.func, and is differentiated by ordinary backward passes."""

    @staticmethod
    def forward(ctx, x):
        return 2 * x

    @staticmethod
    def backward(ctx, gradient):
        return 2 * gradient


class OwnDerivative(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.weight = nn.Linear(5, 4), nn.Parameter(torch.randn(2, 4))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(self.first(x).tanh(), Rescaled.apply(self.weight))


def random(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


PLAIN = {
    "mlp": (lambda: nn.Sequential(nn.Linear(5, 64), nn.ReLU(), nn.Linear(64, 3)), (8, 5)),
    "one output": (lambda: nn.Sequential(nn.Linear(5, 7, bias=False), nn.Tanh(), nn.Linear(7, 1)), (6, 5)),
    "convolution": (lambda: nn.Sequential(nn.Conv1d(2, 3, 2), nn.Tanh(), nn.Flatten()), (5, 2, 4)),
    "both sides": (BothSides, (5, 9, 6)),
    "batch statistics": (OwnStatistics, (4, 2, 5)),
    "own derivative": (OwnDerivative, (5, 5)),
}


def case(name: str):
    """A model and its inputs."""
    torch.manual_seed(0)
    if name in PLAIN:
        model, shape = PLAIN[name]
        return model().double(), random(*shape)
    if name == "tied":
        return tied_gpt2(), batch()
    return classifier(name), batch_for(name)


def some(inputs, index: slice):
    return inputs[index] if isinstance(inputs, Tensor) else rows(inputs, index)


def options(name: str) -> dict:
    return {"output": ntk.outputs.label_words([3, 4])} if name == "tied" else {}


def error(value, reference) -> float:
    return float(np.linalg.norm(value - reference) / np.linalg.norm(reference))


@pytest.mark.parametrize(
    ("name", "mode"), [*((name, mode) for name in (*PLAIN, "bert", "tied") for mode in MODES), ("bart", "held")]
)
def test_products_are_those_of_the_kernel(name, mode):
    model, inputs = case(name)
    K = ntk.flatten(ntk.empirical_ntk(model, inputs, **options(name))).numpy()
    operator = ntk.NTKOperator(model, inputs, mode=mode, **options(name))
    assert operator.shape == K.shape
    assert operator.H is operator
    rng = np.random.default_rng(0)
    for k in (1, 7, 40):  # one vector goes by tokens, and many by formed features
        V = rng.standard_normal((len(K), k))
        assert error(operator @ V, K @ V) <= EXACT
    v = rng.standard_normal(len(K))
    assert error(operator.matvec(v), K @ v) <= EXACT
    assert error(operator @ (v + 2j * v[::-1]), K @ (v + 2j * v[::-1])) <= EXACT
    assert error(operator.diagonal(), K.diagonal()) <= EXACT
    assert operator.trace() == pytest.approx(K.trace(), rel=EXACT)
    assert (operator.held > 0) == (mode == "held")


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", ["mlp", "own derivative", "bert"])
def test_two_batches(name, mode):
    model, inputs = case(name)
    left, right = inputs, some(inputs, slice(1, 3))
    K = ntk.flatten(ntk.empirical_ntk(model, left, right, **options(name))).numpy()
    operator = ntk.NTKOperator(model, left, right, mode=mode, **options(name))
    for k in (1, 30):
        V, W = (np.random.default_rng(k).standard_normal((size, k)) for size in K.shape[::-1])
        assert error(operator @ V, K @ V) <= EXACT
        assert error(operator.H @ W, K.T @ W) <= EXACT
    assert error(operator.H @ W[:, 0], K.T @ W[:, 0]) <= EXACT
    with pytest.raises(ValueError, match="two batches has no diagonal"):
        operator.trace()


@pytest.mark.parametrize("mode", MODES)
def test_parameters_and_small_pieces(mode):
    """Chosen parameters alone; batches of one example, slices of one row, and one vector at a time."""
    model, inputs = case("bert")
    chosen = lambda name, p: "query" in name or "embeddings" in name or name.startswith("classifier")  # noqa: E731
    K = ntk.flatten(ntk.empirical_ntk(model, inputs, params=chosen)).numpy()
    V = np.random.default_rng(0).standard_normal((len(K), 12))
    with mock.patch.object(products, "_SLICE", 1):
        operator = ntk.NTKOperator(model, inputs, params=chosen, mode=mode, memory_budget=250e3)
        assert error(operator @ V, K @ V) <= EXACT
        assert error(operator @ V[:, :2], K @ V[:, :2]) <= EXACT
        assert error(operator.diagonal(), K.diagonal()) <= EXACT


def test_scipys_methods():
    model, inputs = case("mlp")
    K = ntk.flatten(ntk.empirical_ntk(model, inputs)).numpy()
    operator = ntk.NTKOperator(model, inputs)
    values, vectors = np.linalg.eigh(K)
    found, directions = eigsh(operator, k=4)
    assert error(found, values[-4:]) <= 1e-10
    assert error(np.abs((directions * vectors[:, -4:]).sum(axis=0)), np.ones(4)) <= 1e-8
    start = np.random.default_rng(0).standard_normal((len(K), 3))
    found, _ = lobpcg(operator, start, tol=1e-8, maxiter=200)
    assert error(np.sort(found), values[-3:]) <= 1e-10
    b = K @ np.random.default_rng(1).standard_normal(len(K))
    solution, failed = cg(operator, b, rtol=1e-10, maxiter=1000)
    assert not failed
    assert error(K @ solution, b) <= 1e-9


def test_eigenvalues_and_linear_systems():
    model, inputs = case("mlp")
    K = ntk.flatten(ntk.empirical_ntk(model, inputs)).numpy()
    operator = ntk.NTKOperator(model, inputs)
    values, vectors = operator.eigsh(5)
    assert error(values, np.linalg.eigvalsh(K)[-5:]) <= 1e-10
    assert error(K @ vectors, vectors * values) <= 1e-10
    B = np.random.default_rng(0).standard_normal((len(K), 3))
    for b in (B, B[:, 0]):
        found = operator.solve(b, ridge=0.1, tolerance=1e-10)
        assert error(found, np.linalg.solve(K + 0.1 * np.eye(len(K)), b)) <= 1e-8
    for wrong, message in (
        (lambda: operator.eigsh(len(K)), "k must be between 1 and 23"),
        (lambda: operator.solve(B, ridge=0.0), "ridge must be above 0"),
        (lambda: ntk.NTKOperator(model, inputs, inputs[:2]).eigsh(1), "two batches has no eigenvalues"),
    ):
        with pytest.raises(ValueError, match=message):
            wrong()
    with pytest.raises(ArithmeticError, match="more products="):
        operator.solve(B, ridge=1e-9, products=2)


@pytest.mark.parametrize("mode", MODES)
def test_a_float32_model(mode):
    model, inputs = case("bert")
    operator = ntk.NTKOperator(model.float(), inputs, mode=mode)
    K = ntk.flatten(ntk.empirical_ntk(model, inputs)).numpy()
    assert operator.dtype == K.dtype == np.float32
    v = np.random.default_rng(0).standard_normal(len(K))
    assert (operator @ v).dtype == np.float32
    assert error(operator @ v, K @ v) <= 1e-5


def test_a_model_that_changes():
    """Held features are those of the model as it was; a stream is refused, as is a model that draws random numbers."""
    model, x = case("mlp")
    held, streamed = (ntk.NTKOperator(model, x, mode=mode) for mode in MODES)
    v = np.ones(held.shape[1])
    before = held @ v
    x.zero_()  # the stream has its own copy
    assert error(streamed @ v, before) <= EXACT
    with torch.no_grad():
        model[0].weight += 1
    assert error(held @ v, before) <= EXACT
    with pytest.raises(ValueError, match=r"the model's 0\.weight has changed"):
        streamed @ v
    streamed = ntk.NTKOperator(model, x + 1, mode="stream")
    model[0].weight.data = model[0].weight.data.clone()
    with pytest.raises(ValueError, match=r"the model's 0\.weight has changed"):
        streamed @ v


def test_the_model_is_left_as_it_was():
    model, inputs = case("bert")
    for p in model.classifier.parameters():
        p.requires_grad_(False)
    flags = [p.requires_grad for p in model.parameters()]
    operator = ntk.NTKOperator(model, inputs, mode="stream")
    operator @ np.ones(operator.shape[1])
    assert model.training
    assert [p.requires_grad for p in model.parameters()] == flags
    assert all(p.grad is None for p in model.parameters())


def test_what_is_refused():
    model, x = case("mlp")
    with pytest.raises(ValueError, match="mode must be one of 'held', 'stream'; got 'dense'"):
        ntk.NTKOperator(model, x, mode="dense")
    with pytest.raises(MemoryError, match=r"features of all examples need at least .* mode='stream'"):
        ntk.NTKOperator(model, x, memory_budget=1e3)
    with pytest.raises(MemoryError, match="one example and a vector of the parameters' size need at least"):
        ntk.NTKOperator(model, x, memory_budget=1e3, mode="stream")
    random_numbers = nn.Sequential(model, nn.Module())
    random_numbers[1].forward = lambda y: y + torch.rand_like(y)
    mixing = nn.Sequential(nn.Linear(5, 3), nn.BatchNorm1d(3, track_running_stats=False)).double()
    broken = nn.Sequential(nn.Linear(5, 2), nn.ReLU(), nn.Linear(2, 2)).double()
    with torch.no_grad():
        broken[0].bias[0] = torch.inf
    for wrong in (random_numbers, mixing, broken):
        with pytest.raises(ValueError) as expected:  # noqa: PT011
            ntk.empirical_ntk(wrong, x)
        for mode in MODES:
            with pytest.raises(ValueError) as found:  # noqa: PT011
                ntk.NTKOperator(wrong, x, mode=mode)
            assert str(found.value) == str(expected.value)
