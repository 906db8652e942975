"""Recurrent layers and cells: kernels from one pass are those of autograd and of the reference."""

import warnings

import pytest
import torch
from cases import autograd_kernel, randomized, relative_error
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import ntk
from ntk.counts import BY_EXAMPLE, BY_REFERENCE, PASSES, by_kind, counting
from ntk.structured.independence import Independence

EXACT = 1e-10


@pytest.fixture(autouse=True)
def no_parameter_is_slow():
    with warnings.catch_warnings():
        warnings.simplefilter("error", ntk.SlowKernelWarning)
        yield


def numbers(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def compare(model: nn.Module, x: Tensor, x2: Tensor | None = None, *, batches: int | None = None, **options) -> None:
    """Compare the kernel with plain autograd, and each parameter's with the reference."""
    model.eval()
    with counting() as counted:
        found = ntk.empirical_ntk(model, x, x2, method="structured", **options)
    expected = autograd_kernel(model, x, x2)
    assert relative_error(found, expected) <= EXACT
    layers = ntk.layer_kernels(model, x, x2, method="structured", **options)
    for name, kernel in ntk.layer_kernels(model, x, x2, method="jacobian").items():
        scale = max(float(kernel.norm()), 1e-6 * float(expected.norm()))
        assert float((layers[name] - kernel).norm()) <= EXACT * scale, name
    assert not by_kind(counted)[BY_EXAMPLE]
    assert not by_kind(counted)[BY_REFERENCE]
    if batches is not None:
        assert by_kind(counted)[PASSES]["batches"] == batches


class Sequences(nn.Module):
    """A recurrent layer whose outputs and last states are read."""

    def __init__(self, kind, **options):
        super().__init__()
        self.before = nn.Linear(3, 3)
        self.layer = kind(3, 4, **options)
        self.first = options.get("batch_first", False)
        width = (options.get("proj_size") or 4) * (2 if options.get("bidirectional") else 1)
        self.out = nn.Linear(width, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.before(x))
        y, last = self.layer(x if self.first else x.transpose(0, 1))
        states = torch.cat([last] if isinstance(last, Tensor) else list(last), dim=2)
        y = self.out((y if self.first else y.transpose(0, 1)).tanh().mean(1))
        return y + states.sum((0, 2))[:, None] * torch.tensor([0.3, 0.7], dtype=y.dtype)


OPTIONS = {
    "plain": {},
    "batch first": {"batch_first": True},
    "no bias": {"bias": False},
    "two layers": {"num_layers": 2, "dropout": 0.1},
    "both directions": {"num_layers": 2, "bidirectional": True, "batch_first": True},
}
KINDS = {
    "lstm": (nn.LSTM, {}),
    "projected": (nn.LSTM, {"proj_size": 2}),
    "gru": (nn.GRU, {}),
    "tanh": (nn.RNN, {}),
    "relu": (nn.RNN, {"nonlinearity": "relu"}),
}


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("kind", KINDS)
def test_layers(kind, options):
    torch.manual_seed(0)
    layer, own = KINDS[kind]
    model = randomized(Sequences(layer, **own, **OPTIONS[options]).double())
    compare(model, numbers(4, 5, 3), batches=1)
    compare(model, numbers(3, 5, 3), numbers(2, 1, 3), batches=2)


@pytest.mark.parametrize("kind", KINDS)
def test_little_memory(kind):
    torch.manual_seed(0)
    layer, own = KINDS[kind]
    model = randomized(Sequences(layer, **own, num_layers=2, bidirectional=True).double())
    x = numbers(6, 5, 3)
    expected = autograd_kernel(model, x)
    for budget in (6e4, 2e5):
        assert relative_error(ntk.empirical_ntk(model, x, memory_budget=budget), expected) <= EXACT


class Cells(nn.Module):
    """A loop over steps, with the same weights at each."""

    def __init__(self, cell: nn.Module):
        super().__init__()
        self.cell, self.out = cell, nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        state = None
        for step in x.unbind(1):
            state = self.cell(step, state)
        return self.out(state[0] if isinstance(state, tuple) else state)


@pytest.mark.parametrize(
    "make",
    [
        lambda: nn.LSTMCell(3, 4), lambda: nn.GRUCell(3, 4), lambda: nn.RNNCell(3, 4),
        lambda: nn.RNNCell(3, 4, nonlinearity="relu"), lambda: nn.GRUCell(3, 4, bias=False),
    ],
)  # fmt: skip
def test_cells(make):
    torch.manual_seed(0)
    compare(randomized(Cells(make()).double()), numbers(4, 6, 3), batches=1)


class Packed(nn.Module):
    """Sequences that end at the first zero of their first entry."""

    def __init__(self, kind, ordered: bool):
        super().__init__()
        self.layer, self.out = kind(3, 4, batch_first=True, bidirectional=True), nn.Linear(8, 2)
        self.ordered = ordered

    def forward(self, x: Tensor) -> Tensor:
        lengths = (x[:, :, 0] != 0).sum(1)
        packed = pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=self.ordered)
        y, _ = self.layer(packed)
        return self.out(pad_packed_sequence(y, batch_first=True)[0].sum(1))


@pytest.mark.parametrize("ordered", [False, True])
@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
def test_packed_sequences(kind, ordered):
    torch.manual_seed(0)
    x = numbers(4, 5, 3)
    for i, length in enumerate((5, 4, 2, 1) if ordered else (2, 5, 1, 4)):
        x[i, length:] = 0
    compare(randomized(Packed(kind, ordered).double()), x)


class States(nn.Module):
    """A first state from the data, a state carried on, weights computed from others, and weights with two uses."""

    def __init__(self):
        super().__init__()
        self.start, self.layer = nn.Linear(3, 4), nn.LSTM(3, 4, batch_first=True)
        self.normed = nn.utils.parametrizations.weight_norm(nn.GRU(4, 4, batch_first=True), "weight_hh_l0")
        self.out = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        start = torch.tanh(self.start(x[:, 0]))[None]
        y, state = self.layer(x, (start, start * 2))
        y, _ = self.layer(y[..., :3], state)
        return self.out(self.normed(y)[0][:, -1])


def test_states_and_several_uses():
    torch.manual_seed(0)
    compare(randomized(States().double()), numbers(4, 5, 3), batches=1)


class Learned(nn.Module):
    """A first state that is a parameter, or one that differs from example to example by its position."""

    def __init__(self, by_position: bool):
        super().__init__()
        self.layer, self.out = nn.GRU(3, 4, batch_first=True), nn.Linear(4, 2)
        self.state, self.by_position = nn.Parameter(torch.randn(1, 1, 4)), by_position

    def forward(self, x: Tensor) -> Tensor:
        state = self.state.expand(1, len(x), 4).contiguous()
        if self.by_position:
            state = torch.arange(len(x), dtype=x.dtype)[None, :, None] + torch.zeros_like(state.detach())
        return self.out(self.layer(x, state)[0][:, -1])


@pytest.mark.parametrize("by_position", [False, True])
def test_first_states_of_other_kinds_are_exact(by_position):
    torch.manual_seed(0)
    model, x = randomized(Learned(by_position).double()).eval(), numbers(4, 5, 3)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ntk.SlowKernelWarning)
        found = ntk.empirical_ntk(model, x)
    assert relative_error(found, autograd_kernel(model, x)) <= EXACT


def test_examples_on_another_axis_are_noticed():
    """A layer along the examples mixes them, and one that reads them backwards too."""

    class Along(nn.Module):
        def __init__(self, flipped: bool):
            super().__init__()
            self.layer, self.out, self.flipped = nn.GRU(3, 4), nn.Linear(4, 2), flipped

        def forward(self, x: Tensor) -> Tensor:
            if self.flipped:
                return self.out(self.layer(x.flip(0).transpose(0, 1))[0][-1])
            return self.out(self.layer(x)[0].mean(1))

    torch.manual_seed(0)
    x = numbers(5, 5, 3)
    for flipped in (False, True):
        model = randomized(Along(flipped).double()).eval()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ntk.SlowKernelWarning)
            found = ntk.empirical_ntk(model, x)
        assert relative_error(found, autograd_kernel(model, x)) <= EXACT


def test_what_runs_aside_is_followed_by_its_inputs():
    proof, x, same = Independence(3), numbers(3, 2), torch.ones(3, 2, dtype=torch.float64)
    proof.mark(x)
    with proof:
        mixed, both = x.flip(0), x + same
    for given, held in (([x, same], True), ([x, numbers(3, 2)], False), ([mixed], False), ([x, both], True)):
        with proof, proof.aside(given) as made:
            y = sum(given) * 2
            made(y)
        assert proof.in_order(y) == held


def test_adapters_beside_a_recurrent_layer():
    torch.manual_seed(0)
    model, x = randomized(Sequences(nn.LSTM, batch_first=True).double()).eval(), numbers(4, 5, 3)
    methods = {"full": ntk.adapters.Full(), "bias": ntk.adapters.BitFit(), "lora": ntk.adapters.LoRA(rank=2)}
    found, slow = (ntk.adapter_kernels(model, x, methods, method=method) for method in ("auto", "jacobian"))
    for key in methods:
        assert relative_error(found[key], slow[key]) <= EXACT, key
    assert relative_error(found["full"], autograd_kernel(model, x)) <= EXACT
    assert {row.way for row in ntk.explain(model, x).rows} == {"rule"}
