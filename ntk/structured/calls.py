"""Which use of a weight is the call of which layer.

An adapter acts on what a layer takes and returns when it is called. A captured use of the layer's weight
(:mod:`ntk.structured.capture`) shows both if the call does nothing else: it multiplies what the layer was given, or
looks it up, and the layer returns the product. A model may also read a layer's weight and multiply by it itself,
several layers may share one weight, and a layer's class may do more. Hooks therefore watch the layers while they run.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from ntk.functional import batch_of, call, requiring_gradients
from ntk.inputs import Group
from ntk.outputs import Output
from ntk.structured.capture import Capture
from ntk.structured.dependence import Derived, Use
from ntk.structured.targets import Targets, WatchedLayers


@contextmanager
def watched(capture: Capture, layers: WatchedLayers) -> Iterator[set[str]]:
    """Mark the uses within the calls of these layers, and the uses beside which a call does nothing else.

    Yields:
        The layers that have had another call than one recorded use and nothing else.
    """
    unmatched: set[str] = set()
    starts: list[int] = []  # for each call under way, the number of uses before it

    def watch(name: str, module: nn.Module, weight: str) -> list[Any]:
        def enter(*_: Any) -> None:
            capture.within.append(name)
            starts.append(len(capture.uses))

        def leave(_: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
            uses = capture.uses[starts.pop() :]
            capture.within.pop()
            given = next((t for t in (*args, *kwargs.values()) if isinstance(t, Tensor)), None)
            with torch._C.DisableTorchFunction():
                use = _whole_call(capture, name, uses, weight, module, given, output)
            if use is None:
                unmatched.add(name)
            else:
                use.layer = name

        return [module.register_forward_pre_hook(enter), module.register_forward_hook(leave, with_kwargs=True)]

    hooks = [hook for name, (module, weight) in layers.items() for hook in watch(name, module, weight)]
    try:
        yield unmatched
    finally:
        for hook in hooks:
            hook.remove()


def _whole_call(
    capture: Capture, name: str, uses: list[Use], weight: str, module: nn.Module, given: Tensor | None, output: Any
) -> Use | Derived | None:
    """The use beside which a call does nothing else, or the rows that it returns and that nothing has used yet."""
    if not isinstance(output, Tensor):
        return None
    dependence = capture.dependence[output]
    if isinstance(dependence, Derived):
        return dependence if dependence.lookup is not None and dependence.lookup[0] == weight else None
    own = [use for use in uses if use.within == name and weight in use.names]
    if len(own) != 1 or given is None or not _is_returned(own[0], output):
        return None
    # An adapter of an embedding needs no gradient at its ids, so it does not matter where the ids come from.
    takes_given = isinstance(module, nn.Embedding) or (given.data_ptr(), given.numel()) in own[0].arguments
    return own[0] if takes_given else None


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


class BiasReads(TorchFunctionMode):
    """Notes the layers whose bias the model reads while it does not call them.

    Propulsion scales what is read as well, and a captured use of a weight does not show it.

    Attributes:
        layers: the names of these layers.
    """

    WHY = "the model reads the bias of a layer outside its call"

    def __init__(self, capture: Capture, layers: WatchedLayers) -> None:
        super().__init__()
        self.layers: set[str] = set()
        self._capture = capture
        self._owners: dict[int, list[str]] = {}
        for name, (module, _) in layers.items():
            if isinstance(bias := getattr(module, "bias", None), Tensor):
                self._owners.setdefault(id(bias), []).append(name)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Call the function, and note whose bias it got unless it returns no values, as a shape is none."""
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor | tuple | list) and not isinstance(result, torch.Size):
            owners = [self._owners.get(id(one), ()) for one in tree_leaves((args, kwargs)) if isinstance(one, Tensor)]
            self.layers.update(owner for each in owners if not {*each} & {*self._capture.within} for owner in each)
        return result


def find_lost_layers(model: nn.Module, output: Output | None, example: Group, targets: Targets) -> None:
    """Note which layers' calls are not captured, as far as the forward pass of one example shows it."""
    with requiring_gradients(model, targets.layers_of_weight) as leaves:
        capture = Capture(leaves, 1, keep_outputs=True)
        batch = capture.mark(batch_of(example))
        reads = BiasReads(capture, targets.watched)
        with torch.enable_grad(), capture, reads, watched(capture, targets.watched) as unmatched:
            call(model, output, batch, 1)
    for name in reads.layers & targets.layers.keys():
        targets.lost.setdefault(name, BiasReads.WHY)
    for use in capture.uses:
        for parameter in use.names:
            name = targets.layer_used(parameter, use)
            overwritten = use.output is not None and use.output._version != use.version
            if name is not None and overwritten and isinstance(targets.layers[name][0], nn.Embedding):
                targets.lost.setdefault(name, "the model overwrites its output")
    for name in unmatched & targets.layers.keys():
        targets.lost.setdefault(name, "its call is not just the product with its weight")
    for parameter, why in capture.unhandled.items():
        for name in targets.layers_of_weight.get(parameter, ()):
            targets.lost.setdefault(name, why)
