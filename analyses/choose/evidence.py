"""Measurements of a candidate for the predictors: gradients at the start, features after training, kernels."""

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from sklearn.linear_model import LogisticRegression, Ridge
from torch import Tensor, nn
from transformers import TrainerCallback

import ntk
from analyses.subjects.batch import model_inputs
from analyses.subjects.trained_methods import SUPPORTED, tangents, with_head
from analyses.subjects.training_run import RunConfig
from propulsion.data import TaskData
from propulsion.data.kinds import Limits
from propulsion.data.kinds.base import columns_of, evaluating
from propulsion.data.kinds.classification import logits
from propulsion.errors import UserError
from propulsion.heads import head_modules
from propulsion.methods import Method, apply_method
from propulsion.training.learning_rates import parameter_roles
from propulsion.training.trainer import isolated_randomness

FULL = "full"
"""The candidate whose kernel the others are compared with."""
_ROWS = 32  # Training rows of the gradient at the start.


class Start(TrainerCallback):
    """Measures a model that is ready for training, before its first step.

    Attributes:
        norm: Euclidean norm of the gradient of the mean loss over some training rows, of all that is trained.
        slopes: By role, the sum of the absolute values of that gradient.
        trained: What is trained besides the head, in words.
    """

    def __init__(self, data: TaskData, tokenizer: Any, max_length: int | None) -> None:
        rows = data.train.select(range(min(_ROWS, len(data.train))))
        self._inputs = model_inputs(rows, tokenizer, data.task, max_length=max_length)
        self._labels = torch.tensor(list(rows[data.task.label_column]))
        self.norm, self.slopes, self.trained = 0.0, dict[str, float](), ""

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Take one backward pass, without dropout; the model is left as it was."""
        model = kwargs["model"]
        device = next(model.parameters()).device
        inputs = {name: value.to(device) for name, value in self._inputs.items()}
        with isolated_randomness(), evaluating(model), torch.enable_grad():
            loss = model(**inputs, labels=self._labels.to(device)).loss
            named = {name: p for name, p in model.named_parameters() if p.requires_grad}
            found = torch.autograd.grad(loss, list(named.values()), allow_unused=True, materialize_grads=True)
        roles = parameter_roles(model)
        gradients = {name: g.detach().double() for name, g in zip(named, found)}
        self.norm = float(sum(g.square().sum() for g in gradients.values())) ** 0.5
        for name, g in gradients.items():
            self.slopes[roles[name]] = self.slopes.get(roles[name], 0.0) + float(g.abs().sum())
        self.trained = trained_in_words(model)


def trained_in_words(model: nn.Module) -> str:
    """The layers that a model ready for training adapts, by the last part of their names, or what it trains of itself.

    The head, which all methods train, is not named.
    """
    adapted = [name for name, module in model.named_modules() if isinstance(module, BaseTunerLayer)]
    if adapted:
        return ", ".join(dict.fromkeys(name.rpartition(".")[2] for name in adapted))
    roles = parameter_roles(model)
    trained = [name for name, p in model.named_parameters() if p.requires_grad and roles[name] != "head"]
    if not trained:
        return "the head alone"
    every = [name for name, _ in model.named_parameters() if roles[name] != "head"]
    if len(trained) == len(every):
        return "all weights"
    return "all biases" if all(name.endswith("bias") for name in trained) else "prompts"


def head_layer(model: Any, num_labels: int) -> nn.Linear | None:
    """The linear layer of a model's head whose outputs are the logits; None if there is none."""
    network = model.get_base_model() if hasattr(model, "get_base_model") else model
    layers = [
        layer for name in head_modules(network) for layer in network.get_submodule(name).modules()
        if isinstance(layer, nn.Linear) and layer.out_features == num_labels
    ]  # fmt: skip
    if not layers:
        return None
    # With an adapter that saves the head, the last copy is the one in use.
    return layers[-1]


@contextmanager
def _recorded(layer: nn.Module) -> Iterator[list[Tensor]]:
    """The inputs of a layer in the calls within the block."""
    seen: list[Tensor] = []
    handle = layer.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0].detach().float().cpu()))
    try:
        yield seen
    finally:
        handle.remove()


def features_of(
    model: Any, tokenizer: Any, data: TaskData, rows: Any, max_length: int | None
) -> tuple[np.ndarray, np.ndarray] | None:
    """Features ``(n, h)`` that the head's last layer reads, and outputs ``(n, c)``; None if it reads other than one
    vector a row."""
    layer = head_layer(model, data.task.num_labels)
    if layer is None:
        return None
    with _recorded(layer) as seen:
        outputs = logits(model, tokenizer, data.task, columns_of(rows), Limits(max_length))
    if not seen or any(part.ndim != 2 for part in seen) or sum(map(len, seen)) != len(rows):
        return None
    return torch.cat(seen).numpy(), np.asarray(outputs)


def probe(features: np.ndarray, labels: np.ndarray, layer: nn.Linear, *, regression: bool) -> None:
    """Train a linear layer on frozen features by logistic or ridge regression, in place."""
    c, h = layer.weight.shape
    weight, bias = np.zeros((c, h)), np.zeros(c)
    if regression:
        fitted: Any = Ridge(alpha=1.0).fit(features, labels)
        weight[0], bias[0] = fitted.coef_, fitted.intercept_
    else:
        fitted = LogisticRegression(max_iter=1000).fit(features, labels)
        own, intercept = fitted.coef_, fitted.intercept_
        if len(fitted.classes_) == 2:  # One vector tells two classes apart; half of it is added, half subtracted.
            own, intercept = np.concatenate([-own, own]) / 2, np.concatenate([-intercept, intercept]) / 2
        weight[fitted.classes_], bias[fitted.classes_] = own, intercept
    with torch.no_grad():
        layer.weight.copy_(torch.from_numpy(weight))
        if layer.bias is not None:
            layer.bias.copy_(torch.from_numpy(bias))


def kernels_of(
    config: RunConfig, data: TaskData, methods: Mapping[str, Method], n: int, seed: int, *, probed: bool = True
) -> dict[str, np.ndarray]:
    """Kernels ``(n, n, c, c)`` of the candidates before training, of all that they train.

    Those of the methods that `analyses.subjects.trained_methods` describes come from one stream of features, those of
    other adapters (VeRA, DoRA, tuned norms and so on) from the adapted model itself, in a pass of their own. Methods of
    virtual tokens have none. The head is trained on frozen features of the other training rows, since its outputs on
    rows that it was trained on are too good.

    Args:
        config: Options of the runs.
        data: The rows; kernels are of the first n training rows.
        methods: The candidates.
        n: Number of rows, fewer than there are.
        seed: Seed of the model's head and of the methods.
        probed: Whether the head is trained on frozen features first; otherwise it is the random one.

    Returns:
        "kernel.CANDIDATE" for each, "outputs" ``(n, c)``, "labels" ``(n,)``; empty if the model's head is not linear,
        or the other rows are of one class.
    """
    model, tokenizer = config.start(data, seed=seed)
    length = config.training.max_length
    others = data.train.select(range(n, len(data.train)))
    found = features_of(model, tokenizer, data, others, length)
    layer = head_layer(model, data.task.num_labels)
    labels = np.asarray(others[data.task.label_column])
    if found is None or layer is None or len(np.unique(labels)) < 2:
        return {}
    if probed:
        probe(found[0], labels, layer, regression=data.task.is_regression)
    rows = data.train.select(range(n))
    inputs = kernel_rows(config, data, tokenizer, n)
    degree = data.task.degree if config.degree is None else config.degree
    known = supported(model, {FULL: Method(FULL)} | dict(methods), degree=degree, seed=seed)
    of = tangents(model, known, task_type="SEQ_CLS", seed=seed, degree=degree)
    kernels = with_head(ntk.adapter_kernels(model, inputs, of.methods), list(known))
    for name in (name for name in methods if name not in known):
        kernel = _own_pass(model, methods[name].with_defaults(degree=degree), inputs, seed)
        kernels |= {} if kernel is None else {name: kernel}
    outputs = logits(model, tokenizer, data.task, columns_of(rows), Limits(length))
    return {
        "outputs": np.asarray(outputs), "labels": np.asarray(rows[data.task.label_column]),
        **{f"kernel.{name}": kernel.cpu().numpy() for name, kernel in kernels.items()},
    }  # fmt: skip


def kernel_rows(config: RunConfig, data: TaskData, tokenizer: Any, n: int) -> dict[str, Tensor]:
    """Model inputs of the first n training rows, which kernels are of."""
    rows = data.train.select(range(n))
    return model_inputs(rows, tokenizer, data.task, max_length=config.training.max_length, device=config.device)


def supported(model: Any, methods: Mapping[str, Method], *, degree: float, seed: int) -> dict[str, Method]:
    """Those of some methods that `analyses.subjects.trained_methods` describes on a model."""
    found = {}
    for name, method in methods.items():
        if method.name not in SUPPORTED:
            continue
        try:
            tangents(model, {name: method}, task_type="SEQ_CLS", seed=seed, degree=degree)
        except UserError:
            continue
        found[name] = method
    return found


def has_own_pass(method: Method) -> bool:
    """Whether the kernel of a method takes a pass of its own, as far as its name and options tell."""
    return method.name not in SUPPORTED or bool(method.options.get("use_dora"))


def _own_pass(model: Any, method: Method, inputs: Mapping[str, Tensor], seed: int) -> Tensor | None:
    """The kernel of a method at its initialisation, from the adapted model; None if there is none."""
    try:
        adapted = apply_method(copy.deepcopy(model), method, task_type="SEQ_CLS", seed=seed)
    except UserError:
        return None
    return kernel_when_trained(adapted, inputs)


def kernel_when_trained(model: Any, inputs: Mapping[str, Tensor]) -> Float[Tensor, "n n c c"] | None:
    """The kernel of all that a model trains, head included, at its present weights; None with virtual tokens.

    Virtual tokens stand before every text, which kernels of padded batches do not allow for.
    """
    if isinstance(model, PeftModel) and model.active_peft_config.is_prompt_learning:
        return None
    return ntk.empirical_ntk(model, inputs, params="trainable")


def mean_of_last(losses: Sequence[float]) -> float:
    """The mean of the last quarter of some losses."""
    return float(np.mean(losses[-max(1, len(losses) // 4) :]))
