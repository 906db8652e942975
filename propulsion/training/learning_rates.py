"""The learning rate and weight decay of each parameter.

By default the rate of each role is measured on the model and its training rows
(`propulsion.training.measured_rates`). There is also a fixed rate for each role, independent of model and rows:

    weight   a pre-trained weight, trained directly        WEIGHT_RATE
    bias     a pre-trained bias, where only biases train   BIAS_RATE
    scale    Propulsion's z, acting as z**k                SCALE_RATE / k
    adapter  any other parameter that a method adds        ADAPTER_RATE
    head     the task's head, which starts at random       HEAD_RATE

The learning rate sets the size of a step of AdamW, whatever the scale of the gradient. A step of size r on z, near
z = 1, moves the multiplier z**k by about k*r; dividing by the degree therefore makes SCALE_RATE the relative change of
an activation per step, the same for every degree.

Weight decay pulls towards 0. It applies to matrices, and not to biases and norms, as is customary, nor to z, whose
neutral value is 1.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from peft import PeftModel
from torch import nn

from propulsion.training_checks import SCALE_NAME, SCALE_RATE

WEIGHT_RATE = 1e-4
BIAS_RATE = 1e-3
ADAPTER_RATE = 1e-3
HEAD_RATE = 1e-3

RateChoice = float | Literal["auto"] | None
"""How a learning rate is chosen: a number; "auto", measured; None, the fixed rate of the parameter's role."""


def is_rate(choice: RateChoice) -> bool:
    """Whether a choice is valid: auto, None, or a finite number above 0."""
    return choice is None or choice == "auto" or (not isinstance(choice, str) and 0 < choice < float("inf"))


@dataclass(frozen=True)
class RoleRate:
    """The learning rate of one role.

    Attributes:
        rate: The rate.
        reason: A sentence on how it was chosen.
    """

    rate: float
    reason: str


@dataclass(frozen=True)
class Rates:
    """How learning rates are chosen.

    Attributes:
        body: Choice for weights, biases, scales and adapters. A number is used as it is, not divided by the degree.
        head: Choice for the head.
        multiplier: Factor on the rates that are not given as numbers.
        measured: The rates for "auto", by role (`propulsion.training.measured_rates`).
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
        """The choice for a role."""
        return self.head if role == "head" else self.body

    def of(self, role: str, degree: float) -> RoleRate:
        """The rate of a role, times the multiplier, in a model of this degree (1 without Propulsion).

        Raises:
            ValueError: The rate is automatic and was not measured.
        """
        choice = self.choice(role)
        if isinstance(choice, float | int):
            return RoleRate(float(choice), f"given; the fixed one is {fixed_rate(role, degree).reason}")
        if choice is None:
            rate = fixed_rate(role, degree)
        elif role in self.measured:
            rate = self.measured[role]
        else:
            raise ValueError(f"the learning rate of role {role} is automatic and was not measured: call with_measured")
        times = "" if self.multiplier == 1 else f", times {self.multiplier:g}"
        return RoleRate(self.multiplier * rate.rate, rate.reason + times)


def fixed_rate(role: str, degree: float) -> RoleRate:
    """The fixed rate of a role; that of scales is divided by the degree."""
    if role == "scale":
        reason = "so that a step moves a scale z^k by the same share at every degree"
        return RoleRate(SCALE_RATE / degree, f"{SCALE_RATE:g} / degree {degree:g}, {reason}")
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
        options = {"lr": rates.of(role, degree).rate, "weight_decay": weight_decay if decays else 0.0}
        groups.setdefault((role, decays), {"role": role, "params": [], **options})["params"].append(parameter)
    return list(groups.values())


def parameter_roles(model: nn.Module) -> dict[str, str]:
    """Return the role of every parameter by name: weight, bias, scale, adapter or head."""
    network = model.get_base_model() if isinstance(model, PeftModel) else model
    # The head is the part of the network outside its pre-trained body, found by identity, since adapters rename
    # parameters. Prompts are outside the network.
    body = getattr(network, getattr(network, "base_model_prefix", ""), network)
    outside = {id(parameter) for parameter in network.parameters()} - {id(parameter) for parameter in body.parameters()}
    inner = "adapter" if isinstance(model, PeftModel) else "bias" if _trains_biases_only(body) else "weight"
    return {
        name: "scale" if SCALE_NAME in name else "head" if id(parameter) in outside else inner
        for name, parameter in model.named_parameters()
    }


def describe_rates(model: nn.Module, groups: list[dict[str, Any]], rates: Rates) -> str:
    """The learning rates of `parameter_groups` and how they were chosen, one line for each role."""
    k = model_degree(model)
    lines = []
    for role in dict.fromkeys(group["role"] for group in groups):
        of_role = [group for group in groups if group["role"] == role]
        count = sum(parameter.numel() for group in of_role for parameter in group["params"])
        decay = max(group["weight_decay"] for group in of_role)
        rate = rates.of(role, k)
        lines.append(
            f"{role}: {count:,} parameters, learning rate {rate.rate:.3g} ({rate.reason}), weight decay {decay:g}"
        )
    return "\n".join(lines)


def _trains_biases_only(body: nn.Module) -> bool:
    trained = [name for name, parameter in body.named_parameters() if parameter.requires_grad]
    return bool(trained) and all(name.endswith("bias") for name in trained)


def model_degree(model: nn.Module) -> float:
    """Return the degree of a Propulsion model, 1 for any other."""
    if not isinstance(model, PeftModel):
        return 1.0
    return float(getattr(model.active_peft_config, "degree", 1.0))
