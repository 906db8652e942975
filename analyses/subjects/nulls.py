"""Null models: kernels built without a method, as baselines for its agreement with full fine-tuning."""

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
    """All null models of a Hugging Face model: by name, a list of kernels ``(n, n)``, one for each random draw.

    Args:
        model: The model.
        inputs: A padded batch of n examples.
        full: Kernel of full fine-tuning of the backbone, ``(n, n, c, c)``.
        adapter: Propulsion's kernel, ``(n, n)``.
        m: Number of parameters that Propulsion trains.
        draws: Number of draws of each random null model.
        seed: Seed of the draws.
        output: The output that is differentiated; by default the logits.
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
    """Null models without a network: Gaussian sketches of `full` ``(n, n, c, c)``, and permutations of `adapter`."""
    return {
        f"Gaussian sketch of size {m:,}": [
            ntk.reduce_outputs(ntk.gaussian_sketch(full, m, generator=generator), "trace") for _ in range(draws)
        ],
        "Propulsion, examples permuted": [ntk.permuted(adapter, generator=generator) for _ in range(draws)],
    }
