"""Methods of fine-tuning by name, applied to the same model with the same head.

Four names are ours: "full" trains everything, "bitfit" all biases (Ben Zaken et al. 2022), "head" the task's head
alone, "none" nothing. Every other name is a peft method in lower case ("propulsion", "lora", "prefix_tuning", ...),
whose options are the fields of its peft configuration. All but "none" train a new head in full.
"""

import dataclasses
import inspect
import json
import math
import re
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from peft import PEFT_TYPE_TO_CONFIG_MAPPING, PeftConfig, PeftModel, TaskType, get_peft_model
from torch import nn
from transformers import PreTrainedModel

from propulsion import registration as _registration  # noqa: F401  Importing the package registers Propulsion.
from propulsion.errors import UserError, did_you_mean, library_errors
from propulsion.heads import HEADED, head_modules
from propulsion.positions import is_norm


@dataclass(frozen=True)
class Method:
    """A method and its options, specified as ``NAME`` or ``NAME:OPTION=VALUE,OPTION=VALUE``.

    Values are JSON, or otherwise text; ``a+b`` is a list of texts, and ``a+`` a list of one text.

    >>> Method.parse("propulsion:positions=query+value,degree=20")
    Method(name='propulsion', options={'positions': ['query', 'value'], 'degree': 20})
    """

    name: str
    options: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def parse(cls, method_spec: str) -> "Method":
        """Read a method from its specification.

        Raises:
            UserError: There is no such method, or an option is not of the form OPTION=VALUE.
        """
        name, _, options = method_spec.partition(":")
        check_name(name)
        return cls(name, parse_options(options.split(",") if options else ()))

    def with_defaults(self, **defaults: Any) -> "Method":
        """The method with these defaults for those of its options that are not set."""
        known = option_names(self.name)
        return Method(self.name, {k: v for k, v in defaults.items() if k in known} | dict(self.options))


def parse_methods(method_specs: Sequence[str]) -> dict[str, Method]:
    """Read several methods, and return each under its specification.

    Raises:
        UserError: There is none, or one cannot be read.
    """
    if not method_specs:
        raise UserError("there must be a method, such as full, propulsion or lora")
    return {method_spec: Method.parse(method_spec) for method_spec in method_specs}


def parse_options(texts: Iterable[str]) -> dict[str, Any]:
    """Read options, each of the form OPTION=VALUE.

    Raises:
        UserError: One has no "=", or a number that is not finite.
    """
    options = {}
    for text in texts:
        name, equals, words = text.partition("=")
        if not equals or not name:
            raise UserError(f"option {text!r} is not of the form OPTION=VALUE")
        value = _value(words)
        if isinstance(value, float) and not math.isfinite(value):
            raise UserError(f"option {name} is {value}, expected a finite number")
        options[name.strip().replace("-", "_")] = value
    return options


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except (json.JSONDecodeError, RecursionError):
        words = {"True": True, "False": False, "None": None}
        if re.fullmatch(r"[\w.-]+(\+[\w.-]+)*\+?", text) and "+" in text:  # Plain words: no regular expression.
            return [word for word in text.split("+") if word]
        return words.get(text, text)


def method_names() -> tuple[str, ...]:
    """The names of all methods, our own first."""
    return (*_OWN, *sorted(_peft_configs()))


def check_name(name: str) -> None:
    """Raise if no method has this name.

    Raises:
        UserError: There is no such method; the message lists all.
    """
    if name not in method_names():
        close = did_you_mean(name, method_names())
        raise UserError(f"unknown method {name!r}{close}: the methods are {', '.join(method_names())}")


def option_names(name: str) -> set[str]:
    """The options of a method."""
    return set() if name in _OWN else {f.name for f in dataclasses.fields(_peft_configs()[name]) if f.init}


def apply_method(model: PreTrainedModel, method: Method, *, task_type: str, seed: int = 0) -> Any:
    """Make a pre-trained model trainable by a method, in place where the method allows.

    Random values of the method depend on `seed` alone. The head was drawn when the model was loaded, and is the same
    for all methods.

    Args:
        model: The pre-trained model with its head.
        method: The method.
        task_type: peft's name of the task, such as "SEQ_CLS".
        seed: Seed of the method's own random values, such as LoRA's A.

    Returns:
        The model, or the `PeftModel` around it.

    Raises:
        UserError: The method or an option is unknown, or cannot be used on this model.
    """
    check_options(method)
    if task_type not in TaskType.__members__:
        close = did_you_mean(task_type, TaskType.__members__)
        raise UserError(f"task_type is {task_type!r}{close}, expected one of {', '.join(TaskType.__members__)}")
    head = head_modules(model) if task_type in HEADED else []
    if method.name in _OWN:
        _apply_own(model, method.name, head)
        return model
    with _usable(method), torch.random.fork_rng():
        torch.manual_seed(seed)
        return get_peft_model(model, _config(model, method, task_type, head))


def virtual_tokens(model: Any) -> int:
    """How many tokens of its own the method of a model puts before every text; 0 for most methods."""
    config = model.active_peft_config if isinstance(model, PeftModel) else None
    return getattr(config, "num_virtual_tokens", None) or 0


def check_options(method: Method) -> None:
    """Check a method and its options as far as that needs no model.

    Raises:
        UserError: The method or an option is unknown, or a value cannot be used.
    """
    check_name(method.name)
    if unknown := sorted(set(method.options) - option_names(method.name)):
        options = sorted(option_names(method.name) - set(_RESERVED))
        close = did_you_mean(unknown[0], options)
        known = ", ".join(options) or "none"
        raise UserError(f"method {method.name} has no option {', '.join(unknown)}{close}; its options: {known}")
    if reserved := set(method.options) & set(_RESERVED):
        raise UserError(f"option {', '.join(sorted(reserved))} follows from the task and cannot be given")
    for name, value in method.options.items():
        # peft takes a negative probability of dropout for none, and prompts without a token for a method.
        if "dropout" in name and isinstance(value, int | float) and not 0 <= value <= 1:
            raise UserError(f"option {name} of method {method.name} is {value}, expected a probability from 0 to 1")
        if name in ("num_virtual_tokens", "encoder_hidden_size") and isinstance(value, int) and value < 1:
            raise UserError(f"option {name} of method {method.name} is {value}, expected at least 1, not 0 or negative")
    if method.name not in _OWN:
        # peft warns again when the method is applied.
        with _usable(method), warnings.catch_warnings(action="ignore"):
            option_config(method.name, _NEEDED.get(method.name, {}) | dict(method.options))


def _usable(method: Method) -> AbstractContextManager[None]:
    """Name the options of a method in the errors of peft, which checks few of them and may not name them."""
    given = ", ".join(f"{name}={value}" for name, value in method.options.items())
    return library_errors(f"method {method.name}{f', with {given},' if given else ''} cannot be used here")


def trainable_parameters(model: nn.Module) -> int:
    """Number of parameters that require gradients."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


_OWN: dict[str, Callable[[str, bool], bool]] = {
    "full": lambda name, in_head: True,
    "bitfit": lambda name, in_head: in_head or name.endswith("bias"),
    "head": lambda name, in_head: in_head,
    "none": lambda name, in_head: False,
}
"""For each method: (name of a parameter, whether it is in the task's head) -> whether the method trains it."""


def _apply_own(model: PreTrainedModel, name: str, head: list[str]) -> None:
    any_trained = False
    for parameter_name, parameter in model.named_parameters():
        in_head = _is_in(parameter_name, head)
        parameter.requires_grad_(_OWN[name](parameter_name, in_head))
        any_trained |= parameter.requires_grad and (name == "head" or not in_head)
    if name in ("bitfit", "head") and not any_trained:
        what = "bias" if name == "bitfit" else "head of its own"
        raise UserError(f"{type(model).__name__} has no {what} to train: choose another method")


def _is_in(name: str, modules: Iterable[str]) -> bool:
    return any(name.startswith(f"{module}.") for module in modules)


_RESERVED = ("task_type", "peft_type", "inference_mode", "auto_mapping", "peft_version", "base_model_name_or_path")

# Values of options that peft requires without having a default.
_NEEDED: dict[str, dict[str, Any]] = {
    "prompt_tuning": {"num_virtual_tokens": 20},
    "prefix_tuning": {"num_virtual_tokens": 20},
    "p_tuning": {"num_virtual_tokens": 20, "encoder_hidden_size": 128},
    "adalora": {"total_step": 1000},
}


def _peft_configs() -> dict[str, type[PeftConfig]]:
    return {str(getattr(k, "value", k)).lower(): config for k, config in PEFT_TYPE_TO_CONFIG_MAPPING.items()}


def option_config(name: str, options: Mapping[str, Any]) -> PeftConfig:
    """The configuration of a peft method by its name and options, without a task."""
    return _peft_configs()[name](**options)


def _config(model: PreTrainedModel, method: Method, task_type: str, head: list[str]) -> PeftConfig:
    options = _NEEDED.get(method.name, {}) | dict(method.options)
    if method.name == "ln_tuning" and options.get("target_modules") is None:
        # peft finds the norms of few architectures, by name; here they are found by type.
        options["target_modules"] = [name for name, m in model.named_modules() if is_norm(m) and not _is_in(name, head)]
    if head and "modules_to_save" in option_names(method.name):
        # peft finds heads by their usual names; others, and heads of several modules, must be named.
        options["modules_to_save"] = [*head, *(options.get("modules_to_save") or [])]
    return _peft_configs()[method.name](task_type=TaskType(task_type), **options)


_RANKS = ("ipt", "exp_avg_ipt", "exp_avg_unc")  # Statistics that AdaLoRA keeps of each parameter outside its weights.


def _rank_allocator(model: Any) -> Any:
    return getattr(getattr(model, "base_model", None), "rankallocator", None)


@contextmanager
def all_ranks(model: Any) -> Iterator[None]:
    """Save and load all ranks in the block; peft leaves out those that AdaLoRA has pruned, which may come back."""
    if (allocator := _rank_allocator(model)) is None:
        yield
        return
    pattern, allocator.peft_config.rank_pattern = allocator.peft_config.rank_pattern, None
    try:
        yield
    finally:
        allocator.peft_config.rank_pattern = pattern


def rank_state(model: Any) -> dict[str, Any]:
    """State outside the weights of a method that reassigns ranks between layers (AdaLoRA); empty for other methods."""
    if (allocator := _rank_allocator(model)) is None:
        return {}
    return {name: getattr(allocator, name) for name in _RANKS} | {"pattern": allocator.peft_config.rank_pattern}


def restore_rank_state(model: Any, state: Mapping[str, Any]) -> None:
    """Restore what `rank_state` returned."""
    if state:
        allocator = _rank_allocator(model)
        for name in _RANKS:
            setattr(allocator, name, state[name])
        allocator.peft_config.rank_pattern = state["pattern"]


def update_ranks(model: Any, step: int) -> None:
    """Let methods that reassign ranks between layers (AdaLoRA) do so after a step of the optimizer."""
    inner = getattr(model, "base_model", None) if isinstance(model, PeftModel) else None
    update = getattr(inner, "update_and_allocate", None)
    if update is not None and "global_step" in inspect.signature(update).parameters:
        update(step)
