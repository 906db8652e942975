"""`ntk.explain` and the warning about slow parameters."""

import warnings

import pytest
import torch
from cases import FAMILIES, batch, batch_for, classifier
from torch import Tensor, nn

import ntk
from ntk.counts import BY_EXAMPLE, CONTRACTED, by_kind, counting


class Scaled(nn.Module):
    """A layer whose outputs are multiplied by a matrix in a way that has no rule, and by a vector with one."""

    def __init__(self, mixed: bool = False):
        super().__init__()
        self.first, self.out = nn.Linear(4, 8), nn.Linear(8, 3)
        self.matrix, self.vector = nn.Parameter(torch.randn(8, 8)), nn.Parameter(torch.randn(8))
        self.never = nn.Parameter(torch.randn(3))
        self.mixed = mixed

    def forward(self, x: Tensor) -> Tensor:
        h = torch.einsum("ni,ij->nj", torch.tanh(self.first(x)), self.matrix) * self.vector
        return self.out(h - h.mean(0) if self.mixed else h)


X = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))


def made(**options) -> Scaled:
    torch.manual_seed(0)
    return Scaled(**options)


def test_every_parameter_has_its_row():
    found = ntk.explain(made(), X)
    ways = {row.name: row.way for row in found.rows}
    assert ways == {
        "first.weight": "rule", "first.bias": "rule", "out.weight": "rule", "out.bias": "rule", "vector": "rule",
        "matrix": "example by example", "never": "not used",
    }  # fmt: skip
    rows = {row.name: row for row in found.rows}
    assert list(rows) == [name for name, _ in made().named_parameters()]
    assert rows["matrix"].operations == {"torch.functional.einsum": 1}
    assert "no rule" in rows["matrix"].why
    assert rows["first.weight"].held == 6 * (4 + 3 * 8) * 4  # inputs, and gradients of three outputs, in float32
    assert rows["matrix"].held == 6 * 3 * 64 * 4
    assert rows["matrix"].multiplications == (6 * 3) ** 2 * 64
    assert (found.examples, found.outputs, found.one_at_a_time) == (6, 3, None)
    assert "example by example: torch.functional.einsum" in str(found)


def test_the_contraction_is_the_one_that_is_taken():
    torch.manual_seed(0)
    for width, way in ((40, "pairs of tokens"), (1, "formed features")):
        model = nn.Sequential(nn.Linear(3, width, bias=False), nn.Unflatten(1, (1, width)), nn.Flatten())
        x = torch.randn(6 if width > 1 else 120, 3)
        (row,) = ntk.explain(model, x, reduce="trace").rows
        with counting() as found:
            ntk.empirical_ntk(model, x, reduce="trace")
        assert by_kind(found)[CONTRACTED] == {row.contraction: 1} == {way: 1}


def test_sizes_of_padded_batches_are_those_of_their_real_tokens():
    model, inputs = classifier("bert"), batch((7, 3, 5, 7))
    rows = {row.name: row for row in ntk.explain(model, inputs).rows}
    assert {row.way for row in rows.values()} == {"rule"}
    assert rows["bert.encoder.layer.0.attention.self.query.weight"].held == (7 + 3 + 5 + 7) * (12 + 3 * 12) * 8
    both = ntk.explain(model, inputs, inputs)
    assert both.examples == 8


def test_examples_that_run_one_at_a_time():
    found = ntk.explain(made(mixed=True), X)
    assert found.one_at_a_time == "its forward pass may mix the examples of a batch"
    assert "one at a time" in str(found)


def test_a_mistake_is_the_same_error_as_that_of_the_kernel():
    for bad, match in (({"output": lambda y, inputs: y[:, None]}, "n, c"), ({"reduce": "all"}, "reduce must be")):
        with pytest.raises(ValueError, match=match):
            ntk.explain(made(), X, **bad)


def test_nothing_is_changed_and_nothing_is_contracted():
    model = made().train()
    with counting() as found:
        ntk.explain(model, X)
    assert not by_kind(found)[CONTRACTED]
    assert model.training
    assert all(p.grad is None and p.requires_grad for p in model.parameters())


class TestWarning:
    def test_one_warning_names_parameter_reason_and_cost(self):
        with pytest.warns(ntk.SlowKernelWarning) as caught:
            ntk.empirical_ntk(made(), X)
        (words,) = (str(w.message) for w in caught if w.category is ntk.SlowKernelWarning)
        assert "matrix example by example (torch.functional.einsum: the operation has no rule)" in words
        assert "each of the 6 examples" in words

    def test_what_the_reference_takes(self):
        class Several(nn.Module):
            def __init__(self):
                super().__init__()
                self.out, self.p = nn.Linear(4, 2), nn.Parameter(torch.randn(4))

            def forward(self, x: Tensor) -> Tensor:
                return self.out(torch.aminmax(x * 1, dim=1, keepdim=True)[0] + torch.broadcast_tensors(x, self.p)[1])

        with pytest.warns(ntk.SlowKernelWarning, match=r"p by the reference \(.*\), at the cost of Jacobians"):
            ntk.empirical_ntk(Several(), X)
        with pytest.warns(ntk.SlowKernelWarning, match="p by the reference"):
            ntk.adapter_kernels(Several(), X, {"full": ntk.adapters.Full()})
        rows = {row.name: row.way for row in ntk.explain(Several(), X).rows}
        assert rows["p"] == "reference"

    @pytest.mark.parametrize("family", ["bert", "gpt2", "llama", "qwen3", "gptj"])
    def test_families_that_rules_take_give_none(self, family):
        with warnings.catch_warnings():
            warnings.simplefilter("error", ntk.SlowKernelWarning)
            ntk.empirical_ntk(classifier(family), batch_for(family))
            ntk.adapter_kernels(classifier(family), batch_for(family), {"full": ntk.adapters.Full()})

    def test_a_small_part_of_the_work_and_the_reference_by_choice_give_none(self):
        class Little(nn.Module):
            def __init__(self):
                super().__init__()
                self.first, self.out = nn.Linear(4, 100), nn.Linear(100, 2)
                self.p = nn.Parameter(torch.rand(1) + 1)

            def forward(self, x: Tensor) -> Tensor:
                return self.out(torch.tanh(self.first(x))) / self.p

        with warnings.catch_warnings(), counting() as found:
            warnings.simplefilter("error", ntk.SlowKernelWarning)
            ntk.empirical_ntk(Little(), X)
            ntk.empirical_ntk(made(), X, method="jacobian")
        assert by_kind(found)[BY_EXAMPLE]


def test_every_family_is_explained():
    """Every parameter of every family has a row, and only those of rules have no reason."""
    for family in FAMILIES:
        for row in ntk.explain(classifier(family), batch_for(family)).rows:
            assert (row.way == "rule") == (not row.why), (family, row.name)
