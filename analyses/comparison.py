"""What kernels are compared by: the metrics of a pair, of one kernel, and the null models that need no model."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

import ntk
from analyses.model_kernels import is_backbone

KERNEL_UNIT = "output²/parameter²"

# Metrics of a pair (K1, K2): name -> (function, unit).
PAIR_METRICS: dict[str, tuple[Callable[[Tensor, Tensor], float], str]] = {
    "alignment": (ntk.kernel_alignment, ""),
    "cka": (ntk.cka, ""),
    "relative_frobenius": (ntk.kernel_distance, ""),
    "relative_frobenius_scaled": (lambda a, b: ntk.kernel_distance(a, b, scaled=True), ""),
    "mean_absolute": (lambda a, b: ntk.kernel_distance(a, b, kind="mean_absolute"), KERNEL_UNIT),
    "mean_absolute_scaled": (lambda a, b: ntk.kernel_distance(a, b, kind="mean_absolute", scaled=True), KERNEL_UNIT),
    "max_absolute": (lambda a, b: ntk.kernel_distance(a, b, kind="max_absolute"), KERNEL_UNIT),
    "max_absolute_scaled": (lambda a, b: ntk.kernel_distance(a, b, kind="max_absolute", scaled=True), KERNEL_UNIT),
    "best_scale": (ntk.best_scale, ""),
    "trace_ratio": (ntk.trace_ratio, ""),
}
# Null models have no scale of their own to get right, so only scale-free metrics judge them.
NULL_METRICS = ("alignment", "cka", "relative_frobenius_scaled")
KERNEL_METRICS: dict[str, tuple[Callable[[Tensor], float], str]] = {
    "trace": (ntk.trace, KERNEL_UNIT),
    "effective_rank": (ntk.effective_rank, ""),
}


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
