"""Scales in a rotated basis: the formula, its kernel, merging, saving, and what is refused."""

import pytest
import torch
from cases import batch_for, classifier, relative_error
from peft import PeftModel, get_peft_model
from torch import nn
from transformers.pytorch_utils import Conv1D

import ntk
from ntk import adapters
from propulsion import PropulsionConfig
from propulsion.hotswap import hotswap_adapter
from propulsion.layers import layer_class
from propulsion.rotation import rotation

D_IN, D_OUT = 5, 4
BASES = {
    "linear": lambda: nn.Linear(D_IN, D_OUT),
    "linear without bias": lambda: nn.Linear(D_IN, D_OUT, bias=False),
    "conv1d": lambda: Conv1D(D_OUT, D_IN),
    "embedding": lambda: nn.Embedding(7, D_OUT),
}


def adapted(kind: str, *, dtype=torch.float64, **options):
    """A layer with a rotated adapter at z other than 1, and an input."""
    torch.manual_seed(0)
    base = BASES[kind]().to(dtype)
    config = PropulsionConfig(**({"degree": 3, "basis": "rotated", "basis_seed": 5} | options))
    layer = layer_class(base)(base, "default", config)
    with torch.no_grad():
        layer.propulsion_z["default"] += 0.3 * torch.randn_like(layer.propulsion_z["default"])
    return layer, torch.randint(0, 7, (2, 3)) if kind == "embedding" else torch.randn(2, 3, D_IN).to(dtype)


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 2)).double()


def wrapped(**options):
    config = PropulsionConfig(**({"degree": 3, "target_modules": ["0", "2"], "basis": "rotated"} | options))
    return get_peft_model(network(), config).eval()


def moved(model):
    """The model with z away from 1."""
    torch.manual_seed(1)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "propulsion_z" in name:
                p += 0.2 * torch.randn_like(p)
    return model


@pytest.mark.parametrize("vectors", [1, 3])
@pytest.mark.parametrize("kind", BASES)
def test_output_and_merged_layer_are_the_formula(kind, vectors):
    layer, x = adapted(kind, vectors=vectors)
    v, scale, q = layer.base_layer(x), layer.scale(["default"]), rotation(D_OUT, 5)
    expected = torch.einsum("kj,k,ki,...i->...j", q, scale, q, v)
    torch.testing.assert_close(layer(x), expected, rtol=1e-13, atol=1e-14)
    assert not torch.allclose(expected, v * scale)
    kept = [p.clone() for p in layer.base_layer.parameters()]
    layer.merge(safe_merge=True)
    torch.testing.assert_close(layer(x), expected, rtol=1e-13, atol=1e-14)
    torch.testing.assert_close(layer.base_layer(x), expected, rtol=1e-13, atol=1e-14)
    layer.unmerge()
    assert all(torch.equal(a, b) for a, b in zip(kept, layer.base_layer.parameters(), strict=True))


@pytest.mark.parametrize("kind", ["linear", "conv1d", "embedding"])
def test_a_weight_that_the_model_reads_is_that_of_the_scaled_output(kind):
    layer, x = adapted(kind)
    rows = layer.weight[x] if kind == "embedding" else x @ (layer.weight.T if kind == "linear" else layer.weight)
    if kind != "embedding":
        rows = rows + layer.bias
    torch.testing.assert_close(rows, layer(x), rtol=1e-13, atol=1e-14)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_it_starts_as_the_identity_to_the_last_bit(dtype):
    layer, x = adapted("linear", dtype=dtype)
    with torch.no_grad():
        layer.propulsion_z["default"].fill_(1)
    assert torch.equal(layer(x), layer.base_layer(x))
    assert layer(x).dtype == dtype
    with torch.no_grad():
        layer.propulsion_z["default"].fill_(2 ** (1 / 3))  # the same factor in any basis
    torch.testing.assert_close(layer(x), 2 * layer.base_layer(x), rtol=1e-2, atol=1e-2)


def test_q_is_that_of_the_kernels():
    for width, seed in ((4, 0), (9, 3)):
        assert torch.equal(rotation(width, seed), adapters.rotation(width, seed))


@pytest.mark.parametrize("family", ["perceptron", "bert", "gpt2"])
def test_the_kernel_of_z_is_the_rotated_one_of_the_methods(family):
    torch.manual_seed(0)
    if family == "perceptron":
        model, inputs, modules = network(), torch.randn(5, 6, dtype=torch.float64), ["0", "2"]
    else:
        model, inputs = classifier(family), batch_for(family)
        modules = ["query", "word_embeddings"] if family == "bert" else ["c_attn", "c_proj"]
    method = adapters.Propulsion(4, modules, "rotated", seed=2)
    expected = ntk.adapter_kernels(model, inputs, {"it": method})["it"]
    config = PropulsionConfig(degree=4, target_modules=modules, basis="rotated", basis_seed=2)
    trained = get_peft_model(model, config).eval()
    for way in ("jacobian", "auto") if family == "perceptron" else ("auto",):
        found = ntk.empirical_ntk(
            trained.get_base_model(), inputs, params=lambda name, p: "propulsion_z" in name, method=way
        )
        assert relative_error(found, expected) < 1e-12


def test_saved_and_loaded(tmp_path):
    model, x = moved(wrapped(basis_seed=4)), torch.randn(3, 6, dtype=torch.float64)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(network(), str(tmp_path)).eval()
    assert (again.peft_config["default"].basis, again.peft_config["default"].basis_seed) == ("rotated", 4)
    assert torch.equal(again(x), model(x))
    merged = again.merge_and_unload()
    assert not any("propulsion" in name for name, _ in merged.named_parameters())
    torch.testing.assert_close(merged(x), model(x), rtol=1e-12, atol=1e-13)
    with pytest.raises(ValueError, match="an adapter with basis_seed = 0, got 4: load it with load_adapter"):
        hotswap_adapter(wrapped(), tmp_path)
    with pytest.raises(ValueError, match="an adapter with basis = 'coordinates', got 'rotated'"):
        hotswap_adapter(wrapped(basis="coordinates", basis_seed=4), tmp_path)
    other = wrapped(basis_seed=4)
    hotswap_adapter(other, tmp_path)
    assert torch.equal(other(x), model(x))


def test_training_moves_it_and_lean_does_not_matter():
    x, y = torch.randn(16, 6, dtype=torch.float64), torch.randn(16, 2, dtype=torch.float64)
    losses = {}
    for lean in (True, False):
        torch.manual_seed(0)
        model = wrapped(lean=lean).train()
        optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.01)
        steps = []
        for _ in range(30):
            loss = (model(x) - y).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            steps.append(float(loss.detach()))
        losses[lean] = steps
    assert losses[True] == losses[False]
    assert losses[True][-1] < 0.95 * losses[True][0]


class TestSeveralAdapters:
    def test_of_one_basis_multiply_and_of_different_ones_are_refused(self):
        model, x = wrapped(), torch.randn(3, 6, dtype=torch.float64)
        for name, options in (("same", {}), ("plain", {"basis": "coordinates"}), ("seed", {"basis_seed": 1})):
            options = {"degree": 3, "target_modules": ["0", "2"], "basis": "rotated"} | options
            model.add_adapter(name, PropulsionConfig(**options))
        moved(model)
        layers = [m for m in model.modules() if hasattr(m, "propulsion_z")]
        model.base_model.set_adapter(["default", "same"])
        h = x
        for layer, base in zip(layers, (model.base_model.model[0], model.base_model.model[2]), strict=True):
            q, scale = rotation(8, 0), layer.scale(["default"]) * layer.scale(["same"])
            h = torch.tanh((base.base_layer(h) @ q.T * scale) @ q)
        both = model(x)
        torch.testing.assert_close(both, model.base_model.model[4](h), rtol=1e-12, atol=1e-13)
        model.base_model.add_weighted_adapter(["default", "same"], [1.0, 1.0], "product")
        model.base_model.set_adapter("product")
        torch.testing.assert_close(model(x), both, rtol=1e-6, atol=1e-7)
        for name in ("plain", "seed"):
            model.base_model.set_adapter(["default", name])
            with pytest.raises(ValueError, match="expected adapters of one basis and basis_seed"):
                model(x)
            with pytest.raises(ValueError, match="expected adapters of one basis and basis_seed"):
                model.base_model.merge_adapter(["default", name])
            with pytest.raises(ValueError, match="expected adapters of one basis and basis_seed"):
                model.base_model.add_weighted_adapter(["default", name], [1.0, 1.0], "never")

    def test_no_batch_mixes_them(self):
        layer, x = adapted("linear")
        with pytest.raises(ValueError, match="a batch that mixes adapters, got one with basis='rotated': run each"):
            layer(x, adapter_names=["default", "__base__"])


class TestRefused:
    @pytest.mark.parametrize(("module", "kind"), [("1", "LayerNorm"), ("0", "Conv1d")])
    def test_layers_whose_output_has_no_last_axis_to_rotate_or_no_matrix(self, module, kind):
        model = nn.Sequential(nn.Conv1d(3, 4, 2), nn.LayerNorm(5), nn.Linear(5, 2))
        before = [type(m) for m in model.modules()]
        with pytest.raises(
            ValueError, match=f"for linear layers and embeddings, got '{module}', a {kind}: leave it out"
        ):
            get_peft_model(model, PropulsionConfig(target_modules=["2", module], basis="rotated"))
        assert [type(m) for m in model.modules()] == before

    def test_quantised_weights_do_not_merge(self):
        torch.manual_seed(0)
        base = nn.Linear(4, 3)
        base.weight = nn.Parameter(torch.ones(3, 4, dtype=torch.int8), requires_grad=False)
        layer = layer_class(nn.Linear(4, 3))(base, "default", PropulsionConfig(basis="rotated"))
        with pytest.raises(
            ValueError, match=r"a rotated basis mixes its rows\. Dequantise the model, or keep the adapter"
        ):
            layer.merge()

    def test_options(self):
        with pytest.raises(ValueError, match=r"basis must be one of 'coordinates', 'rotated'; got 'rotate' \(did you"):
            PropulsionConfig(basis="rotate")
        with pytest.raises(ValueError, match="basis_seed must be a whole number, got True"):
            PropulsionConfig(basis="rotated", basis_seed=True)
