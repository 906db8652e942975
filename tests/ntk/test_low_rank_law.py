"""The law of LoRA's alignment at every rank, against draws of its matrices."""

import itertools
import math

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, jacrev, vmap

import ntk
from ntk import adapters
from ntk.layer_tokens import TokenGradients
from ntk.low_rank_law import UNIFORM, lora_law

RANKS = (1, 2, 4, 8, 16, 64)


class Tokens(nn.Module):
    """Two layers on the tokens of each example and a readout of their mean; with residual connections."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.out = nn.Linear(16, 40), nn.Linear(40, 40), nn.Linear(40, 2)

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        return self.out((h + self.second(torch.tanh(h))).mean(dim=-2))


def perceptron() -> nn.Module:
    return nn.Sequential(nn.Linear(20, 64), nn.GELU(), nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 2))


def case(name: str) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    model = (Tokens() if name == "tokens" else perceptron()).double()
    shape = (40, 5, 16) if name == "tokens" else (40, 20)
    return model, torch.randn(shape, dtype=torch.float64) + (1.0 if name == "with a mean" else 0.0)


CASES = ("perceptron", "with a mean", "tokens")


def gradients(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """d f_a(x_i) / d W of every linear layer, (n, c, r, s), by layer."""
    parameters = {name: p.detach() for name, p in model.named_parameters()}
    J = vmap(jacrev(lambda p, one: functional_call(model, p, (one[None],))[0]), (None, 0))(parameters, x)
    return {name.removesuffix(".weight"): J[name] for name in J if name.endswith("weight")}


def drawn(model: nn.Module, x: Tensor, kind, draws: int, **options) -> dict[int, Tensor]:
    """The kernels (draws, n, n) of a method at each rank, summed over outputs, by its own random matrices."""
    methods = {f"{r} {seed}": kind(rank=r, seed=seed, **options) for r in RANKS for seed in range(draws)}
    kernels = ntk.adapter_kernels(model, x, methods, reduce="trace")
    return {r: torch.stack([kernels[f"{r} {seed}"] for seed in range(draws)]) for r in RANKS}


@pytest.mark.parametrize("name", CASES)
def test_the_law_predicts_lora_at_every_rank(name):
    """The mean of 40 draws; peft's matrices weigh layers by 1 / s, and the CKA at high ranks shows it."""
    model, x = case(name)
    layers = gradients(model, x)
    full = sum(torch.einsum("iars,jars->ij", G, G) for G in layers.values())
    law = lora_law(list(layers.values()), weights=[1 / G.shape[-1] for G in layers.values()], excess_kurtosis=UNIFORM)
    assert law.limit < 0.999
    for rank, kernels in drawn(model, x, adapters.LoRA, 40).items():
        values = [ntk.cka(full, kernel) for kernel in kernels]
        assert law.cka(rank) == pytest.approx(sum(values) / len(values), abs=0.02), rank


@pytest.mark.parametrize("name", CASES)
def test_the_law_predicts_gaussian_matrices_of_equal_variance(name):
    model, x = case(name)
    layers = gradients(model, x)
    full = sum(torch.einsum("iars,jars->ij", G, G) for G in layers.values())
    law, generator = lora_law(list(layers.values())), torch.Generator().manual_seed(1)
    assert law.limit == pytest.approx(1)
    for rank, seeds in itertools.product(RANKS, [150]):
        values = []
        for _ in range(seeds):
            kernel = torch.zeros_like(full)
            for G in layers.values():
                a = torch.randn(rank, G.shape[-1], generator=generator, dtype=torch.float64)
                feature = (G @ a.T).flatten(1)
                kernel += feature @ feature.T / rank
            values.append(ntk.cka(full, kernel))
        assert law.cka(rank) == pytest.approx(sum(values) / seeds, abs=0.02), rank


def test_where_few_directions_dominate_the_law_holds_from_higher_ranks_on():
    """With nearly parallel inputs the kernel's size fluctuates, as `size` says; ranks from 8 on are predicted."""
    torch.manual_seed(0)
    G = torch.randn(40, 1, 3, 1, dtype=torch.float64) * torch.randn(30, dtype=torch.float64)
    G = G + 0.3 * torch.randn(40, 1, 3, 30, dtype=torch.float64)
    law, full = lora_law([G]), torch.einsum("iars,jars->ij", G, G)
    assert law.size > 1
    errors = {}
    for rank in (1, 8, 64):
        values = []
        for _ in range(400):
            feature = (G @ torch.randn(30, rank, dtype=torch.float64)).flatten(1)
            values.append(ntk.cka(full, feature @ feature.T))
        errors[rank] = abs(sum(values) / 400 - law.cka(rank))
    assert errors[1] > 0.02 > max(errors[8], errors[64])


@pytest.mark.parametrize("kurtosis", [0.0, UNIFORM])
def test_variances_are_those_of_the_draws(kurtosis):
    """Constant and size from the fluctuation of many draws at rank 4, by their definition."""
    torch.manual_seed(0)
    G, rank, draws = torch.randn(6, 2, 3, 4, dtype=torch.float64), 4, 40_000
    shape = draws, rank, 4
    a = torch.randn(shape, dtype=torch.float64) if not kurtosis else (2 * torch.rand(shape).double() - 1) * math.sqrt(3)
    features = torch.einsum("iaps,drs->diapr", G, a).flatten(2) / math.sqrt(rank)
    kernels = features @ features.mT
    R = ntk.center(torch.einsum("iaps,japs->ij", G, G))
    E = torch.stack([ntk.center(k) for k in kernels[:4000]]) - R
    along = torch.einsum("dij,ij->d", E, R) / R.square().sum()
    law = lora_law([G], excess_kurtosis=kurtosis)
    assert law.size == pytest.approx(float(rank * along.square().mean()), rel=0.1)
    beside = E - along[:, None, None] * R
    assert law.constant == pytest.approx(float(rank * beside.square().sum((1, 2)).mean() / R.square().sum()), rel=0.05)


def test_rslora_has_the_same_law_and_dora_an_added_kernel():
    model, x = case("perceptron")
    layers = gradients(model, x)
    weights = [1 / G.shape[-1] for G in layers.values()]
    ours = drawn(model, x, adapters.LoRA, 1)[4][0]
    scaled = drawn(model, x, adapters.LoRA, 1, alpha=math.sqrt(4.0) * 4)[4][0]  # scale alpha / rank = 2
    assert ntk.cka(ours, scaled) == pytest.approx(1)
    full = sum(torch.einsum("iars,jars->ij", G, G) for G in layers.values())
    lengths = {}
    for name, G in layers.items():
        W = model.get_submodule(name).weight.detach()
        u = torch.einsum("iars,rs->iar", G, W) / W.norm(dim=1)
        lengths[name] = torch.einsum("iar,jar->ij", u, u)
    added = sum(lengths.values())
    for rank, kernels in drawn(model, x, adapters.DoRA, 40).items():
        # DoRA of scale 1: the mean of the low-rank part is rank / (3 s) times the weight's kernel.
        law = lora_law(
            list(layers.values()), weights=[rank * w / 3 for w in weights], added=added, excess_kurtosis=UNIFORM
        )
        values = [ntk.cka(full, kernel) for kernel in kernels]
        assert law.cka(rank) == pytest.approx(sum(values) / len(values), abs=0.02), rank


def test_the_rank_that_reaches_an_alignment():
    law = lora_law([torch.randn(12, 1, 5, 30, dtype=torch.float64, generator=torch.Generator().manual_seed(0))])
    assert law.cka(law.rank(0.9)) == pytest.approx(0.9)
    assert law.rank(1.0) == math.inf
    assert law.rank(0.5) < law.rank(0.9)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda G: lora_law([]), "one or more layers; got 0 and 0"),
        (lambda G: lora_law([G], weights=[1.0, 2.0]), "got 2 and 1"),
        (lambda G: lora_law([G * math.nan]), "NaN"),
        (lambda G: lora_law([torch.ones_like(G)]), "K1 is zero"),
    ],
)
def test_mistakes(call, message):
    with pytest.raises(ValueError, match=message):
        call(torch.randn(4, 1, 2, 3, dtype=torch.float64))


@pytest.mark.parametrize("exponent", [-300, -100, 90, 300, 500])
def test_the_law_does_not_depend_on_the_scale_of_the_gradients(exponent):
    generator = torch.Generator().manual_seed(0)
    gradients = [torch.randn(6, 2, 3, 5, dtype=torch.float64, generator=generator) for _ in range(2)]
    expected = lora_law(gradients, weights=[1.0, 0.5], excess_kurtosis=UNIFORM)
    scaled = [G * 2.0**exponent for G in gradients]
    assert lora_law(scaled, weights=[1.0, 0.5], excess_kurtosis=UNIFORM) == expected
    g, a = (tuple(torch.randn(t, 4, dtype=torch.float64, generator=generator) for t in (2, 3, 1)) for _ in range(2))
    tokens = TokenGradients(g, a)
    moved = TokenGradients(tuple(x * 2.0**exponent for x in g), tuple(x * 2.0 ** (exponent // 2) for x in a))
    assert lora_law([moved]) == lora_law([tokens])
    assert lora_law(gradients, weights=[2.0**200, 2.0**199], excess_kurtosis=UNIFORM) == expected


def test_numbers_that_the_law_does_not_take():
    gradients = [torch.randn(6, 1, 3, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))]
    for options in (
        {"weights": [float("nan")]}, {"excess_kurtosis": float("inf")}, {"added": torch.full((6, 6), float("nan"))},
    ):  # fmt: skip
        with pytest.raises(ValueError, match="finite"):
            lora_law(gradients, **options)
    for rank in (0, -1, float("nan")):
        with pytest.raises(ValueError, match="rank above 0"):
            lora_law(gradients).cka(rank)
