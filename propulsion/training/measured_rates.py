"""Learning rates measured on the model and the rows that it trains, so that all methods start alike.

How far a step of a given size goes differs a thousandfold between methods: the same 0.001 that suits LoRA moves a head
or (IA)³ hardly at all. What a step does to the loss does not: at the rates at which methods learn best, one step of
Adam changes the loss of rows that it was not taken on by about a per cent of what it was, in one direction or the
other, whatever is trained. So the rate of each role (`propulsion.training.learning_rates`) is the one at which that is
the role's share (`SHARES`):

    mean over rows i and batches b of |l_i(theta - rate * Adam's step on b) - l_i(theta)|  =  share * mean of l_i(theta)

What the step does to the outputs of all rows alike is left out where a row has one label. Before training that is the
larger part of it for many methods, since the mean of the labels, or their commonest class, is learnt in a few steps;
a rate by which those steps were small would be too low for all that follow.

The change is measured by taking the step and looking, and not by the gradients alone: sum |dl_b/dtheta|, what a step
does to the loss of its own batch to first order, is as large as the noise of a small batch makes it, and for another
batch b' sum sign(dl_b/dtheta) dl_b'/dtheta is as small as the noise leaves it. The former is the first guess. Degrees,
scalings and ranks need no rule of their own.

Where a method starts at a product of zero (LoRA's B, VeRA's vectors), the first step says little of those that
follow, since the other factor has no gradient yet. Such tensors are known by their gradients, nearly zero at the start
and no longer after one step; then the change is the larger of that of the first step and that of a step after `LOOK`
others, which are `STRIDE` times as long so as to come as far as many.
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

from propulsion.layer import PropulsionLayer
from propulsion.training.learning_rates import Rates, RoleRate, fixed_rate, model_degree, parameter_roles
from propulsion.training.trainer import isolated_randomness
from propulsion.training_checks import LARGEST_STEP

SHARE = 0.01
SHARES = {"head": 0.05, "weight": 0.03}
"""What one step changes the loss of a fresh row by, as a share of it: `SHARE`, but for two roles. The head starts near
zero, is linear in what it reads and has the longer way to go. Of a step of all weights, more is what the noise of its
batch makes it, which later steps undo."""
LOOK, STRIDE = 4, 4
"""Steps past the first, and how many times as long as others they are, after which a method is looked at that starts at
a product of zero, whose factors matter as they grow."""
BATCHES, ROWS = 4, 8
"""Batches that steps are taken on, and further rows that they are measured on."""

_PASSES = 8  # At most; most roles need one.
_NEAR = 2.0  # A change within this factor of what is wanted is near enough to be scaled in proportion.
_SILENT = 1e-4  # A tensor's gradient, beside the largest of its role, that counts as none.
_LARGEST_JUMP = 30.0
_FAR_BELOW, _RISE = 300.0, 6.0  # Where the search begins of a product from zero on, and how fast it goes up at most.

Batch = Mapping[str, Any]


def choose_rows(count: int, batch_size: int, seed: int) -> tuple[list[list[int]], list[int]]:
    """Which training rows rates are measured on.

    Args:
        count: Training rows there are.
        batch_size: Rows of a training batch.
        seed: Of the draw.

    Returns:
        The rows of each batch, and the rows of their own beside them; of few rows, smaller batches, and in the end the
        same rows twice.
    """
    order = np.random.default_rng(seed).permutation(count).tolist()
    fresh = order[: min(ROWS, max(1, count // 2))]
    rest = order[len(fresh) :] or order
    size = max(1, min(batch_size, len(rest) // BATCHES))
    return [rest[start : start + size] for start in range(0, size * min(BATCHES, len(rest)), size)], fresh


def with_measured(
    model: nn.Module, rates: Rates, examples: Any, collator: Callable[[list[Any]], Any], *, batch_size: int, seed: int
) -> Rates:
    """The same choice of rates, with what is automatic measured on some training rows.

    Args:
        model: The model, ready to be trained.
        rates: How rates are chosen.
        examples: Encoded training rows: a dataset, of which the seed draws, or a stream, whose first ones are taken.
        collator: Makes a batch of rows.
        batch_size: Rows of a training batch.
        seed: Of the draw.
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
        found = measured(model, rates, [batch(rows) for rows in chosen], [batch([row]) for row in fresh])
    return replace(rates, measured=found)


def measured(model: nn.Module, rates: Rates, batches: Sequence[Batch], rows: Sequence[Batch]) -> dict[str, RoleRate]:
    """Measure the rates that are to be automatic.

    The model, its mode, its gradients and the random states are left as they were. The same arguments give the same
    rates.

    Args:
        model: The model, ready to be trained.
        rates: How rates are chosen.
        batches: Training batches, each what the model is called with, labels included.
        rows: Further training rows, each a batch of one.

    Returns:
        By role, the rate at which a step changes the loss of a row by its share, and the reason in words. Where that
        cannot be measured, the fixed rate of the role, and why.

    Cost: some ten passes of a batch and thirty of single rows for each role, without dropout.
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
    """The rate at which the change is the role's share: a first guess, scaled until it is near.

    The change grows as a power of the rate, 1 where the first step is measured, more where factors of a product grow
    together; the power is that between the last two rates tried.
    """
    share = SHARES.get(role, SHARE)
    fixed = fixed_rate(role, model_degree(probe.model))
    others = [p for p in probe.model.parameters() if p.requires_grad and all(p is not q for q in parameters.values())]
    with _frozen(others):
        first = probe.gradients(parameters, 0)
        slope = sum(float(g.abs().sum(dtype=torch.float64)) for g in first.values())
        if not (probe.loss > 0 and math.isfinite(probe.loss) and 0 < slope < math.inf):
            return RoleRate(fixed.rate, f"{fixed.reason}: the loss or its gradient is zero or not finite at the start")
        guess, look = share * probe.loss / slope, 0
        rate = guess
        if (silent := _silent(first)) and _wakes(probe, parameters, silent, rate):
            # From far below: the first step is no guide, and after large ones some networks answer to nothing.
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
    if not near:  # As where the outputs are bounded, whatever the step.
        rate = guess / (_LARGEST_JUMP if look else 1)
        reason = f"automatic: to first order {step} changes its batch's loss by {share:.0%}; other rows' it did not"
    if role == "scale" and rate * (k := _largest_degree(probe.model)) > LARGEST_STEP:
        return RoleRate(LARGEST_STEP / k, f"automatic: no step moves a scale by more than {LARGEST_STEP:.0%}")
    return RoleRate(rate, reason)


def _silent(gradients: Mapping[str, Tensor]) -> set[str]:
    """The tensors that have no gradient, or next to none, beside others of their role that have one."""
    sizes = {name: float(g.double().square().mean().sqrt()) for name, g in gradients.items()}
    return {name for name, size in sizes.items() if size <= _SILENT * max(sizes.values())}


def _wakes(probe: "_Probe", parameters: Mapping[str, nn.Parameter], silent: set[str], rate: float) -> bool:
    """Whether tensors without a gradient have one after a step of the others."""
    with _restored(parameters):
        probe.step(parameters, torch.optim.Adam(parameters.values(), lr=rate), 0)
        return bool(silent - _silent(probe.gradients(parameters, 0)))


class _Probe:
    """A model in evaluation mode with the batches that it steps on and the rows that it is measured on."""

    def __init__(self, model: nn.Module, batches: Sequence[Batch], rows: Sequence[Batch]) -> None:
        self.model, self._batches, self._rows = model, batches, rows
        self._call = _task_loss(model, rows[0])
        self._start = self._look()
        self.loss = float(self._start.losses.mean())

    @torch.no_grad()
    def _look(self) -> "_Look":
        """Every row as the model is."""
        found = [self._call(**row) for row in self._rows]
        losses = torch.stack([output.loss.double().cpu() for output in found])
        outputs = [getattr(output, "logits", None) for output in found]
        logits = [values for values in outputs if isinstance(values, Tensor) and values.ndim == 2 and len(values) == 1]
        if len(logits) < len(outputs):
            return _Look(losses)
        labels = torch.cat([row["labels"].reshape(-1).cpu() for row in self._rows])
        if labels.shape != losses.shape:
            return _Look(losses)
        look = _Look(losses, torch.cat([values.double().cpu() for values in logits]), labels)
        # Only where this is how the model computes its loss.
        return look if torch.allclose(look.losses_at(look.outputs), losses, rtol=1e-3) else _Look(losses)

    def gradients(self, parameters: Mapping[str, nn.Parameter], batch: int) -> dict[str, Tensor]:
        """Of a batch's loss, zero where the loss does not depend on a parameter."""
        loss = self._call(**self._batches[batch % len(self._batches)]).loss
        found = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True, materialize_grads=True)
        return dict(zip(parameters, found))

    def step(self, parameters: Mapping[str, nn.Parameter], optimizer: torch.optim.Optimizer, batch: int) -> None:
        """One step, as training takes it."""
        for name, gradient in self.gradients(parameters, batch).items():
            parameters[name].grad = gradient
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    def change(self, parameters: Mapping[str, nn.Parameter], rate: float, look: int) -> float:
        """What a step changes the loss of a row by, as a share of what it was before any.

        Without a look past the first step, the mean over the first steps on each batch; with it, the larger of the
        first step and the one after that many others, as some networks answer to nothing after too large steps.
        """
        found = []
        for first in range(1 if look else len(self._batches)):
            with _restored(parameters):
                optimizer = torch.optim.Adam(parameters.values(), lr=rate)
                found.append(self._change_by_step(parameters, optimizer, first, self._start))
                if look:
                    optimizer.param_groups[0]["lr"] = STRIDE * rate
                    for batch in range(1, look + 1):
                        self.step(parameters, optimizer, batch)
                    optimizer.param_groups[0]["lr"] = rate
                    found.append(self._change_by_step(parameters, optimizer, look + 1, self._look()))
        return (max(found) if look else float(np.mean(found))) / self.loss

    def _change_by_step(
        self, parameters: Mapping[str, nn.Parameter], optimizer: torch.optim.Optimizer, batch: int, before: "_Look"
    ) -> float:
        self.step(parameters, optimizer, batch)
        return before.change(self._look())


@dataclass(frozen=True)
class _Look:
    """Rows as a model is.

    Attributes:
        losses: Of every row, ``(n,)``.
        outputs: What the losses are of, ``(n, c)``, where a row has one label; empty otherwise.
        labels: Of every row, ``(n,)``; empty where outputs are.
    """

    losses: Tensor
    outputs: Tensor = field(default_factory=lambda: torch.empty(0))
    labels: Tensor = field(default_factory=lambda: torch.empty(0))

    def losses_at(self, outputs: Tensor) -> Tensor:
        """What the losses would be, of a regression or a classification, at other outputs ``(n, c)``."""
        if outputs.shape[1] == 1:
            return (outputs[:, 0] - self.labels).square()
        return torch.nn.functional.cross_entropy(outputs, self.labels.long(), reduction="none")

    def change(self, after: "_Look") -> float:
        """What a step changes the loss of a row by, on average, without what it does to the outputs of all alike."""
        if not self.outputs.numel() or not after.outputs.numel():
            return float((after.losses - self.losses).abs().mean())
        moved = after.outputs - self.outputs
        return float((self.losses_at(self.outputs + moved - moved.mean(dim=0)) - self.losses).abs().mean())


@torch.no_grad()
def _task_loss(model: nn.Module, row: Batch) -> Any:
    """What is called for the loss of the task alone: some adapters add to it what keeps them orthogonal (AdaLoRA)."""
    if not isinstance(model, PeftModel) or model.active_peft_config.is_prompt_learning:
        return model
    inner = model.get_base_model()
    whole, plain = model(**row), inner(**row)
    same = "logits" in plain and torch.equal(whole["logits"], plain["logits"])
    return inner if same else model


def _largest_degree(model: nn.Module) -> float:
    found = (d for m in model.modules() if isinstance(m, PropulsionLayer) for d in m.degree.values())
    return max((float(degree) for degree in found), default=1.0)


# --- leaving all as it was ------------------------------------------------------------------------------------------


@contextmanager
def _as_found(model: nn.Module) -> Iterator[None]:
    """Evaluation mode, and then every module's own mode, every gradient and the random states again."""
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
    """The values of parameters, to the bit, after whatever is done to them."""
    kept = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    try:
        yield
    finally:
        with torch.no_grad():
            for name, parameter in parameters.items():
                parameter.copy_(kept[name])


@contextmanager
def _frozen(parameters: Sequence[nn.Parameter]) -> Iterator[None]:
    """Parameters that need no gradient meanwhile, which saves passing it through what lies below them."""
    try:
        for parameter in parameters:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter in parameters:
            parameter.requires_grad_(True)
