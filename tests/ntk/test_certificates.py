"""Bounds on the distance of two kernels: they hold, they are reached, and they say something on random networks."""

import math

import numpy as np
import pytest
import torch
from cases import batch_for, classifier, randomized
from torch import Tensor, nn

import ntk
from ntk.adapters import rotated_mean, rotation
from ntk.certificates import conditioning, distance_interval, rotated_bound, rotated_deviation, rotated_variance

EXACT = 1e-12


def positive(n: int, rank: int) -> Tensor:
    features = torch.randn(n, rank, dtype=torch.float64)
    return features @ features.T


def scales_in(q: Tensor, M: Tensor) -> Tensor:
    """K_P in the bases q ``(b, r, r)``: ``(b, m, m)``."""
    diagonals = torch.einsum("bja,iac,bjc->bij", q, M, q)
    return torch.einsum("bik,bjk->bij", diagonals, diagonals)


class TestInterval:
    def test_it_holds_the_distance_after_the_best_scale(self):
        torch.manual_seed(0)
        for _ in range(200):
            F = positive(6, 4)
            M, P = (F + weight * positive(6, 4) for weight in torch.rand(2, dtype=torch.float64) * 2)
            low, high = distance_interval(ntk.kernel_alignment(F, M), ntk.kernel_alignment(M, P))
            distance = ntk.kernel_distance(F, P, scaled=True)
            assert low - EXACT <= distance <= high + EXACT

    @pytest.mark.parametrize("side", [1, -1])
    def test_coplanar_kernels_reach_its_ends(self, side):
        M, across = (
            torch.diag(torch.tensor([2.0, 1.0, 0.0])).double(),
            torch.diag(torch.tensor([-0.5, 1.0, 0.0])).double(),
        )
        F = M + 0.2 * across
        P = 3 * (M - side * 0.4 * across)
        assert min(float(each.diagonal().min()) for each in (F, M, P)) >= 0
        interval = distance_interval(ntk.kernel_alignment(F, M), ntk.kernel_alignment(M, P))
        end = interval.high if side == 1 else interval.low
        assert ntk.kernel_distance(F, P, scaled=True) == pytest.approx(end, abs=EXACT)

    def test_orthogonal_steps_say_nothing(self):
        assert distance_interval(0.6, 0.6) == (0, 1)
        with pytest.raises(ValueError, match=r"metric_scales is an alignment .* between 0 and 1; got 1.1"):
            distance_interval(0.5, 1.1)

    @pytest.mark.parametrize("family", ["bert", "gpt2", "llama", "t5", "linear"])
    def test_every_layer_of_a_random_network(self, family):
        torch.manual_seed(0)
        if family == "linear":
            model = nn.Sequential(nn.Linear(24, 512), nn.Linear(512, 512), nn.Linear(512, 2)).double()
            inputs = torch.randn(8, 24, dtype=torch.float64)
        else:
            model, inputs = classifier(family), batch_for(family)
        found = {k: p for k, p in ntk.decomposition(model, inputs, reduce="trace").items() if p.full.any()}
        assert found
        for name, parts in found.items():
            steps = (parts.full, parts.metric), (parts.metric, parts.propulsion)
            interval = distance_interval(*(min(1.0, ntk.kernel_alignment(*step)) for step in steps))
            distance = ntk.kernel_distance(parts.full, parts.propulsion, scaled=True)
            assert interval.low - 1e-7 <= distance <= interval.high + 1e-7, name  # arccos near 1 loses half the digits
            if name in ("0", "1"):  # wide layers without an activation: the setting of Theorem 5b
                assert distance <= interval.high < 0.35, name


class TestConditioning:
    @pytest.mark.parametrize(("r", "s", "bias"), [(60, 4, False), (60, 4, True), (9, 9, False), (200, 30, True)])
    def test_it_bounds_the_difference_as_a_matrix(self, r, s, bias):
        """K_F + bias's kernel if there is a bias, from autograd, and K_M from the decomposition."""
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(s, r, bias=bias), nn.GELU(), nn.Linear(r, 2)).double()
        x = torch.randn(7, s, dtype=torch.float64)
        W, a = model[0].get_parameter("weight").detach(), x
        if bias:
            W, a = (
                torch.cat([W, model[0].get_parameter("bias").detach()[:, None]], 1),
                torch.cat([x, torch.ones(7, 1)], 1),
            )
        full = ntk.flatten(ntk.empirical_ntk(model, x, params=lambda name, p: name.startswith("0.")))
        metric = ntk.flatten(ntk.decomposition(model, x, modules=["0"])["0"].metric)
        scale, bound = conditioning(W, a)
        difference = full - scale * metric
        for sign in (1, -1):
            assert float(torch.linalg.eigvalsh(bound * full + sign * difference).min()) > -EXACT * float(full.trace())
        assert ntk.kernel_distance(full, scale * metric) <= bound
        assert bound < (0.7 if r > 4 * s else 1.1)

    def test_some_gradients_reach_it_and_inputs_confine_it(self):
        torch.manual_seed(0)
        W = torch.diag(torch.tensor([1.0, 2.0, 5.0])).double()
        scale, bound = conditioning(W, torch.eye(3).double())
        assert (scale, bound) == (pytest.approx(2 * 3 / 26), pytest.approx(24 / 26))
        for direction in (0, 2):
            feature = torch.outer(torch.randn(3, dtype=torch.float64), torch.eye(3).double()[direction])
            full, metric = feature.square().sum(), (feature @ W.T).square().sum() / 3
            assert float((full - scale * metric).abs() / full) == pytest.approx(bound)
        assert conditioning(W, torch.eye(3)[:2]).bound == pytest.approx(3 / 5)
        assert conditioning(W[:2], torch.eye(3)).bound == 1  # one direction is lost

    def test_mistakes(self):
        with pytest.raises(
            ValueError, match=r"expected a weight \(r, s\) and inputs \(N, s\); got \(2, 3\) and \(4, 2\)"
        ):
            conditioning(torch.ones(2, 3), torch.ones(4, 2))
        with pytest.raises(ValueError, match="maps all inputs to 0"):
            conditioning(torch.ones(2, 3), torch.zeros(4, 3))


def all_bases(r: int) -> tuple[Tensor, Tensor]:
    """Orthogonal matrices and weights that integrate polynomials of degree 8 over SO(r) exactly, r = 2 or 3."""
    angles = torch.arange(17).double() * 2 * math.pi / 17
    turns = torch.zeros(17, r, r, dtype=torch.float64)
    turns[:, 0, 0] = turns[:, 1, 1] = angles.cos()
    turns[:, 0, 1] = -angles.sin()
    turns[:, 1, 0] = angles.sin()
    if r == 2:
        return turns, torch.full((17,), 1 / 17, dtype=torch.float64)
    turns[:, 2, 2] = 1
    cosines, weights = map(torch.from_numpy, np.polynomial.legendre.leggauss(9))
    tilt = torch.zeros(9, 3, 3, dtype=torch.float64)
    tilt[:, 1, 1] = 1
    tilt[:, 0, 0] = tilt[:, 2, 2] = cosines
    tilt[:, 0, 2] = (1 - cosines**2).sqrt()
    tilt[:, 2, 0] = -tilt[:, 0, 2]
    bases = torch.einsum("aij,bjk,ckl->abcil", turns, tilt, turns).reshape(-1, 3, 3)
    return bases, (weights / 2).repeat_interleave(17).repeat(17) / 17**2


class TestRotated:
    @pytest.mark.parametrize("r", [2, 3])
    def test_the_variance_is_the_integral_over_all_bases(self, r):
        torch.manual_seed(0)
        M = torch.randn(4, r, r, dtype=torch.float64) + 0.5
        bases, weights = all_bases(r)
        kernels = scales_in(bases, M)
        mean = torch.einsum("b,bij->ij", weights, kernels)
        products, transposed = torch.einsum("iab,jab->ij", M, M), torch.einsum("iab,jba->ij", M, M)
        traces = torch.einsum("iaa->i", M)
        torch.testing.assert_close(mean, rotated_mean(products, torch.outer(traces, traces), transposed, r))
        variance = torch.einsum("b,bij->ij", weights, (kernels - mean) ** 2)
        torch.testing.assert_close(rotated_variance(M[:2], M), variance[:2], rtol=1e-10, atol=1e-12)

    @pytest.mark.parametrize("r", [4, 11])
    def test_the_variance_is_that_of_many_draws(self, r):
        torch.manual_seed(0)
        M = torch.randn(3, r, r, dtype=torch.float64) + torch.eye(r).double()
        q, upper = torch.linalg.qr(torch.randn(40_000, r, r, dtype=torch.float64))
        kernels = scales_in((q * upper.diagonal(dim1=1, dim2=2).sign()[:, None]).mT, M)
        torch.testing.assert_close(rotated_variance(M, M), kernels.var(dim=0), rtol=0.06, atol=0)

    def test_one_output_has_one_basis(self):
        M = torch.randn(3, 1, 1, dtype=torch.float64)
        assert float(rotated_variance(M, M).abs().max()) < EXACT

    @pytest.mark.parametrize("r", [2, 5, 40])
    def test_the_deviation_bounds_the_sum_of_all_variances_closely(self, r):
        torch.manual_seed(0)
        M = torch.randn(6, r, r, dtype=torch.float64)
        S, total = (M + M.mT) / 2, float(rotated_variance(M, M).sum())
        four = 4 * (float(S.square().sum()) ** 2 + float(torch.einsum("iab,jab->ij", S, S).square().sum())
                    + 4 * float((S @ S).sum(0).square().sum()))  # fmt: skip
        assert rotated_deviation(M) ** 2 == pytest.approx(four / ((r + 1) * (r + 2) * (r + 6)))
        assert total <= rotated_deviation(M) ** 2
        assert r < 40 or total > 0.8 * rotated_deviation(M) ** 2

    def test_spread_features_have_the_variance_of_a_random_projection(self):
        """(K K' + K_M^2) / r, as in Proposition 2, for features whose entries are independent."""
        torch.manual_seed(0)
        r = 60
        one, noise = torch.randn(2, r, r, dtype=torch.float64)
        M = torch.stack([one, 0.6 * one + 0.8 * noise])
        metric = torch.einsum("iab,jab->ij", M, M) / r
        projected = ntk.bounds.kernel_variance(metric, r)
        torch.testing.assert_close(rotated_variance(M, M), projected, rtol=0.15, atol=0)

    @pytest.mark.parametrize(("family", "width"), [("perceptron", 200), ("bert", 0)])
    def test_the_bound_to_the_full_kernel_holds_and_says_something(self, family, width):
        """||K_F - s K_P|| of rotated scales, over 40 bases of one layer of a network of random weights."""
        torch.manual_seed(0)
        if family == "perceptron":
            model = nn.Sequential(nn.Linear(3, width, bias=False), nn.Tanh(), nn.Linear(width, 1)).double()
            inputs, layer = torch.randn(8, 3, dtype=torch.float64), "0"
        else:
            model, inputs, layer = (
                randomized(classifier("bert")),
                batch_for("bert"),
                "bert.encoder.layer.0.intermediate.dense",
            )
        M, W, a = features(model, inputs, layer)
        parts = ntk.decomposition(model, inputs, modules=[layer])[layer]
        full, metric = ntk.flatten(parts.full), ntk.flatten(parts.metric)
        torch.testing.assert_close(torch.einsum("iab,jab->ij", M, M) / M.shape[-1], metric)
        beside = rotated_bound(M, failure=0.1)
        draws = torch.stack([rotation(M.shape[-1], seed) for seed in range(40)])
        distances = (scales_in(draws, M) - metric).norm(dim=(1, 2))
        assert int((distances > beside).sum()) <= 40 * 0.1 + 4 * math.sqrt(40 * 0.09)
        if family == "perceptron":
            scale, bound = conditioning(W, a)
            total = bound * float(full.norm()) + scale * beside
            apart = (full - scale * scales_in(draws, M)).norm(dim=(1, 2))
            assert float(apart.max()) <= total < 0.8 * float(full.norm())

    def test_mistakes(self):
        square = torch.ones(2, 3, 3)
        with pytest.raises(ValueError, match=r"expected features \(m, r, r\).*got \(2, 3\)"):
            rotated_deviation(square[0, :2])
        with pytest.raises(ValueError, match="features of one layer"):
            rotated_variance(square, torch.ones(2, 2, 2))
        with pytest.raises(ValueError, match="failure is a probability"):
            rotated_bound(square, 0.0)


def features(model: nn.Module, inputs, layer: str) -> tuple[Tensor, Tensor, Tensor]:
    """M of every example and output of a layer that is called once, its weight, and its inputs."""
    seen: list[Tensor] = []
    module: nn.Module = model.eval().get_submodule(layer)

    def keep(module: nn.Module, args: tuple, y: Tensor) -> None:
        seen.extend((args[0], y))

    hook = module.register_forward_hook(keep)
    result = model(inputs) if isinstance(inputs, Tensor) else model(**inputs)
    hook.remove()
    values = getattr(result, "logits", result)
    a, v = seen
    rows = []
    for c in range(values.shape[1]):
        (g,) = torch.autograd.grad(values[:, c].sum(), v, retain_graph=True)
        g, y = (t.reshape(len(values), -1, t.shape[-1]) for t in (g, v.detach()))
        rows.append(torch.einsum("ntj,ntk->njk", g, y))
    return torch.stack(rows, 1).flatten(0, 1), module.get_parameter("weight").detach(), a.detach().flatten(0, -2)
