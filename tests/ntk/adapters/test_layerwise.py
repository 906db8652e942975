"""The kernels of each layer's weight, of a matrix on its outputs and of its scales, against autograd at its calls."""

import itertools
import math

import pytest
import torch
from cases import Mamba, autograd_kernel, batch_for, classifier, each_alone, randomized, relative_error, tied_gpt2
from torch import Tensor, nn

import ntk
from ntk import adapters

EXACT = 1e-12


class Twice(nn.Module):
    """Calls one layer twice, and two layers that share a weight once each; one layer is never called."""

    def __init__(self):
        super().__init__()
        self.first, self.again, self.twin, self.idle = (nn.Linear(6, 6) for _ in range(4))
        self.twin.weight = self.first.weight
        self.out = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.twin(self.first(x).tanh()).relu()
        return self.out(self.again(self.again(x).tanh()).mean(dim=1))


class Doubled(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x.tanh())


class Reads(nn.Module):
    """Reads the weight of one layer and the bias of another, and has a layer that does more than multiply."""

    def __init__(self):
        super().__init__()
        self.read, self.bias_read, self.doubled, self.out = (nn.Linear(6, 6) for _ in range(4))
        self.doubled = Doubled(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        x = self.doubled(self.read(x) @ self.read.weight)
        return self.out((self.bias_read(x) + self.bias_read.bias).mean(dim=1))


def perceptron() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 9), nn.GELU(), nn.Linear(9, 5, bias=False), nn.Tanh(), nn.Linear(5, 3))


CASES = {
    "perceptron": lambda: (randomized(perceptron().double()), torch.randn(4, 6, dtype=torch.float64), None),
    "called twice, and tied": lambda: (randomized(Twice().double()), torch.randn(4, 3, 6, dtype=torch.float64), None),
    "Mamba": lambda: (randomized(Mamba().double()), batch_for("bert", (5, 5))["input_ids"], "in_proj|out_proj|out"),
    "tied GPT-2": lambda: (tied_gpt2(), batch_for("gpt2", (7, 3, 5), side="right"), None),
} | {
    family: lambda family=family: (classifier(family), batch_for(family), None)
    for family in ("bert", "gpt2", "llama", "albert", "mixtral", "t5")
}


def case(name: str):
    torch.manual_seed(0)
    model, inputs, last = CASES[name]()
    modules = None if last is None else (lambda module: module.split(".")[-1] in last.split("|"))
    return model, inputs, {"modules": modules, "output": _two_tokens if name == "tied GPT-2" else None}


def _two_tokens(result, inputs) -> Tensor:
    """Two logits at the last real token."""
    last = inputs["attention_mask"].sum(dim=1) - 1
    return result.logits[torch.arange(len(last)), last][:, 5:7]


def calls(model: nn.Module, inputs, output=None) -> dict[str, list[list[Tensor]]]:
    """(G, M) of every linear layer, example and output: sums over calls and tokens of g a^T and g v^T, by autograd."""
    model.eval()
    found: dict[str, list[list[Tensor]]] = {}
    layers = {k: m for k, m in adapters.layers_of(model).items() if not isinstance(m, nn.Embedding)}
    for one in each_alone(inputs):
        made = []
        hooks = [
            m.register_forward_hook(lambda m, args, y, name=name, made=made: made.append((name, args[0], y)))
            for name, m in layers.items()
        ]
        result = model(one) if isinstance(one, Tensor) else model(**one)
        for hook in hooks:
            hook.remove()
        values = output(result, one) if output else getattr(result, "logits", result)
        sums = {name: [[], []] for name in layers}
        for value in values[0]:
            gradients = torch.autograd.grad(value, [y for *_, y in made], retain_graph=True, allow_unused=True)
            total = {name: [0, 0] for name in layers}
            for (name, a, v), g in zip(made, gradients, strict=True):
                if g is not None:
                    total[name][0] += g.flatten(0, -2).T @ a.detach().flatten(0, -2)
                    total[name][1] += g.flatten(0, -2).T @ v.detach().flatten(0, -2)
            for name, pair in total.items():
                for i in range(2):
                    sums[name][i].append(pair[i])
        for name, pair in sums.items():
            if torch.is_tensor(pair[0][0]):
                found.setdefault(name, []).append([torch.stack(each) for each in pair])
    return found


def defined(pairs: list[list[Tensor]], others: list[list[Tensor]]) -> tuple[Tensor, Tensor, Tensor]:
    """K_F, K_M and K_P - K_M from (G, M) of each example."""
    G, M = (torch.stack(each) for each in zip(*pairs, strict=True))
    G2, M2 = (torch.stack(each) for each in zip(*others, strict=True))
    r = M.shape[-1]
    full = torch.einsum("iars,jbrs->ijab", G, G2)
    metric = torch.einsum("iars,jbrs->ijab", M, M2) / r
    diagonals = torch.einsum("iarr,jbrr->ijab", M, M2)
    return full, metric, diagonals - metric


@pytest.mark.filterwarnings("ignore:the model reads the weight")
@pytest.mark.parametrize(
    ("name", "method"),
    [(name, "auto") for name in CASES]
    + [(name, "jacobian") for name in ("perceptron", "called twice, and tied", "Mamba", "gpt2")],
)
def test_every_layer_is_what_autograd_at_its_calls_defines(name, method):
    model, inputs, options = case(name)
    expected = calls(model, inputs, options["output"])
    found = ntk.decomposition(model, inputs, **options, method=method)
    chosen = {k for k in expected if adapters.chosen(options["modules"], k)}
    assert chosen
    assert {k for k, parts in found.items() if parts.full.any()} == chosen
    for layer, parts in found.items():
        if layer not in chosen:
            assert not torch.stack([parts.metric, parts.coordinates]).any()
            continue
        full, metric, coordinates = defined(expected[layer], expected[layer])
        assert relative_error(parts.full, full) <= EXACT, layer
        assert relative_error(parts.metric, metric) <= EXACT, layer
        assert float((parts.coordinates - coordinates).norm() / (metric + coordinates).norm()) <= EXACT, layer


@pytest.mark.parametrize("name", ["perceptron", "bert", "gpt2"])
def test_full_is_the_kernel_of_the_weight_and_propulsion_that_of_the_scales(name):
    model, inputs, _ = case(name)
    for layer, parts in itertools.islice(ntk.decomposition(model, inputs).items(), 4):
        weight = autograd_kernel(model, inputs, params=lambda n, p, w=f"{layer}.weight": n == w)
        assert relative_error(parts.full, weight) <= EXACT
        scales = ntk.adapter_kernels(model, inputs, {"it": adapters.Propulsion(3, modules=[layer])})["it"]
        assert relative_error(9 * parts.propulsion, scales) <= EXACT


def test_coordinates_are_the_covariance_over_the_coordinates_of_gradients_and_outputs():
    """K_P - K_M = r sum_ts Cov_j(g_tj g'_sj, v_tj v'_sj); <diag M, diag M'> - tr M tr M' / r is another number."""
    torch.manual_seed(0)
    r, g, v = 7, torch.randn(2, 3, 7, dtype=torch.float64), torch.randn(2, 3, 7, dtype=torch.float64)
    M = torch.einsum("xtj,xtk->xjk", g, v)
    gg, vv = (torch.einsum("tj,sj->tsj", x[0], x[1]) for x in (g, v))
    covariance = ((gg - gg.mean(-1, keepdim=True)) * vv).mean(-1)
    diagonals = M[0].diagonal() @ M[1].diagonal()
    difference = diagonals - (M[0] * M[1]).sum() / r
    torch.testing.assert_close(r * covariance.sum(), difference, rtol=1e-12, atol=0)
    assert abs(diagonals - M[0].trace() * M[1].trace() / r - difference) > 0.1


def test_without_a_bias_the_metric_is_w_w_transposed():
    """K_M = <G (W W^T / r)^1/2 ...>: the kernel of the weight after G is multiplied by W^T / sqrt(r)."""
    model, inputs, _ = case("perceptron")
    layer = "2"
    assert model[2].bias is None
    G = torch.stack([pair[0] for pair in calls(model, inputs)[layer]]) @ model[2].weight.detach().T / math.sqrt(5)
    expected = torch.einsum("iars,jbrs->ijab", G, G)
    assert relative_error(ntk.decomposition(model, inputs)[layer].metric, expected) <= EXACT


@pytest.mark.parametrize(
    ("name", "reduce"),
    [("bert", "trace"), ("gpt2", None), *(("called twice, and tied", r) for r in (None, "trace", "diagonal", "sum"))],
)
def test_two_sided_reduced_and_in_little_memory(name, reduce):
    model, inputs, options = case(name)
    if isinstance(inputs, Tensor):
        other = inputs[:2].flip(2)
    else:
        other = {key: value[1:3] for key, value in inputs.items()}
    whole = ntk.decomposition(model, inputs, other, **options)
    budget = 40_000 if isinstance(inputs, Tensor) else 250_000
    for layer, parts in ntk.decomposition(model, inputs, other, **options, reduce=reduce, memory_budget=budget).items():
        for part in ("full", "metric", "coordinates"):
            expected = (
                ntk.reduce_outputs(getattr(whole[layer], part), reduce) if reduce else getattr(whole[layer], part)
            )
            scale = max(float(whole[layer].propulsion.norm()), float(expected.norm()))
            assert float((getattr(parts, part) - expected).norm()) <= EXACT * scale, (layer, part)


def test_rotated_scales_average_to_the_formula_and_close_to_the_metric():
    model, inputs, _ = case("bert")
    layer = "bert.encoder.layer.0.intermediate.dense"
    M = torch.stack([pair[1] for pair in calls(model, inputs)[layer]])
    products = torch.einsum("iars,jbrs->ijab", M, M)
    traces, transposed = torch.einsum("iarr,jbss->ijab", M, M), torch.einsum("iars,jbsr->ijab", M, M)
    expected = adapters.rotated_mean(products, traces, transposed, M.shape[-1])
    draws = {str(i): adapters.Propulsion(2, [layer], "rotated", seed=i) for i in range(200)}
    kernels = torch.stack(list(ntk.adapter_kernels(model, inputs, draws).values())) / 4
    q = adapters.rotation(M.shape[-1], 7)
    rotated = torch.einsum("ja,ncab,jb->ncj", q, M, q)
    assert relative_error(kernels[7], torch.einsum("iaj,kbj->ikab", rotated, rotated)) <= EXACT
    spread = kernels.std(dim=0) / math.sqrt(len(kernels))
    assert float(((kernels.mean(dim=0) - expected) / spread).abs().max()) <= 4.5
    assert relative_error(kernels.mean(dim=0), products / (M.shape[-1] + 2)) > 0.02  # the other terms are needed here


@pytest.mark.parametrize("r", [2, 5])
def test_the_mean_over_rotations_is_that_of_many_draws(r):
    torch.manual_seed(0)
    M, other = torch.randn(2, r, r, dtype=torch.float64)
    q, upper = torch.linalg.qr(torch.randn(100_000, r, r, dtype=torch.float64))
    q = q * upper.diagonal(dim1=1, dim2=2).sign()[:, None]
    values = (torch.einsum("dji,ik,djk->dj", q, M, q) * torch.einsum("dji,ik,djk->dj", q, other, q)).sum(1)
    expected = adapters.rotated_mean((M * other).sum(), M.trace() * other.trace(), (M * other.T).sum(), r)
    error = float(values.std()) / math.sqrt(len(values))
    assert float(values.mean()) == pytest.approx(float(expected), abs=4 * error)
    assert abs(2 * float(expected) / r) > 8 * error  # a factor of 1 / r would show


def test_the_rotation_is_orthogonal_and_depends_on_seed_and_length_alone():
    q = adapters.rotation(5, 3)
    torch.testing.assert_close(q @ q.T, torch.eye(5, dtype=torch.float64), rtol=0, atol=1e-14)
    assert not torch.equal(q, adapters.rotation(5, 4))
    assert torch.equal(q, adapters.rotation.__wrapped__(5, 3))


class TestMistakes:
    @pytest.mark.parametrize("layer", ["read", "bias_read", "doubled"])
    def test_a_layer_that_is_used_otherwise_than_by_one_product(self, layer):
        model, x = randomized(Reads().double()), torch.randn(2, 3, 6, dtype=torch.float64)
        with pytest.raises(NotImplementedError, match=f"{layer} does more than multiply.*leave it out of modules"):
            ntk.decomposition(model, x, modules=[layer])
        if layer != "doubled":
            with pytest.raises(NotImplementedError, match="rotated basis does not scale: leave the layer out"):
                ntk.adapter_kernels(model, x, {"it": adapters.Propulsion(1, [layer], "rotated")})

    def test_choices(self):
        model, x, _ = case("perceptron")
        with pytest.raises(ValueError, match=r"no linear layer of the model.s body is chosen by modules="):
            ntk.decomposition(model, x, modules=["nowhere"])
        with pytest.raises(ValueError, match="method must be one of"):
            ntk.decomposition(model, x, method="fast")
        with pytest.raises(ValueError, match="basis must be 'coordinates' or 'rotated'; got 'other'"):
            adapters.Propulsion(basis="other")

    def test_an_output_that_depends_on_none(self):
        model = Twice().double()
        with pytest.raises(ValueError, match="depends on none of the linear layers"):
            ntk.decomposition(model, torch.randn(2, 3, 6, dtype=torch.float64), modules=["idle"])
