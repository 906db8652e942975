"""The kernels of one model over the sets of parameters that the analysis compares."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor

import ntk
from analyses.subjects.parameters import is_backbone, is_scale
from propulsion.errors import UserError

# The names say which parameters a kernel covers, so that kernels with and without the head are not confused.
PAIRS = (("full_backbone", "propulsion_z"), ("full_all", "propulsion_z_head"), ("full_all", "propulsion_z"))
FULL, ADAPTER = PAIRS[0]
KERNELS = tuple(dict.fromkeys(name for pair in PAIRS for name in pair))


@dataclass(frozen=True)
class ModelKernels:
    """Kernels of one model on one batch, each over a stated set of parameters.

    Attributes:
        whole: name -> ``(n, n, c, c)``.
        traced: name -> ``(n, n)``, traced over the outputs.
        coverage: name -> which parameters it covers, in words with their count.
        shares: one row for each kernel and parameter, with its share of the kernel's trace.
    """

    whole: dict[str, Tensor]
    traced: dict[str, Tensor]
    coverage: dict[str, str]
    shares: list[dict[str, Any]]

    def __or__(self, other: "ModelKernels") -> "ModelKernels":
        return ModelKernels(
            self.whole | other.whole, self.traced | other.traced, self.coverage | other.coverage,
            self.shares + other.shares,
        )  # fmt: skip


PARTS: dict[str, dict[str, tuple[str, Callable[[Any, str], bool]]]] = {
    "all": {
        "full_backbone": ("every parameter of the pre-trained backbone", is_backbone),
        "full_all": ("every parameter, backbone and head", lambda model, name: True),
    },
    "trainable": {
        "propulsion_z": ("the scale vectors z", lambda model, name: is_scale(name)),
        "propulsion_z_head": ("the scale vectors z and the trained head", lambda model, name: True),
    },
}
"""The kernels of full fine-tuning, over "all" parameters, and of Propulsion, over the "trainable" ones: by name, a
description and a function that says whether a kernel covers a parameter."""


def model_kernels(
    model: Any, inputs: dict[str, Tensor], params: Literal["all", "trainable"], memory_budget: float | None
) -> ModelKernels:
    """The kernels of `PARTS` as sums of their parameters' kernels, which one pass computes."""
    layers = ntk.layer_kernels(model, inputs, params=params, memory_budget=memory_budget, progress=True)
    layers = {name: kernel.cpu() for name, kernel in layers.items()}
    sizes = {name: p.numel() for name, p in model.named_parameters()}
    whole, coverage, shares = {}, {}, []
    for part, (words, belongs) in PARTS[params].items():
        names = [name for name in layers if belongs(model, name)]
        if not names:
            raise UserError(f"the model has no parameter for the kernel {part} ({words})")
        whole[part] = sum((layers[name] for name in names[1:]), layers[names[0]])
        coverage[part] = f"{words}: {sum(sizes[name] for name in names):,} parameters in {len(names)} tensors"
        total = ntk.trace(whole[part])
        for name in names:
            share = ntk.trace(layers[name]) / total if total else 0.0
            shares.append({"kernel": part, "parameter": name, "parameters": sizes[name], "trace_share": share})
    traced = {part: ntk.reduce_outputs(kernel, "trace") for part, kernel in whole.items()}
    return ModelKernels(whole, traced, coverage, shares)
