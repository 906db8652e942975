"""Which learning rate and weight decay each parameter trains with: the one home of that rule.

By default the rate of each role is measured on the model and the rows that it trains (`propulsion.rates`). Beside it
there is one fixed rate a role, whatever the model and the rows:

    weight   a pre-trained weight, trained directly        WEIGHT_RATE
    bias     a pre-trained bias, where only biases train   BIAS_RATE
    scale    Propulsion's z, acting as z**k                SCALE_RATE / k
    adapter  any other parameter that a method adds        ADAPTER_RATE
    head     the task's head, which starts at random       HEAD_RATE

A step of AdamW has a size set by its learning rate, whatever the gradient's scale. A step of size r on z, near z = 1,
moves the multiplier z**k by about k*r; dividing by the degree therefore makes SCALE_RATE the relative change of an
activation per step, the same for every degree.

Weight decay pulls towards 0, and so applies to matrices only. Biases and norms are left out as is customary; z is left
out because its neutral value is 1.
"""

import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from peft import PeftModel
from torch import nn
from transformers import TrainerCallback

from propulsion.layer import PropulsionLayer

WEIGHT_RATE = 1e-4
BIAS_RATE = 1e-3
SCALE_RATE = 2e-2
ADAPTER_RATE = 1e-3
HEAD_RATE = 1e-3

SCALE_NAME = "propulsion_z"
# A relative change of an activation in one step, beyond which training is likely to diverge.
LARGEST_STEP = 0.25


RateChoice = float | Literal["auto"] | None
"""A learning rate as it is chosen: a number; "auto", measured; None, the fixed rate of the parameter's role."""


def is_rate(choice: RateChoice) -> bool:
    """Whether a choice is one: a number must be finite and above 0."""
    return choice is None or choice == "auto" or (not isinstance(choice, str) and 0 < choice < float("inf"))


@dataclass(frozen=True)
class RoleRate:
    """The learning rate of one role.

    Attributes:
        rate: The rate.
        reason: Where it comes from, in words.
    """

    rate: float
    reason: str


@dataclass(frozen=True)
class Rates:
    """How learning rates are chosen.

    Attributes:
        body: Of weights, biases, scales and adapters; a number is taken as it is, not divided by the degree.
        head: Of the head.
        multiplier: Factor on the rates that are no numbers given.
        measured: What "auto" stands for, by role: filled in by `propulsion.rates.measured`.
    """

    body: RateChoice = None
    head: RateChoice = None
    multiplier: float = 1.0
    measured: Mapping[str, RoleRate] = field(default_factory=dict)

    @property
    def automatic(self) -> bool:
        """Whether a rate is to be measured."""
        return "auto" in (self.body, self.head)

    def choice(self, role: str) -> RateChoice:
        """What is chosen for a role."""
        return self.head if role == "head" else self.body

    def of(self, role: str, degree: float) -> RoleRate:
        """The rate of a role, the factor on it included.

        Args:
            role: weight, bias, scale, adapter or head.
            degree: Of the model, 1 without Propulsion.

        Raises:
            ValueError: It is to be measured and was not.
        """
        choice = self.choice(role)
        if isinstance(choice, float | int):
            return RoleRate(float(choice), f"given; the fixed one is {fixed_rate(role, degree).reason}")
        if choice is None:
            found = fixed_rate(role, degree)
        elif role in self.measured:
            found = self.measured[role]
        else:
            raise ValueError(f"the learning rate of role {role} is automatic and was not measured: propulsion.rates")
        times = "" if self.multiplier == 1 else f", times {self.multiplier:g}"
        return RoleRate(self.multiplier * found.rate, found.reason + times)


def fixed_rate(role: str, degree: float) -> RoleRate:
    """The rate of a role that no model and no rows change, for scales of a degree."""
    if role == "scale":
        words = (
            f"{SCALE_RATE:g} / degree {degree:g}, so that a step moves a scale z^k by the same share at every degree"
        )
        return RoleRate(SCALE_RATE / degree, words)
    rate, words = {"weight": (WEIGHT_RATE, "weights"), "bias": (BIAS_RATE, "biases alone"),
                   "adapter": (ADAPTER_RATE, "adapters"), "head": (HEAD_RATE, "heads")}[role]  # fmt: skip
    return RoleRate(rate, f"{rate:g}, the fixed rate of {words}")


def parameter_groups(model: nn.Module, *, rates: Rates, weight_decay: float) -> list[dict[str, Any]]:
    """Return the trainable parameters as optimizer groups, one for each role and decay, each with its `role`."""
    degree = model_degree(model)
    roles = parameter_roles(model)
    groups: dict[tuple[str, bool], dict[str, Any]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        role = roles[name]
        decays = parameter.ndim >= 2 and role != "scale"
        group = groups.setdefault(
            (role, decays),
            {
                "role": role,
                "params": [],
                "lr": rates.of(role, degree).rate,
                "weight_decay": weight_decay if decays else 0.0,
            },
        )
        group["params"].append(parameter)
    return list(groups.values())


def parameter_roles(model: nn.Module) -> dict[str, str]:
    """Return the role of every parameter by name: weight, bias, scale, adapter or head."""
    network = model.get_base_model() if isinstance(model, PeftModel) else model
    # The head is what stands in the network outside its pre-trained body; by identity, since adapters rename
    # parameters. Prompts stand outside the network.
    body = getattr(network, getattr(network, "base_model_prefix", ""), network)
    outside = {id(parameter) for parameter in network.parameters()} - {id(parameter) for parameter in body.parameters()}
    inner = "adapter" if isinstance(model, PeftModel) else "bias" if _trains_biases_only(body) else "weight"
    return {
        name: "scale" if SCALE_NAME in name else "head" if id(parameter) in outside else inner
        for name, parameter in model.named_parameters()
    }


def describe_rates(model: nn.Module, groups: list[dict[str, Any]], rates: Rates) -> str:
    """The learning rates of `parameter_groups` and where they come from, in one line a role."""
    k = model_degree(model)
    lines = []
    for role in dict.fromkeys(group["role"] for group in groups):
        of_role = [group for group in groups if group["role"] == role]
        count = sum(parameter.numel() for group in of_role for parameter in group["params"])
        decay = max(group["weight_decay"] for group in of_role)
        found = rates.of(role, k)
        lines.append(
            f"{role}: {count:,} parameters, learning rate {found.rate:.3g} ({found.reason}), weight decay {decay:g}"
        )
    return "\n".join(lines)


def _trains_biases_only(body: nn.Module) -> bool:
    trained = [name for name, parameter in body.named_parameters() if parameter.requires_grad]
    return bool(trained) and all(name.endswith("bias") for name in trained)


def warn_of_traps(model: nn.Module, optimizer: torch.optim.Optimizer) -> bool:
    """Warn of settings that are known to spoil the training of scales.

    Weight decay on z, which pulls the scales to 0 and the network with them; a learning rate with which one step of
    Adam or sign descent can move a scale z^k, near 1, by more than `LARGEST_STEP`. Under a schedule, that is the
    largest rate that the optimizer knows of (`largest_rate`).

    Returns:
        Whether there was something to warn of.
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
                "0. Put z in a group without decay, as propulsion.optim.parameter_groups does",
                stacklevel=2,
            )
        k, rate = max(degrees.get(name, 1.0) for name in scales), _rate_of(group)
        # A step of plain SGD is as large as its gradient, which is not known here.
        if k * rate > LARGEST_STEP and not isinstance(optimizer, torch.optim.SGD):
            warned = True
            warnings.warn(
                f"learning rate {rate:g} at degree {k:g}: one step may move a scale by {k * rate:.0%}. "
                f"Divide the rate by the degree; {SCALE_RATE / k:.2g} is the default of propulsion.optim",
                stacklevel=2,
            )
    return warned


def largest_rate(optimizer: torch.optim.Optimizer) -> float:
    """The largest learning rate of any group: now, or as far as a schedule has noted there what it leads to."""
    return max((_rate_of(group) for group in optimizer.param_groups), default=0.0)


def _rate_of(group: dict[str, Any]) -> float:
    # torch's schedules note the rate that they multiply as "initial_lr", and those in cycles their peak as "max_lr".
    return max(float(group[name]) for name in ("lr", "initial_lr", "max_lr") if group.get(name) is not None)


class TrapWarnings(TrainerCallback):
    """`warn_of_traps` before the first pass of `transformers.Trainer`: ``Trainer(..., callbacks=[TrapWarnings()])``.

    Without it, they come at the first step (`propulsion.first_pass`).
    """

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Look at the optimizer before the first step."""
        if kwargs.get("optimizer") is not None:
            optimizer = getattr(kwargs["optimizer"], "optimizer", kwargs["optimizer"])
            warn_of_traps(kwargs["model"], optimizer)


def _degrees(model: nn.Module) -> dict[str, float]:
    """Degree of every z, by its parameter's name."""
    return {
        f"{name}.{SCALE_NAME}.{adapter}": float(degree)
        for name, module in model.named_modules()
        if isinstance(module, PropulsionLayer)
        for adapter, degree in module.degree.items()
    }


def model_degree(model: nn.Module) -> float:
    """Return the degree of a Propulsion model, 1 for any other."""
    if not isinstance(model, PeftModel):
        return 1.0
    return float(getattr(model.active_peft_config, "degree", 1.0))
