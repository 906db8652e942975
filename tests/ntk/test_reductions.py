"""Kernels that are formed with reduced output axes, compared with whole kernels that are reduced afterwards."""

import pytest
import torch
from cases import batch, batch_for, classifier, relative_error, tied_gpt2
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import ntk
from ntk.layout import LAYOUTS

EXACT = 1e-10
REDUCTIONS = [reduce for reduce in LAYOUTS if reduce]


def check(model, inputs, inputs2=None, **options):
    """Check every reduction by both methods, for the kernel and for every parameter's kernel."""
    layers = ntk.layer_kernels(model, inputs, inputs2, method="jacobian", **options)
    total = sum(layers.values(), torch.zeros(()))
    for reduce in REDUCTIONS:
        expected = ntk.reduce_outputs(total, reduce)
        for method in ("structured", "jacobian"):
            found = ntk.empirical_ntk(model, inputs, inputs2, method=method, reduce=reduce, **options)
            assert found.shape == expected.shape
            assert relative_error(found, expected) <= EXACT, (reduce, method)
            parts = ntk.layer_kernels(model, inputs, inputs2, method=method, reduce=reduce, **options)
            for name, kernel in layers.items():
                part = ntk.reduce_outputs(kernel, reduce)
                # A kernel that is zero up to rounding is compared relative to the whole kernel.
                scale = max(float(part.norm()), 1e-6 * float(total.norm()))
                assert float((parts[name] - part).norm()) <= EXACT * scale, (reduce, method, name)


# These compute norms or rotations in float32, whatever the model's precision. A backward pass of summed outputs rounds
# there once, c passes round c times.
PARTLY_FLOAT32 = ("llama", "mixtral")


@pytest.mark.parametrize("family", ["bert", "bart", *PARTLY_FLOAT32])
def test_families(family):
    model, inputs = classifier(family), batch_for(family, (5, 2, 5))
    whole = ntk.empirical_ntk(model, inputs)
    for reduce in REDUCTIONS:
        found = ntk.empirical_ntk(model, inputs, reduce=reduce)
        rounding = 1e-7 if reduce == "sum" and family in PARTLY_FLOAT32 else EXACT
        assert relative_error(found, ntk.reduce_outputs(whole, reduce)) <= rounding, reduce


def test_every_parameter_of_a_classifier():
    check(classifier("bert"), batch((3, 2)), output=ntk.outputs.classes([2, 0]))


def test_two_batches():
    check(classifier("bert"), batch((4, 6, 2)), batch((3, 5), seed=9))


def test_examples_that_use_different_parameters():
    """Some batches do not use a parameter."""

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.words, self.first, self.second, self.out = (
                nn.Embedding(50, 6), nn.Linear(6, 4), nn.Linear(6, 4), nn.Linear(4, 3),
            )  # fmt: skip

        def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
            layer = self.first if input_ids.shape[1] < 4 else self.second
            return self.out(torch.tanh(layer(self.words(input_ids)).sum(dim=1)))

    torch.manual_seed(0)
    check(Model().double(), batch((3, 5, 2)), batch((5, 3), seed=9))
    check(Model().double(), batch((3, 2)), batch((5, 4), seed=9))


@pytest.mark.parametrize("words", [[5, 9], [3]])
def test_a_tied_head_and_a_single_output(words):
    check(tied_gpt2(), batch(), output=ntk.outputs.label_words(words))


def test_outputs_without_an_axis():
    """The output has shape (n,), one number for each example."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 1), nn.Flatten(0)).double()
    check(model, torch.randn(6, 4, dtype=torch.float64))


class Several(nn.Module):
    """Operations with and without a rule, dense features, and a readout that only some outputs depend on."""

    def __init__(self, c: int):
        super().__init__()
        self.conv, self.scale = nn.Conv1d(2, 3, 2), nn.Parameter(torch.rand(3, 1))
        self.left, self.right = nn.Linear(12, c - c // 2), nn.Linear(12, c // 2)
        self.unused = nn.Parameter(torch.randn(2))

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.tanh(self.conv(x) * self.scale).flatten(1)
        return torch.cat([self.left(hidden), self.right(F.gelu(hidden))], dim=1)


def test_parameters_of_all_kinds():
    torch.manual_seed(0)
    check(Several(5).double(), torch.randn(6, 2, 5, dtype=torch.float64))


def test_a_symmetric_kernel_of_many_examples():
    """There are more rows than the size from which symmetric products are computed by halves."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3)).double()
    check(model, torch.randn(300, 3, dtype=torch.float64))


def test_what_the_reference_takes_over():
    """The reference's kernels are added in the same reduced layout."""

    class Mixing(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.second(_Doubled.apply(x, self.first.weight).tanh() + self.first(x))

    torch.manual_seed(0)
    check(Mixing().double(), torch.randn(5, 4, dtype=torch.float64))


class _Doubled(torch.autograd.Function):
    """An operation that the capture cannot see."""

    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x, weight)
        return 2 * x * weight.sum(dim=0)

    @staticmethod
    def backward(ctx, g):  # pyright: ignore[reportIncompatibleMethodOverride]
        x, weight = ctx.saved_tensors
        return 2 * g * weight.sum(dim=0), (2 * g * x).sum(dim=0).expand_as(weight)


METHODS = {
    "full": ntk.adapters.Full(),
    "Propulsion": ntk.adapters.Propulsion(degree=3),
    "LoRA": ntk.adapters.LoRA(rank=2),
    "mean of LoRA": ntk.adapters.LoRA(rank=2, a="expected"),
    "BitFit": ntk.adapters.BitFit(),
}


@pytest.mark.parametrize("family", ["bert", "gpt2"])
def test_adapters(family):
    model, left, right = classifier(family), batch((6, 2, 6)), batch((5, 6), seed=9)
    for inputs2 in (None, right):
        whole = ntk.adapter_kernels(model, left, METHODS, inputs2)
        for reduce in REDUCTIONS:
            found = ntk.adapter_kernels(model, left, METHODS, inputs2, reduce=reduce)
            for name, kernel in whole.items():
                assert relative_error(found[name], ntk.reduce_outputs(kernel, reduce)) <= EXACT, (name, reduce)


def test_little_memory():
    """With little memory the model runs in segments and the examples in tiles."""
    model, left, right = classifier("bert"), batch((6, 2, 6)), batch((5, 6), seed=9)
    for inputs2 in (None, right):
        whole = ntk.empirical_ntk(model, left, inputs2)
        for reduce in REDUCTIONS:
            found = ntk.empirical_ntk(model, left, inputs2, reduce=reduce, memory_budget=60_000)
            assert relative_error(found, ntk.reduce_outputs(whole, reduce)) <= EXACT, reduce


def test_random_subsets():
    model, inputs = classifier("bert"), batch()
    draw = lambda reduce: ntk.random_subset_ntk(  # noqa: E731
        model, inputs, 40, generator=torch.Generator().manual_seed(0), reduce=reduce, draws=2
    )
    for reduce in REDUCTIONS:
        for found, whole in zip(draw(reduce), draw(None), strict=True):
            assert relative_error(found, ntk.reduce_outputs(whole, reduce)) <= EXACT
    with pytest.raises(ValueError, match="reduce must be None, 'trace'"):
        draw("mean")


class Largest(TorchDispatchMode):
    """Records the number of elements of the largest tensor that an operation returned."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for t in tree_leaves(result):
            if isinstance(t, Tensor):
                self.elements = max(self.elements, t.untyped_storage().nbytes() // t.element_size())
        return result


class Backward(TorchDispatchMode):
    """Counts backward passes, by the derivative of the only tanh."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func is torch.ops.aten.tanh_backward.default
        return func(*args, **(kwargs or {}))


def many_outputs(c: int) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, c))
    return model.double(), torch.randn(20, 6, dtype=torch.float64)


@pytest.mark.parametrize("method", ["structured", "jacobian"])
@pytest.mark.parametrize("reduce", REDUCTIONS)
def test_nothing_is_as_large_as_the_whole_kernel(method, reduce):
    """A budget of a tenth of the whole kernel suffices, and no tensor exceeds it."""
    (model, x), whole = many_outputs(100), 20**2 * 100**2
    if method == "jacobian":
        x, whole = x[:8], 8**2 * 100**2
    budget = 8 * whole / 10 if method == "structured" else 8 * whole
    expected = ntk.reduce_outputs(ntk.empirical_ntk(model, x), reduce)
    with Largest() as seen:
        found = ntk.empirical_ntk(model, x, reduce=reduce, method=method, memory_budget=budget)
    assert relative_error(found, expected) <= EXACT
    assert seen.elements <= budget / 8


def test_a_summed_kernel_takes_one_backward_pass():
    """Its features have one output."""
    (model, x), seen = many_outputs(100), {}
    for reduce in ("trace", "sum"):
        with Backward() as calls:
            ntk.empirical_ntk(model, x, reduce=reduce)
        seen[reduce] = calls.count
    assert seen["trace"] >= 100
    assert seen["sum"] < 10


@pytest.mark.parametrize("method", ["structured", "jacobian"])
def test_what_to_do_about_a_kernel_that_is_too_large(method):
    """Following the message's advice helps, and the smallest budget that it names suffices."""
    model, x = many_outputs(100)
    with pytest.raises(MemoryError, match="use fewer examples or outputs, or reduce='trace', or raise memory_budget"):
        ntk.empirical_ntk(model, x, method=method, memory_budget=5e6)
    assert ntk.empirical_ntk(model, x, method=method, memory_budget=5e6, reduce="trace").shape == (20, 20)
    with pytest.raises(MemoryError, match=r"at least .*use (?!.*reduce=)") as caught:
        ntk.empirical_ntk(model, x[:4], method=method, memory_budget=3e3, reduce="trace")
    number, unit = str(caught.value).split("at least ")[1].split()[:2]
    least = float(number) * {"MB": 1e6, "GB": 1e9}[unit]
    ntk.empirical_ntk(model, x[:4], method=method, memory_budget=1.1 * least, reduce="trace")
