"""Models in which examples of a batch change one another: `auto` is exact, and independent examples run together."""

import pytest
import torch
from cases import FAMILIES, VOCABULARY, autograd_kernel, batch, batch_for, classifier, randomized, relative_error
from torch import Tensor, nn
from torch.nn import functional as F

import ntk
from ntk.structured.independence import Independence

EXACT = 1e-10


class Net(nn.Module):
    """Two layers, with an operation between them that a subclass defines."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.tanh(self.between(self.first(x), x)))

    def between(self, hidden: Tensor, x: Tensor) -> Tensor:
        raise NotImplementedError


def net(between) -> nn.Module:
    torch.manual_seed(0)
    model = Net().double()
    model.between = between
    return model


def capacity(hidden: Tensor, x: Tensor) -> Tensor:
    """An expert that changes the first two rows of the batch that choose it, and leaves the others unchanged."""
    chosen = (hidden[:, 0] > 0).long()
    room = (chosen.cumsum(0) <= 2).to(hidden)
    return hidden + (chosen * room)[:, None] * hidden.flip(1)


def routed(hidden: Tensor, x: Tensor) -> Tensor:
    """Rows of each sign are gathered, use one half of the hidden units, and are put back in place."""
    result = torch.zeros_like(hidden)
    for rows in (x[:, 0] > 0, x[:, 0] <= 0):
        taken = rows.nonzero().squeeze(1)
        result = result.index_add(0, taken, hidden[taken] / max(1, len(taken)))
    return result


class Clipped(torch.autograd.Function):
    """The identity; its gradient is divided by its norm over the batch if that is large."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, g):
        return g / g.norm().clamp(min=0.05)


def hooked(hidden: Tensor, x: Tensor) -> Tensor:
    """Clip gradients by a hook."""
    hidden = hidden * 1.0
    if hidden.requires_grad:
        hidden.register_hook(lambda g: g / g.norm().clamp(min=0.05))
    return hidden


# What examples may do to one another, and on how many of them, or on which values, it may depend.
MIXING = {
    "mean": lambda h, x: h - h.mean(0),
    "mean of two": lambda h, x: h - 0.1 * h[:2].mean(0),
    "largest, clamped": lambda h, x: h / x.abs().amax().clamp(min=3),
    "largest, as a number": lambda h, x: h / max(3.0, x.abs().max().item()),
    "branch on any": lambda h, x: -h if (x.abs() > 3).any() else h,
    "branch on a list": lambda h, x: -h if max(x.flatten().tolist()) > 3 else h,
    "branch on an array": lambda h, x: -h if x.detach().numpy().max() > 3 else h,
    "branch on a count": lambda h, x: h * (1 + len(x[x > 3])),
    "branch on nonzero": lambda h, x: h * (1 + (x > 3).nonzero().shape[0]),
    "softmax over the batch": lambda h, x: h.softmax(0),
    "batch statistics": lambda h, x: F.batch_norm(h[:, :, None].expand(-1, -1, 3) * torch.arange(3.0), None, None,
                                                  training=True)[:, :, 0],
    "attention over the batch": lambda h, x: (h @ h.T).softmax(1) @ h,
    "fused attention over the batch": lambda h, x: F.scaled_dot_product_attention(h[None], h[None], h[None])[0],
    "sorted": lambda h, x: h.sort(0).values,
    "sorted and put back": lambda h, x: h[x[:, 0].argsort()][x[:, 0].argsort().argsort()],
    "neighbour": lambda h, x: h + 0.1 * h.roll(1, 0),
    "neighbour, by a window": lambda h, x: F.avg_pool1d(h.T[None], 3, 1, 1)[0].T,
    "reversed": lambda h, x: h + 0.1 * h.flip(0),
    "shifted": lambda h, x: torch.cat([h[1:], h[:1]]),
    "first row": lambda h, x: h + 0.1 * h[0],
    "written row": lambda h, x: torch.cat([h[:1] * 2, h[1:]]),
    "in place": lambda h, x: h.clone().add_(h.sum(0), alpha=0.1),
    "a row in place": lambda h, x: h.clone().index_fill_(0, torch.tensor([0]), 0.0),
    "position": lambda h, x: h * (1 + torch.arange(len(h))[:, None]),
    "scale by position": lambda h, x: h * torch.linspace(1, 2, len(h), dtype=h.dtype)[:, None],
    "number of examples": lambda h, x: h / len(h),
    "number of examples, from four on": lambda h, x: h * (1 + len(h) // 4),
    "cumulative": lambda h, x: h.cumsum(0),
    "norm over all": lambda h, x: h / (1 + h.norm()),
    "flattened": lambda h, x: h + 0.1 * h.flatten().roll(1).view_as(h),
    "capacity of an expert": capacity,
    "routing": routed,
    "derivative of its own": lambda h, x: Clipped.apply(h),
    "hook": hooked,
    "einsum over the batch": lambda h, x: torch.einsum("id,jd->id", h, h),
    "convolution over the batch": lambda h, x: F.conv1d(h.T[None], torch.ones(4, 4, 3).to(h) / 9, padding=1)[0].T,
    "equal rows": lambda h, x: h * (1 + (x[:, None] == x[None]).all(2).sum(1, keepdim=True)),
}  # fmt: skip


def examples(odd: int) -> Tensor:
    """Five examples, the first two equal, one of them large."""
    x = torch.randn(5, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64).clamp(-2, 2)
    x[1] = x[0]
    x[odd] = x[odd] * 8
    return x


@pytest.mark.parametrize("odd", [0, 2, 4])
@pytest.mark.parametrize("name", MIXING)
def test_examples_that_change_one_another(name, odd):
    model, x = net(MIXING[name]), examples(odd)
    expected = autograd_kernel(model, x)
    assert float((ntk.empirical_ntk(model, x) - expected).norm()) <= EXACT * max(1.0, float(expected.norm()))
    left, right = x[[odd, 3]], x[[1, 0, 3, odd]]
    expected = autograd_kernel(model, left, right)
    assert float((ntk.empirical_ntk(model, left, right) - expected).norm()) <= EXACT * max(1.0, float(expected.norm()))


TOGETHER = {
    "rows of one example": lambda h, x: h - h.mean(1, keepdim=True),
    "softmax": lambda h, x: h.softmax(-1),
    "branch on the shape": lambda h, x: -h if h.shape[1] > 3 else h,
    "reshaped": lambda h, x: h.view(len(h), 2, 2).transpose(1, 2).reshape(-1, 2).flip(1).reshape(len(h), 4),
    "time first and back": lambda h, x: torch.tanh(h[None].transpose(0, 1).transpose(0, 1) * 2)[0],
    "zeros filled": lambda h, x: torch.zeros_like(h).copy_(h).mul_(2),
    "half filled": lambda h, x: _half(h),
    "gathered": lambda h, x: h.gather(1, x.argsort(1)),
    "by its own row": lambda h, x: h * h[torch.arange(len(h)), x.argmax(1)][:, None],
    "masked": lambda h, x: h.masked_fill(x > 1, 0.0),
    "products of its own": lambda h, x: torch.bmm(h[:, :, None], h[:, None, :]).sum(2),
    "einsum": lambda h, x: torch.einsum("nd,ne->ne", h, x),
    "attention": lambda h, x: F.scaled_dot_product_attention(*[h.view(-1, 1, 2, 2)] * 3).flatten(1),
    "group norm": lambda h, x: F.group_norm(h, 2),
    "convolution": lambda h, x: F.conv1d(h[:, None], torch.ones(1, 1, 3).to(h), padding=1)[:, 0],
    "determinant": lambda h, x: h * torch.linalg.det(h.view(-1, 2, 2) + torch.eye(2).to(h))[:, None],
}


def _half(hidden: Tensor) -> Tensor:
    result = torch.zeros_like(hidden)
    result[:, :2] = hidden[:, 2:]
    return result


@pytest.mark.parametrize("name", TOGETHER)
def test_examples_that_keep_to_themselves_run_together(name, monkeypatch):
    """Independence is recognised for these, so that the examples run together."""
    largest = []
    model, x = net(TOGETHER[name]), examples(2)
    model.register_forward_hook(lambda module, args, output: largest.append(len(output)))
    kernel = ntk.empirical_ntk(model, x, method="structured")
    assert max(largest) == 5
    assert relative_error(kernel, autograd_kernel(model, x)) <= EXACT


# Read values of the batch to choose rows, or bring a derivative of their own.
ALONE = ("mixtral", "t5", "bart", "bloom")


@pytest.mark.parametrize("family", [family for family in FAMILIES if family not in ALONE])
def test_families_run_together(family):
    model = classifier(family).eval()
    inputs = {key: value.clone() for key, value in batch_for(family).items()}
    proof = Independence(4)
    for key, value in inputs.items():
        proof.mark(value, mask=key == "attention_mask")
    with proof:
        logits = model(**inputs).logits
    assert proof.why is None
    assert proof.in_order(logits)


class Padded(nn.Module):
    """A text model with a pooling that a subclass defines."""

    def __init__(self, pool):
        super().__init__()
        self.embed, self.out, self.pool = nn.Embedding(VOCABULARY, 4), nn.Linear(4, 2), pool
        self.config = type("Config", (), {"pad_token_id": 1})

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return self.out(torch.tanh(self.pool(self.embed(input_ids), attention_mask)))


def masked_mean(h: Tensor, m: Tensor) -> Tensor:
    return (h * m[..., None]).sum(1) / m.sum(1, keepdim=True)


# Poolings into which padding, its amount or that of other examples can leak.
LEAKS = {
    "mean over padding": lambda h, m: h.mean(1),
    "padded length": lambda h, m: masked_mean(h, m) * h.shape[1],
    "largest over padding": lambda h, m: h.amax(1),
    "padding of the others": lambda h, m: masked_mean(h, m) / m.sum(1).max().item(),
    "padding of the others, as a branch": lambda h, m: masked_mean(h, m) * (2 if m.sum() < 14 else 1),
    "shortest of the batch": lambda h, m: h[:, : int(m.sum(1).min())].mean(1),
    "share of padding": lambda h, m: masked_mean(h, m) * m.to(h).mean(),
}


@pytest.mark.parametrize("lengths", [(2, 6, 3, 6), (6, 5, 5, 4), (3, 3, 3, 7)])
@pytest.mark.parametrize("params", ["all", "head"])
@pytest.mark.parametrize("name", LEAKS)
def test_padding_that_leaks(name, params, lengths):
    torch.manual_seed(0)
    model, inputs = randomized(Padded(LEAKS[name]).double()), batch(lengths)
    chosen = (lambda name, p: True) if params == "all" else (lambda name, p: name.startswith("out"))
    rows = []
    for i, length in enumerate(lengths):
        rows.append({key: value[i : i + 1, :length] for key, value in inputs.items()})
    expected = torch.cat([
        torch.cat([autograd_kernel(model, left, right, output=lambda r, _: r, params=chosen) for right in rows], 1)
        for left in rows
    ])  # fmt: skip
    kernel = ntk.empirical_ntk(model, inputs, params=chosen)
    assert relative_error(kernel, expected) <= EXACT
