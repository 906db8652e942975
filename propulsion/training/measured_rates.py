"""Learning rates measured on the model and its training rows, by the same rule for all methods.

The best learning rates of methods differ by a factor of a thousand. But for every method, one step of Adam at the best
rate changes the loss of rows outside the step's batch, up or down, by about 1 %. So the rate of each role
(`propulsion.training.learning_rates`) is the one at which that change equals the role's share (`SHARES`):

    mean over rows i and batches b of |l_i(theta - rate * Adam's step on b) - l_i(theta)|  =  share * mean of l_i(theta)

If rows have one label each, the mean change of all rows' outputs is subtracted first. At the start of training it is
the larger part of the change for many methods, which learn the mean label, or the most frequent class, in a few steps;
a rate at which these first steps are small would be too low afterwards.

The change is measured by taking the step. Gradients alone do not suffice: the first-order change sum |dl_b/dtheta| of
the loss of the step's own batch is dominated by the noise of a small batch, and so is that of another batch b',
sum sign(dl_b/dtheta) dl_b'/dtheta. The former is the first guess. Degrees, scalings and ranks need no special rule.

If a method starts with a product that is zero (LoRA's B, VeRA's vectors), the first step says little about later ones,
since the other factor has no gradient yet. Such tensors have a gradient of nearly zero at the start, and a larger one
after one step. The change is then the larger of two: that of the first step, and that of a step after `LOOK` others,
each `STRIDE` times as long.
"""

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from peft import PeftModel
from torch import Tensor, nn

from propulsion.layer import adapted_layers
from propulsion.training.learning_rates import Rates, RoleRate, fixed_rate, model_degree, parameter_roles
from propulsion.training.trainer import isolated_randomness
from propulsion.training_checks import LARGEST_STEP

SHARE = 0.01
SHARES = {"head": 0.05, "weight": 0.03}
"""The share by which one step changes the loss of another row, by role; `SHARE` for other roles. It is larger for the
head, which starts near zero, and for a step of all weights, much of which is noise that later steps undo."""
LOOK, STRIDE = 4, 4
"""Number of steps, and their length relative to others, before the second measurement of a method that starts with a
product that is zero."""
BATCHES, ROWS = 4, 8
"""Number of batches to take steps on, and number of other rows to measure the change on."""

_PASSES = 8  # Largest number of rates tried; most roles need one.
_NEAR = 2.0  # A change within this factor of the share needs no further trial.
_SILENT = 1e-4  # A gradient below this share of the largest of its role counts as zero.
_LARGEST_JUMP = 30.0
_KEPT_BYTES = 2**26  # Gradients at the start are kept up to this size, and computed anew for every rate beyond it.
_FAR_BELOW, _RISE = 300.0, 6.0  # For products that are zero: the search begins at guess / 300 and rises 6-fold at most.

Batch = Mapping[str, Any]


def choose_rows(count: int, batch_size: int, seed: int) -> tuple[list[list[int]], list[int]]:
    """Draw, of `count` training rows, the rows of each batch to take steps on, and other rows to measure the change on.

    With few training rows the batches are smaller, and with very few they contain the other rows too.
    """
    order = np.random.default_rng(seed).permutation(count).tolist()
    fresh = order[: min(ROWS, max(1, count // 2))]
    rest = order[len(fresh) :] or order
    size = max(1, min(batch_size, len(rest) // BATCHES))
    return [rest[start : start + size] for start in range(0, size * min(BATCHES, len(rest)), size)], fresh


def with_measured(
    model: nn.Module, rates: Rates, examples: Any, collator: Callable[[list[Any]], Any], *, batch_size: int, seed: int
) -> Rates:
    """Return the rates, with the automatic ones measured on some training rows, for a model that is ready for training.

    The examples are encoded rows: a dataset, from which rows are drawn by the seed, or a stream, whose first rows are
    taken. The collator makes a batch of them.
    """
    if not rates.automatic:
        return rates
    if not hasattr(examples, "__len__"):
        examples = list(itertools.islice(examples, ROWS + BATCHES * batch_size))
    chosen, fresh = choose_rows(len(examples), batch_size, seed)
    device = next(model.parameters()).device

    def batch(rows: list[int]) -> Batch:
        return {name: value.to(device) for name, value in collator([examples[row] for row in rows]).items()}

    with isolated_randomness():
        by_role = measured(model, rates, [batch(rows) for rows in chosen], [batch([row]) for row in fresh])
    return replace(rates, measured=by_role)


def measured(model: nn.Module, rates: Rates, batches: Sequence[Batch], rows: Sequence[Batch]) -> dict[str, RoleRate]:
    """Measure the automatic rates on training batches with labels and on other training rows, each a batch of one.

    The model, its mode, its gradients and the random states are restored afterwards. The same arguments give the same
    rates.

    Returns:
        By role, the rate at which a step changes the loss of a row by the role's share, or the fixed rate of the role
        if that cannot be measured.

    Cost: about ten passes of a batch and thirty of single rows for each role, without dropout.
    """
    roles = parameter_roles(model)
    trained: dict[str, dict[str, nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and rates.choice(roles[name]) == "auto":
            trained.setdefault(roles[name], {})[name] = parameter
    if not trained:
        return {}
    with _as_found(model):
        probe = _Probe(model, batches, rows)
        return {role: _rate_of_role(probe, role, parameters) for role, parameters in trained.items()}


def _rate_of_role(probe: "_Probe", role: str, parameters: Mapping[str, nn.Parameter]) -> RoleRate:
    """The rate at which the change equals the role's share, found by scaling a first guess until the change is near it.

    The change grows as a power of the rate: 1 for the first step, more if factors of a product grow together. The power
    is estimated from the last two rates tried.
    """
    share = SHARES.get(role, SHARE)
    fixed = fixed_rate(role, model_degree(probe.model))
    others = [p for p in probe.model.parameters() if p.requires_grad and all(p is not q for q in parameters.values())]
    probe.forget()
    with _frozen(others):
        first = probe.gradients_at_start(parameters, 0)
        slope = sum(float(g.abs().sum(dtype=torch.float64)) for g in first.values())
        if not (probe.loss > 0 and math.isfinite(probe.loss) and 0 < slope < math.inf):
            return RoleRate(fixed.rate, f"{fixed.reason}: the loss or its gradient is zero or not finite at the start")
        guess, look = share * probe.loss / slope, 0
        rate = guess
        if (silent := _silent(first)) and _wakes(probe, parameters, silent, rate):
            # The search begins far below, since some networks no longer respond after too large steps.
            look, rate = LOOK, guess / _FAR_BELOW
        near, power, last = False, 2.0 if look else 1.0, (0.0, 0.0)
        for _ in range(_PASSES):
            change = probe.change(parameters, rate, look)
            if not math.isfinite(change) or not change:
                rate *= _LARGEST_JUMP if change == 0 else 1 / _LARGEST_JUMP
                continue
            here = math.log(rate), math.log(change)
            if last != (0.0, 0.0) and abs(here[0] - last[0]) > 1e-6:
                power = min(max((here[1] - last[1]) / (here[0] - last[0]), 0.5), 4.0)
            last, near = here, 1 / _NEAR <= share / change <= _NEAR
            rate *= min(max((share / change) ** (1 / power), 1 / _LARGEST_JUMP), _RISE if look else _LARGEST_JUMP)
            if near or rate > _LARGEST_JUMP * guess:
                break
    step = f"a step{f', of {look} past the first, at which some tensors have no gradient,' * bool(look)}"
    reason = f"automatic: {step} changes the loss of a training row, {probe.loss:.3g}, by {share:.0%}"
    if not near:  # Such as with bounded outputs.
        rate = guess / (_LARGEST_JUMP if look else 1)
        reason = f"automatic: to first order {step} changes its batch's loss by {share:.0%}; other rows' it did not"
    degrees = (degree for layer in adapted_layers(probe.model) for degree in layer.degree.values())
    if role == "scale" and rate * (k := max(degrees, default=1)) > LARGEST_STEP:
        return RoleRate(LARGEST_STEP / k, f"automatic: no step moves a scale by more than {LARGEST_STEP:.0%}")
    return RoleRate(rate, reason)


def _silent(gradients: Mapping[str, Tensor]) -> set[str]:
    """The tensors whose gradient is zero, or nearly zero relative to the others of their role."""
    sizes = {name: float(g.double().square().mean().sqrt()) for name, g in gradients.items()}
    return {name for name, size in sizes.items() if size <= _SILENT * max(sizes.values())}


def _wakes(probe: "_Probe", parameters: Mapping[str, nn.Parameter], silent: set[str], rate: float) -> bool:
    """Whether tensors without a gradient have one after a step of the other tensors."""
    with _restored(parameters):
        optimizer = torch.optim.Adam(parameters.values(), lr=rate)
        _step(parameters, optimizer, probe.gradients_at_start(parameters, 0))
        return bool(silent - _silent(probe.gradients(parameters, 0)))


class _Probe:
    """A model in evaluation mode with the batches that it steps on and the rows that it is measured on."""

    def __init__(self, model: nn.Module, batches: Sequence[Batch], rows: Sequence[Batch]) -> None:
        self.model, self._batches, self._rows = model, batches, rows
        self._call = _task_loss(model, rows[0])
        self._start = self._look()
        self._kept: dict[int, dict[str, Tensor]] = {}
        self.loss = float(self._start.losses.mean())

    @torch.no_grad()
    def _look(self) -> "_Look":
        """Losses and outputs of every row with the current weights."""
        results = [self._call(**row) for row in self._rows]
        losses = torch.stack([output.loss.double().cpu() for output in results])
        outputs = [getattr(output, "logits", None) for output in results]
        logits = [values for values in outputs if isinstance(values, Tensor) and values.ndim == 2 and len(values) == 1]
        if len(logits) < len(outputs):
            return _Look(losses)
        labels = torch.cat([row["labels"].reshape(-1).cpu() for row in self._rows])
        if labels.shape != losses.shape:
            return _Look(losses)
        look = _Look(losses, torch.cat([values.double().cpu() for values in logits]), labels)
        # Outputs are used only if the model computes its loss from them in this way.
        return look if torch.allclose(look.losses_at(look.outputs), losses, rtol=1e-3) else _Look(losses)

    def gradients(self, parameters: Mapping[str, nn.Parameter], batch: int) -> dict[str, Tensor]:
        """Gradients of a batch's loss, zero for parameters on which it does not depend."""
        loss = self._call(**self._batches[batch % len(self._batches)]).loss
        gradients = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True, materialize_grads=True)
        return dict(zip(parameters, gradients))

    def gradients_at_start(self, parameters: Mapping[str, nn.Parameter], batch: int) -> dict[str, Tensor]:
        """The same with the initial weights, which the first step at every rate takes; kept if they are small."""
        if batch in self._kept:
            return self._kept[batch]
        found = self.gradients(parameters, batch)
        if len(self._batches) * sum(g.nbytes for g in found.values()) <= _KEPT_BYTES:
            self._kept[batch] = found
        return found

    def forget(self) -> None:
        """Drop the gradients of other parameters that are kept."""
        self._kept.clear()

    def change(self, parameters: Mapping[str, nn.Parameter], rate: float, look: int) -> float:
        """The change of a row's loss by one step, as a share of its initial value.

        With `look` 0, it is the mean over first steps on each batch. Otherwise it is the larger of the changes by the
        first step and by one after `look` others, since some networks no longer respond after too large steps.
        """
        changes = []
        for first in range(1 if look else len(self._batches)):
            with _restored(parameters):
                optimizer = torch.optim.Adam(parameters.values(), lr=rate)
                _step(parameters, optimizer, self.gradients_at_start(parameters, first))
                changes.append(self._start.change(self._look()))
                if look:
                    optimizer.param_groups[0]["lr"] = STRIDE * rate
                    for batch in range(1, look + 1):
                        _step(parameters, optimizer, self.gradients(parameters, batch))
                    optimizer.param_groups[0]["lr"] = rate
                    before = self._look()
                    _step(parameters, optimizer, self.gradients(parameters, look + 1))
                    changes.append(before.change(self._look()))
        return (max(changes) if look else float(np.mean(changes))) / self.loss


def _step(
    parameters: Mapping[str, nn.Parameter], optimizer: torch.optim.Optimizer, gradients: Mapping[str, Tensor]
) -> None:
    """Take one step of an optimizer, which leaves the gradients as they are."""
    for name, gradient in gradients.items():
        parameters[name].grad = gradient
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


@dataclass(frozen=True)
class _Look:
    """Losses and outputs of rows for given weights.

    Attributes:
        losses: Loss of every row, ``(n,)``.
        outputs: Outputs of every row, ``(n, c)``, if rows have one label each; otherwise empty.
        labels: Label of every row, ``(n,)``; empty if `outputs` is.
    """

    losses: Tensor
    outputs: Tensor = field(default_factory=lambda: torch.empty(0))
    labels: Tensor = field(default_factory=lambda: torch.empty(0))

    def losses_at(self, outputs: Tensor) -> Tensor:
        """The losses of these rows, in a regression or a classification, with other outputs ``(n, c)``."""
        if outputs.shape[1] == 1:
            return (outputs[:, 0] - self.labels).square()
        return torch.nn.functional.cross_entropy(outputs, self.labels.long(), reduction="none")

    def change(self, after: "_Look") -> float:
        """The mean absolute change of a row's loss by a step, with the mean change of all rows' outputs subtracted."""
        if not self.outputs.numel() or not after.outputs.numel():
            return float((after.losses - self.losses).abs().mean())
        moved = after.outputs - self.outputs
        return float((self.losses_at(self.outputs + moved - moved.mean(dim=0)) - self.losses).abs().mean())


@torch.no_grad()
def _task_loss(model: nn.Module, row: Batch) -> Any:
    """The model whose loss is the task's alone: some adapters, such as AdaLoRA, add a regularisation term."""
    if not isinstance(model, PeftModel) or model.active_peft_config.is_prompt_learning:
        return model
    inner = model.get_base_model()
    whole, plain = model(**row), inner(**row)
    same = "logits" in plain and torch.equal(whole["logits"], plain["logits"])
    return inner if same else model


@contextmanager
def _as_found(model: nn.Module) -> Iterator[None]:
    """Put a model in evaluation mode, and restore modes, gradients and random states afterwards."""
    modes = {module: module.training for module in model.modules()}
    gradients = [(parameter, parameter.grad) for parameter in model.parameters()]
    with isolated_randomness(), torch.enable_grad():
        try:
            model.eval()
            yield
        finally:
            for module, mode in modes.items():
                module.training = mode
            for parameter, gradient in gradients:
                parameter.grad = gradient


@contextmanager
def _restored(parameters: Mapping[str, nn.Parameter]) -> Iterator[None]:
    """Restore the values of parameters afterwards, bit for bit."""
    kept = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    try:
        yield
    finally:
        with torch.no_grad():
            for name, parameter in parameters.items():
                parameter.copy_(kept[name])


@contextmanager
def _frozen(parameters: Sequence[nn.Parameter]) -> Iterator[None]:
    """Turn gradients of parameters off in the block, which saves part of the backward pass."""
    try:
        for parameter in parameters:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter in parameters:
            parameter.requires_grad_(True)
