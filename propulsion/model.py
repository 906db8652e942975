"""The tuner that puts Propulsion into a model."""

import copy
import itertools
import math
import threading
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

from peft import PeftConfig
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer, check_target_module_exists
from peft.utils.other import AuxiliaryTrainingWrapper, ModulesToSaveWrapper, get_pattern_key
from torch import nn
from transformers.pytorch_utils import Conv1D

from propulsion import heads
from propulsion.config import PropulsionConfig
from propulsion.layer import BASE, PropulsionLayer, adapted_layers
from propulsion.layers import LAYERS, layer_class
from propulsion.positions import base_modules, bypass, leaves_outputs_alone, resolve, shared_by_all_examples
from propulsion.registration import PREFIX
from propulsion.scale import root
from propulsion.training_checks import is_watched, unwatched, watch


class PropulsionModel(BaseTuner):
    """A model with Propulsion on the modules that its config names (Kowsher et al. 2024): see `peft.get_peft_model`.

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
        """Resolve positions for this model. `target_modules` stays unset, so that loading resolves them again."""
        assert isinstance(peft_config, PropulsionConfig)
        _train_head(self.model, peft_config)
        if peft_config.positions is not None:
            names = resolve(
                self.model, peft_config.positions, peft_config.layers_to_transform, peft_config.layers_pattern
            )
            # Attributes that peft's matching reads to apply its rules for exclude_modules and modules_to_save.
            vars(peft_config)["resolved"] = SimpleNamespace(
                target_modules=names,
                exclude_modules=peft_config.exclude_modules,
                modules_to_save=peft_config.modules_to_save,
            )
        return peft_config

    @staticmethod
    def _check_target_module_exists(peft_config: PeftConfig, key: str) -> Any:
        # peft matches modules_to_save by the end of a name: "classifier" also matches DistilBERT's "pre_classifier".
        if any(key.endswith(name) for name in getattr(peft_config, "modules_to_save", None) or ()):
            return False
        resolved = getattr(peft_config, "resolved", None)
        if resolved is None:
            return check_target_module_exists(peft_config, key)
        # peft matches ends of names; resolved names are whole.
        return check_target_module_exists(resolved, key) and key in resolved.target_modules

    def _prepare_model(self, peft_config: PeftConfig, model: nn.Module) -> None:
        """Check every target before the first is replaced."""
        assert isinstance(peft_config, PropulsionConfig)
        # peft expands "all-linear" later: until then every Linear counts as a target.
        targets = peft_config.target_modules
        all_linear = isinstance(targets, str) and targets.lower() == "all-linear"
        uses = Counter(module for _, module in model.named_modules(remove_duplicate=False))
        for name, base in base_modules(model).items():
            chosen = all_linear and isinstance(base, (nn.Linear, Conv1D))
            if name and (chosen or self._check_target_module_exists(peft_config, name)):
                _check_target(model, name, uses[model.get_submodule(name)])
                _check_basis(base, name, peft_config)
                _warn_of_head(model, name)

    def _create_and_replace(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, peft_config: PropulsionConfig, adapter_name: str, target: nn.Module, target_name: str, parent: nn.Module,
        current_key: str,
    ) -> None:  # fmt: skip
        lean = peft_config.degree > 1 and leaves_outputs_alone(self.model)
        if isinstance(target, PropulsionLayer):
            target.update_layer(adapter_name, peft_config, current_key, lean=lean)
            return
        layer = layer_class(target)
        assert layer is not None  # _prepare_model checked
        adapted = layer(target, adapter_name, peft_config, current_key, lean=lean)
        if adapter_name not in self.active_adapters:
            adapted.requires_grad_(False)  # a further adapter is trainable once it is active
        self._replace_module(parent, target_name, adapted, target)

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        if isinstance(child, AuxiliaryTrainingWrapper):
            # A trained head of several layers has no `weight`, which peft's method reads.
            setattr(parent, child_name, new_module)
        else:
            super()._replace_module(parent, child_name, new_module, child)

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> Any:
        """As in peft; the first steps of training will be checked (`propulsion.training_checks`)."""
        result = super().inject_adapter(model, adapter_name, *args, **kwargs)
        layers = adapted_layers(model)
        for layer in layers:
            layer._together = layers
        _warn_of_patterns(model, adapter_name, self.peft_config[adapter_name])
        watch(model)
        return result

    def _mark_only_adapters_as_trainable(self, model: nn.Module) -> None:
        """As in peft, which reads the biases to be trained from the adapted layers; here it reads them unscaled."""
        with _read_as(model, []):
            super()._mark_only_adapters_as_trainable(model)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Call the wrapped model."""
        return self.model(*args, **kwargs) if is_watched(self.model) else self.model.forward(*args, **kwargs)

    def unload(self) -> nn.Module:
        """Return the base model without adapters; merged ones are unmerged first."""
        if any(layer.merged for layer in adapted_layers(self)):
            self.unmerge_adapter()
        return unwatched(super().unload())

    def merge_adapter(self, adapter_names: list[str] | None = None, safe_merge: bool = False) -> None:
        """As in peft, if the trained heads in use are those of the adapters to merge."""
        heads.check_merged_with_head(self.model, adapter_names)
        super().merge_adapter(adapter_names, safe_merge)

    def merge_and_unload(
        self, progressbar: bool = False, safe_merge: bool = False, adapter_names: list[str] | None = None
    ) -> nn.Module:
        """Return the base model with the adapters merged into it, and with their trained heads."""
        heads.check_merged_with_head(self.model, adapter_names)
        return unwatched(super().merge_and_unload(progressbar, safe_merge, adapter_names))

    def _check_tied_modules(self, model: nn.Module, peft_config: PeftConfig) -> None:
        """Do nothing: a tied embedding and head share a weight, and each has its own z."""

    def _check_merge_allowed(self) -> None:
        """Do nothing: merging one of two tied modules unties them (`PropulsionLayer`)."""

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        """Pass `adapter_names`, one for each example, to every adapted layer that this thread calls."""
        names = kwargs.get("adapter_names")
        if names is None:
            yield
            return
        if self.training:
            raise ValueError("expected a model in evaluation mode for adapter_names: call eval() first")
        if unknown := sorted(set(names) - {BASE, *self._adapters()}):
            # The wording of peft, which users search for.
            raise ValueError(f"Trying to infer with non-existing adapter(s): {', '.join(unknown)}")
        beams = kwargs.get("num_beams")
        repeated = [name for name in names for _ in range(beams)] if isinstance(beams, int) and beams > 1 else names

        # `get_encoder` of a decoder-only model may return the decoder.
        two_sided = beams and getattr(getattr(self.model, "config", None), "is_encoder_decoder", False)
        encoder: Any = self.model.get_encoder() if two_sided else None
        inside = {id(module) for module in encoder.modules()} if isinstance(encoder, nn.Module) else set()

        def of(module: nn.Module) -> list[str]:
            return names if id(module) in inside else repeated  # the encoder runs before rows are repeated for beams

        thread = threading.get_ident()  # Hooks also run where another thread calls the model.

        def hand_over(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]] | None:
            return (args, {**kwargs, "adapter_names": of(module)}) if threading.get_ident() == thread else None

        def by_own_copies(module: Any, args: tuple, kwargs: dict[str, Any], output: Any) -> Any:
            return heads.of_each_example(module, of(module), args, kwargs) if threading.get_ident() == thread else None

        handles = []
        try:
            for name, module in self.model.named_modules():
                if isinstance(module, PropulsionLayer) and shared_by_all_examples(self.model, name):
                    if set(names) & set(module.propulsion_z):
                        raise ValueError(
                            f"the output of {name!r} is shared by all examples of a batch, and cannot be scaled by "
                            "each one's own adapter: leave it out of the adapters (exclude_modules) to mix them"
                        )
                elif isinstance(module, ModulesToSaveWrapper):
                    handles.append(module.register_forward_hook(by_own_copies, with_kwargs=True))
                elif isinstance(module, (PropulsionLayer, AuxiliaryTrainingWrapper)):
                    handles.append(module.register_forward_pre_hook(hand_over, with_kwargs=True))
            with _read_as(self.model, names):
                yield
        finally:
            for handle in handles:
                handle.remove()

    def _adapters(self) -> set[str]:
        """Names of the adapters of all layers and trained modules."""
        found: set[str] = set()
        for module in self.modules():
            if isinstance(module, PropulsionLayer):
                found |= set(module.propulsion_z)
            elif isinstance(module, AuxiliaryTrainingWrapper):
                found |= set(module._adapters)
        return found

    def add_weighted_adapter(self, adapters: list[str], weights: list[float], adapter_name: str) -> None:
        """Add an adapter whose scale is the geometric combination of others': s = prod_i sign(s_i) |s_i|^w_i.

        Scales multiply: weights of 1 compose the adapters, as merging them one after another would, and weights of 1/m
        give their geometric mean. Several vectors of one module enter by their pooled scale. Modules that were trained
        in full, such as heads, become their weighted mean (`propulsion.heads`).

        Args:
            adapters: names of the adapters to combine; each layer combines those that it has.
            weights: one finite number for each.
            adapter_name: name of the new adapter, which gets the degree of the first.

        Raises:
            ValueError: an adapter does not exist, the name is taken, the numbers of adapters and weights differ, a
                weight is not finite, a combined scale is negative at an even degree, an adapter trains biases, the
                bases differ, or the weights of adapters with a head do not sum to 1. Nothing has changed then.
        """
        if adapter_name in self.peft_config:
            raise ValueError(f"expected a new name for the combined adapter, got {adapter_name!r}, which exists")
        if isinstance(adapters, str) or not all(isinstance(each, (list, tuple)) for each in (adapters, weights)):
            raise ValueError(f"expected a list of adapters and one of weights, got {adapters!r} and {weights!r}")
        if missing := [name for name in adapters if name not in self.peft_config]:
            raise ValueError(f"expected existing adapters, got {missing}; there are {list(self.peft_config)}")
        numeric = all(isinstance(weight, (int, float)) and math.isfinite(weight) for weight in weights)
        if not adapters or len(adapters) != len(weights) or not numeric:
            raise ValueError(f"expected one finite weight for each of {adapters}, got {weights}")
        if trains_biases := [name for name in adapters if getattr(self.peft_config[name], "bias", "none") != "none"]:
            raise ValueError(
                f"expected adapters that train no biases, got {trains_biases}: those are the model's own, and a "
                "combined adapter would be saved without them"
            )
        if len(bases := {_basis(self.peft_config[name]) for name in adapters}) > 1:
            raise ValueError(
                f"expected adapters of one basis and basis_seed, got {sorted(map(str, bases))}: merge them"
            )
        means = heads.combined(self.model, adapters, weights)
        combined: dict[PropulsionLayer, Any] = {}
        for layer in adapted_layers(self):
            present = [(n, w) for n, w in zip(adapters, weights, strict=True) if n in layer.propulsion_z]
            if present:
                factors = [_weighed(layer.scale([name]), weight) for name, weight in present]
                combined[layer] = math.prod(factors[1:], start=factors[0])
        config = copy.copy(self.peft_config[adapters[0]])
        assert isinstance(config, PropulsionConfig)
        degrees = {layer: layer.degree.get(adapters[0], config.degree) for layer in combined}
        values = {layer: root(scale, degrees[layer]) for layer, scale in combined.items()}
        config.vectors, config.init_weights, config.init_value, config.init_noise = 1, True, 1.0, 0.0
        if len({_targets(self.peft_config[name]) for name in adapters}) > 1:
            names = {name for name, module in self.model.named_modules() if module in combined}
            config.positions, config.target_modules, config.exclude_modules = None, names, None
            config.layers_to_transform = config.layers_pattern = None
            vars(config).pop("resolved", None)
        saved = [name for other in adapters for name in getattr(self.peft_config[other], "modules_to_save", None) or ()]
        config.modules_to_save = list(dict.fromkeys(saved)) or None
        config.task_type = next((t for name in adapters if (t := self.peft_config[name].task_type)), None)
        self.peft_config[adapter_name] = config
        try:
            self.inject_adapter(self.model, adapter_name)
        except Exception:
            self.peft_config.pop(adapter_name)
            raise
        trained = heads.trained_modules(self.model)
        for name, head in means.items():
            trained[name].modules_to_save[adapter_name].load_state_dict(head)
        for layer, z in values.items():
            new = layer.propulsion_z[adapter_name]
            layer.degree[adapter_name] = degrees[layer]
            new.data.copy_(z)
            new.requires_grad_(False)


@contextmanager
def _read_as(model: nn.Module, adapter_names: list[str]) -> Iterator[None]:
    """In the block, weights that the model reads from layers are scaled by these adapters, not by the active ones.

    This holds for the calling thread alone.
    """
    layers, thread = adapted_layers(model), threading.get_ident()
    for layer in layers:
        layer._of_examples[thread] = adapter_names
    try:
        yield
    finally:
        for layer in layers:
            del layer._of_examples[thread]


def _weighed(scale: Any, weight: float) -> Any:
    return scale.detach().sign() * scale.detach().abs() ** weight


def _basis(config: PeftConfig) -> tuple[str, int] | str:
    basis = getattr(config, "basis", "coordinates")
    return basis if basis == "coordinates" else (basis, getattr(config, "basis_seed", 0))


def _targets(config: PeftConfig) -> str:
    fields = ("target_modules", "positions", "exclude_modules", "layers_to_transform", "layers_pattern")
    values = [getattr(config, name) for name in fields]
    return repr([sorted(v) if isinstance(v, (set, list)) else v for v in values])


def _check_target(model: nn.Module, name: str, uses: int) -> None:
    target = model.get_submodule(name)
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
    if uses > 1:
        names = [other for other, module in model.named_modules(remove_duplicate=False) if module is target]
        raise ValueError(
            f"expected every module under one name, got one as {' and '.join(map(repr, names))}: only one of its uses "
            "would be scaled. Exclude it with exclude_modules, or give each use a module of its own"
        )


def _check_basis(base: nn.Module, name: str, config: PropulsionConfig) -> None:
    layer = layer_class(base)
    if config.basis == "rotated" and layer is not None and not layer.rotates:
        raise ValueError(
            f"basis='rotated' is for linear layers and embeddings, got {name!r}, a {type(base).__name__}: leave it out "
            "of target_modules, or exclude it with exclude_modules"
        )


def _train_head(model: nn.Module, config: PropulsionConfig) -> None:
    """Add the modules of the task's head that peft does not know by name to `modules_to_save`.

    Examples are DeBERTa's pooler and BART's head. Modules that the configuration excludes stay frozen.
    """
    if config.task_type not in heads.HEADED or config.inference_mode:
        return
    excluded = SimpleNamespace(target_modules=config.exclude_modules or [])
    names, head = [name for name, _ in model.named_modules()], heads.head_modules(model)
    for module in head:
        known = any(module.endswith(name) for name in config.modules_to_save or ())
        if known or check_target_module_exists(excluded, module):
            continue
        # peft matches modules_to_save by the end of their names.
        others = [n for n in names if n.endswith(module) and n.partition(".")[0] not in head]
        if others:
            warnings.warn(
                f"{module!r} is part of the head of {type(model).__name__} and stays frozen: peft chooses modules by "
                f"the end of their name, and would train {others[0]!r} too. If the head is new, and so random, rename "
                "it, or train both with modules_to_save",
                stacklevel=2,
            )
            continue
        config.modules_to_save = [*(config.modules_to_save or []), module]
    saved = tuple(config.modules_to_save or ())
    untrained = [
        name
        for name in heads.random_in_body(model)
        # Neither the module nor one that contains it is trained.
        if not any(part.endswith(saved) for part in itertools.accumulate(name.split("."), "{}.{}".format))
    ]
    if untrained:
        warnings.warn(
            f"the checkpoint of {type(model).__name__} lacks {', '.join(untrained)}, whose weights are random and stay "
            f"so: train them with modules_to_save=[{untrained[0]!r}], or use a checkpoint that has them",
            stacklevel=2,
        )


def _warn_of_head(model: nn.Module, name: str) -> None:
    """Warn if a task's head gets a scale, but its weight stays random."""
    body = getattr(model, "base_model_prefix", "")
    is_classifier = type(model).__name__.endswith(("Classification", "QuestionAnswering"))
    if is_classifier and hasattr(model, body) and not name.startswith(f"{body}."):
        warnings.warn(
            f"{name!r} is part of the head of {type(model).__name__}: its output gets a scale and its weight stays "
            "frozen. If the head is new, and so random, train it: give task_type='SEQ_CLS' or modules_to_save",
            stacklevel=2,
        )


def _warn_of_patterns(model: nn.Module, adapter_name: str, config: PeftConfig) -> None:
    """Warn of degree patterns that match no adapted module."""
    names = [
        name
        for name, module in model.named_modules()
        if isinstance(module, PropulsionLayer) and adapter_name in module.propulsion_z
    ]
    patterns = getattr(config, "degree_pattern", None) or {}
    if unused := [p for p in patterns if not any(get_pattern_key([p], name) == p for name in names)]:
        warnings.warn(f"degree_pattern {unused} matches no adapted module: correct it, or drop it", stacklevel=2)
