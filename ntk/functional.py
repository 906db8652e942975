"""A model as a pure function of its parameters and one group of examples."""

import difflib
import random
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from fnmatch import fnmatchcase
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from ntk import outputs
from ntk.inputs import Group, Inputs, check_devices, check_finite
from ntk.own_state import OwnState, parameter_hooks

Parameters = dict[str, Tensor]
Leaves = dict[str, nn.Parameter]
ParameterChoice = str | Sequence[str] | Callable[[str, nn.Parameter], bool]
"""``"all"``, ``"trainable"``, names or patterns, or a predicate: see :func:`select_parameters`."""

# Kernels of one process are computed one after another: each changes the mode and gradients of its model, and settings
# and random states that torch has once for the whole process. A thread may take the lock again.
_ONE_AT_A_TIME = threading.RLock()


def select_parameters(model: nn.Module, params: ParameterChoice = "all") -> Parameters:
    """The parameters a kernel is taken over, detached, by their name in ``model.named_parameters()``.

    Args:
        model: tied parameters appear once, under their first name, as in ``named_parameters()``.
        params: ``"all"``, ``"trainable"`` (``requires_grad``), a predicate ``(name, parameter) -> bool``, or one or
            several of: the name of a parameter, the name of a module, for all of its parameters, and a pattern of
            such names with ``*`` and ``?`` (:mod:`fnmatch`).

    Raises:
        ValueError: an unknown choice, no selected parameter, a name or pattern that none has, or a selected parameter
            that is not real floating-point.
    """
    choose = _predicate(model, params)
    chosen = {name: p for name, p in model.named_parameters() if choose(name, p)}
    if not chosen:
        raise ValueError(
            f"params={params!r} selects none of the model's parameters; their names are in model.named_parameters()"
        )
    for name, p in chosen.items():
        if p.is_complex():
            raise ValueError(
                f"parameter {name} is complex ({p.dtype}), and kernels are of real parameters: make "
                "torch.view_as_real of it the parameter, or select the others with a predicate"
            )
        if not p.is_floating_point():
            raise ValueError(
                f"parameter {name} has dtype {p.dtype} and no gradient; "
                "select the others with params='trainable' or a predicate"
            )
    return {name: p.detach() for name, p in chosen.items()}


def _predicate(model: nn.Module, params: ParameterChoice) -> Callable[[str, nn.Parameter], bool]:
    """A choice of parameters as a predicate ``(name, parameter) -> bool``."""
    if params == "all":
        return lambda name, p: True
    if params == "trainable":
        return lambda name, p: p.requires_grad
    if callable(params):
        return params
    listed = [params] if isinstance(params, str) else params
    if not isinstance(listed, Sequence) or not all(isinstance(part, str) for part in listed):
        raise ValueError(
            "params must be 'all', 'trainable', names or patterns of parameters, or a predicate (name, parameter) -> "
            f"bool; got {params!r}"
        )
    # Each tensor has all names under which a model registers it, and is chosen by any of them.
    names: dict[int, list[str]] = {}
    for name, p in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(p), []).append(name)
    found: set[int] = set()
    for part in listed:
        own = {key for key, all_names in names.items() if any(_is_named(name, part) for name in all_names)}
        if not own:
            close = difflib.get_close_matches(part, [name for each in names.values() for name in each], cutoff=0.3)
            advice = f"did you mean {', '.join(close)}" if close else "see model.named_parameters()"
            raise ValueError(
                f"params={part!r} is no parameter or module with parameters of the model, and no pattern of their "
                f"names: {advice}"
            )
        found |= own
    return lambda name, p: id(p) in found


def _is_named(name: str, part: str) -> bool:
    """Whether a parameter, or a module that it lies in, has this name or fits this pattern."""
    return name == part or name.startswith(f"{part}.") or fnmatchcase(name, part) or fnmatchcase(name, f"{part}.*")


@contextmanager
def requiring_gradients(model: nn.Module, names: Iterable[str]) -> Iterator[Leaves]:
    """Let only the named parameters require gradients inside the block; restore all flags afterwards."""
    everything = dict(model.named_parameters())
    before = {name: p.requires_grad for name, p in everything.items()}
    chosen = set(names)
    try:
        for name, p in everything.items():
            p.requires_grad_(name in chosen)
        yield {name: p for name, p in everything.items() if name in chosen}
    finally:
        for name, p in everything.items():
            p.requires_grad_(before[name])


def call(
    model: nn.Module, output: outputs.Output | None, inputs: Mapping[str, Any], n: int, params: Parameters | None = None
) -> Tensor:
    """The outputs ``(n, c)`` of a batch of n examples, with ``params`` in place of the model's own.

    Labels are passed to ``output`` but not to the model, which would compute an unused loss; an encoder-decoder gets
    them if it makes its decoder's inputs from them.

    Raises:
        ValueError: the output is not ``(n, c)`` or ``(n,)``, or has no gradient.
    """
    positional: tuple[Any, ...] = ()
    named: Mapping[str, Any] = {}
    given: Any = inputs
    if "" in inputs:  # a plain tensor, the input of a plain module
        given = inputs[""]
        positional = (given,)
    else:
        withheld = () if is_encoder_decoder(model) and "decoder_input_ids" not in inputs else ("labels",)
        named = {key: value for key, value in inputs.items() if key not in withheld}
    result = model(*positional, **named) if params is None else functional_call(model, params, positional, dict(named))
    raw = result if isinstance(result, Tensor) else getattr(result, "logits", None)
    if output is None and n == 1 and isinstance(raw, Tensor) and raw.ndim < 2:
        value = raw  # a head that squeezes its output loses the axis of a single example
    else:
        value = (output or outputs.logits)(result, given)
    if isinstance(value, Tensor) and n == 1 and value.ndim < 2:
        value = value.reshape(1, -1)
    if not isinstance(value, Tensor) or value.ndim not in (1, 2) or value.shape[0] != n:
        got = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
        raise ValueError(f"output must return a tensor (n, c) for n examples; for {n} it returned {got}")
    if not value.is_floating_point():
        raise ValueError(f"output must be real and floating-point to have a gradient; got {value.dtype}")
    return value.reshape(n, -1)


def fresh(inputs: Any) -> Any:
    """Copies of all tensors and arrays, since a model may write into its inputs; ``requires_grad`` is kept."""

    def copy(value: Any) -> Any:
        if isinstance(value, np.ndarray):
            return value.copy()
        if not isinstance(value, Tensor):
            return value
        copied = value.detach().clone()
        return copied.requires_grad_() if value.requires_grad else copied

    return tree_map(copy, inputs)


def batch_of(group: Group) -> dict[str, Any]:
    """The group as one batch of fresh tensors, with a row for each example in masks that the examples share."""
    return fresh(group.batched | group.repeated())


def is_encoder_decoder(model: nn.Module) -> bool:
    """Whether a Hugging Face configuration says that the model has an encoder and a decoder."""
    return bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))


def first_line(error: Exception) -> str:
    """The type of an exception and the first sentence of its message."""
    words = str(error).strip().partition("\n")[0].partition(". ")[0]
    return f"{type(error).__name__}: {words}"


class RandomNumbers(ValueError):
    """The model draws random numbers in evaluation mode."""

    def __init__(self) -> None:
        super().__init__(
            "the model draws random numbers in evaluation mode, so it has no tangent kernel; "
            "switch its noise off (dropout written with training=True is the usual cause)"
        )


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode, without the fused path of attention and without compilation; every module's mode is restored.

    Other threads wait at this place until the block is done.
    """
    with _ONE_AT_A_TIME:
        yield from _evaluating(model)


def _evaluating(model: nn.Module) -> Iterator[None]:
    modes = {module: module.training for module in model.modules()}
    fast = torch.backends.mha.get_fastpath_enabled()
    # torch._dynamo takes seconds to import, and nothing is compiled unless it is imported already.
    stance = torch.compiler.set_stance("force_eager") if "torch._dynamo" in sys.modules else nullcontext()
    with stance:
        try:
            torch.backends.mha.set_fastpath_enabled(False)
            model.eval()
            yield
        finally:
            torch.backends.mha.set_fastpath_enabled(fast)
            for module, mode in modes.items():
                module.training = mode


@contextmanager
def evaluation(model: nn.Module, *batches: Inputs | None) -> Iterator[None]:
    """Evaluation mode without recording gradients; the model is restored at the end, also after an error.

    Each pass starts from the model's state at entry (:mod:`ntk.own_state`). Compiled models run uncompiled;
    attention does not use its fused kernels, which lack some derivatives; hooks on parameters' gradients do not run.
    It works inside of ``torch.inference_mode`` too. Memory: a copy of the buffers.

    Other threads that compute a kernel wait until the block is done. Meanwhile they may draw random numbers, but must
    not call, train or change this model.

    Raises:
        ValueError: a batch is on another device than the model, or not finite; the model was made in inference mode;
            the block drew random numbers or changed a parameter or buffer, so that the outputs are not a function of
            parameters and inputs.
    """
    check_devices(model, batches)
    check_finite(batches)
    _check_made_for_gradients(model)
    with _ONE_AT_A_TIME:
        yield from _evaluation(model, batches)


def _evaluation(model: nn.Module, batches: tuple[Inputs | None, ...]) -> Iterator[None]:
    hooks = [(table, dict(table)) for table in parameter_hooks(model)]
    before, others = _random_state(), (random.getstate(), np.random.get_state())  # noqa: NPY002  (others' draws)
    state, before_block = OwnState(model), versions(model)
    start, drawn_elsewhere, alone = None, False, threading.active_count() == 1
    with torch.inference_mode(False), torch.no_grad(), evaluating(model):
        try:
            for table, _ in hooks:
                table.clear()
            if not isinstance(model, torch.jit.ScriptModule):
                start = model.register_forward_pre_hook(lambda *_: state.restore())
            yield
        except (RuntimeError, ValueError) as error:
            _check_unchanged(model, before_block, error)  # a change may be the reason why autograd failed
            if isinstance(error, RandomNumbers):
                _check_settings(state, error)
            raise
        else:
            _check_unchanged(model, before_block)
            if not all(torch.equal(a, b) for a, b in zip(before, _random_state(), strict=True)):
                alone = (alone and threading.active_count() == 1) or not any(batch is not None for batch in batches)
                drawn_elsewhere = not alone and not _draws(model, batches)
                if not drawn_elsewhere:
                    _check_settings(state, None)
                    raise RandomNumbers
        finally:
            if start is not None:
                start.remove()
            for table, content in hooks:
                table.update(content)
            state.restore(finally_=True)
            random.setstate(others[0])
            np.random.set_state(others[1])  # noqa: NPY002
            moved = not all(torch.equal(a, b) for a, b in zip(before, _random_state(), strict=True))
            if moved and not drawn_elsewhere:
                torch.set_rng_state(before[0])
                if before[1:]:
                    torch.cuda.set_rng_state_all(before[1:])


class _SeenDraws(TorchDispatchMode):
    """Notes whether an operation of the calling thread draws random numbers, by torch's own tag of such operations."""

    def __init__(self) -> None:
        super().__init__()
        self.any = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if torch.Tag.nondeterministic_seeded in func.tags:
            given = {a.name: a.default_value for a in func._schema.arguments if a.has_default_value()}
            given |= dict(zip((a.name for a in func._schema.arguments), args)) | (kwargs or {})
            # Attention and noisy activations have the tag also where they draw nothing.
            self.any |= all(given.get(name) not in (False, 0) for name in ("dropout_p", "train", "training"))
        return func(*args, **(kwargs or {}))


def _draws(model: nn.Module, batches: tuple[Inputs | None, ...]) -> bool:
    """Whether the model itself draws random numbers, and not another thread: all share one generator.

    The model is called once more, under a mode that sees the operations of this thread alone.
    """
    with _SeenDraws() as seen:
        for batch in batches:
            if batch is not None:
                copied = fresh(batch)
                _ = model(copied) if isinstance(copied, Tensor) else model(**copied)
    return seen.any


def _check_made_for_gradients(model: nn.Module) -> None:
    for name, t in [*model.named_parameters(), *model.named_buffers()]:
        if t.is_inference():
            raise ValueError(
                f"the model's {name} was made in torch.inference_mode, and can have no gradient: make the model "
                "outside of it, or pass copy.deepcopy(model)"
            )


def _check_settings(state: OwnState, cause: Exception | None) -> None:
    """Raise if the model changes its own settings, since that change then causes its random numbers."""
    state.restore()
    if state.changed:
        name, (old, new) = next(iter(state.changed.items()))
        raise ValueError(
            f"the model changes its {name} from {old!r} to {new!r} in its own forward pass, and draws "
            "random numbers as it does so: set it before"
        ) from cause


def _check_unchanged(model: nn.Module, before: dict[str, tuple[int, int]], cause: Exception | None = None) -> None:
    if changed := [name for name, version in versions(model).items() if before.get(name) != version]:
        raise ValueError(
            f"the model changes its {changed[0]} in its own forward pass, so it has no one tangent kernel; "
            "compute what is to be remembered outside of forward"
        ) from cause


def _random_state() -> list[Tensor]:
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() and torch.cuda.is_initialized() else []
    return [torch.get_rng_state(), *cuda]


def versions(model: nn.Module) -> dict[str, tuple[int, int]]:
    """The identity of each named tensor, and how often it was written to.

    peft's wrapper of a single parameter (for example of a stack of experts) registers the parameter again in each
    forward pass, which counts as a write. There, a sum over the tensor's bytes is used instead of the number of writes.
    """
    wrapped = {id(m.base_layer) for m in model.modules() if hasattr(m, "parameter_name") and hasattr(m, "base_layer")}
    again = {id(p) for m in model.modules() if id(m) in wrapped for p in m.parameters()}
    tensors = (*model.named_parameters(), *model.named_buffers())
    return {name: (id(t), _bits(t) if id(t) in again else t._version) for name, t in tensors}


def _bits(t: Tensor) -> int:
    return int(t.detach().contiguous().view(torch.uint8).sum(dtype=torch.int64))


def nonfinite_cause(model: nn.Module, inputs: Inputs) -> str:
    """The reason, for an error message, why a kernel of finite inputs holds NaN or infinite values."""
    for name, p in [*model.named_parameters(), *model.named_buffers()]:
        if p.is_floating_point() and not torch.isfinite(p).all():
            return f"the model's {name} holds NaN or infinite values; load the weights again"
    if layer := _first_overflow(model, inputs):
        return f"the activations overflow at {layer}; run the model in float32 or float64"
    if layer := _last_gradient_overflow(model, inputs):
        return (
            f"the gradients at the output of {layer} are infinite or no numbers: what comes after it has no derivative "
            "there, or overflows in this precision"
        )
    return "gradients or their products overflow; run the model in float32 or float64"


def _first_overflow(model: nn.Module, inputs: Inputs) -> str | None:
    """The first module whose output is not finite."""
    with torch.no_grad():
        activations = _outputs_of_modules(model, inputs)
    return next((name for name, t in activations if not torch.isfinite(t).all()), None)


def _last_gradient_overflow(model: nn.Module, inputs: Inputs) -> str | None:
    """The last module at whose output a gradient of the network's outputs is not finite."""
    try:
        with torch.enable_grad():
            activations = [(name, t) for name, t in _outputs_of_modules(model, inputs) if t.requires_grad]
            gradients = torch.autograd.grad(activations[-1][1].sum(), [t for _, t in activations], allow_unused=True)
    except (RuntimeError, IndexError):  # the model writes into its activations, or has no gradients
        return None
    pairs = zip(reversed(activations), reversed(gradients), strict=True)
    return next((name for (name, _), g in pairs if g is not None and not torch.isfinite(g).all()), None)


def _outputs_of_modules(model: nn.Module, inputs: Inputs) -> list[tuple[str, Tensor]]:
    """The floating-point outputs of the modules without children, then the model's own, with their names."""
    activations: list[tuple[str, Tensor]] = []

    def look(name: str) -> Any:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            for t in tree_leaves(output):
                if isinstance(t, Tensor) and t.is_floating_point():
                    if torch.is_grad_enabled() and not t.requires_grad:
                        t.requires_grad_()
                    activations.append((f"{name} ({type(module).__name__})", t))

        return hook

    modules = [(name, m) for name, m in model.named_modules() if name and not list(m.children())]
    hooks = [m.register_forward_hook(look(name)) for name, m in modules]
    try:
        copied = fresh(inputs)
        result = model(copied) if isinstance(copied, Tensor) else model(**copied)
    finally:
        for hook in hooks:
            hook.remove()
    own = [t for t in tree_leaves(result) if isinstance(t, Tensor) and t.is_floating_point()]
    return [*activations, *((f"the model ({type(model).__name__})", t) for t in own[:1])]
