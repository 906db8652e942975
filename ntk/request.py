"""What is asked of a kernel: the model, the examples, the output, the layout, the memory."""

from dataclasses import dataclass
from functools import cached_property

import psutil
import torch
from torch import nn

from ntk.functional import is_encoder_decoder
from ntk.inputs import Group, Inputs, group_examples
from ntk.layout import Layout, layout_of
from ntk.outputs import Output, summed_outputs


@dataclass(frozen=True)
class Request:
    """The arguments that every way of computing kernels takes; each means what it means in :func:`ntk.empirical_ntk`.

    Attributes:
        model: in evaluation mode.
        inputs: the rows.
        inputs2: the columns; None for the symmetric kernel.
        output: what is differentiated, summed already where the layout says so.
        layout: what becomes of the outputs.
        memory_budget: in bytes; None for half of the memory that is free when it is asked for.
        progress: whether to show a progress bar.
    """

    model: nn.Module
    inputs: Inputs
    inputs2: Inputs | None
    output: Output | None
    layout: Layout
    memory_budget: int | float | None
    progress: bool

    @classmethod
    def of(
        cls,
        model: nn.Module,
        inputs: Inputs,
        inputs2: Inputs | None,
        output: Output | None,
        reduce: str | None,
        memory_budget: int | float | None,
        progress: bool,
    ) -> "Request":
        """From the arguments of :func:`ntk.empirical_ntk`."""
        layout = layout_of(reduce)
        output = summed_outputs(output) if layout.summed else output
        return cls(model, inputs, inputs2, output, layout, memory_budget, progress)

    def budget(self, device: torch.device) -> int | float:
        """The memory budget for this device, in bytes."""
        if self.memory_budget is not None:
            return self.memory_budget
        if device.type == "cuda":
            return torch.cuda.mem_get_info(device)[0] // 2
        return psutil.virtual_memory().available // 2

    @cached_property
    def rows(self) -> list[Group]:
        """The examples of the rows, grouped."""
        return group_examples(self.inputs, encoder_decoder=is_encoder_decoder(self.model))

    @cached_property
    def columns(self) -> list[Group]:
        """The examples of the columns, grouped; none for the symmetric kernel."""
        if self.inputs2 is None:
            return []
        return group_examples(self.inputs2, encoder_decoder=is_encoder_decoder(self.model))
