"""A model that writes into its inputs changes neither the caller's inputs nor later passes."""

import pytest
import torch
from cases import relative_error
from torch import Tensor, nn

import ntk


class Subtracting(nn.Module):
    """An in-place change of the inputs, then an LSTM."""

    def __init__(self, kind: str):
        super().__init__()
        torch.manual_seed(0)
        self.cell, self.out, self.kind = nn.LSTM(3, 4, batch_first=True), nn.Linear(4, 2), kind

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        if self.kind == "subtracts":
            x.sub_(1.0)
        elif self.kind == "writes a row":
            x[:, 0] = x[:, 1] * 2
        elif self.kind == "through a view":
            x.flatten(1).mul_(2.0)
        elif self.kind == "resets a mask" and mask is not None:
            x.mul_(mask[:, :, None])
            mask.zero_()
        return self.out(self.cell(x)[0].mean(dim=1))


def by_hand(model: nn.Module, inputs: Tensor | dict[str, Tensor]) -> Tensor:
    """The kernel by one backward pass for each output, of one example at a time, on copies."""
    rows = []
    entries = {"x": inputs} if isinstance(inputs, Tensor) else inputs
    for i in range(len(entries["x"])):
        for value in model(**{key: value[i : i + 1].clone() for key, value in entries.items()})[0]:
            found = torch.autograd.grad(value, list(model.parameters()), retain_graph=True)
            rows.append(torch.cat([g.flatten() for g in found]))
    J = torch.stack(rows).unflatten(0, (-1, 2))
    return torch.einsum("iap,jbp->ijab", J, J)


@pytest.mark.parametrize("method", ["jacobian", "auto"])
@pytest.mark.parametrize("kind", ["subtracts", "writes a row", "through a view", "resets a mask"])
def test_models_that_write_into_their_inputs(kind, method):
    model, x = Subtracting(kind).double().eval(), torch.randn(5, 4, 3, dtype=torch.float64)
    inputs = x if kind != "resets a mask" else {"x": x, "mask": (torch.rand(5, 4) < 0.7).double()}
    before = x.clone()
    expected = by_hand(model, inputs)
    assert relative_error(ntk.empirical_ntk(model, inputs, method=method), expected) <= 1e-12
    assert torch.equal(x, before)
    if isinstance(inputs, dict):
        assert bool(inputs["mask"].any())
    two_sided = ntk.empirical_ntk(model, inputs, inputs, method=method)
    assert relative_error(two_sided, expected) <= 1e-12
    assert torch.equal(x, before)
