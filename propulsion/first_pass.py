"""A look at the first forward pass and the first optimizer step of training, for what would fail in silence."""

import warnings
import weakref
from typing import Any

import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_pre_hook

from propulsion.layer import PropulsionLayer
from propulsion.optim import SCALE_NAME, warn_of_traps


def watch(model: nn.Module) -> None:
    """Have the next forward pass in training mode looked at, and the first step of an optimizer of its scales."""
    if not is_watched(model):
        model.register_forward_pre_hook(_look)


def is_watched(model: nn.Module) -> bool:
    """Whether a forward pass is still to be looked at, when it comes through the model's own call."""
    return _look in model._forward_pre_hooks.values()


def unwatched(model: nn.Module) -> nn.Module:
    """Take the look off a model, and return it."""
    for key in [key for key, hook in model._forward_pre_hooks.items() if hook is _look]:
        del model._forward_pre_hooks[key]
    return model


# A function of the module, and no closure, as models are pickled with their hooks.
def _look(model: nn.Module, args: Any) -> None:
    if not model.training or torch.compiler.is_compiling():
        return
    unwatched(model)
    layers = {name: m for name, m in model.named_modules() if isinstance(m, PropulsionLayer) and _is_active(m)}
    called: set[nn.Module] = set()
    handles = [layer.register_forward_pre_hook(lambda layer, _: called.add(layer)) for layer in layers.values()]

    def finish(model: nn.Module, args: Any, output: Any) -> None:
        for handle in handles:
            handle.remove()
        dead = [name for name, layer in layers.items() if layer not in called]
        if dead and output is not None:
            warnings.warn(
                f"the model did not call {dead[0]!r}{f' and {len(dead) - 1} others' if dead[1:] else ''} in this pass: "
                "the scales there have no effect. Leave such modules out with exclude_modules",
                stacklevel=2,
            )

    handles.append(model.register_forward_hook(finish, always_call=True))
    _watch_first_step(model)


def _is_active(layer: PropulsionLayer) -> bool:
    return not (layer.disable_adapters or layer.merged) and any(n in layer.propulsion_z for n in layer.active_adapters)


def _watch_first_step(model: nn.Module) -> None:
    """Have `warn_of_traps` look at the first optimizer that steps on a scale of this model, once."""
    watched = weakref.ref(model)
    done = False

    def look(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        nonlocal done
        model = None if done else watched()
        if model is None:
            return
        scales = {id(p) for name, p in model.named_parameters() if SCALE_NAME in name}
        if any(id(p) in scales for group in optimizer.param_groups for p in group["params"]):
            done = True
            warn_of_traps(model, optimizer)

    # A hook cannot remove itself while hooks run.
    weakref.finalize(model, register_optimizer_step_pre_hook(look).remove)
