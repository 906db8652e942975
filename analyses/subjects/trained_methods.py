"""Descriptions for `ntk` of the fine-tuning methods that `propulsion.methods` trains.

A method is applied to a copy of the model as in training. The layers, degree and LoRA matrices are then read from the
copy, so that `ntk.adapter_kernels` computes the kernel of the network that training would start from. A new head is
trained along with every method; it has a kernel of its own, which is added to that of the method.
"""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from peft.tuners.ia3 import IA3Layer
from peft.tuners.lora import LoraLayer
from torch import Tensor

import ntk
from analyses.subjects.parameters import SelectedParameters, backbone_prefix, is_backbone
from ntk import adapters
from propulsion.data.tasks import Task
from propulsion.errors import UserError
from propulsion.heads import HEADED
from propulsion.layer import PropulsionLayer
from propulsion.methods import Method, apply_method
from propulsion.training.learning_rates import Rates, parameter_groups

HEAD = "head"
"""Name of the kernel of the head, and of the method that trains the head alone."""
SUPPORTED = ("full", "propulsion", "lora", "bitfit", "ia3", HEAD)


@dataclass(frozen=True)
class Tangents:
    """The arguments of `ntk.adapter_kernels` for some methods on one model.

    Attributes:
        methods: By its text, each method without the head; under "head", the head if it is new.
        rates: By method, the learning rates of its two parts, "body" and "head", that
            `propulsion.training.learning_rates` sets.
    """

    methods: dict[str, adapters.Method]
    rates: dict[str, dict[str, float]]


def tangents(
    model: Any, methods: Mapping[str, Method], *, task_type: str, seed: int = 0, degree: float | None = None
) -> Tangents:
    """Apply each method to a copy of the model and describe what it trains.

    Args:
        model: The pre-trained model with its head; not changed.
        methods: Methods by their text.
        task_type: peft's name of the task type.
        seed: Seed of the parameters that a method draws at random.
        degree: Propulsion's degree where a method does not name one.

    Raises:
        UserError: A method has no tangent kernel here, or cannot be applied.
    """
    headed = task_type in HEADED
    found: dict[str, adapters.Method] = {}
    rates = {}
    for text, method in methods.items():
        if method.name not in SUPPORTED or (method.name == HEAD and not headed):
            known = ", ".join(SUPPORTED if headed else SUPPORTED[:-1])
            raise UserError(f"method {text} has no tangent kernel here; those that have: {known}")
        options = {} if degree is None else {"degree": degree}
        trained = apply_method(copy.deepcopy(model), method.with_defaults(**options), task_type=task_type, seed=seed)
        groups = parameter_groups(trained, rates=Rates(), weight_decay=0.0)
        by_role = {HEAD if group["role"] == HEAD else "body": group["lr"] for group in groups}
        rates[text] = by_role
        if method.name != HEAD:
            found[text] = adapters.Backbone(
                _adapter(text, method, model, trained), backbone_prefix(model) if headed else ""
            )
    if headed:
        found[HEAD] = SelectedParameters(lambda name, parameter: not is_backbone(model, name))
    return Tangents(found, rates)


def with_head(
    kernels: Mapping[str, Tensor], texts: Sequence[str], rates: Mapping[str, Mapping[str, float]] | None = None
) -> dict[str, Tensor]:
    """The kernel of each method plus that of the head, if there is a head.

    Args:
        kernels: Kernels of the methods of `tangents`, by name.
        texts: The methods to return, by their text.
        rates: If given, the head's kernel is multiplied by the head's learning rate over the method's own; else by 1.
    """
    head = kernels.get(HEAD)
    found = {}
    for text in texts:
        found[text] = kernels[text]
        if head is not None and text != HEAD:
            weight = 1.0 if rates is None else rates[text][HEAD] / rates[text]["body"]
            found[text] = kernels[text] + weight * head
    return found


def check_influence(kernels: Mapping[str, Tensor]) -> None:
    """Check that what each kernel is of influences the outputs, so that shares and ridges relative to it are defined.

    Raises:
        UserError: A kernel has trace 0.
    """
    for name, kernel in kernels.items():
        if not kernel.diagonal().any():
            raise UserError(
                f"the kernel of {name} is zero on these rows: its parameters do not influence the outputs, and nothing "
                "can be said relative to it; leave it out, or take another model"
            )


def _adapter(text: str, method: Method, model: Any, trained: Any) -> adapters.Method:
    """The method of `ntk.adapters` that corresponds to the adapted layers of a trained model."""
    if method.name == "full":
        return adapters.Full()
    if method.name == "bitfit":
        return adapters.BitFit()
    kinds = (LoraLayer, IA3Layer, PropulsionLayer)
    layers: dict[str, Any] = {n: m for n, m in trained.get_base_model().named_modules() if isinstance(m, kinds)}
    adaptable = adapters.layers_of(model)
    if outside := [name for name in layers if name not in adaptable]:
        raise UserError(
            f"method {text} adapts {outside[0]}, outside the model's body, where it has no tangent kernel here; leave "
            f"it out, as by exclude_modules={outside[0]}+"
        )
    if method.name == "lora":
        settings = {(m.r["default"], m.scaling["default"], bool(m.use_dora["default"])) for m in layers.values()}
        rank, scaling, dora = next(iter(settings))
        if len(settings) > 1 or dora or any(m.lora_B["default"].weight.any() for m in layers.values()):
            raise UserError(f"method {text}: only plain LoRA of one rank, at B = 0, has a tangent kernel here")
        a = {name: m.lora_A["default"].weight.detach() for name, m in layers.items()}
        return adapters.LoRA(rank=rank, alpha=scaling * rank, modules=list(a).__contains__, a=a)
    if method.name == "propulsion":
        degrees = {m.degree["default"] for m in layers.values()}
        ones = all((z.ndim == 1) and bool((z == 1).all()) for m in layers.values() for z in m.propulsion_z.values())
        if len(degrees) > 1 or not ones:
            raise UserError(f"method {text}: only one degree, and one vector a layer at z = 1, has a kernel here")
        seed = next(m.basis["default"] for m in layers.values())  # one configuration, one basis
        basis = {} if seed is None else {"basis": "rotated", "seed": seed}
        return adapters.Propulsion(degrees.pop(), list(layers).__contains__, **basis)
    inputs = [name for name, m in layers.items() if m.is_feedforward]
    outputs = [name for name in layers if name not in inputs]
    return adapters.IA3(outputs.__contains__, inputs.__contains__)


def one_output(task: Task) -> ntk.outputs.Output | None:
    """The single output of a task whose kernel describes training; None where the task has several outputs.

    For two classes it is the difference of the logits. The cross-entropy depends on this difference alone, so that its
    gradient flow is exactly that of this single output.
    """
    return ntk.outputs.logits if task.is_regression else ntk.outputs.margin() if task.num_labels == 2 else None
