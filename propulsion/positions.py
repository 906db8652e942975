"""The paper's positions, as the modules of an architecture (Kowsher et al. 2024, Section 4 and Table 1).

"all" (without norms), "embedding" and "norm" choose modules of any model by their type. The other positions choose them
by how the blocks of a transformer are built (`propulsion.block_layers`).
"""

import re
from collections.abc import Iterable

from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn
from transformers.pytorch_utils import Conv1D

from propulsion.block_layers import block_layers

POSITIONS = ("all", "attn", "query", "key", "value", "attention_output", "mlp", "embedding", "norm")

# Modules that are neither called nor read, so that a z on them has no effect. In other models, the first pass of
# training finds them (`propulsion.training_checks`).
_UNUSED = {"t5": "shared", "bart": "shared"}


# Families that are known not to write into the outputs of their layers, which can thus be kept for the backward pass.
_LEAVE_OUTPUTS_ALONE = (
    "albert", "bart", "bert", "bloom", "deberta-v2", "distilbert", "electra", "gemma", "gemma2", "gemma3_text", "gpt2",
    "gpt_neox", "gptj", "llama", "mistral", "mixtral", "mpnet", "opt", "phi", "phi3", "qwen2", "qwen3", "roberta", "t5",
    "vit", "xlm-roberta",
)  # fmt: skip

# Modules whose output has no axis of examples: T5 adds the same bias to the scores of all examples.
_WITHOUT_EXAMPLES = {"t5": "relative_attention_bias"}


def resolve(
    model: nn.Module,
    positions: Iterable[str] | str,
    layers_to_transform: Iterable[int] | int | None = None,
    layers_pattern: Iterable[str] | str | None = None,
) -> set[str]:
    """Return the full names of the modules of `model` at the given positions.

    A module that is already adapted counts as the module beneath; modules that are trained in full are left out.

    Raises:
        ValueError: the architecture is unknown, or has no module of its own for a position.
    """
    candidates = {name: module for name, module in base_modules(model).items() if bypass(model, name) is None}
    names: set[str] = set()
    for position in [positions] if isinstance(positions, str) else positions:
        matching = _at(position, model, candidates)
        if not matching:
            raise ValueError(
                f"position {position!r} matches no module of {type(model).__name__}: choose other positions, "
                "or name modules with target_modules"
            )
        names |= matching
    if layers_to_transform is None:
        return names
    layers = {layers_to_transform} if isinstance(layers_to_transform, int) else set(layers_to_transform)
    patterns = [layers_pattern] if isinstance(layers_pattern, str) else list(layers_pattern or [])
    names = {name for name in names if _layer(name, patterns) in layers}
    if not names:
        raise ValueError(
            f"expected layers_to_transform to name blocks of {type(model).__name__}, got {sorted(layers)} "
            f"(layers_pattern {patterns or None}), which leaves no module of positions {positions!r}: correct them"
        )
    return names


def base_modules(model: nn.Module) -> dict[str, nn.Module]:
    """Return every module by name, without those of adapters; an adapted module stands as the module beneath it."""
    modules, inside = {}, []
    for name, module in model.named_modules():
        if any(name.startswith(prefix) for prefix in inside):
            continue
        if isinstance(module, (BaseTunerLayer, AuxiliaryTrainingWrapper)):
            inside.append(f"{name}.")
        modules[name] = module.get_base_layer() if isinstance(module, BaseTunerLayer) else module
    return modules


def bypass(model: nn.Module, name: str) -> str | None:
    """Return why scaling the output of this module would not reach the model's output; None if it would."""
    pattern = _UNUSED.get(_model_type(model))
    return f"{type(model).__name__} does not call it" if pattern and _ends_with(pattern, name) else None


def is_norm(module: nn.Module) -> bool:
    """Whether a module is a LayerNorm or RMSNorm, of torch or of any family, with one weight for each feature."""
    named = type(module).__name__.endswith(("LayerNorm", "RMSNorm")) or isinstance(module, nn.LayerNorm)
    weight = getattr(module, "weight", None)
    return named and isinstance(weight, nn.Parameter) and weight.ndim == 1


def leaves_outputs_alone(model: nn.Module) -> bool:
    """Whether the model is of a family that is known not to write into the outputs of its layers in place."""
    return _model_type(model) in _LEAVE_OUTPUTS_ALONE


def shared_by_all_examples(model: nn.Module, name: str) -> bool:
    """Whether the output of a module has no axis of examples, so that no example can have a scale of its own."""
    pattern = _WITHOUT_EXAMPLES.get(_model_type(model))
    return pattern is not None and _ends_with(pattern, name)


def _at(position: str, model: nn.Module, candidates: dict[str, nn.Module]) -> set[str]:
    if position == "all":
        return {name for name, module in candidates.items() if isinstance(module, (nn.Linear, Conv1D, nn.Embedding))}
    if position == "embedding":
        return {name for name, module in candidates.items() if isinstance(module, nn.Embedding)}
    if position == "norm":
        return {name for name, module in candidates.items() if is_norm(module)}
    if position not in POSITIONS:
        raise ValueError(f"unknown position {position!r}; there are {', '.join(POSITIONS)}")
    layers = block_layers(candidates)
    if position in layers:
        return layers[position]
    architecture = _model_type(model) or type(model).__name__
    if "attn" not in layers:
        raise ValueError(
            f"position {position!r} is not known for the architecture {architecture!r}, in which no layers named as "
            "query, key and value were found: name the modules with target_modules, or use 'all', 'embedding', 'norm'"
        )
    reasons = {
        "mlp": "whose blocks have no linear layers but those of attention; experts may be stacked in one parameter",
        "attention_output": "in which no output projection of attention was found",
    }
    reason = reasons.get(position, "which fuses query, key and value in one: use 'attn' for all three")
    raise ValueError(f"position {position!r} has no module of its own in {architecture!r}, {reason}")


def _model_type(model: nn.Module) -> str:
    return getattr(getattr(model, "config", None), "model_type", "")


def _ends_with(pattern: str, name: str) -> bool:
    return re.fullmatch(rf"(.*\.)?({pattern})", name) is not None


def _layer(name: str, patterns: list[str]) -> int | None:
    """The number of the block of a module: the first number in its name, or the first after one of the patterns."""
    segments = name.split(".")
    for before, segment in zip(["", *segments], segments[:-1]):
        if segment.isdigit() and (not patterns or before in patterns):
            return int(segment)
    return None
