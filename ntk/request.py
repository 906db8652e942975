"""The arguments of a computation of kernels: model, examples, output, layout and memory budget."""

import math
from dataclasses import dataclass, field
from functools import cached_property

import psutil
import torch
from torch import nn

from ntk.functional import is_encoder_decoder
from ntk.inputs import Group, Inputs, by_name, group_examples
from ntk.layout import Layout, layout_of
from ntk.outputs import Output, summed_outputs


@dataclass(frozen=True)
class Request:
    """The arguments common to all methods of computing kernels, as described in :func:`ntk.empirical_ntk`.

    Attributes:
        model: in evaluation mode.
        inputs: the rows; a tuple is replaced by a mapping.
        inputs2: the columns; None for the symmetric kernel.
        requested: the output as the caller gave it; ``output`` is the one that is differentiated.
        reduce: name of the layout.
        memory_budget: in bytes; None for half of the memory that is free at the time of use.
        progress: whether to show a progress bar.
        slow: parameter -> why one of its operations was differentiated example by example at a cost worth a warning.
        reference: parameter -> why the reference took it, where the fast way was tried.

    Raises:
        ValueError: an unknown name of a layout; a memory budget that is negative or not finite.
    """

    model: nn.Module
    inputs: Inputs
    inputs2: Inputs | None
    requested: Output | None
    reduce: str | None
    memory_budget: int | float | None
    progress: bool
    layout: Layout = field(init=False)
    slow: dict[str, str] = field(init=False, default_factory=dict, compare=False)
    reference: dict[str, str] = field(init=False, default_factory=dict, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "layout", layout_of(self.reduce))
        for side in ("inputs", "inputs2"):
            if getattr(self, side) is not None:
                object.__setattr__(self, side, by_name(self.model, getattr(self, side)))
        if self.memory_budget is not None and not 0 <= self.memory_budget < math.inf:
            raise ValueError(f"memory_budget must be a number of bytes, or None; got {self.memory_budget}")

    @property
    def output(self) -> Output | None:
        """The function that is differentiated: the sum of the outputs if the layout says so."""
        return summed_outputs(self.requested) if self.layout.summed else self.requested

    def budget(self, device: torch.device) -> int | float:
        """The memory budget for this device, in bytes."""
        if self.memory_budget is not None:
            return self.memory_budget
        if device.type == "cuda":
            return torch.cuda.mem_get_info(device)[0] // 2
        return psutil.virtual_memory().available // 2

    @cached_property
    def rows(self) -> list[Group]:
        """The groups of the rows' examples."""
        return self._grouped(self.inputs)

    @cached_property
    def columns(self) -> list[Group]:
        """The groups of the columns' examples; empty for the symmetric kernel."""
        return [] if self.inputs2 is None else self._grouped(self.inputs2)

    @property
    def examples(self) -> int:
        """Number of examples of the rows and the columns."""
        return sum(len(group.indices) for group in (*self.rows, *self.columns))

    def _grouped(self, inputs: Inputs) -> list[Group]:
        assert not isinstance(inputs, tuple)
        return group_examples(inputs, encoder_decoder=is_encoder_decoder(self.model))
