"""Warnings, at the first forward pass and the first optimizer steps, of settings that fail without an error."""

import warnings
import weakref
from typing import Any

import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_pre_hook
from transformers import TrainerCallback

from propulsion.layer import PropulsionLayer

SCALE_NAME = "propulsion_z"
SCALE_RATE = 2e-2
"""The fixed learning rate of scales at degree 1 (`propulsion.training.learning_rates`)."""
# The relative change of an activation in one step above which training is likely to diverge.
LARGEST_STEP = 0.25


def watch(model: nn.Module) -> None:
    """Check the next forward pass in training mode, and the steps of the optimizer of the scales."""
    if not is_watched(model):
        model.register_forward_pre_hook(_check_pass)


def is_watched(model: nn.Module) -> bool:
    """Whether the model's next call in training mode is to be checked."""
    return _check_pass in model._forward_pre_hooks.values()


def unwatched(model: nn.Module) -> nn.Module:
    """Remove the check of the next call from a model, and return the model."""
    for key in [key for key, hook in model._forward_pre_hooks.items() if hook is _check_pass]:
        del model._forward_pre_hooks[key]
    return model


# Not a closure, since models are pickled with their hooks.
def _check_pass(model: nn.Module, args: Any) -> None:
    if not model.training or torch.compiler.is_compiling():
        return
    unwatched(model)
    layers = {name: m for name, m in model.named_modules() if isinstance(m, PropulsionLayer) and _is_active(m)}
    called: set[nn.Module] = set()
    for layer in layers.values():
        layer._was_read = False
    handles = [layer.register_forward_pre_hook(lambda layer, _: called.add(layer)) for layer in layers.values()]

    dead: list[str] = []

    def finish(model: nn.Module, args: Any, output: Any) -> None:
        for handle in handles:
            handle.remove()
        dead.extend(name for name, layer in layers.items() if layer not in called and not layer._was_read)
        if dead and output is not None:
            _warn_of_dead(f"the model did not call {_several(dead)} in this pass, nor read its weight")

    handles.append(model.register_forward_hook(finish, always_call=True))
    _watch_steps(model, dead)


def _is_active(layer: PropulsionLayer) -> bool:
    return not (layer.disable_adapters or layer.merged) and any(n in layer.propulsion_z for n in layer.active_adapters)


def _rates_are_elsewhere(optimizer: torch.optim.Optimizer) -> bool:
    rates = (group["lr"] for group in optimizer.param_groups)
    return any(isinstance(rate, torch.Tensor) and rate.device.type != "cpu" for rate in rates)


def _several(names: list[str]) -> str:
    return f"{names[0]!r}{f' and {len(names) - 1} others' if names[1:] else ''}"


def _warn_of_dead(what: str) -> None:
    warnings.warn(f"{what}: the scales there have no effect. Leave such modules out with exclude_modules", stacklevel=3)


def _watch_steps(model: nn.Module, known: list[str]) -> None:
    """Check the first optimizer that steps on a scale of this model, and again whenever its rate rises.

    Modules in `known` have been reported already.
    """
    watched = weakref.ref(model)
    first: weakref.ref[torch.optim.Optimizer] | None = None
    judged = 0.0

    def check(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        nonlocal first, judged
        model = watched()
        if model is None or (first is not None and first() is not optimizer):
            return
        # Reading rates on an accelerator would wait for it at every step, so such rates are checked once.
        if first is not None and (_rates_are_elsewhere(optimizer) or largest_rate(optimizer) <= judged):
            return
        scales = {id(p): name for name, p in model.named_parameters() if SCALE_NAME in name}
        stepped = [p for group in optimizer.param_groups for p in group["params"] if id(p) in scales]
        if not stepped:
            return
        # An optimizer that is given a closure has no gradients before it calls it.
        if first is None and not any(callable(given) for given in (*args, *kwargs.values())):
            without = [scales[id(p)] for p in stepped if p.requires_grad and p.grad is None]
            names = [name.partition(f".{SCALE_NAME}")[0] for name in without]
            if unknown := [name for name in names if name not in known]:
                _warn_of_dead(f"no gradient has reached the scales of {_several(unknown)} in this step")
        first = weakref.ref(optimizer)
        judged = float("inf") if warn_of_traps(model, optimizer) else largest_rate(optimizer)

    # The hook cannot remove itself while hooks run, so it stays as long as the model does.
    weakref.finalize(model, register_optimizer_step_pre_hook(check).remove)


def warn_of_traps(model: nn.Module, optimizer: torch.optim.Optimizer) -> bool:
    """Warn of settings that harm the training of scales, and return whether there were any.

    They are weight decay on z, which pulls the scales to 0, and a learning rate (`largest_rate`) at which one step of
    Adam or sign descent can move a scale z^k near 1 by more than `LARGEST_STEP`.
    """
    names = {id(p): name for name, p in model.named_parameters()}
    degrees = _degrees(model)
    warned = False
    for group in optimizer.param_groups:
        scales = [names[id(p)] for p in group["params"] if SCALE_NAME in names.get(id(p), "")]
        if not scales:
            continue
        if group.get("weight_decay", 0.0) > 0:
            warned = True
            warnings.warn(
                f"weight decay {group['weight_decay']} acts on z ({scales[0]} and others): it pulls every scale to "
                "0. Put z in a group without decay, as propulsion.training.parameter_groups does",
                stacklevel=2,
            )
        k, rate = max(degrees.get(name, 1.0) for name in scales), _rate_of(group)
        # The size of a step of plain SGD depends on the gradient, which is not known here.
        if k * rate > LARGEST_STEP and not isinstance(optimizer, torch.optim.SGD):
            warned = True
            warnings.warn(
                f"learning rate {rate:g} at degree {k:g}: one step may move a scale by {k * rate:.0%}. "
                f"Divide the rate by the degree; {SCALE_RATE / k:.2g} is the fixed rate of propulsion.training",
                stacklevel=2,
            )
    return warned


def largest_rate(optimizer: torch.optim.Optimizer) -> float:
    """The largest learning rate that any group holds: its current, initial or peak rate."""
    return max((_rate_of(group) for group in optimizer.param_groups), default=0.0)


def _rate_of(group: dict[str, Any]) -> float:
    # torch's schedules store the rate that they multiply as "initial_lr", and cyclic ones their peak as "max_lr".
    return max(float(group[name]) for name in ("lr", "initial_lr", "max_lr") if group.get(name) is not None)


class TrapWarnings(TrainerCallback):
    """Calls `warn_of_traps` before the first forward pass: ``Trainer(..., callbacks=[TrapWarnings()])``.

    Without this callback, the warnings come at the first optimizer step (`watch`).
    """

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Check the optimizer before the first step."""
        if kwargs.get("optimizer") is not None:
            optimizer = getattr(kwargs["optimizer"], "optimizer", kwargs["optimizer"])
            warn_of_traps(kwargs["model"], optimizer)


def _degrees(model: nn.Module) -> dict[str, float]:
    """The degree of every scale parameter z, by the parameter's name."""
    return {
        f"{name}.{SCALE_NAME}.{adapter}": float(degree)
        for name, module in model.named_modules()
        if isinstance(module, PropulsionLayer)
        for adapter, degree in module.degree.items()
    }
