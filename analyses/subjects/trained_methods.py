"""The tangent kernels of methods of fine-tuning, as `propulsion.methods` trains them.

A method is applied to a copy of the model as training would apply it, and what it adapts there (layers, degree, LoRA's
very matrices) is read off, so that `ntk.adapter_kernels` gives the kernel of the network that will be trained. The
task's head, where it is new, is trained beside every method, and has a kernel of its own to be added.
"""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from peft.tuners.ia3 import IA3Layer
from peft.tuners.lora import LoraLayer
from torch import Tensor

import ntk
from analyses.subjects.parameters import Backbone, SelectedParameters, backbone_prefix, is_backbone
from ntk import adapters
from propulsion.data.tasks import Task
from propulsion.errors import UserError
from propulsion.heads import HEADED
from propulsion.layer import PropulsionLayer
from propulsion.methods import Method, apply_method
from propulsion.training.learning_rates import Rates, parameter_groups

HEAD = "head"
"""The head's own kernel, and the method that trains nothing else."""
SUPPORTED = ("full", "propulsion", "lora", "bitfit", "ia3", HEAD)


@dataclass(frozen=True)
class Tangents:
    """What `ntk.adapter_kernels` needs for some methods on one model.

    Attributes:
        methods: method by its text, without the head; and, under "head", the head where it is new.
        rates: by method, the learning rates of its two parts, "body" and "head", under the rule of
            `propulsion.training.learning_rates`.
    """

    methods: dict[str, adapters.Method]
    rates: dict[str, dict[str, float]]


def tangents(
    model: Any, methods: Mapping[str, Method], *, task_type: str, seed: int = 0, degree: float | None = None
) -> Tangents:
    """Read off what each method trains.

    Args:
        model: the pre-trained model with its head; not changed.
        methods: by their text.
        task_type: peft's name of the task.
        seed: of what methods draw themselves.
        degree: of Propulsion, where a method does not name one.

    Raises:
        UserError: a method that has no kernel here, or cannot be applied.
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
            found[text] = Backbone(_adapter(text, method, model, trained), backbone_prefix(model) if headed else "")
    if headed:
        found[HEAD] = SelectedParameters(lambda name, parameter: not is_backbone(model, name))
    return Tangents(found, rates)


def with_head(
    kernels: Mapping[str, Tensor], texts: Sequence[str], rates: Mapping[str, Mapping[str, float]] | None = None
) -> dict[str, Tensor]:
    """Each method's kernel with the head's beside it, as far as there is one.

    Args:
        kernels: of the methods of `tangents`.
        texts: methods wanted.
        rates: weigh the two parts by their learning rates, of which the method's own counts as 1; equal if None.
    """
    head = kernels.get(HEAD)
    found = {}
    for text in texts:
        found[text] = kernels[text]
        if head is not None and text != HEAD:
            weight = 1.0 if rates is None else rates[text][HEAD] / rates[text]["body"]
            found[text] = kernels[text] + weight * head
    return found


def _adapter(text: str, method: Method, model: Any, trained: Any) -> adapters.Method:
    """The method of `ntk.adapters` that a trained model's layers say."""
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
        return adapters.Propulsion(degrees.pop(), list(layers).__contains__)
    inputs = [name for name, m in layers.items() if m.is_feedforward]
    outputs = [name for name in layers if name not in inputs]
    return adapters.IA3(outputs.__contains__, inputs.__contains__)


def one_output(task: Task) -> ntk.outputs.Output | None:
    """What a kernel of one output differentiates; None where the task has several.

    For two classes it is the difference of the logits: their cross-entropy depends on nothing else, so that a network's
    gradient flow on it is that of this one output, exactly.
    """
    return ntk.outputs.logits if task.is_regression else ntk.outputs.margin() if task.num_labels == 2 else None
