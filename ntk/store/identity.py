"""What a kernel depends on, as texts that are equal only if it is the same.

Identity is by content: the weights, the structure of the model, the source of the output function, the names of the
parameters, the numbers of the examples.
"""

import functools
import hashlib
import inspect
import json
from collections.abc import Callable, Mapping
from types import CodeType, FunctionType
from typing import Any

import torch
from torch import Tensor, nn

from ntk.functional import ParameterChoice, select_parameters
from ntk.inputs import Batch
from ntk.outputs import Output

# Entries of a Hugging Face configuration that do not change what the model computes.
_NAMES = ("_name_or_path", "name_or_path", "transformers_version")


def kernel_identity(
    model: nn.Module, params: ParameterChoice, output: Output | None, reduce: str | None
) -> dict[str, str]:
    """The identity of a kernel but for its examples: by what a message calls it, a text.

    Raises:
        ValueError: an output function of which two cannot be told apart, such as an object without a repr of its own.
    """
    chosen = select_parameters(model, params)
    return {
        "weights": tensors_digest({**dict(model.named_parameters()), **dict(model.named_buffers())}),
        "structure": _digest(repr(model), _configuration(model)),
        "parameters": f"{sum(p.numel() for p in chosen.values()):,} in {_digest(*chosen)}",
        "output": "logits" if output is None else _described(output),
        "reduce": str(reduce),
    }


def inputs_digest(inputs: Batch) -> str:
    """The digest of a batch.

    Raises:
        ValueError: an entry is not a tensor.
    """
    entries = {"": inputs} if isinstance(inputs, Tensor) else inputs
    for name, value in entries.items():
        if not isinstance(value, Tensor):
            raise ValueError(
                f"a store keeps examples as tensors; entry {name!r} of inputs is {type(value).__name__}: leave it out "
                "or make it a tensor"
            )
    return tensors_digest(entries)


def tensors_digest(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 of names, dtypes, shapes and bytes."""
    content = hashlib.sha256()
    for name in sorted(tensors):
        value = tensors[name].detach().cpu().contiguous()
        content.update(f"{name} {value.dtype} {tuple(value.shape)} ".encode())
        content.update(value.reshape(-1).view(torch.uint8).numpy().data)
    return content.hexdigest()


def _configuration(model: nn.Module) -> str:
    """The configuration of a Hugging Face model, without its names."""
    to_dict = getattr(getattr(model, "config", None), "to_dict", None)
    entries = to_dict() if callable(to_dict) else {}
    assert isinstance(entries, dict)
    return json.dumps({k: v for k, v in entries.items() if k not in _NAMES}, sort_keys=True, default=str)


def _described(value: Any) -> str:
    """A text that is the same in another process for the same function or constant, and differs for others.

    Functions that a function calls are not looked at, only what it holds.
    """
    if isinstance(value, functools.partial):
        return _digest("partial", _described(value.func), *map(_described, value.args), _described(value.keywords))
    if isinstance(value, FunctionType):
        value = inspect.unwrap(value)
        cells = [cell.cell_contents for cell in value.__closure__ or ()]
        held = [_described(each) for each in (*cells, value.__defaults__, value.__kwdefaults__)]
        return f"{value.__module__}.{value.__qualname__} {_digest(_source(value), *held)}"
    if isinstance(value, Tensor):
        return tensors_digest({"": value})
    if isinstance(value, nn.Module):
        return _digest(repr(value), tensors_digest(value.state_dict()))
    if isinstance(value, Mapping):
        return _digest(*(f"{key!r}: {_described(each)}" for key, each in value.items()))
    if isinstance(value, (list, tuple)):
        return _digest(type(value).__name__, *map(_described, value))
    if inspect.ismethod(value):
        return _digest(_described(value.__func__), _described(value.__self__))
    text = repr(value)
    if " at 0x" in text:
        raise ValueError(
            f"the output function holds {text}, which cannot be recognised in another process: give it a repr that "
            "says what it computes, or pass a plain function"
        )
    return f"{type(value).__module__}.{type(value).__qualname__} {text}"


def _source(function: Callable[..., Any]) -> str:
    """The text of a function; its bytecode where the text is not at hand."""
    try:
        return inspect.getsource(function)
    except (OSError, TypeError):
        return _bytecode(function.__code__)


def _bytecode(code: CodeType) -> str:
    constants = [_bytecode(each) if isinstance(each, CodeType) else repr(each) for each in code.co_consts]
    return _digest(code.co_code.hex(), *constants, *code.co_names)


def _digest(*texts: str) -> str:
    return hashlib.sha256("\0".join(texts).encode()).hexdigest()[:16]
