"""Null models: kernels that know nothing of a method, which its agreement with full fine-tuning is held against."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

import ntk
from analyses.subjects.parameters import is_backbone


def model_nulls(
    model: Any,
    inputs: Mapping[str, Tensor],
    full: Tensor,
    adapter: Tensor,
    m: int,
    *,
    draws: int,
    seed: int,
    output: ntk.outputs.Output | None = None,
) -> dict[str, list[Tensor]]:
    """All null models of a Hugging Face model: kernels ``(n, n)`` that know nothing of any method, by name.

    Args:
        model: the model.
        inputs: a padded batch of n examples.
        full: K_F of the backbone, ``(n, n, c, c)``.
        adapter: Propulsion's kernel, ``(n, n)``.
        m: how many parameters Propulsion has.
        draws: of each random one.
        seed: of what is random.
        output: what is differentiated; by default the logits.
    """
    generator = torch.Generator().manual_seed(seed)
    nulls = null_kernels(full, adapter, m, draws=draws, generator=generator)
    subsets = ntk.random_subset_ntk(
        model, inputs, m, generator=generator, params=lambda name, p: is_backbone(model, name), output=output,
        reduce="trace", draws=draws, progress=True,
    )  # fmt: skip
    nulls[f"random subset of {m:,} weights"] = [kernel.cpu() for kernel in subsets]
    nulls["last hidden states"] = [ntk.hidden_state_kernel(model, inputs).cpu()]
    return nulls


def null_kernels(
    full: Tensor, adapter: Tensor, m: int, *, draws: int, generator: torch.Generator
) -> dict[str, list[Tensor]]:
    """The nulls that need no model: a Gaussian sketch of K_F ``(n, n, c, c)``, and the adapter's kernel permuted."""
    return {
        f"Gaussian sketch of size {m:,}": [
            ntk.reduce_outputs(ntk.gaussian_sketch(full, m, generator=generator), "trace") for _ in range(draws)
        ],
        "Propulsion, examples permuted": [ntk.permuted(adapter, generator=generator) for _ in range(draws)],
    }
