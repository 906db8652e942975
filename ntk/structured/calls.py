"""Which use of a weight is the call of which layer.

An adapter acts on what a layer takes and returns when it is called. A captured use of the layer's weight
(:mod:`ntk.structured.capture`) shows that if it is all that the call does: it multiplies what the layer was given, or
looks it up, and the layer returns the product. A model may also read a layer's weight and multiply by it itself,
several layers may share one weight, and a layer of its own class may do more. So the layers are watched while they run.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ntk.functional import call
from ntk.inputs import Group
from ntk.outputs import Output
from ntk.structured.capture import Capture, Derived, Use
from ntk.structured.passes import batch_of, requiring_gradients
from ntk.structured.targets import Wanted


def look(model: nn.Module, output: Output | None, example: Group, wanted: Wanted) -> None:
    """Note which of the wanted layers are lost, as far as the forward pass of one example shows it."""
    with requiring_gradients(model, wanted.weights) as leaves:
        capture = Capture(leaves, 1, keep_outputs=True)
        batch = capture.mark(batch_of(example))
        with torch.enable_grad(), capture:
            call(model, output, batch, 1)
    for use in capture.uses:
        for parameter in use.names:
            name = wanted.layer_used(parameter, use.within, use.layer)
            is_table = name is not None and isinstance(wanted.layers[name][0], nn.Embedding)
            if name is not None and is_table and use.output is not None and use.output._version != use.version:
                wanted.lost.setdefault(name, "the model overwrites its output")
    for name in capture.unmatched & wanted.layers.keys():
        wanted.lost.setdefault(name, "its call is not just the product with its weight")
    for parameter, why in capture.unhandled.items():
        for name in wanted.weights.get(parameter, ()):
            wanted.lost.setdefault(name, why)


@contextmanager
def watched(layers: Mapping[str, tuple[nn.Module, str]]) -> Iterator[None]:
    """Have every capture tell which uses are within the calls of these layers, and which are all that a call does.

    Args:
        layers: name of the module -> (module, name of its weight among the model's parameters).
    """
    hooks = []
    try:
        for name, (module, weight) in layers.items():
            hooks.append(module.register_forward_pre_hook(partial(_enter, name), with_kwargs=True))
            hooks.append(module.register_forward_hook(partial(_leave, weight), with_kwargs=True))
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _enter(name: str, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
    if Capture.running:
        capture = Capture.running[-1]
        capture.entered.append((name, len(capture.uses)))


def _leave(weight: str, module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
    if not Capture.running:
        return
    capture = Capture.running[-1]
    name, start = capture.entered.pop()
    if not (
        isinstance(output, Tensor) and _tell(capture, name, start, weight, module, (*args, *kwargs.values()), output)
    ):
        capture.unmatched.add(name)


def _tell(
    capture: Capture, name: str, start: int, weight: str, module: nn.Module, arguments: tuple, output: Tensor
) -> bool:
    """Mark the use that is all that a call does; whether there is one."""
    with torch._C.DisableTorchFunction():
        state = capture.state(output)
        if isinstance(state, Derived):
            if state.lookup is None or state.lookup[0] != weight:
                return False
            state.layer = name
            return True
        uses = [use for use in capture.uses[start:] if use.within == name and weight in use.names]
        given = next((t for t in arguments if isinstance(t, Tensor)), None)
        if len(uses) != 1 or given is None:
            return False
        # Which rows an embedding reads is its own affair: its input takes no gradient.
        same = isinstance(module, nn.Embedding) or (given.data_ptr(), given.numel()) in uses[0].arguments
        if not (same and _is_returned(uses[0], output)):
            return False
        uses[0].layer = name
        return True


def _is_returned(use: Use, output: Tensor) -> bool:
    """Whether a call returns what a use made, token by token."""
    made = use.output
    return (
        use.derived is None
        and made is not None
        and (made.data_ptr(), made.shape[-1:], made.numel()) == (output.data_ptr(), output.shape[-1:], output.numel())
        and made._version == use.version
        and made.is_contiguous()
        and output.is_contiguous()
    )
