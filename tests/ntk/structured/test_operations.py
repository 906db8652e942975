"""Every operation: kernels by both methods are exact, compared with a backward pass for each output, or refused."""

import pytest
import torch
from operations import OPERATIONS, Operation
from torch import Tensor, nn

import ntk

EXACT = 1e-10
# The second example is the first's neighbour, the last is far from both.
X = torch.tensor([[0.3, -0.7, 1.1, 0.45], [0.31, -0.69, 1.13, 0.4], [-5.2, 3.4, 0.9, -8.6]], dtype=torch.float64)


class One(nn.Module):
    """An operation on a parameter and data that depends on other parameters, and a layer that reads the result."""

    def __init__(self, shape: tuple[int, ...], operation: Operation):
        super().__init__()
        generator = torch.Generator().manual_seed(1)
        self.before = nn.Parameter(torch.tensor(1.1, dtype=torch.float64))
        self.p = nn.Parameter(torch.randn(shape, generator=generator, dtype=torch.float64))
        self.operation = operation

    def forward(self, x: Tensor) -> Tensor:
        found = self.operation(x * self.before, self.p).flatten(1)
        weights = torch.linspace(0.5, 1.7, found.shape[1], dtype=x.dtype)
        return torch.stack([found @ weights, (found**2) @ weights.flip(0)], dim=1)


def by_hand(model: One) -> Tensor:
    """The kernel (n, c, n, c) by one backward pass for each output, of one example at a time."""
    rows = []
    for row in X:
        for value in model(row[None].clone())[0]:
            found = torch.autograd.grad(value, [model.before, model.p], retain_graph=True, allow_unused=True,
                                        materialize_grads=True)  # fmt: skip
            rows.append(torch.cat([g.to_dense().flatten() for g in found]))
    J = torch.stack(rows)
    return (J @ J.T).unflatten(1, (3, 2)).unflatten(0, (3, 2)).transpose(1, 2)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", OPERATIONS)
def test_exact_or_refused(name):
    model = One(*OPERATIONS[name])
    try:
        expected = by_hand(model)
    except RuntimeError as error:  # torch itself does not differentiate this operation.
        if "not differentiable with respect to" not in str(error) and "is not implemented" not in str(error):
            raise
        expected = None
    refusals = []
    for method in ("auto", "jacobian"):
        try:
            found = ntk.empirical_ntk(model, X, method=method)
        except (ValueError, NotImplementedError) as error:
            refusals.append(str(error))
            continue
        assert expected is not None, f"{method} gives a kernel where there is no derivative"
        # Entry by entry, since the last example's kernel may be far larger than the others'.
        size = expected.diagonal(dim1=0, dim2=1).diagonal(dim1=0, dim2=1).sqrt()
        scale = torch.einsum("ia,jb->ijab", size, size).clamp_min(torch.finfo(size.dtype).tiny)
        assert float(((found - expected).abs() / scale).max()) <= EXACT, method
    assert len(refusals) == (0 if expected is not None else 2)
    assert not any("\n" in words for words in refusals)
