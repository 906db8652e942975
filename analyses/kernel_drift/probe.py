"""A training callback that measures, at chosen steps, how far a network has changed since the start.

It measures on held-out examples: the tangent kernel of the parameters that the method trains in the backbone; the
outputs of the network and of its linearisation at the initial parameters; and, on the first few examples, the distance
of the Jacobian from the initial one. Jacobians are computed one example at a time, at the initial and at the present
parameters, so that at most four are in memory at once.
"""

import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from peft import PeftModel
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import TrainerCallback

import ntk
from analyses.subjects.parameters import is_backbone
from ntk.dynamics import Linearized
from ntk.functional import evaluation, select_parameters
from ntk.inputs import Group, batch_size, group_examples, one_by_one, pad_together, padding_token
from ntk.reference import Jacobian, jacobian_function
from propulsion.errors import UserError
from propulsion.training.trainer import isolated_randomness

Values = dict[str, Tensor]

# The fixed cost of a batch, expressed as a number of tokens, by which lengths are grouped.
_OVERHEAD = 48


def own_parameters(model: Any) -> list[str]:
    """Names of the parameters that a method trains in the backbone, which are all except the head.

    Raises:
        UserError: The method trains nothing in the backbone.
    """
    wrapped = isinstance(model, PeftModel)
    own = [name for name, p in model.named_parameters() if p.requires_grad
           and (".modules_to_save." not in name if wrapped else is_backbone(model, name))]  # fmt: skip
    if not own:
        raise UserError("a method that trains the head alone has no kernel of its own: leave it out")
    return own


def depth_of(name: str) -> str:
    """The part of the network that a parameter is in, by its name.

    >>> depth_of("bert.encoder.layer.11.output.dense.weight"), depth_of("bert.embeddings.LayerNorm.bias")
    ('layer 11', 'embeddings')
    """
    if found := re.search(r"\.(\d+)\.", name):
        return f"layer {found[1]}"
    return "embeddings" if "embed" in name or ".wte." in name else "after the layers"


def traced_kernel(
    model: Any, inputs: Mapping[str, Tensor], names: Sequence[str], memory_budget: float | None = None
) -> Tensor:
    """The tangent kernel ``(n, n)`` over the named parameters, traced over the outputs, on the CPU."""
    chosen = frozenset(names)
    kernel = ntk.empirical_ntk(model, inputs, params=lambda name, p: name in chosen, reduce="trace",
                               memory_budget=memory_budget)  # fmt: skip
    return kernel.cpu()


def trained_values(model: nn.Module) -> Values:
    """Copies of all trained parameters, including the head, by name."""
    return {name: p.clone() for name, p in select_parameters(model, "trainable").items()}


@contextmanager
def parameters_at(model: nn.Module, values: Values) -> Iterator[None]:
    """Give some parameters of the model other values within the context. No tensor is copied."""
    swapped = [(p, p.data, values[name]) for name, p in model.named_parameters() if name in values]
    try:
        for p, _, other in swapped:
            p.data = other
        yield
    finally:
        for p, own, _ in swapped:
            p.data = own


def relative_movement(model: nn.Module, start: Values, names: Sequence[str]) -> float:
    """|theta_t - theta_0| / |theta_0|, where theta is all named parameters together."""
    now = select_parameters(model, "trainable")
    moved = sum(float((now[name] - start[name]).square().sum()) for name in names)
    return (moved / sum(float(start[name].square().sum()) for name in names)) ** 0.5


def batched_outputs(model: nn.Module, inputs: Mapping[str, Tensor], function: Callable[..., Tensor]) -> Tensor:
    """Outputs ``(n, c)`` of a function that is called like the model, in evaluation mode; batches have like lengths."""
    padding = padding_token(model)
    groups = group_examples(inputs)
    groups = groups if padding is None else pad_together(groups, padding, overhead=_OVERHEAD)
    found: dict[int, Tensor] = {}
    # Only the plain implementation of attention has forward-mode derivatives.
    with evaluation(model), sdpa_kernel(SDPBackend.MATH):
        for group in groups:
            values = function(**group.batched, **group.constant).detach().cpu()
            found.update(zip(group.indices, values, strict=True))
    return torch.stack([found[i] for i in range(batch_size(inputs))])


# --- Jacobians ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Block:
    """A few entries of the Jacobian to be shown one by one: the first entries of one parameter tensor, flattened.

    Attributes:
        parameter: Name of the parameter tensor.
        size: Number of entries of the tensor.
        width: Number of entries that are shown.
    """

    parameter: str
    size: int
    width: int

    @classmethod
    def choose(cls, model: nn.Module, names: Sequence[str], module: str, width: int) -> "Block":
        """The smallest tensor in the last module of that name; the last named parameter if no module has that name.

        Of several smallest tensors the last is taken: for LoRA that is B, since the gradient of A is 0 while B is 0.
        """
        inside = [name for name in names if f".{module}." in name] or [names[-1]]
        stem = inside[-1].partition(f".{module}.")[0]
        sizes = {name: p.numel() for name, p in model.named_parameters()}
        last = [name for name in inside if name.partition(f".{module}.")[0] == stem]
        parameter = min(reversed(last), key=lambda name: sizes[name])
        return cls(parameter, sizes[parameter], min(width, sizes[parameter]))

    def of(self, jacobian: Jacobian) -> Tensor:
        """The block's entries ``(width,)`` of a Jacobian of one example: derivatives of its last output."""
        return jacobian[self.parameter][0, -1].flatten()[: self.width].cpu()

    def __str__(self) -> str:
        return f"gradient of the last output by {self.parameter}, entries 1 to {self.width} of {self.size:,}"


@dataclass(frozen=True)
class JacobianDrift:
    """Squared Frobenius norms of Jacobians J ``(c, p)`` of m examples, by place in the network, and a block's entries.

    Attributes:
        moved: ``(places, m)``, |J_t(i) - J_0(i)|^2.
        moved_same_head: ``(places, m)``, the same with the initial head: the part that is due to the backbone.
        start: ``(places, m)``, |J_0(i)|^2.
        shifted: ``(places, m)``, |J_t(i) - J_0(i - 1)|^2, for comparison (example 0 is compared with the last).
        block_start: ``(m, width)``, the block's entries of J_0.
        block_now: ``(m, width)``, the block's entries of J_t.
    """

    moved: Tensor
    moved_same_head: Tensor
    start: Tensor
    shifted: Tensor
    block_start: Tensor
    block_now: Tensor


def jacobian_drift(
    model: nn.Module, inputs: Mapping[str, Tensor], start: Values, names: Sequence[str], block: Block
) -> JacobianDrift:
    """Squared distances of the Jacobians of the named parameters from those at the start.

    Cost: three Jacobians for each example, and one more; at most four are in memory.
    """
    head = {name: value for name, value in start.items() if name not in names}
    examples, chosen = one_by_one(group_examples(inputs)), frozenset(names)
    jacobian = jacobian_function(model, None)

    def at(values: Values, example: Group) -> Jacobian:
        """The Jacobian with some parameters at the given values, and all others at their present ones."""
        with parameters_at(model, values), evaluation(model):
            return jacobian(select_parameters(model, lambda name, p: name in chosen), [example])[1]

    def squared(one: Jacobian, other: Jacobian | None = None) -> Tensor:
        """|one - other|^2, or |one|^2 without `other`, by place."""
        found = torch.zeros(len(places), dtype=torch.float64)
        for name, row in rows.items():
            found[row] += float((one[name] if other is None else one[name] - other[name]).square().sum())
        return found

    places = list(dict.fromkeys(depth_of(name) for name in names))
    rows = {name: places.index(depth_of(name)) for name in names}
    found: list[dict[str, Tensor]] = []
    previous = at(start, examples[-1])
    for example in examples:
        before, after = at(start, example), at({}, example)
        entries = {"block_start": block.of(before), "block_now": block.of(after)}
        norms = {"moved": squared(after, before), "shifted": squared(after, previous), "start": squared(before)}
        after = at(head, example)
        found.append(entries | norms | {"moved_same_head": squared(after, before)})
        previous = before
    return JacobianDrift(**{
        name: torch.stack([of[name] for of in found], dim=0 if name.startswith("block") else 1) for name in found[0]
    })  # fmt: skip


# --- the callback ---------------------------------------------------------------------------------------------------


class Probe(TrainerCallback):
    """Measures before the first step and after chosen steps, without changing the training.

    Attributes:
        points: One row for each checkpoint: `step`, `score`, `parameter_drift` and `head_drift`; the last has no score.
        block: The entries of the Jacobian that are kept.
        seconds: Wall time of the measurements.
    """

    def __init__(
        self, steps: Sequence[int], inputs: Mapping[str, Tensor], *, n_jacobians: int, module: str, width: int,
        score: Callable[[Any], float], memory_budget: float | None = None,
    ) -> None:  # fmt: skip
        """Create the callback.

        Args:
            steps: Optimizer steps after which to measure; step 0 is always measured.
            inputs: Held-out examples.
            n_jacobians: Number of examples, the first ones, on which Jacobians are compared.
            module: Name of modules; entries of the Jacobian are kept for the last of these.
            width: Number of these entries.
            score: Evaluates a model; not called after the last step, since the training run evaluates then.
            memory_budget: Bytes for kernels, as in `ntk.empirical_ntk`.
        """
        self._steps, self._inputs, self._score = frozenset(steps), dict(inputs), score
        self._few = {name: value[:n_jacobians] for name, value in inputs.items()}
        self._module, self._width, self._budget = module, width, memory_budget
        # These are set when training begins.
        self._start: Values
        self._linearized: Linearized
        self._own: list[str]
        self.block: Block
        self.points: list[dict[str, float | None]] = []
        self.seconds = 0.0
        self._found: dict[str, list[Tensor]] = {}

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Keep the initial parameters, and measure before the first step."""
        model = kwargs["model"]
        self._own, self._start = own_parameters(model), trained_values(model)
        self.block = Block.choose(model, self._own, self._module, self._width)
        mode = model.training
        self._linearized = Linearized(model, "trainable")
        model.train(mode)
        self._measure(0, model)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Measure after the chosen steps."""
        if state.global_step in self._steps:
            self._measure(state.global_step, kwargs["model"], last=state.global_step == state.max_steps)

    @property
    def places(self) -> list[str]:
        """The parts of the network that the rows of Jacobian norms belong to."""
        return list(dict.fromkeys(depth_of(name) for name in self._own))

    def arrays(self) -> dict[str, np.ndarray]:
        """The measured arrays of all T checkpoints, by name.

        `kernels` ``(T, n, n)``; `outputs` and `linearized` ``(T, n, c)``; and the fields of `JacobianDrift`
        ``(T - 1, ...)``, which are not measured before the first step.
        """
        return {name: torch.stack(values).numpy().astype(np.float32) for name, values in self._found.items()}

    @property
    def own_size(self) -> int:
        """Number of parameters that the kernel covers."""
        return sum(self._start[name].numel() for name in self._own)

    def _measure(self, step: int, model: Any, *, last: bool = False) -> None:
        started = time.time()
        with isolated_randomness():
            score = None if last else self._score(model)
            outputs = batched_outputs(model, self._inputs, lambda **inputs: model(**inputs).logits)
            self._keep(kernels=traced_kernel(model, self._inputs, self._own, self._budget), outputs=outputs)
            if step == 0:
                # At the start the linearisation is exact and the Jacobian has not changed.
                self._keep(linearized=outputs)
            else:
                self._keep(linearized=batched_outputs(model, self._inputs, self._at(model)))
                self._keep(**vars(jacobian_drift(model, self._few, self._start, self._own, self.block)))
        head = [name for name in self._start if name not in self._own]
        moved = {
            "parameter_drift": relative_movement(model, self._start, self._own),
            "head_drift": relative_movement(model, self._start, head) if head else 0.0,
        }
        self.points.append({"step": step, "score": score} | moved)
        self.seconds += time.time() - started

    def _at(self, model: nn.Module) -> Linearized:
        """The linearisation, evaluated at the present change of the parameters."""
        now = select_parameters(model, "trainable")
        with torch.no_grad():
            for name, delta in zip(self._linearized.names, self._linearized.delta, strict=True):
                delta.copy_(now[name] - self._start[name])
        return self._linearized

    def _keep(self, **values: Tensor) -> None:
        for name, value in values.items():
            self._found.setdefault(name, []).append(value)
