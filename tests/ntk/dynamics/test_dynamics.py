"""Predictions from kernels, compared with each other, with closed forms, and with trained networks."""

import numpy as np
import pytest
import torch
from scipy.linalg import expm
from torch import nn

import ntk
from ntk.dynamics import (
    Linearized,
    cross_entropy_flow,
    gradient_flow,
    kernel_regression,
    linearization_error,
    relative_drift,
    sign_gradient_kernel,
)
from ntk.infinite.networks import MLP, Recipe, is_multiplier
from ntk.layout import flatten


def kernels(n: int = 6, m: int = 4, c: int = 2, seed: int = 0):
    """A training kernel, a cross kernel, targets and initial outputs, of a random linear model."""
    generator = torch.Generator().manual_seed(seed)
    J = torch.randn(n + m, c, 40, generator=generator, dtype=torch.float64)
    K = torch.einsum("iap,jbp->ijab", J, J)
    y, f0 = (torch.randn(n + m, c, generator=generator, dtype=torch.float64) for _ in range(2))
    return K[:n, :n], K[n:, :n], y[:n], f0[:n], f0[n:]


@pytest.mark.parametrize("c", [1, 3])
def test_flow_is_the_matrix_exponential(c):
    K, cross, y, f0, f1 = kernels(c=c)
    flat = flatten(K).numpy()
    times = [0.0, 0.01, 0.5]
    found = gradient_flow(K, y, f0, times=times)
    new = gradient_flow(K, y, f0, times=times, cross=cross, initial_cross=f1)
    for i, t in enumerate(times):
        decay = expm(-flat * t)
        expected = y.flatten().numpy() + decay @ (f0 - y).flatten().numpy()
        np.testing.assert_allclose(found[i].flatten().numpy(), expected, rtol=1e-10, atol=1e-10)
        moved = flatten(cross).numpy() @ np.linalg.solve(flat, (np.eye(len(flat)) - decay) @ (y - f0).flatten().numpy())
        np.testing.assert_allclose((new[i] - f1).flatten().numpy(), moved, rtol=1e-8, atol=1e-9)


def test_flow_ends_at_the_regression():
    K, cross, y, f0, f1 = kernels()
    end = gradient_flow(K, y, f0, times=[1e6], cross=cross, initial_cross=f1)[0]
    regression = kernel_regression(K, y, f0, cross=cross, initial_cross=f1)
    assert float((end - regression).norm() / regression.norm()) < 1e-10
    torch.testing.assert_close(kernel_regression(K, y, f0), y, rtol=1e-10, atol=1e-10)


def test_a_shared_kernel_is_the_block_diagonal_one():
    K, cross, y, f0, f1 = kernels()
    shared, shared_cross = K[:, :, 0, 0], cross[:, :, 0, 0]
    eye = torch.eye(2, dtype=torch.float64)
    for function, options in ((kernel_regression, {"ridge": 0.3}), (gradient_flow, {"times": [0.2]})):
        one = function(shared, y, f0, cross=shared_cross, initial_cross=f1, **options)
        both = function(
            shared[..., None, None] * eye, y, f0, cross=shared_cross[..., None, None] * eye, initial_cross=f1, **options
        )
        torch.testing.assert_close(one, both, rtol=1e-10, atol=1e-10)


def test_ridge_is_the_penalty_on_the_parameters():
    """Ridge regression gives the minimum of (1/2) |f0 + J d - y|^2 + (ridge / 2) |d|^2."""
    generator = torch.Generator().manual_seed(0)
    J = torch.randn(5, 3, generator=generator, dtype=torch.float64)  # fewer parameters than examples
    y, f0 = (torch.randn(5, 1, generator=generator, dtype=torch.float64) for _ in range(2))
    d = torch.linalg.solve(J.T @ J + 0.7 * torch.eye(3, dtype=torch.float64), J.T @ (y - f0))
    found = kernel_regression(J @ J.T, y, f0, ridge=0.7)
    torch.testing.assert_close(found, f0 + J @ d, rtol=1e-10, atol=1e-10)


def test_a_singular_kernel_flows_and_does_not_regress():
    x = torch.randn(4, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x = torch.cat([x, x[:1]])  # an example twice
    K, y = x @ x.T, torch.arange(5.0, dtype=torch.float64)[:, None]
    with pytest.raises(ValueError, match=r"kernel is singular .* give a ridge"):
        kernel_regression(K, y, cross=K)
    flow = gradient_flow(K, y, times=[1e9], cross=K)[0]
    # The expectation does not use the kernel's pseudo-inverse, whose condition number is the square of the features'.
    torch.testing.assert_close(flow, x @ torch.linalg.lstsq(x, y, driver="gelsd").solution, rtol=1e-10, atol=1e-10)


def test_cross_entropy_flow_is_gradient_descent_by_small_steps():
    K, cross, _, f0, f1 = kernels(c=3)
    labels = torch.tensor([0, 1, 2, 0, 1, 2])
    y = nn.functional.one_hot(labels, 3).double()
    flat, step, a = flatten(K), 1e-6, torch.zeros(18, dtype=torch.float64)
    for _ in range(20000):
        f = f0 + (flat @ a).view(6, 3)
        a = a + step * (y - f.softmax(dim=1)).flatten()
    found = cross_entropy_flow(K, labels, f0, times=[0.0, 0.02])
    torch.testing.assert_close(found[0], f0)
    torch.testing.assert_close(found[1], f0 + (flat @ a).view(6, 3), rtol=1e-3, atol=1e-3)
    new = cross_entropy_flow(K, y, f0, times=[0.02], cross=cross, initial_cross=f1)[0]
    torch.testing.assert_close(new, f1 + (flatten(cross) @ a).view(4, 3), rtol=1e-3, atol=1e-3)


def wide(width: int, activation: str = "gelu", n_out: int = 1) -> MLP:
    """One hidden layer in NTK parametrisation, so that outputs change by O(1) while features hardly change."""
    recipe = Recipe(generator=torch.Generator().manual_seed(0), sigma_w=1.5, multipliers="hidden")
    return MLP(5, width=width, depth=1, activation=activation, recipe=recipe, n_out=n_out)


def gaussian(*sizes: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(n, 5, generator=generator, dtype=torch.float64) for n in sizes]


def full(name: str, parameter: nn.Parameter) -> bool:
    """Whether full fine-tuning trains this parameter of the random networks."""
    return not is_multiplier(name, parameter)


def train(model: nn.Module, chosen, loss, x, new, *, step: float, marks: list[int]):
    """Train by full-batch steps, and return outputs on both sets of inputs after the marked numbers of steps."""
    parameters = [p for name, p in model.named_parameters() if chosen(name, p)]
    optimizer = torch.optim.SGD(parameters, lr=step)
    found, found_new = [], []
    for k in range(1, marks[-1] + 1):
        model.zero_grad()
        loss(model(x)).backward()
        optimizer.step()
        if k in marks:
            found.append(model(x).detach())
            found_new.append(model(new).detach())
    return torch.stack(found), torch.stack(found_new)


@pytest.mark.parametrize("loss", ["squared", "cross-entropy"])
@pytest.mark.parametrize("chosen", [full, is_multiplier], ids=["full", "propulsion"])
def test_a_wide_network_trained_by_small_steps_follows_its_kernel(chosen, loss):
    model, x, new = wide(4096, n_out=1 if loss == "squared" else 3), *gaussian(10, 6)
    K, cross = (ntk.empirical_ntk(model, a, b, params=chosen) for a, b in ((x, None), (new, x)))
    f0, f1 = model(x).detach(), model(new).detach()
    # The step is far below 2 / the largest eigenvalue; the last mark is at 20 time constants.
    step, marks = 0.05 / float(torch.linalg.eigvalsh(flatten(K))[-1]), [4, 20, 80, 400]
    options = {"times": [step * k for k in marks]}
    if loss == "squared":
        y, flow, criterion = x[:, :1].sign(), gradient_flow, lambda f: (f - y).square().sum() / 2
    else:
        y, flow = torch.arange(10) % 3, cross_entropy_flow
        criterion = lambda f: nn.functional.cross_entropy(f, y, reduction="sum")  # noqa: E731
    found, found_new = train(model, chosen, criterion, x, new, step=step, marks=marks)
    predicted = flow(K, y, f0, **options)
    predicted_new = flow(K, y, f0, **options, cross=cross, initial_cross=f1)
    assert float((found[-1] - f0).norm() / f0.norm()) > 0.4  # The outputs did change.
    for found_t, predicted_t in zip([*found, *found_new], [*predicted, *predicted_new], strict=True):
        assert float((found_t - predicted_t).norm() / found_t.norm()) < 0.02
    assert 0 < relative_drift(ntk.empirical_ntk(model, x, params=chosen), K) < 0.01
    assert linearization_error(found[-1], predicted[-1], f0) < 0.02
    if loss == "squared":  # The flow ends at the regression.
        end = gradient_flow(K, y, f0, times=[1e6], cross=cross, initial_cross=f1)[0]
        regression = kernel_regression(K, y, f0, cross=cross, initial_cross=f1)
        assert float((end - regression).norm() / regression.norm()) < 1e-10


def drift_after_training(width: int, chosen) -> tuple[float, float]:
    """Relative drift of the Jacobian, and the share of the outputs' change that the kernel does not explain."""
    model, x, _ = wide(width, "tanh"), *gaussian(10, 1)
    K, f0, start = ntk.empirical_ntk(model, x, params=chosen), model(x).detach(), jacobian(model, x, chosen)
    y = f0 + 0.5 * x[:, :1].sign()
    step = 0.1 / float(torch.linalg.eigvalsh(flatten(K))[-1])
    found, _ = train(model, chosen, lambda f: (f - y).square().sum() / 2, x, x, step=step, marks=[200])
    predicted = gradient_flow(K, y, f0, times=[200 * step])
    return relative_drift(jacobian(model, x, chosen), start), linearization_error(found[0], predicted[0], f0)


def test_training_grows_lazier_with_the_width_and_propulsion_later_than_full_fine_tuning():
    """Both drift as 1 / sqrt(width); Propulsion drifts more, since it has few parameters and a small kernel."""
    drifts = {(chosen, w): drift_after_training(w, chosen) for chosen in (full, is_multiplier) for w in (256, 4096)}
    for chosen in (full, is_multiplier):
        assert drifts[chosen, 4096][0] < drifts[chosen, 256][0] / 2  # a quarter in the limit
        assert drifts[chosen, 4096][1] < drifts[chosen, 256][1]
    assert drifts[is_multiplier, 4096][0] > 3 * drifts[full, 4096][0]


def least_norm(degree: float) -> dict[str, float]:
    """How far the least-norm solution of J delta = r moves, and how nonlinear the outputs are there."""
    recipe = Recipe(generator=torch.Generator().manual_seed(0), sigma_w=1.5, multipliers="hidden", degree=degree)
    model, (x, _) = MLP(5, width=256, depth=1, activation="tanh", recipe=recipe), gaussian(10, 1)
    J, f0 = jacobian(model, x, is_multiplier), model(x).detach()
    J = J.reshape(len(f0), -1)
    delta = J.T @ torch.linalg.solve(J @ J.T, 0.5 * x[:, :1].sign())
    (z,) = [p for name, p in model.named_parameters() if is_multiplier(name, p)]
    with torch.no_grad():
        z += delta[:, 0]
    moved = J @ delta
    drift = relative_drift(jacobian(model, x, is_multiplier).reshape(J.shape), J)
    return {
        "trace": float(J.square().sum()), "distance": float(delta.norm()), "drift": drift,
        "error": float((model(x).detach() - f0 - moved).norm() / moved.norm()),
    }  # fmt: skip


def test_the_size_of_the_kernel_changes_the_distance_and_not_the_laziness():
    """From degree 2 to 50 the kernel grows 625-fold and the distance falls 25-fold, and training is no lazier."""
    small, large = least_norm(2), least_norm(50)
    assert large["trace"] / small["trace"] == pytest.approx(625)
    assert small["distance"] / large["distance"] == pytest.approx(25)
    for measure in ("drift", "error"):
        assert small[measure] > 0.01
        assert 0.7 < large[measure] / small[measure] < 2, measure


def jacobian(model: nn.Module, x: torch.Tensor, chosen) -> torch.Tensor:
    parameters = [p for name, p in model.named_parameters() if chosen(name, p)]
    rows = [torch.autograd.grad(f, parameters, retain_graph=True) for f in model(x)[:, 0]]
    return torch.stack([torch.cat([g.flatten() for g in row]) for row in rows])


def test_the_linearised_model_is_the_first_order_expansion():
    model = wide(16)
    x = torch.randn(3, 5, dtype=torch.float64)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    linearized = Linearized(model)
    torch.testing.assert_close(linearized(x), model(x))
    with torch.no_grad():
        for delta in linearized.delta:
            delta += 1e-6 * torch.randn_like(delta)
    moved = linearized(x)
    with torch.no_grad():
        for p, delta in zip(model.parameters(), linearized.delta, strict=True):
            p += delta
    torch.testing.assert_close(model(x), moved, rtol=0, atol=1e-9)
    linearized(x).sum().backward()
    assert all(delta.grad is not None for delta in linearized.delta)
    assert len(list(linearized.parameters())) == len(before)


class Attending(nn.Module):
    """A torch layer that is fused in evaluation mode, with dropout and an in-place change of its input."""

    def __init__(self):
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(4, 2, 8, dropout=0.5, batch_first=True)
        self.out = nn.Linear(4, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x.mul_(2.0)
        return self.out(self.layer(x).mean(dim=1))


@pytest.mark.parametrize("fails", [False, True])
def test_the_linearised_model_leaves_the_model_in_its_mode_and_takes_attention(fails):
    torch.manual_seed(0)
    model, x = Attending().double(), torch.randn(3, 5, 4, dtype=torch.float64)
    model.out.eval()
    before = x.clone()
    linearized = Linearized(model)
    assert model.training
    if fails:
        with pytest.raises((RuntimeError, AssertionError)):
            linearized(x[:, :, :2])
    else:
        with torch.no_grad():
            for delta in linearized.delta:
                delta += 1e-6 * torch.randn_like(delta)
        moved = linearized(x)
        torch.testing.assert_close(x, before)
        moving = Attending().double().eval()
        with torch.no_grad():
            for p, own, delta in zip(moving.parameters(), model.parameters(), linearized.delta, strict=True):
                p.copy_(own + delta)
        torch.testing.assert_close(moving(x.clone()), moved, rtol=0, atol=1e-9)
        moved.sum().backward()
        assert all(delta.grad is not None for delta in linearized.delta)
    assert [m.training for m in (model, model.layer, model.out)] == [True, True, False]
    assert torch.backends.mha.get_fastpath_enabled()


def test_training_the_linearised_model_is_training_by_its_kernel():
    model = wide(16)
    x, y = torch.randn(4, 5, dtype=torch.float64), torch.ones(4, 1, dtype=torch.float64)
    K, f0 = flatten(ntk.empirical_ntk(model, x)), model(x).detach()
    linearized, step = Linearized(model), 0.05
    optimizer = torch.optim.SGD(linearized.parameters(), lr=step)
    expected = f0
    for _ in range(10):
        optimizer.zero_grad()
        (0.5 * (linearized(x) - y).square().sum()).backward()
        optimizer.step()
        expected = expected - step * K @ (expected - y)
    torch.testing.assert_close(linearized(x).detach(), expected, rtol=1e-10, atol=1e-12)


def test_a_step_of_sign_descent_moves_outputs_by_the_sign_gradient_kernel():
    model = wide(16)
    x = torch.randn(3, 5, dtype=torch.float64)
    J = torch.func.jacrev(lambda p: torch.func.functional_call(model, p, (x,)))(dict(model.named_parameters()))
    flat = torch.cat([j.detach().flatten(2) for j in J.values()], dim=2)
    kernel = sign_gradient_kernel(flat)
    before, step = model(x).detach(), 1e-7
    model(x[1:2]).sum().backward()
    with torch.no_grad():
        for p in model.parameters():
            p += step * p.grad.sign()
    torch.testing.assert_close((model(x) - before)[:, 0] / step, kernel[:, 1, 0, 0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda K, y: kernel_regression(-K, y), "definite: its eigenvalues go from -"),
        (lambda K, y: kernel_regression(K + torch.randn_like(K), y), "symmetric kernel"),
        (lambda K, y: kernel_regression(K[:3], y), "square kernel"),
        (lambda K, y: kernel_regression(K, y[:3]), r"outputs \(n, c\) of 6 examples"),
        (lambda K, y: kernel_regression(K, y, ridge=-1), "ridge must be at least 0"),
        (lambda K, y: kernel_regression(K, y, cross=K[:, :3]), "cross kernel"),
        (lambda K, y: gradient_flow(K, y, times=[-1.0]), "times must be finite and at least 0"),
        (lambda K, y: gradient_flow(K, y, y[:2], times=[1.0]), "one shape"),
        (lambda K, y: cross_entropy_flow(K, torch.zeros(5), y, times=[1.0]), "expected labels"),
        (lambda K, y: relative_drift(K, torch.zeros_like(K)), "not defined"),
        (lambda K, y: linearization_error(y, y, y), "did not move"),
    ],
)
def test_mistakes(call, message):
    K, _, y, _, _ = kernels()
    with pytest.raises(ValueError, match=message):
        call(K, y)
