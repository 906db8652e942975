"""Baselines for the kernels' timings: contraction of torch.func's Jacobians, and the model's passes alone."""

from time import perf_counter
from typing import Any

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
    entries = _with_prepared_mask(batch, next(iter(parameters.values())).dtype)

    def logits(p: dict[str, Tensor], example: dict[str, Tensor]) -> Tensor:
        inputs = {name: value[None] for name, value in example.items()}
        return logits_of(functional_call(model, p, (), inputs))[0]

    def jacobian(tile: slice) -> dict[str, Tensor]:
        some = {name: value[tile] for name, value in entries.items()}
        found = vmap(jacrev(logits), (None, 0))(parameters, some)
        return {name: j.detach().flatten(2) for name, j in found.items()}

    n, again, kernel = len(next(iter(entries.values()))), 0.0, torch.empty(0)
    tiles = [slice(start, min(start + rows, n)) for start in range(0, n, rows)]
    for left, tile in enumerate(tiles):
        j1 = jacobian(tile)
        if left == 0:
            like = next(iter(j1.values()))
            kernel = like.new_zeros((n, n, like.shape[1], like.shape[1]))
        _contract(kernel, tile, tile, j1, j1)
        for other in tiles[left + 1 :]:
            start = perf_counter()
            j2 = jacobian(other)
            again += perf_counter() - start
            _contract(kernel, tile, other, j1, j2)
            del j2
        del j1
    return kernel, again


def logits_of(output: Any) -> Tensor:
    """The logits of a Hugging Face model's output, or the tensor that a plain module returns."""
    return output if isinstance(output, Tensor) else output.logits


def _with_prepared_mask(batch: dict[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """The ids with an additive 4-D mask; another batch as it is."""
    if "attention_mask" not in batch:
        return batch
    ids = batch["input_ids"]
    hidden = (1 - batch["attention_mask"][:, None, None, :].to(dtype)) * torch.finfo(dtype).min
    return {"input_ids": ids, "attention_mask": hidden.expand(-1, 1, ids.shape[1], -1).contiguous()}


def bare_passes(model: nn.Module, batch: dict[str, Tensor]) -> None:
    """Run one forward pass and c backward passes to every parameter, with all examples in one batch."""
    parameters = list(model.parameters())
    outputs = logits_of(model(**batch)).sum(dim=0)
    for a in range(len(outputs)):
        torch.autograd.grad(outputs[a], parameters, retain_graph=a + 1 < len(outputs), allow_unused=True)


def _contract(kernel: Tensor, left: slice, right: slice, j1: dict[str, Tensor], j2: dict[str, Tensor]) -> None:
    kernel[left, right] = torch.stack([torch.einsum("iap,jbp->ijab", j1[k], j2[k]) for k in j1]).sum(0)
    if left != right:
        kernel[right, left] = kernel[left, right].permute(1, 0, 3, 2)
