"""Both contractions of features that are kept as tokens, compared with features formed in full."""

from unittest import mock

import torch
from cases import autograd_kernel, relative_error
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

import ntk
from ntk.features import Lookup, Outer
from ntk.layout import LAYOUTS, reduce_outputs
from ntk.structured import gram
from ntk.structured.contraction import HALF
from ntk.tokens import Gradients, Packing


@settings(max_examples=25, deadline=None)
@given(
    n=st.integers(1, 5), c=st.integers(1, 4), t=st.integers(1, 6), r=st.integers(1, 7), s=st.integers(1, 7),
    transposed=st.booleans(), uses=st.integers(1, 3), data=st.data(),
)  # fmt: skip
def test_both_contractions_agree(n, c, t, r, s, transposed, uses, data):
    """The contractions of pairs of tokens and of formed features agree; some tokens have no gradient."""
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 99)))
    random = lambda *shape: torch.randn(shape, generator=generator, dtype=torch.float64)  # noqa: E731
    groups, dense = [], []
    for size in (n, 2):
        group, whole = [], 0
        for _ in range(uses):
            x = random(size, t, s)
            g = random(size, c, t, r) * (torch.rand(size, 1, t, 1, generator=generator) < 0.6)
            by_output = {a: g[:, a] for a in range(c)}
            gradients = Gradients(by_output, c, Packing(size))
            group.append(Outer(gradients.inputs(x), gradients.packed, gradients.tokens, transposed))
            whole = whole + torch.einsum("nctr,nts->ncrs", g, x)
        groups.append(group)
        dense.append(whole)
    shape = torch.Size((s, r) if transposed else (r, s))
    for split, reduce, expected in expectations(torch.cat(dense), n):
        layout = LAYOUTS[reduce]
        for chunk in (gram.CHUNK, 20):  # The smaller blocks have some rows, outputs or tokens of an example.
            for found in (
                gram._ghost(groups, split, layout, chunk),
                gram._direct(groups, shape, split, layout, chunk),
            ):
                torch.testing.assert_close(layout.kernel(found, c), expected, rtol=1e-10, atol=1e-10)


@settings(max_examples=25, deadline=None)
@given(
    n=st.integers(1, 5), c=st.integers(1, 3), t=st.integers(1, 6), rows=st.integers(1, 9), block=st.integers(1, 20),
    uses=st.integers(1, 3), data=st.data(),
)  # fmt: skip
def test_both_contractions_of_an_embedding_agree(n, c, t, rows, block, uses, data):
    """Several tokens and several uses read the same rows; examples fit into some blocks and not into others."""
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 99)))
    groups, dense = [], []
    for size in (n, 2):
        group, whole = [], torch.zeros(size, c, rows, 3, dtype=torch.float64)
        for _ in range(uses):
            ids = torch.randint(-1, rows, (size, t), generator=generator)
            g = torch.randn(size, c, t, 3, generator=generator, dtype=torch.float64)
            g = g * (torch.rand(size, 1, t, 1, generator=generator) < 0.6)
            gradients = Gradients({a: g[:, a] for a in range(c)}, c, Packing(size))
            group.append(
                Lookup(gradients.tokens.pick(ids.reshape(-1, 1)).squeeze(1), gradients.packed, gradients.tokens)
            )
            whole += torch.einsum("nctr,ntv->ncvr", g, (ids[..., None] == torch.arange(rows)).double())
        groups.append(group)
        dense.append(whole)
    for split, reduce, expected in expectations(torch.cat(dense), n):
        layout = LAYOUTS[reduce]
        with mock.patch.object(gram, "_BLOCK", block):
            found = layout.kernel(gram._ghost(groups, split, layout), c)
            torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
        for chunk in (gram.CHUNK, 10):
            found = layout.kernel(gram._direct(groups, torch.Size((rows, 3)), split, layout, chunk), c)
            torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


def test_a_matrix_used_on_both_sides_is_formed():
    """x W and x W^T have their inputs on different sides of the feature, which pairs of tokens cannot tell."""

    class BothSides(nn.Module):
        def __init__(self, width):
            super().__init__()
            self.weight = nn.Parameter(torch.randn(width, width) / width**0.5)

        def forward(self, x: Tensor) -> Tensor:
            return F.linear(torch.tanh(x @ self.weight), self.weight).tanh().sum(dim=1)[:, :2]

    for width in (5, 40):
        torch.manual_seed(0)
        model, x = BothSides(width).double(), torch.randn(4, 3, width, dtype=torch.float64)
        exact = autograd_kernel(model, x)
        for method in ("structured", "jacobian"):
            assert relative_error(ntk.empirical_ntk(model, x, method=method), exact) <= 1e-12


def expectations(dense, n):
    """(examples of the first batch, reduction, its kernel) of features ``(n, c, ...)``, by the kernel's definition."""
    flat = dense.flatten(2)
    for split, left, right in ((None, flat, flat), (n, flat[:n], flat[n:])):
        whole = torch.einsum("iap,jbp->ijab", left, right)
        for reduce in (None, "trace", "diagonal"):
            yield split, reduce, reduce_outputs(whole, reduce)


def test_large_symmetric_products_by_halves():
    generator = torch.Generator().manual_seed(0)
    for k, rows in ((1, 2 * HALF + 3), (2, 2 * HALF), (3, 5)):
        left = torch.randn(k, rows, 7, generator=generator, dtype=torch.float64)
        torch.testing.assert_close(gram.product(left, None), left @ left.mT, rtol=1e-12, atol=1e-12)


def test_blocks_hold_no_more_pairs_than_a_temporary_may():
    cpu, elsewhere = torch.device("cpu"), torch.device("meta")
    assert gram._block_size(cpu, gram.CHUNK, 3**2) == gram._BLOCK
    assert gram.CHUNK / 2 < (3 * gram._block_size(elsewhere, gram.CHUNK, 3**2)) ** 2 <= gram.CHUNK
    for device in (cpu, elsewhere):
        assert (100 * gram._block_size(device, gram.CHUNK, 100**2)) ** 2 <= gram.CHUNK
        assert gram._block_size(device, 10, 100**2) == 1
