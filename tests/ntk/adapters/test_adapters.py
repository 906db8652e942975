"""Kernels of adapters from shared passes, compared with automatic differentiation through peft's own layers."""

import copy

import peft
import pytest
import torch
from cases import autograd_kernel, batch, classifier, relative_error
from torch import nn

import ntk
from ntk import adapters
from propulsion import PropulsionConfig

EXACT = 1e-10
FAMILIES = ["bert", "roberta", "gpt2", "llama"]
LINEAR = {
    "bert": ["query", "value", "intermediate.dense", "output.dense"],
    "roberta": ["query", "value", "intermediate.dense", "output.dense"],
    "gpt2": ["c_attn", "mlp.c_proj", "c_fc"],
    "llama": ["q_proj", "v_proj", "up_proj", "down_proj"],
}
FEEDFORWARD = {"bert": ["output.dense"], "roberta": ["output.dense"], "gpt2": ["mlp.c_proj"], "llama": ["down_proj"]}


def wrapped(model, config):
    """The model wrapped by peft, in float64, and the kernel of its trainable parameters."""
    model = peft.get_peft_model(copy.deepcopy(model), config).double()
    return model, ntk.empirical_ntk(model, batch(), params="trainable", method="jacobian")


def modules(model, kind):
    """peft's layers by the layer's name in the model without peft."""
    prefix = "base_model.model."
    return {name.removeprefix(prefix): m for name, m in model.named_modules() if isinstance(m, kind)}


def kernel_of(model, method):
    return ntk.adapter_kernels(model, batch(), {"it": method})["it"]


@pytest.mark.parametrize("family", FAMILIES)
def test_lora_with_peft_s_matrices(family):
    model = classifier(family)
    with_lora, expected = wrapped(model, peft.LoraConfig(r=3, lora_alpha=6, target_modules=LINEAR[family]))
    a = {
        name: m.lora_A["default"].weight.detach() for name, m in modules(with_lora, peft.tuners.lora.LoraLayer).items()
    }
    found = kernel_of(model, adapters.LoRA(rank=3, alpha=6, modules=LINEAR[family], a=a))
    assert relative_error(found, expected) <= EXACT


@pytest.mark.parametrize("family", FAMILIES)
def test_dora_with_peft_s_matrices(family):
    model = classifier(family)
    with_dora, expected = wrapped(
        model, peft.LoraConfig(r=3, target_modules=LINEAR[family], lora_alpha=3, use_dora=True)
    )
    a = {
        name: m.lora_A["default"].weight.detach() for name, m in modules(with_dora, peft.tuners.lora.LoraLayer).items()
    }
    found = kernel_of(model, adapters.DoRA(rank=3, modules=LINEAR[family], a=a))
    assert relative_error(found, expected) <= EXACT


@pytest.mark.parametrize("family", FAMILIES)
def test_vera_with_peft_s_matrices(family):
    model = classifier(family)
    with_vera, expected = wrapped(model, peft.VeraConfig(r=4, target_modules=LINEAR[family]))
    layer = next(iter(modules(with_vera, peft.tuners.vera.layer.VeraLayer).values()))
    a, b = layer.vera_A["default"].double(), layer.vera_B["default"].double()
    found = kernel_of(
        model, adapters.VeRA(a=a, b=b, initial=float(layer.vera_lambda_d["default"][0]), modules=LINEAR[family])
    )
    assert relative_error(found, expected) <= EXACT


@pytest.mark.parametrize("family", FAMILIES)
def test_loha_with_peft_s_factors(family):
    model = classifier(family)
    try:
        with_loha, expected = wrapped(model, peft.LoHaConfig(r=3, alpha=6, target_modules=LINEAR[family]))
    except TypeError:
        pytest.skip("peft's LoHa does not take Conv1D")
    factors = {
        name: tuple(getattr(m, f"hada_{which}")["default"].detach() for which in ("w1_a", "w1_b", "w2_a"))
        for name, m in modules(with_loha, peft.tuners.loha.layer.LoHaLayer).items()
    }
    found = kernel_of(model, adapters.LoHa(rank=3, alpha=6, modules=LINEAR[family], factors=factors))
    assert relative_error(found, expected) <= EXACT


@pytest.mark.parametrize("family", FAMILIES)
def test_ia3(family):
    targets = {"target_modules": LINEAR[family], "feedforward_modules": FEEDFORWARD[family]}
    model = classifier(family)
    _, expected = wrapped(model, peft.IA3Config(**targets))
    found = kernel_of(model, adapters.IA3(LINEAR[family], FEEDFORWARD[family]))
    assert relative_error(found, expected) <= EXACT


@pytest.mark.parametrize("family", [*FAMILIES, "albert", "opt"])
@pytest.mark.parametrize("degree", [1, 15])
def test_propulsion_on_every_layer_and_embedding(family, degree):
    model = classifier(family)
    _, expected = wrapped(
        model, PropulsionConfig(degree=degree, positions=["all"], modules_to_save=["classifier", "score"])
    )
    heads = autograd_kernel(model, batch(), params=lambda name, p: name.split(".")[0] in ("classifier", "score"))
    found = kernel_of(model, adapters.Propulsion(degree=degree))
    assert relative_error(found + heads, expected) <= EXACT


@pytest.mark.parametrize("family", FAMILIES)
def test_parameters_of_the_network_itself(family):
    model = classifier(family)
    norms = {p for m in model.modules() if "norm" in type(m).__name__.lower() for p in m.parameters()}
    expected = {
        "full": autograd_kernel(model, batch()),
        "norms": autograd_kernel(model, batch(), params=lambda name, p: p in norms),
    }
    methods = {"full": adapters.Full(), "norms": adapters.NormTuning()}
    if family != "llama":
        methods["bitfit"] = adapters.BitFit()
        expected["bitfit"] = autograd_kernel(model, batch(), params=lambda name, p: name.endswith("bias"))
    found = ntk.adapter_kernels(model, batch(), methods)
    for key, kernel in expected.items():
        assert relative_error(found[key], kernel) <= EXACT


@pytest.mark.parametrize("family", FAMILIES)
def test_random_subset(family):
    model = classifier(family)
    method = adapters.RandomSubset(count=7, modules=LINEAR[family], seed=5)
    places, expected = {}, 0.0
    for module, layer in adapters.layers_of(model).items():
        if method.adapts(module) and not isinstance(layer, nn.Embedding):
            chosen = adapters.subset(layer.weight.numel(), 7, f"5.{module}")
            places[f"{module}.weight"] = (chosen, type(layer).__name__ == "Conv1D")
    inputs = batch()
    model.eval()
    rows = []
    for i in range(4):
        one = {key: value[i : i + 1] for key, value in inputs.items()}
        parameters = dict(model.named_parameters())
        outputs = model(**one).logits[0]
        for value in outputs:
            gradients = torch.autograd.grad(value, [parameters[name] for name in places], retain_graph=True)
            entries = [
                (g.T if transposed else g).flatten()[chosen]
                for g, (chosen, transposed) in zip(gradients, places.values(), strict=True)
            ]
            rows.append(torch.cat(entries))
    features = torch.stack(rows).unflatten(0, (4, 3))
    expected = torch.einsum("iap,jbp->ijab", features, features)
    assert relative_error(kernel_of(model, method), expected) <= EXACT


def test_the_mean_over_lora_s_matrices():
    """The mean over many draws of A approaches the expected kernel as their number grows."""
    model = classifier("bert")
    methods = {str(seed): adapters.LoRA(rank=2, alpha=6, seed=seed) for seed in range(64)}
    methods["mean"] = adapters.LoRA(rank=2, alpha=6, a="expected")
    found = ntk.adapter_kernels(model, batch(), methods)
    mean = found.pop("mean")
    errors = [relative_error(sum(list(found.values())[:k], torch.zeros_like(mean)) / k, mean) for k in (4, 64)]
    assert errors[1] < 0.25
    assert errors[1] < 0.6 * errors[0]


def test_random_matrices_depend_on_seed_and_layer_alone():
    model = classifier("bert")
    some = ntk.adapter_kernels(model, batch(), {"a": adapters.LoRA(modules=["query"])})["a"]
    methods = {
        "b": adapters.LoRA(),
        "a": adapters.LoRA(modules=["query"]),
        "c": adapters.LoRA(modules=["query"], seed=1),
    }
    more = ntk.adapter_kernels(model, batch(), methods)
    assert relative_error(more["a"], some) <= EXACT
    assert relative_error(more["c"], some) > 0.01


def test_all_methods_in_one_pass_equal_each_alone_and_two_sided():
    model, left, right = classifier("bert"), batch(), batch((6, 4), seed=9)
    methods = {
        "full": adapters.Full(),
        "propulsion": adapters.Propulsion(degree=15),
        "attention": adapters.Propulsion(modules=r".*attention.*"),
        "ia3": adapters.IA3(["key", "value"], ["output.dense"]),
        "lora": adapters.LoRA(rank=2),
        "dora": adapters.DoRA(rank=2),
        "loha": adapters.LoHa(rank=2),
        "subset": adapters.RandomSubset(5),
    }
    together = ntk.adapter_kernels(model, left, methods, right)
    for key, method in methods.items():
        alone = ntk.adapter_kernels(model, left, {key: method}, right, memory_budget=400_000)[key]
        assert together[key].shape == (4, 2, 3, 3)
        assert relative_error(alone, together[key]) <= EXACT
    traces = ntk.adapter_kernels(model, left, methods, right, reduce="trace")
    assert traces["full"].shape == (4, 2)


def test_outputs_overwritten_in_place():
    class InPlace(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.two = nn.Linear(4, 4), nn.Linear(4, 2)

        def forward(self, x):
            hidden = self.one(x)
            hidden += 1
            return self.two(hidden.tanh())

    torch.manual_seed(0)
    model, x = InPlace().double(), torch.randn(5, 4, dtype=torch.float64)
    config = PropulsionConfig(degree=1, target_modules=["one", "two"])
    adapted = peft.get_peft_model(copy.deepcopy(model), config).double()
    expected = ntk.empirical_ntk(adapted, x, params="trainable", method="jacobian")
    assert relative_error(ntk.adapter_kernels(model, x, {"it": adapters.Propulsion()})["it"], expected) <= EXACT


class TestMistakes:
    def test_methods_of_another_type(self):
        with pytest.raises(TypeError, match="methods must map names to methods"):
            ntk.adapter_kernels(classifier("bert"), batch(), {"x": "lora"})

    def test_a_method_that_trains_nothing(self):
        with pytest.raises(ValueError, match=r"method 'x' .* trains nothing"):
            ntk.adapter_kernels(classifier("bert"), batch(), {"x": adapters.LoRA(modules=["q_proj"])})

    def test_missing_matrix(self):
        with pytest.raises(ValueError, match=r"no matrix A is given for bert.encoder"):
            ntk.adapter_kernels(classifier("bert"), batch(), {"x": adapters.LoRA(modules=["query"], a={})})

    def test_vera_too_small(self):
        method = adapters.VeRA(a=torch.zeros(2, 3), b=torch.zeros(3, 2))
        with pytest.raises(ValueError, match="are too small"):
            ntk.adapter_kernels(classifier("bert"), batch(), {"x": method})

    @pytest.mark.parametrize("options", [{"rank": 0}, {"a": "mean"}])
    def test_lora(self, options):
        with pytest.raises(ValueError, match=r"rank of LoRA|a must be"):
            adapters.LoRA(**options)
