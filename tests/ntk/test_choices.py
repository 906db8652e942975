"""What functions of kernels accept: choices of parameters, tuples of inputs, arrays; tangent features themselves."""

import numpy as np
import pytest
import torch
from cases import batch, classifier, relative_error
from torch import Tensor, nn

import ntk
from ntk.functional import select_parameters

EXACT = 1e-10
NETWORK = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4)), nn.Linear(4, 2))


@pytest.mark.parametrize(
    ("params", "expected"),
    [
        ("0.weight", ["0.weight"]),
        ("2", ["2.0.weight", "2.0.bias", "2.1.weight", "2.1.bias"]),
        ("2.1", ["2.1.weight", "2.1.bias"]),
        ("*.bias", ["0.bias", "2.0.bias", "2.1.bias", "3.bias"]),
        (["3", "0.bias"], ["0.bias", "3.weight", "3.bias"]),
        (("?.weight",), ["0.weight", "3.weight"]),
        ("*.1", ["2.1.weight", "2.1.bias"]),
    ],
)
def test_parameters_are_chosen_by_names_modules_and_patterns(params, expected):
    assert list(select_parameters(NETWORK, params)) == expected


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ("0.wieght", r"did you mean 0.weight"),
        (["0", "4"], r"params='4' is no parameter or module"),
        ("zzzzzzzz", r"see model.named_parameters"),
        ([], r"selects none"),
    ],
)
def test_names_that_no_parameter_has_are_refused(params, message):
    with pytest.raises(ValueError, match=message):
        select_parameters(NETWORK, params)


def test_a_tied_parameter_is_chosen_by_any_of_its_names():
    model = nn.ModuleDict({"first": nn.Linear(3, 3), "second": nn.Linear(3, 3)})
    model["second"].weight = model["first"].weight
    assert list(select_parameters(model, "second.weight")) == ["first.weight"]


class Two(nn.Module):
    """Takes two tensors, of which the second may be missing."""

    def __init__(self):
        super().__init__()
        self.left, self.right = nn.Linear(3, 2), nn.Linear(4, 2)

    def forward(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        return self.left(x).tanh() * (1 if y is None else self.right(y))


def test_tuples_of_inputs_are_positional_arguments(tmp_path):
    model = Two().double()
    x, y = torch.randn(4, 3, dtype=torch.float64), torch.randn(4, 4, dtype=torch.float64)
    named = {"x": x, "y": y}
    expected = ntk.empirical_ntk(model, named, method="jacobian")
    for method in ntk.METHODS:
        assert relative_error(ntk.empirical_ntk(model, (x, y), method=method), expected) <= EXACT
    one = ntk.empirical_ntk(model, (x,), inputs2=(x[:2],))
    assert relative_error(one, ntk.empirical_ntk(model, x, x[:2])) <= EXACT
    assert str(ntk.explain(model, (x, y))) == str(ntk.explain(model, named))
    assert np.allclose(ntk.NTKOperator(model, (x, y)).trace(), ntk.trace(expected))
    sketches = [ntk.sketched_ntk(model, inputs, dimension=64).features for inputs in ((x, y), named)]
    assert torch.equal(*sketches)
    store = ntk.kernel_store(tmp_path, model, block=2)
    store.add((x, y))
    store.compute()
    assert relative_error(torch.tensor(store.load()), expected) <= EXACT
    with pytest.raises(ValueError, match=r"a tuple of 3 tensors, and Two.forward has 2 named"):
        ntk.empirical_ntk(model, (x, y, y))
    with pytest.raises(ValueError, match=r"must hold the tensors that the model takes, in their order; got nothing"):
        ntk.empirical_ntk(model, ())


def test_jacobians_are_the_features_of_the_kernel():
    model, inputs = classifier("roberta").eval(), batch()
    J = ntk.jacobian(model, inputs, params=["*.query", "classifier"])
    kernel = sum(torch.einsum("iap,jbp->ijab", each.flatten(2), each.flatten(2)) for each in J.values())
    assert relative_error(kernel, ntk.empirical_ntk(model, inputs, params=["*.query", "classifier"])) <= EXACT
    assert all(each.shape[:2] == (4, 3) for each in J.values())
    margin = ntk.jacobian(model, inputs, params="classifier", output=ntk.outputs.margin(0, 1))
    assert torch.allclose(margin["classifier.out_proj.bias"][:, 0], torch.tensor([1.0, -1.0, 0.0]).double())
    with pytest.raises(MemoryError, match=r"the Jacobians of 4 examples and 3 outputs need at least"):
        ntk.jacobian(model, inputs, memory_budget=1e3)


def test_a_linearized_model_has_the_kernel_of_the_model():
    model = NETWORK.double()
    x = torch.randn(5, 3, dtype=torch.float64)
    linear = ntk.linearize(model, "0")
    assert torch.allclose(linear(x), model(x))
    values = linear(x)
    gradients = [
        torch.cat([g.flatten() for g in torch.autograd.grad(v, list(linear.delta), retain_graph=True)])
        for v in values.flatten()
    ]
    J = torch.stack(gradients).view(5, 2, -1)
    expected = ntk.empirical_ntk(model, x, params="0")
    assert relative_error(torch.einsum("iap,jbp->ijab", J, J), expected) <= EXACT


@pytest.mark.parametrize("shared", [True, False])
def test_metrics_take_arrays(shared, tmp_path):
    generator = np.random.default_rng(0)
    J = generator.normal(size=(5, 2, 20))
    K1, K2 = (np.einsum("iap,jbp->ijab", J[..., :k], J[..., :k]) for k in (20, 15))
    if shared:  # memory that must not be written to, as a store returns it
        K1.flags.writeable = False
    T1, T2 = torch.tensor(K1), torch.tensor(K2)
    for metric in (ntk.trace, ntk.effective_rank, ntk.participation_ratio):
        assert metric(K1) == metric(T1)
    for metric in (ntk.spectrum, ntk.center, ntk.flatten):
        assert torch.equal(metric(K1), metric(T1))
    for metric in (
        ntk.kernel_distance, ntk.best_scale, ntk.kernel_alignment, ntk.cka, ntk.trace_ratio, ntk.matching_degree,
    ):  # fmt: skip
        assert metric(K1, K2) == metric(T1, T2) == metric(K1, T2)
    assert ntk.eigenspace_overlap(K1, K2, 2) == ntk.eigenspace_overlap(T1, T2, 2)
    assert torch.equal(ntk.principal_angles(K1, K2, 2), ntk.principal_angles(T1, T2, 2))
    assert ntk.equivalent_directions(K1, 0.5) == ntk.equivalent_directions(T1, 0.5)
    assert torch.equal(ntk.reduce_outputs(K1, "trace"), ntk.reduce_outputs(T1, "trace"))
    for draw in (ntk.permuted, lambda K, generator: ntk.gaussian_sketch(K, 3, generator=generator)):
        drawn = [draw(K, generator=torch.Generator().manual_seed(0)) for K in (K1, T1)]
        assert torch.equal(*drawn)


def test_a_backbone_method_leaves_the_head_out():
    model, inputs = classifier("roberta").eval(), batch()
    prefix = f"{model.base_model_prefix}."
    kernels = ntk.adapter_kernels(
        model, inputs, {"body": ntk.adapters.Backbone(ntk.adapters.Full(), prefix), "all": ntk.adapters.Full()}
    )
    head = ntk.empirical_ntk(model, inputs, params="classifier")
    assert relative_error(kernels["body"] + head, kernels["all"]) <= EXACT
