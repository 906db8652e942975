"""Modules that are trained in full, such as a task's head: how they are found, combined, mixed in a batch and merged.

peft keeps a copy of such a module for each adapter (`ModulesToSaveWrapper`), and the original for adapters without one.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from peft import TaskType
from peft.utils.other import AuxiliaryTrainingWrapper, ModulesToSaveWrapper
from torch import Tensor, nn

from propulsion.pretrained.untrained import FEWEST, looks_untrained

HEADED = frozenset({TaskType.SEQ_CLS, TaskType.TOKEN_CLS, TaskType.QUESTION_ANS})
"""Task types with a new head, which every method trains."""

# transformers sets this attribute on parameters that it has read from a checkpoint.
_READ = "_is_hf_initialized"


def was_read(parameter: nn.Parameter) -> bool:
    """Whether transformers has read a parameter from a checkpoint."""
    return hasattr(parameter, _READ)


def head_modules(model: nn.Module) -> list[str]:
    """Names of the modules of the task's head: those outside the pre-trained body that have parameters.

    If the model names no body, its head is the modules of which no parameter was read from the checkpoint.
    """
    children = {name: own for name, child in model.named_children() if (own := list(child.parameters()))}
    body = getattr(model, "base_model_prefix", "")
    if body in children:
        return [name for name in children if name != body]
    if not any(hasattr(p, _READ) for p in model.parameters()):
        return []
    return [name for name, parameters in children.items() if not any(hasattr(p, _READ) for p in parameters)]


def random_in_body(model: nn.Module) -> list[str]:
    """Names of the layers of the body, such as a pooler, that the checkpoint lacks and that are therefore random.

    A layer that the caller has replaced was not read from the checkpoint either. So a layer counts only if its values
    also look untrained: a bias of zeros and, if there are enough values to tell, a Gaussian weight. Embeddings never
    count, since they may have new rows for new words. The list is empty for a model that was not loaded.
    """
    body = getattr(model, getattr(model, "base_model_prefix", ""), None)
    if not isinstance(body, nn.Module) or not any(hasattr(p, _READ) for p in model.parameters()):
        return []
    inside = {id(module) for module in body.modules()}
    return [name for name, module in model.named_modules() if id(module) in inside and _is_random(module)]


def _is_random(module: nn.Module) -> bool:
    weight, bias = (module._parameters.get(name) for name in ("weight", "bias"))
    if weight is None or weight.ndim != 2 or hasattr(weight, _READ) or isinstance(module, nn.Embedding):
        return False
    bias = weight.new_zeros(len(weight)) if bias is None else bias
    if weight.is_meta or bias.any():
        return False
    return weight.numel() < FEWEST or looks_untrained("", weight, bias) is not None


def trained_modules(model: nn.Module) -> dict[str, ModulesToSaveWrapper]:
    """The modules that some adapter trains in full, by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, ModulesToSaveWrapper)}


def combined(model: nn.Module, adapters: Sequence[str], weights: Sequence[float]) -> dict[str, dict[str, Tensor]]:
    """Weighted means of the modules that adapters have trained in full, by module name.

    The mean of linear heads is the head whose outputs are the means of theirs. The weights must sum to 1, since a head
    has no neutral value that could take the remaining weight.

    Returns:
        The state of each module that at least one of the adapters has trained, averaged over those adapters.

    Raises:
        ValueError: the weights of the adapters that have trained a module do not sum to 1, or the buffers of their
            modules, such as running statistics, differ.
    """
    means = {}
    for name, module in model.named_modules():
        if not isinstance(module, AuxiliaryTrainingWrapper):
            continue
        present = [(a, w) for a, w in zip(adapters, weights, strict=True) if a in module._adapters]
        if not present:
            continue
        if not isinstance(module, ModulesToSaveWrapper):
            raise ValueError(f"expected modules trained in full to combine, got {name!r} of {type(module).__name__}")
        total = sum(weight for _, weight in present)
        if abs(total - 1) > 1e-6:
            raise ValueError(
                f"expected weights that sum to 1 over the adapters that have trained {name!r} "
                f"({', '.join(dict.fromkeys(a for a, _ in present))}), got {total:g}: a head has no other "
                "combination than a mean. Give such weights, or combine adapters without heads"
            )
        means[name] = _mean(name, [(module.modules_to_save[a], w) for a, w in present])
    return means


@torch.no_grad()
def _mean(name: str, modules: list[tuple[nn.Module, float]]) -> dict[str, Tensor]:
    (first, _), *others = modules
    buffers = dict(first.named_buffers())
    state = {}
    for key, value in first.state_dict().items():
        if key in buffers:
            if any(not torch.equal(value, other.state_dict()[key]) for other, _ in others):
                raise ValueError(f"expected equal buffers {key!r} in {name!r}, got several: buffers cannot be combined")
            state[key] = value.clone()
            continue
        wide = torch.promote_types(value.dtype, torch.float32)
        terms = [module.state_dict()[key].to(wide) * weight for module, weight in modules]
        state[key] = torch.stack(terms).sum(dim=0).to(value.dtype)
    return state


def of_each_example(wrapper: ModulesToSaveWrapper, names: Sequence[str], args: tuple, kwargs: dict[str, Any]) -> Tensor:
    """Output of a module in which each example's row is of its own adapter's copy, or of the original without a copy.

    Every copy is called with the whole batch; the module must not mix examples.

    Raises:
        ValueError: the output is not a tensor with one row for each example.
    """
    modules: dict[str, Any] = {name: wrapper.original_module for name in names} | dict(wrapper.modules_to_save.items())
    outputs = {name: modules[name](*args, **kwargs) for name in dict.fromkeys(names)}
    for output in outputs.values():
        if not isinstance(output, Tensor) or output.ndim == 0 or len(output) not in (1, len(names)):
            kind = f"{len(output)} rows" if isinstance(output, Tensor) and output.ndim else type(output).__name__
            raise ValueError(
                f"expected one row of output for each of {len(names)} adapter names from a module trained in full "
                f"({type(wrapper.original_module).__name__}), got {kind}: run each adapter's examples by themselves"
            )
    return torch.stack([outputs[name][i if len(outputs[name]) > 1 else 0] for i, name in enumerate(names)])


def check_merged_with_head(model: nn.Module, adapters: Iterable[str] | None) -> None:
    """Check that the trained modules in use are those of the adapters to merge.

    Raises:
        ValueError: the model uses those of other adapters, or several of the adapters have their own.
    """
    if adapters is None:
        return
    for name, module in trained_modules(model).items():
        own = [adapter for adapter in adapters if adapter in module._adapters]
        used = module.active_adapters
        if own != list(used):
            raise ValueError(
                f"expected the model to use the {name!r} of the adapters to merge ({', '.join(own) or 'none'}), but it "
                f"uses that of {', '.join(used) or 'none'}: call set_adapter first"
            )
