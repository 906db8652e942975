"""The configuration of Propulsion."""

import math
import numbers
import re
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import ClassVar

from peft import PeftConfig

from propulsion.errors import did_you_mean
from propulsion.positions import POSITIONS
from propulsion.registration import METHOD, PROPULSION
from propulsion.rotation import BASES
from propulsion.scale import POOLINGS

BIASES = ("none", "all", f"{METHOD}_only")

# Near 1, neighbouring float32 values of z are 1e-7 apart, and change z^k by a tenth at this degree.
LARGEST_DEGREE = 1_000_000


@dataclass
class PropulsionConfig(PeftConfig):
    """Configuration of Propulsion, y = z^k * v for the output v of a layer (Kowsher et al. 2024, Eq. 1-3).

    Modules are chosen by either `positions` or `target_modules`; the default is ``positions="all"``. With a task type
    that has a new head, such as ``task_type="SEQ_CLS"``, the whole head is added to `modules_to_save`: it is trained in
    full, and not adapted. Without a task type, the head is adapted like any other module.

    Args:
        degree: k > 0. An integer gives z^k; another real gives sign(z) |z|^k, which is finite for every z.
        target_modules: Names of modules, or one regular expression, as for peft's methods ("all-linear" included).
        positions: One or several of "all", "attn", "query", "key", "value", "attention_output", "mlp", "embedding";
            resolved to modules by architecture (`propulsion.positions`).
        exclude_modules: Names of modules, or one regular expression, to leave alone.
        modules_to_save: Modules to train and save in full; never adapted.
        layers_to_transform: Indices of the blocks to adapt; modules outside numbered blocks are then left alone.
        layers_pattern: Name of the list of blocks, where the first number in a module's name is not the block.
        bias: Biases to train besides z: "none", "all", or "propulsion_only" (those of adapted modules).
        init_weights: False adds noise of standard deviation 0.02 to the initial z of the next two fields, for tests.
        init_value: Initial value of z. With 1 the model starts unchanged.
        init_noise: Standard deviation of noise added to z, from torch's global generator.
        degree_pattern: Degrees of single modules, by the end of their name or a regular expression for it, as LoRA's
            ``rank_pattern``.
        vectors: Number p of vectors of each module, whose scales are pooled (the paper's multi-propulsion, App. F).
            They start with scales that differ by 2 %, since equal vectors would stay equal, and with the pooled scale
            init_value^k. Every pooling merges.
        pooling: "mean", "max", "min" or "l2" (the root mean square), over the p scales.
        lean: In training, keep a layer's scaled output for the backward pass, and not its unscaled one
            (`propulsion.scaled_output`): less memory and time, and a gradient of z that is exact up to two roundings.
            Models that write into their layers' outputs in place (Falcon, ``nn.ReLU(inplace=True)``) raise an error.
            None means True at degrees above 1 in architectures that are known not to write in place, else False; at
            degree 1, Propulsion is therefore (IA)3 to the last bit.
        basis: "coordinates" of the output; or "rotated", where z^k multiplies its coordinates in a fixed random
            orthogonal basis, y = Q^T (z^k * Q v) (`propulsion.rotation`), for linear layers and embeddings. It is a
            control, and costs two products of a square layer's size more.
        basis_seed: seed of Q, which is saved in place of Q.

    Raises:
        ValueError: a field has an invalid value, or two fields contradict each other; the message says what to change.
    """

    degree: int | float = 15
    target_modules: list[str] | set[str] | str | None = None
    positions: list[str] | tuple[str, ...] | str | None = None
    exclude_modules: list[str] | set[str] | str | None = None
    modules_to_save: list[str] | None = None
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None
    bias: str = "none"
    init_weights: bool = True
    init_value: float = 1.0
    init_noise: float = 0.0
    degree_pattern: dict[str, int | float] = field(default_factory=dict)
    vectors: int = 1
    pooling: str = "mean"
    lean: bool | None = None
    basis: str = "coordinates"
    basis_seed: int = 0

    # Module names of the positions in one model. This is not a field, so that it is not saved with the configuration.
    resolved: ClassVar[SimpleNamespace | None] = None

    def __post_init__(self):
        super().__post_init__()
        self.peft_type = PROPULSION
        self.degree = _checked_degree(self.degree)
        if not isinstance(self.degree_pattern or {}, dict):
            raise ValueError(f"degree_pattern maps names of modules to degrees, got {self.degree_pattern!r}")
        self.degree_pattern = {name: _checked_degree(degree) for name, degree in (self.degree_pattern or {}).items()}
        _check_start(self)
        _check_names(self)
        if self.target_modules is None:
            self.positions = _checked_positions("all" if self.positions is None else self.positions)
        elif self.positions is not None:
            raise ValueError(
                f"expected target_modules or positions, got both ({self.target_modules!r} and {self.positions!r}): "
                "drop one of them"
            )
        elif not self.target_modules:
            raise ValueError(f"expected at least one target module, got {self.target_modules!r}: name some, or drop it")
        if self.bias not in BIASES:
            close = did_you_mean(str(self.bias), BIASES)
            raise ValueError(f"bias must be one of {', '.join(map(repr, BIASES))}; got {self.bias!r}{close}")
        if self.layers_pattern and self.layers_to_transform is None:
            raise ValueError("layers_pattern needs layers_to_transform, got None: give the indices of the blocks")
        if self.layers_to_transform is not None and isinstance(self.target_modules, str):
            raise ValueError(
                "layers_to_transform works with positions or a list of target_modules, got the expression "
                f"{self.target_modules!r}: choose the blocks within the expression"
            )
        if isinstance(self.modules_to_save, str):
            self.modules_to_save = [self.modules_to_save]
        # peft looks names up in sets, and saves them as lists.
        if isinstance(self.target_modules, list):
            self.target_modules = set(self.target_modules)
        if isinstance(self.exclude_modules, list):
            self.exclude_modules = set(self.exclude_modules)


def _checked_degree(degree: int | float) -> int | float:
    """Return an integral degree as an int, so that z^k is then an integer power however k was written."""
    is_number = isinstance(degree, numbers.Real) and not isinstance(degree, bool)
    if not is_number or not 0 < degree < float("inf"):
        raise ValueError(f"degree must be a finite number > 0, got {degree!r}: use for example 15, the paper's")
    if degree > LARGEST_DEGREE:
        raise ValueError(
            f"degree must be at most {LARGEST_DEGREE:,}, got {degree!r}: z^k would change too much between "
            "neighbouring float32 values of z"
        )
    return int(degree) if degree == int(degree) else float(degree)


def _check_names(config: PropulsionConfig) -> None:
    """Raise for module names that are neither a list nor a string, and for invalid regular expressions."""
    for name in ("target_modules", "exclude_modules"):
        value = getattr(config, name)
        if isinstance(value, tuple):
            setattr(config, name, value := list(value))
        if value is not None and not isinstance(value, (str, list, set)):
            raise ValueError(f"{name} must be a list of names or one regular expression, got {value!r}")
        if isinstance(value, str):
            try:
                re.compile(value)
            except re.error as error:
                raise ValueError(f"{name} must be a valid regular expression, got {value!r}: {error}") from error


def _check_start(config: PropulsionConfig) -> None:
    for name in ("init_value", "init_noise"):
        value = getattr(config, name)
        if isinstance(value, bool) or not isinstance(value, numbers.Real) or not math.isfinite(value):
            raise ValueError(f"{name} must be a finite number, got {value!r}")
    if config.init_noise < 0:
        raise ValueError(f"init_noise is a standard deviation and must be >= 0, got {config.init_noise!r}")
    if isinstance(config.vectors, bool) or not isinstance(config.vectors, int) or config.vectors < 1:
        raise ValueError(f"vectors must be a whole number >= 1, got {config.vectors!r}")
    if config.lean not in (None, True, False):
        raise ValueError(f"lean must be True, False or None, got {config.lean!r}")
    if config.pooling not in POOLINGS:
        close = did_you_mean(str(config.pooling), POOLINGS)
        raise ValueError(f"pooling must be one of {', '.join(map(repr, POOLINGS))}; got {config.pooling!r}{close}")
    if config.basis not in BASES:
        close = did_you_mean(str(config.basis), BASES)
        raise ValueError(f"basis must be one of {', '.join(map(repr, BASES))}; got {config.basis!r}{close}")
    if isinstance(config.basis_seed, bool) or not isinstance(config.basis_seed, int):
        raise ValueError(f"basis_seed must be a whole number, got {config.basis_seed!r}")
    if config.vectors > 1 and config.init_value <= 0:
        raise ValueError(
            f"several vectors need an init_value > 0, got {config.init_value!r}: their initial values are spread in "
            "proportion to it, and vectors that start equal stay equal"
        )


def _checked_positions(positions: list[str] | tuple[str, ...] | str) -> list[str] | str:
    is_several = isinstance(positions, (list, tuple, set))
    names: list = list(positions) if is_several else [positions]
    unknown = [name for name in names if name not in POSITIONS]
    if unknown or not names:
        close = did_you_mean(str(unknown[0]), POSITIONS) if unknown else ""
        raise ValueError(
            f"positions must be one or several of {', '.join(map(repr, POSITIONS))}; got {positions!r}{close}. "
            "Name other modules with target_modules"
        )
    return positions if isinstance(positions, str) else names
