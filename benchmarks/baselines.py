"""Baselines for the kernels' timings: contraction of torch.func's Jacobians, and the model's passes alone."""

from time import perf_counter

import torch
from torch import Tensor, nn
from torch.func import functional_call, jacrev, vmap


def torch_func_ntk(model: nn.Module, batch: dict[str, Tensor], rows: int) -> tuple[Tensor, float]:
    """The kernel as in PyTorch's own tutorial, on the padded batch, in tiles of `rows` examples.

    vmap cannot trace the mask code of Hugging Face models, so the model gets a prepared additive 4-D mask.

    Returns:
        The kernel (n, n, c, c), and the seconds spent on computing Jacobians again because memory did not hold all.
    """
    parameters = dict(model.named_parameters())
    ids, dtype = batch["input_ids"], next(iter(parameters.values())).dtype
    hidden = (1 - batch["attention_mask"][:, None, None, :].to(dtype)) * torch.finfo(dtype).min
    mask = hidden.expand(-1, 1, ids.shape[1], -1).contiguous()

    def logits(p: dict[str, Tensor], row: Tensor, row_mask: Tensor) -> Tensor:
        inputs = {"input_ids": row[None], "attention_mask": row_mask[None]}
        return functional_call(model, p, (), inputs).logits[0]

    def jacobian(tile: slice) -> dict[str, Tensor]:
        found = vmap(jacrev(logits), (None, 0, 0))(parameters, ids[tile], mask[tile])
        return {name: j.detach().flatten(2) for name, j in found.items()}

    n, c, again = len(ids), model.config.num_labels, 0.0
    kernel = ids.new_zeros((n, n, c, c), dtype=mask.dtype)
    tiles = [slice(start, min(start + rows, n)) for start in range(0, n, rows)]
    for left, tile in enumerate(tiles):
        j1 = jacobian(tile)
        _contract(kernel, tile, tile, j1, j1)
        for other in tiles[left + 1 :]:
            start = perf_counter()
            j2 = jacobian(other)
            again += perf_counter() - start
            _contract(kernel, tile, other, j1, j2)
            del j2
        del j1
    return kernel, again


def bare_passes(model: nn.Module, batch: dict[str, Tensor]) -> None:
    """Run one forward pass and c backward passes to every parameter, with all examples in one batch."""
    parameters = list(model.parameters())
    outputs = model(**batch).logits.sum(dim=0)
    for a in range(len(outputs)):
        torch.autograd.grad(outputs[a], parameters, retain_graph=a + 1 < len(outputs), allow_unused=True)


def _contract(kernel: Tensor, left: slice, right: slice, j1: dict[str, Tensor], j2: dict[str, Tensor]) -> None:
    kernel[left, right] = torch.stack([torch.einsum("iap,jbp->ijab", j1[k], j2[k]) for k in j1]).sum(0)
    if left != right:
        kernel[right, left] = kernel[left, right].permute(1, 0, 3, 2)
