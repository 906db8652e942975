"""The tuner that puts Propulsion into a model."""

from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

from peft import PeftConfig
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer, check_target_module_exists
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn
from transformers.pytorch_utils import Conv1D

from propulsion.config import PropulsionConfig
from propulsion.layer import LAYERS, PropulsionLayer, layer_class
from propulsion.positions import base_modules, bypass, resolve
from propulsion.registration import PREFIX


class PropulsionModel(BaseTuner):
    """A model with Propulsion on the modules its config names (Kowsher et al. 2024); made by `peft.get_peft_model`.

    Adapter parameters are named ``<module>.propulsion_z.<adapter>``, each of shape (d_out,).

    Raises:
        ValueError: a module cannot be adapted, or a position does not exist in this architecture; nothing has been
            replaced then.

    Example:
        >>> from peft import get_peft_model
        >>> from torch import nn
        >>> from propulsion import PropulsionConfig
        >>> model = get_peft_model(nn.Sequential(nn.Linear(4, 3)), PropulsionConfig(degree=15))
        >>> [(name, tuple(p.shape)) for name, p in model.named_parameters() if p.requires_grad]
        [('base_model.model.0.propulsion_z.default', (3,))]
    """

    prefix: str = PREFIX
    tuner_layer_cls = PropulsionLayer

    def _prepare_adapter_config(self, peft_config: PeftConfig, model_config: dict) -> PeftConfig:
        """Resolve positions for the model at hand; `target_modules` stays unset, so that a reload resolves again."""
        assert isinstance(peft_config, PropulsionConfig)
        if peft_config.positions is not None:
            names = resolve(
                self.model, peft_config.positions, peft_config.layers_to_transform, peft_config.layers_pattern
            )
            # What peft's own matching reads, to apply its rules for exclude_modules and modules_to_save.
            vars(peft_config)["resolved"] = SimpleNamespace(
                target_modules=names,
                exclude_modules=peft_config.exclude_modules,
                modules_to_save=peft_config.modules_to_save,
            )
        return peft_config

    @staticmethod
    def _check_target_module_exists(peft_config: PeftConfig, key: str) -> Any:
        resolved = getattr(peft_config, "resolved", None)
        if resolved is None:
            return check_target_module_exists(peft_config, key)
        # peft also matches the ends of names; resolved names are complete.
        return check_target_module_exists(resolved, key) and key in resolved.target_modules

    def _prepare_model(self, peft_config: PeftConfig, model: nn.Module) -> None:
        """Check every target before the first is replaced."""
        assert isinstance(peft_config, PropulsionConfig)
        # peft expands "all-linear" only after this: until then every Linear is taken for a target.
        targets = peft_config.target_modules
        all_linear = isinstance(targets, str) and targets.lower() == "all-linear"
        names_by_module = _names_by_module(model)
        for name, base in base_modules(model).items():
            if not name:
                continue
            chosen = isinstance(base, (nn.Linear, Conv1D)) if all_linear else False
            if chosen or self._check_target_module_exists(peft_config, name):
                target = model.get_submodule(name)
                _check_target(model, name, target, names_by_module[id(target)])

    def _create_and_replace(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        peft_config: PropulsionConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
    ) -> None:
        if isinstance(target, PropulsionLayer):
            target.update_layer(adapter_name, peft_config)
            return
        layer = layer_class(target)
        assert layer is not None  # _prepare_model checked
        adapted = layer(target, adapter_name, peft_config)
        if adapter_name not in self.active_adapters:
            adapted.requires_grad_(False)  # a further adapter is trainable only once it is made active
        self._replace_module(parent, target_name, adapted, target)

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        if isinstance(child, AuxiliaryTrainingWrapper):
            # A head of several layers, trained beside the scales: peft would look for one `weight` on it.
            setattr(parent, child_name, new_module)
        else:
            super()._replace_module(parent, child_name, new_module, child)

    def _check_tied_modules(self, model: nn.Module, peft_config: PeftConfig) -> None:
        """Nothing to warn of: a tied embedding and head have one weight and each a z of its own."""

    def _check_merge_allowed(self) -> None:
        """Nothing to refuse: merging one of two tied modules unties them (`PropulsionLayer`)."""

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        # peft would drop the argument without a word and apply the active adapter to every example.
        if kwargs.get("adapter_names") is not None:
            raise ValueError(
                f"Propulsion does not mix adapters within a batch, got adapter_names={kwargs['adapter_names']!r}: "
                "run one batch per adapter, choosing it with set_adapter"
            )
        yield


def _check_target(model: nn.Module, name: str, target: nn.Module, names: list[str]) -> None:
    if isinstance(target, PropulsionLayer):
        return
    if isinstance(target, BaseTunerLayer):
        raise ValueError(
            f"expected module {name!r} to be plain, got one with another method's adapter ({type(target).__name__}): "
            "unload or merge that adapter first"
        )
    if layer_class(target) is None:
        supported = ", ".join(f"{kind.__module__}.{kind.__name__}" for kind in LAYERS)
        raise ValueError(
            f"expected module {name!r} to be one of {supported}, got the unsupported {type(target).__name__}: "
            "leave it out of target_modules, or exclude it with exclude_modules"
        )
    if reason := bypass(model, name):
        raise ValueError(
            f"scaling the output of module {name!r} would have no effect: {reason}. Leave it out of target_modules, or "
            "exclude it with exclude_modules"
        )
    if len(names) > 1:
        raise ValueError(
            f"expected every module under one name, got one as {' and '.join(map(repr, names))}: only one of its uses "
            "would be scaled. Exclude it with exclude_modules, or give each use a module of its own"
        )


def _names_by_module(model: nn.Module) -> dict[int, list[str]]:
    names: dict[int, list[str]] = defaultdict(list)
    for name, module in model.named_modules(remove_duplicate=False):
        names[id(module)].append(name)
    return names
