"""A model as a pure function of its parameters and one group of examples."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from ntk import outputs
from ntk.inputs import Inputs

Parameters = dict[str, Tensor]
ParameterChoice = str | Callable[[str, nn.Parameter], bool]


def select_parameters(model: nn.Module, params: ParameterChoice = "all") -> Parameters:
    """The parameters a kernel is taken over, detached, by their name in ``model.named_parameters()``.

    Args:
        model: tied parameters appear once, under their first name, as in ``named_parameters()``.
        params: ``"all"``, ``"trainable"`` (``requires_grad``) or a predicate ``(name, parameter) -> bool``.

    Raises:
        ValueError: an unknown choice, no parameter selected, or a selected one that is not floating-point.
    """
    if params == "all":
        chosen = dict(model.named_parameters())
    elif params == "trainable":
        chosen = {name: p for name, p in model.named_parameters() if p.requires_grad}
    elif callable(params):
        chosen = {name: p for name, p in model.named_parameters() if params(name, p)}
    else:
        raise ValueError(f"params must be 'all', 'trainable' or a predicate (name, parameter) -> bool; got {params!r}")
    if not chosen:
        raise ValueError(
            f"params={params!r} selects none of the model's parameters; their names are in model.named_parameters()"
        )
    for name, p in chosen.items():
        if not p.is_floating_point():
            raise ValueError(
                f"parameter {name} has dtype {p.dtype} and no gradient; "
                "select the others with params='trainable' or a predicate"
            )
    return {name: p.detach() for name, p in chosen.items()}


def output_function(
    model: nn.Module, output: outputs.Output | None = None
) -> Callable[[Parameters, dict[str, Tensor], Mapping[str, Any]], Tensor]:
    """f(params, example, constant) -> (c,), for one example without its batch dimension; fit for ``torch.func``.

    ``example`` and ``constant`` are entries of a :class:`ntk.inputs.Group`. Labels reach ``output`` but not the model,
    whose own loss would be computed for nothing, unless an encoder-decoder needs them for its decoder's inputs.

    Raises:
        ValueError: the output is not ``(1, c)`` or ``(1,)`` for one example, or has no gradient.
    """
    read = output or outputs.logits

    def f(params: Parameters, example: dict[str, Tensor], constant: Mapping[str, Any]) -> Tensor:
        inputs: Any = {key: value.unsqueeze(0) for key, value in example.items()} | dict(constant)
        if "" in inputs:  # a plain tensor, the input of a plain module
            inputs = inputs[""]
            model_output = functional_call(model, params, (inputs,))
        else:
            withheld = () if is_encoder_decoder(model) and "decoder_input_ids" not in inputs else ("labels",)
            model_output = functional_call(model, params, (), {k: v for k, v in inputs.items() if k not in withheld})
        value = read(model_output, inputs)
        if not isinstance(value, Tensor) or value.ndim not in (1, 2) or value.shape[0] != 1:
            got = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
            raise ValueError(f"output must return a tensor (n, c) for n examples; for one example it returned {got}")
        if not value.is_floating_point():
            raise ValueError(f"output must be floating-point to have a gradient; got {value.dtype}")
        return value.reshape(-1)

    return f


def is_encoder_decoder(model: nn.Module) -> bool:
    """Whether a Hugging Face configuration says that the model has an encoder and a decoder."""
    return bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))


@contextmanager
def evaluation(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without autograd's own graph; every module's mode is restored, whatever happens.

    Raises:
        ValueError: the block drew random numbers, so that the outputs are not a function of parameters and inputs.
    """
    modes = {module: module.training for module in model.modules()}
    model.eval()
    before = _random_state()
    try:
        with torch.no_grad():
            yield
        if not all(torch.equal(a, b) for a, b in zip(before, _random_state(), strict=True)):
            raise ValueError(
                "the model draws random numbers in evaluation mode, so it has no tangent kernel; "
                "switch its noise off (dropout written with training=True is the usual cause)"
            )
    finally:
        for module, mode in modes.items():
            module.training = mode


def _random_state() -> list[Tensor]:
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() and torch.cuda.is_initialized() else []
    return [torch.get_rng_state(), *cuda]


def nonfinite_cause(model: nn.Module, inputs: Inputs) -> str:
    """Why a kernel came out NaN or infinite, in words: a parameter, an input, or the computation itself."""
    for name, p in [*model.named_parameters(), *model.named_buffers()]:
        if p.is_floating_point() and not torch.isfinite(p).all():
            return f"the model's {name} holds NaN or infinite values; load the weights again"
    entries = {"": inputs} if isinstance(inputs, Tensor) else inputs
    for key, value in entries.items():
        if isinstance(value, Tensor) and value.is_floating_point() and not torch.isfinite(value).all():
            return f"the inputs{f' ({key})' if key else ''} hold NaN or infinite values"
    return "activations or gradients overflow; run the model in float32 or float64"
