"""Gradients as tokens against formed ones: kernels, and LoRA's law from pairs of tokens."""

import pytest
import torch
from cases import batch_for, classifier, relative_error
from torch import Tensor, nn

import ntk
from ntk.layer_tokens import TokenGradients, token_gradients
from ntk.low_rank_law import UNIFORM, lora_law


class Twice(nn.Module):
    """Calls one layer twice, on three tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.again, self.out = nn.Linear(6, 5, bias=False), nn.Linear(5, 5), nn.Linear(5, 2)

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        return self.out(self.again(torch.tanh(self.again(h))).mean(dim=1))


def case(name: str):
    torch.manual_seed(0)
    if name == "twice":
        return Twice().double(), torch.randn(6, 3, 6, dtype=torch.float64), None
    if name == "perceptron":
        model = nn.Sequential(nn.Linear(4, 7), nn.Tanh(), nn.Linear(7, 3)).double()
        return model, torch.randn(6, 4, dtype=torch.float64), None
    modules = {"gpt2": ["c_attn", "c_proj"], "bert": ["value", "dense"]}[name]
    return classifier(name), batch_for(name, (7, 3, 5, 4)), modules


def formed(tokens: TokenGradients) -> Tensor:
    return torch.stack([g.T @ a for g, a in zip(tokens.g, tokens.a, strict=True)])[:, None]


CASES = ("twice", "perceptron", "bert", "gpt2")


@pytest.mark.parametrize("name", CASES)
def test_kernels_are_those_of_the_weights(name):
    model, inputs, modules = case(name)
    found = token_gradients(model, inputs, modules=modules)
    expected = {k: p.full for k, p in ntk.decomposition(model, inputs, modules=modules, reduce="trace").items()}
    assert set(found) == {layer for layer, kernel in expected.items() if kernel.any()}
    for layer, tokens in found.items():
        assert relative_error(tokens.kernel(), expected[layer]) < 1e-12
        assert tokens.kernel().dtype == torch.float64


@pytest.mark.parametrize("kurtosis", [0.0, UNIFORM, 2.0])
@pytest.mark.parametrize("name", CASES)
def test_the_law_from_pairs_of_tokens_is_that_from_formed_gradients(name, kurtosis):
    model, inputs, modules = case(name)
    layers = list(token_gradients(model, inputs, modules=modules).values())
    weights = [1.0 / (1 + i) for i in range(len(layers))]
    expected = lora_law([formed(each) for each in layers], weights=weights, excess_kurtosis=kurtosis)
    found = lora_law(layers, weights=weights, excess_kurtosis=kurtosis)
    for field in ("limit", "constant", "size"):
        assert getattr(found, field) == pytest.approx(getattr(expected, field), rel=1e-9), field


def test_batches_and_little_memory_give_the_same():
    model, inputs, modules = case("bert")
    whole = token_gradients(model, inputs, modules=modules)
    for layer, tokens in token_gradients(model, inputs, modules=modules, memory_budget=400_000).items():
        torch.testing.assert_close(tokens.kernel(), whole[layer].kernel(), rtol=1e-12, atol=0)


class Reads(nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind, self.first, self.second = kind, nn.Linear(4, 4), nn.Linear(4, 4)
        if kind == "shared":
            self.second.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        h = x * self.first.weight.diagonal() if self.kind == "diagonal" else self.first(x)
        return self.second(h @ self.first.weight if self.kind == "on the right" else h)


class TestMistakes:
    @pytest.mark.parametrize("kind", ["diagonal", "on the right", "shared"])
    def test_weights_that_are_used_otherwise(self, kind):
        model, x = Reads(kind).double(), torch.randn(3, 4, dtype=torch.float64)
        with pytest.raises(NotImplementedError, match=r"first\.weight.*leave its layer out"):
            token_gradients(model, x)
        if kind != "shared":
            assert set(token_gradients(model, x, modules=["second"])) == {"second"}

    def test_choices_and_memory(self):
        model, x, _ = case("perceptron")
        with pytest.raises(ValueError, match="no linear layer of the model's body is chosen"):
            token_gradients(model, x, modules=["nowhere"])
        with pytest.raises(MemoryError, match="take fewer examples or layers, or raise memory_budget"):
            token_gradients(model, x, memory_budget=100)
