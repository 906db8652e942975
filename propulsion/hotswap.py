"""Replacement of a loaded adapter by a saved one, without compiling a compiled model again."""

import threading
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig
from peft.utils import CONFIG_NAME
from peft.utils.save_and_load import get_peft_model_state_dict, load_peft_weights
from torch import nn

from propulsion.checksums import check_sums
from propulsion.config import PropulsionConfig
from propulsion.layer import adapted_layers
from propulsion.user_files import read_json

# Two swaps at once would leave a mixture of two adapters.
_ONE_AT_A_TIME = threading.Lock()

# Fields of the configuration that are constants in a compiled model.
_FIXED = ("degree", "degree_pattern", "vectors", "pooling", "basis", "basis_seed")


def hotswap_adapter(model: nn.Module, folder: Path | str, adapter_name: str = "default") -> None:
    """Overwrite an adapter by one that `save_pretrained` wrote, in place, as `peft.utils.hotswap` does for LoRA.

    Modules that were trained in full, such as a head, are overwritten too. No thread may run the model meanwhile: its
    outputs would mix the two adapters.

    Args:
        model: a PeftModel with the adapter, compiled or not.
        folder: folder of the saved adapter.
        adapter_name: name of the loaded adapter.

    Raises:
        ValueError: there is no such adapter, the adapters differ in degree, vectors, pooling, basis, modules or shapes,
            the saved one is damaged or not finite, or the adapter is merged. Nothing has changed then.
    """
    network: Any = getattr(model, "_orig_mod", model)
    if adapter_name not in network.peft_config:
        raise ValueError(f"expected an existing adapter, got {adapter_name!r}; there are {list(network.peft_config)}")
    if Path(folder).is_dir():
        check_sums(folder)
        read_json(Path(folder) / CONFIG_NAME, needed="peft_type")
    old, new = network.peft_config[adapter_name], PeftConfig.from_pretrained(str(folder))
    if not isinstance(new, PropulsionConfig):
        raise ValueError(f"expected a Propulsion adapter in {folder}, got {new.peft_type}")
    for name in _FIXED:
        if getattr(old, name) != getattr(new, name):
            raise ValueError(
                f"expected an adapter with {name} = {getattr(old, name)!r}, got {getattr(new, name)!r}: load it with "
                "load_adapter instead"
            )
    if any(adapter_name in layer.merged_adapters for layer in adapted_layers(network)):
        raise ValueError(f"expected an unmerged adapter {adapter_name!r}: call unmerge_adapter() first")
    own = get_peft_model_state_dict(network, adapter_name=adapter_name, save_embedding_layers=False)
    values = load_peft_weights(str(folder), device="cpu")
    if different := sorted(own.keys() ^ values.keys()):
        where = "this model's" if different[0] in own else f"the one in {folder}"
        raise ValueError(
            f"expected adapters of the same modules and heads, but only {where} has {different[0]}: load it with "
            "load_adapter instead"
        )
    for name, p in own.items():
        if p.shape != values[name].shape:
            raise ValueError(f"expected {name} of shape {tuple(p.shape)}, got {tuple(values[name].shape)}")
        if not torch.isfinite(values[name]).all():
            raise ValueError(f"expected finite values, got others in {name} of {folder}: the adapter is damaged")
    with _ONE_AT_A_TIME, torch.no_grad():
        for name, p in own.items():  # In place, since a compiled model holds the parameters' memory.
            p.copy_(values[name])
