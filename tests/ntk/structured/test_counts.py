"""`ntk.counts` counts the rules and contractions that ran, and each of them is used by some model."""

import pytest
import torch
from cases import relative_error
from torch import Tensor, nn
from torch.nn import functional as F

import ntk
from benchmarks.kernels import ran, unused
from ntk.counts import BY_EXAMPLE, BY_REFERENCE, BY_RULE, CONTRACTED, PASSES, by_kind, counting
from ntk.structured.rules import RULES, name_of

# How to call an operation with data h (n, 4), a matrix w (4, 4) and a vector b (4,); func(h, b) if not named here.
CALLS = {
    F.linear: lambda func, h, w, b: func(h, w, b),
    torch.addmm: lambda func, h, w, b: func(b, h, w),
    F.embedding: lambda func, h, w, b: func((h[:, :2] > 0).long(), w).sum(dim=1),
    F.layer_norm: lambda func, h, w, b: func(h, (4,), w[0], b),
    torch.layer_norm: lambda func, h, w, b: func(h, (4,), w[0], b),
    F.rms_norm: lambda func, h, w, b: func(h, (4,), b),
    F.batch_norm: lambda func, h, w, b: func(h, w[0].detach(), w[1].detach() ** 2, b, w[2]),
    F.instance_norm: lambda func, h, w, b: func(h[:, :, None] * torch.arange(3.0).to(h), weight=b).flatten(1),
    F.group_norm: lambda func, h, w, b: func(h, 2, b),
    torch.group_norm: lambda func, h, w, b: func(h, 2, b),
    **{
        func: lambda func, h, w, b, axes=axes: func(
            h.reshape(-1, 4, *[1] * axes), w.reshape(4, 4, *[1] * axes), b
        ).flatten(1)
        for axes, pair in enumerate(
            ((F.conv1d, F.conv_transpose1d), (F.conv2d, F.conv_transpose2d), (F.conv3d, F.conv_transpose3d)), 1
        )
        for func in pair
    },
} | dict.fromkeys(
    (torch.matmul, torch.Tensor.matmul, torch.mm, torch.Tensor.mm),
    lambda func, h, w, b: func(h, w),
)  # fmt: skip


class Calling(nn.Module):
    def __init__(self, func):
        super().__init__()
        self.func, self.call = func, CALLS.get(func, lambda func, h, w, b: func(h, b))
        self.matrix, self.vector = nn.Parameter(torch.randn(4, 4)), nn.Parameter(torch.randn(4))

    def forward(self, x: Tensor) -> Tensor:
        return self.call(self.func, x, self.matrix, self.vector).tanh()


@pytest.mark.parametrize("func", RULES, ids=name_of)
def test_every_rule_is_taken(func):
    """A rule under a wrong name would never be used, and kernels would still be exact, example by example."""
    torch.manual_seed(0)
    model, x = Calling(func).double(), torch.randn(3, 4, dtype=torch.float64)
    with counting() as found:
        kernel = ntk.empirical_ntk(model, x, method="structured")
    assert found[BY_RULE, name_of(func)] > 0
    assert not by_kind(found)[BY_EXAMPLE]
    assert not by_kind(found)[BY_REFERENCE]
    assert relative_error(kernel, ntk.empirical_ntk(model, x, method="jacobian")) <= 1e-10


def test_operators_are_taken_by_the_rules_of_their_functions():
    class Operators(nn.Module):
        def __init__(self):
            super().__init__()
            self.matrix, self.vector = nn.Parameter(torch.randn(4, 4)), nn.Parameter(torch.randn(4))

        def forward(self, x: Tensor) -> Tensor:
            return self.vector * (self.vector + (x @ self.matrix) * self.vector) - self.vector

    torch.manual_seed(0)
    with counting() as found:
        ntk.empirical_ntk(Operators().double(), torch.randn(3, 4, dtype=torch.float64))
    assert by_kind(found)[BY_RULE].keys() == {f"torch.Tensor.{name}" for name in ("add", "matmul", "mul", "sub")}
    assert not by_kind(found)[BY_EXAMPLE]


def test_both_contractions_and_passes():
    torch.manual_seed(0)
    x = torch.randn(6, 3, dtype=torch.float64)
    for width, way in ((40, "pairs of tokens"), (1, "formed features")):
        model = nn.Sequential(nn.Linear(3, width, bias=False), nn.Unflatten(1, (1, width)), nn.Flatten()).double()
        with counting() as found:
            ntk.empirical_ntk(model, x.repeat(1 if width > 1 else 20, 1), reduce="trace")
        assert by_kind(found)[CONTRACTED] == {way: 1}
        assert by_kind(found)[PASSES] == {"batches": 1, "segments": 1}


def test_what_has_no_rule_and_what_the_reference_takes():
    class Divided(nn.Module):
        def __init__(self):
            super().__init__()
            self.p = nn.Parameter(torch.rand(4) + 1)

        def forward(self, x: Tensor) -> Tensor:
            return (x / self.p).tanh()

    model, x = Divided().double(), torch.randn(3, 4, dtype=torch.float64)
    with pytest.warns(ntk.SlowKernelWarning), counting() as found:
        ntk.empirical_ntk(model, x)
    assert by_kind(found)[BY_EXAMPLE].keys() == {"torch.Tensor.div"}
    with counting() as found:
        ntk.empirical_ntk(model, x, method="jacobian")
        with counting() as inner:
            pass
    assert by_kind(found)[BY_REFERENCE] == {"p": 1}
    assert not any(by_kind(inner).values())
    with pytest.warns(ntk.SlowKernelWarning):
        ntk.empirical_ntk(model, x)
    assert not by_kind(found)[BY_EXAMPLE]  # Outside of the context nothing is counted.


def test_benchmarks_say_what_never_ran():
    torch.manual_seed(0)
    with counting() as found:
        ntk.empirical_ntk(nn.Linear(3, 2), torch.randn(4, 3))
    run = {"ran": by_kind(found)}
    assert "operations by rule: torch.nn.functional.linear" in ran(run)
    assert "parameters by the reference: none" in ran(run)
    never = unused([{"measures": {"full": [run]}}, {"measures": {"bare": [{}]}}])
    assert never is not None
    assert "torch.nn.functional.linear" not in never
    assert "torch.nn.functional.rms_norm" in never
    assert ran({}) == "measured before this was counted"
    assert unused([{"measures": {"full": [run], "adapters": [{}]}}]) is None
