"""The lean layer: the same gradients, with less memory kept for the backward pass and less memory written."""

import copy
import pickle

import pytest
import torch
from architectures import build, inputs
from cases import FAMILIES, batch_for, classifier
from peft import get_peft_model
from torch import nn

from propulsion import PropulsionConfig
from propulsion.layer import PropulsionLayer
from propulsion.layers import layer_class
from propulsion.scaled_output import SMALLEST, multiply


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("shape", [(4,), (4, 1, 1)])
def test_the_lean_product_has_the_same_gradients(shape, overwrite):
    torch.manual_seed(0)

    def product(v, s):
        return multiply(v * 1, s, lean=True, overwrite=overwrite)  # Times 1: leaves cannot be overwritten.

    v = torch.randn(3, 5, *shape, dtype=torch.float64, requires_grad=True)
    s = (1 + 0.5 * torch.randn(shape, dtype=torch.float64).clamp(-1.5, 1.5)).requires_grad_(True)
    g = torch.randn(3, 5, *shape, dtype=torch.float64)
    plain = multiply(v, s, lean=False)
    lean = product(v, s)
    assert torch.equal(plain, lean)
    for a, b in zip(torch.autograd.grad(plain, (v, s), g), torch.autograd.grad(lean, (v, s), g), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-13, atol=1e-13)
    assert torch.autograd.gradcheck(product, (v, s), check_batched_grad=True)
    assert torch.autograd.gradgradcheck(product, (v, s))


def kept(lean: bool, value: float = 1.0) -> set[int]:
    """Bytes of the distinct tensors of a token's size that autograd keeps in a small feed-forward layer."""
    torch.manual_seed(0)
    inner, outer = nn.Linear(8, 64), nn.Linear(64, 8)
    config = PropulsionConfig(degree=3, lean=lean, init_value=value)
    layers = [layer_class(m)(m.requires_grad_(False), "default", config) for m in (inner, outer)]
    model = nn.Sequential(layers[0], nn.GELU(), layers[1]).train()
    sizes: dict[int, int] = {}

    def pack(t: torch.Tensor) -> torch.Tensor:
        sizes[t.untyped_storage().data_ptr()] = t.numel()
        alive.append(t)
        return t

    alive: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        model(torch.randn(100, 8)).sum().backward()
    return {n for n in sizes.values() if n >= 800} | {len([n for n in sizes.values() if n == 6400])}


def test_the_lean_layer_keeps_one_tensor_where_two_were():
    assert 1 in kept(lean=True)  # The scaled output, which GELU keeps too.
    assert 2 in kept(lean=False)  # The unscaled output too.


def test_near_zero_the_unscaled_output_is_kept_and_gradients_are_exact():
    """Near zero y / s would be 0 / 0."""
    assert 2 in kept(lean=True, value=0.0)
    for value in (0.0, 0.9 * SMALLEST ** (1 / 3), 1.1 * SMALLEST ** (1 / 3)):
        gradients = []
        for lean in (True, False):
            torch.manual_seed(0)
            base = nn.Linear(5, 4).double()
            layer = layer_class(base)(base, "default", PropulsionConfig(degree=3, init_value=value, lean=lean)).train()
            layer(torch.ones(2, 5, dtype=torch.float64)).square().sum().backward()
            gradients.append(layer.propulsion_z["default"].grad)
        torch.testing.assert_close(*gradients, rtol=1e-13, atol=0)


@pytest.mark.parametrize("by", ["the parameter", "its data"])
def test_a_scale_that_reaches_zero_is_noticed(by):
    base = nn.Linear(5, 4).double()
    layer = layer_class(base)(base, "default", PropulsionConfig(degree=1, lean=True)).train()
    x, z = torch.ones(2, 5, dtype=torch.float64), layer.propulsion_z["default"]
    layer(x).sum().backward()
    with torch.no_grad():
        (z if by == "the parameter" else z.data).zero_()
    layer.zero_grad()
    layer(x).sum().backward()
    torch.testing.assert_close(z.grad, base(x).sum(dim=0))


def test_all_layers_of_a_model_are_looked_at_at_once(monkeypatch):
    """Reading values waits for an accelerator, so it is done once; the test treats the CPU as one."""
    monkeypatch.setattr("propulsion.layer._waits", lambda scale: True)
    model = get_peft_model(build("bert"), PropulsionConfig(degree=3)).train()
    layers = [module for module in model.modules() if isinstance(module, PropulsionLayer)]
    looks, look = [], PropulsionLayer._look
    monkeypatch.setattr(PropulsionLayer, "_look", lambda layer: looks.append(layer) or look(layer))
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    for _ in range(3):
        model(**inputs("bert")).logits.square().sum().backward()
        optimizer.step()
    assert len(looks) == 3
    assert len(layers) > 3
    with torch.no_grad():
        layers[-1].propulsion_z["default"].zero_()
    model(**inputs("bert")).logits.square().sum().backward()
    assert [layer._far[1] for layer in layers] == [True] * (len(layers) - 1) + [False]
    copied = copy.deepcopy(layers[0])  # It is not checked together with the others.
    assert not copied._together
    assert layers[0]._together == layers


def test_a_copied_model_trains_as_the_first():
    model = get_peft_model(build("bert"), PropulsionConfig(degree=3)).train()
    gradients = []
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), model):
        torch.manual_seed(3)
        twin(**inputs("bert")).logits.square().sum().backward()
        gradients.append([z.grad for name, z in twin.named_parameters() if "propulsion_z" in name])
    for one, other, last in zip(*gradients, strict=True):
        assert torch.equal(one, last)
        assert torch.equal(other, last)


def test_torch_func_takes_a_training_layer():
    torch.manual_seed(0)
    base = nn.Linear(5, 4).double()
    layer = layer_class(base)(base, "default", PropulsionConfig(degree=2, lean=True)).train()
    p = {"propulsion_z.default": torch.rand(4, dtype=torch.float64) + 0.5}
    x = torch.randn(6, 5, dtype=torch.float64)

    def loss(p, row):
        return torch.func.functional_call(layer, p, (row,)).square().sum()

    found = torch.func.vmap(torch.func.grad(loss), (None, 0))(p, x)["propulsion_z.default"]
    z = p["propulsion_z.default"]
    torch.testing.assert_close(found, 4 * z**3 * base(x) ** 2, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_overwritten_product_is_rounded_as_the_other(dtype):
    torch.manual_seed(0)
    v, s = torch.randn(64, 32).to(dtype), torch.randn(32)
    plain, g = multiply(v, s, lean=False), torch.randn(64, 32).to(dtype)
    assert torch.equal(multiply(v.clone(), s.requires_grad_(True), lean=True, overwrite=True), plain)
    gradients = []
    for lean in (False, True):
        leaf = v.clone().requires_grad_(True)
        product = multiply(leaf * 1, s, lean=lean, overwrite=lean)
        gradients.append(torch.autograd.grad(product, (leaf, s), g))
    assert torch.equal(gradients[0][0], gradients[1][0])
    precision = 4 * torch.finfo(dtype).eps  # y / s differs from v by one rounding to the layer's dtype.
    size = float((g.float() * v.float()).abs().sum(dim=0).max())
    torch.testing.assert_close(gradients[0][1], gradients[1][1], rtol=0, atol=precision * size)


@pytest.mark.parametrize("family", [name for name in FAMILIES if name != "falcon"])
def test_a_lean_model_has_the_same_gradients(family):
    """For every family that uses the lean layer by default, at scales other than 1, with dropout."""
    batch, gradients = batch_for(family), []
    model = get_peft_model(classifier(family), PropulsionConfig(degree=3, positions="all", task_type="SEQ_CLS")).train()
    layers = [module for module in model.modules() if isinstance(module, PropulsionLayer)]
    assert all(layer._lean for layer in layers)
    with torch.no_grad():
        for layer in layers:
            layer.propulsion_z["default"] += 0.1 * torch.randn(layer.out_features)
    for lean in (False, True):
        for layer in layers:
            layer._lean = lean
        model.zero_grad()
        torch.manual_seed(3)
        model(**batch).logits.square().sum().backward()
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for name, expected in gradients[0].items():
        # Gradients cancel over tokens, while each token's term has its own rounding error.
        atol = 1e-12 * max(float(g.abs().max()) for g in gradients[0].values())
        torch.testing.assert_close(gradients[1][name], expected, rtol=1e-10, atol=atol, msg=name)


def test_where_the_lean_layer_is_taken_without_asking():
    def lean(model: nn.Module, **fields) -> bool:
        adapted = get_peft_model(copy.deepcopy(model), PropulsionConfig(**fields))
        return {m._lean for m in adapted.modules() if isinstance(m, PropulsionLayer)} == {True}

    bert, unknown = build("bert"), nn.Sequential(nn.Linear(3, 3))
    assert lean(bert)
    assert not lean(bert, lean=False)
    assert not lean(bert, degree=1)  # There it equals (IA)3 bit for bit.
    assert lean(bert, degree=1, lean=True)
    assert not lean(build("falcon"))  # The model writes into its layers' outputs.
    assert not lean(build("deberta"))
    assert not lean(unknown)
    assert lean(unknown, lean=True)


def test_a_model_that_writes_into_its_layers_outputs_is_told_what_to_do():
    torch.manual_seed(0)
    base = get_peft_model(build("falcon"), PropulsionConfig(degree=3, lean=True)).train()
    ids = torch.randint(3, 30, (2, 5))
    with pytest.raises(RuntimeError, match=r"writes into the output of a layer .* PropulsionConfig\(lean=False\)"):
        base(input_ids=ids).logits.sum().backward()
    plain = get_peft_model(build("falcon"), PropulsionConfig(degree=3)).train()
    plain(input_ids=ids).logits.sum().backward()


def test_an_output_that_somebody_watches_is_not_overwritten():
    torch.manual_seed(0)
    base, x = nn.Linear(5, 4), torch.randn(2, 5)
    layer = layer_class(base)(base, "default", PropulsionConfig(degree=3, lean=True, init_value=1.1)).train()
    seen: list[torch.Tensor] = []
    handle = base.register_forward_hook(lambda module, args, output: seen.append(output))
    output = layer(x)
    assert torch.equal(seen[0], base(x))
    handle.remove()
    assert torch.equal(layer(x), output)


def test_a_layer_of_its_own_kind_is_not_overwritten():
    """A layer of another class may return a tensor that it uses later: here, its weight."""

    class Positions(nn.Embedding):
        def forward(self, x):
            return self.weight[: x.shape[1]]

    base = Positions(6, 4)
    before = base.weight.detach().clone()
    layer = layer_class(base)(base, "default", PropulsionConfig(degree=3, lean=True, init_value=1.1)).train()
    layer(torch.zeros(2, 5, dtype=torch.long)).sum().backward()
    assert torch.equal(base.weight, before)


def test_forward_mode_differentiation_of_a_training_layer():
    torch.manual_seed(0)
    base, x = nn.Linear(5, 4).double(), torch.randn(2, 5, dtype=torch.float64)
    layer = layer_class(base)(base, "default", PropulsionConfig(degree=2, lean=True, init_value=1.1)).train()
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x, torch.ones_like(x))
        tangent = torch.autograd.forward_ad.unpack_dual(layer(dual)).tangent
    torch.testing.assert_close(tangent, (1.1**2 * base.weight.sum(dim=1)).expand(2, 4))
