"""The methods whose kernels are compared, by their names in tables and figures."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn

from analyses.subjects.parameters import backbone_prefix
from ntk import adapters
from ntk.adapters import Backbone, Method, Propulsion, layers_of
from propulsion.errors import UserError
from propulsion.methods import Method as TrainedMethod
from propulsion.methods import check_options
from propulsion.positions import resolve

FULL, REFERENCE = "full fine-tuning", "Propulsion"


@dataclass(frozen=True)
class MethodChoice:
    """Methods compared besides full fine-tuning, Propulsion on every layer, BitFit and norm tuning."""

    positions: tuple[str, ...] = ("attn", "mlp", "embedding", "query", "key", "value", "attention_output")
    """Positions, for each of which there is Propulsion on these layers alone; the model must have them."""
    ia3_positions: tuple[str, ...] = ("key", "value")
    """Layers whose outputs (IA)³ scales; without any, (IA)³ is left out."""
    degrees: tuple[float, ...] = (15.0, 55.0)
    """Degrees of Propulsion besides 1, to show that the degree changes only the size of the kernel."""
    ranks: tuple[int, ...] = (1, 8, 64)
    """Ranks of LoRA; LoHa and DoRA have the middle one."""
    vera_rank: int = 256
    """Rank of VeRA's shared matrices."""
    subset: int = 384
    """Weights of each layer that the random subset trains."""

    def check(self) -> None:
        """Raise UserError if a number is out of range, or a position unknown."""
        for positions in (self.positions, self.ia3_positions):
            if positions:
                check_options(TrainedMethod("propulsion", {"positions": list(positions)}))
        for name in ("vera_rank", "subset"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} must be at least 1; got {getattr(self, name)}")
        if not self.ranks or min(self.ranks) < 1:
            raise UserError(f"ranks must be one or more numbers of at least 1; got {self.ranks}")
        if not all(degree > 0 for degree in self.degrees):
            raise UserError(f"degrees must be positive; got {self.degrees}")


def with_degree(degree: float) -> str:
    """The name of Propulsion of this degree on every layer."""
    return f"{REFERENCE}, degree {degree:g}"


def methods_of(model: Any, choice: MethodChoice, seed: int) -> tuple[dict[str, Method], dict[str, str]]:
    """Every method by its name, full fine-tuning first; and, by name, the reasons why others are left out.

    Raises:
        UserError: The model has no layer at a position.
    """
    linear: dict[str, Any] = {n: m for n, m in layers_of(model).items() if not isinstance(m, nn.Embedding)}

    def at(*positions: str) -> Callable[[str], bool]:
        try:
            return resolve(model, positions).__contains__
        except ValueError as error:
            raise UserError(str(error)) from error

    longest = max(max(m.weight.shape) for m in linear.values())
    rank = sorted(choice.ranks)[len(choice.ranks) // 2]
    names = linear.__contains__
    shared = (adapters.kaiming_uniform((choice.vera_rank, longest), f"{seed}.vera.a"),
              adapters.kaiming_uniform((longest, choice.vera_rank), f"{seed}.vera.b"))  # fmt: skip
    every = at("all")
    found: dict[str, Method] = {
        FULL: adapters.Full(),
        REFERENCE: Propulsion(modules=every),
        **{with_degree(k): Propulsion(k, every) for k in choice.degrees},
        **{f"Propulsion, {p}": Propulsion(modules=at(p)) for p in choice.positions},
        "BitFit": adapters.BitFit(),
        "norm tuning": adapters.NormTuning(),
        **({"(IA)³": adapters.IA3(at(*choice.ia3_positions))} if choice.ia3_positions else {}),
        **{f"LoRA, rank {r}": adapters.LoRA(rank=r, modules=names, seed=seed) for r in choice.ranks},
        f"DoRA, rank {rank}": adapters.DoRA(rank=rank, modules=names, seed=seed),
        f"VeRA, rank {choice.vera_rank}": adapters.VeRA(*shared, modules=names),
        f"LoHa, rank {rank}": adapters.LoHa(rank=rank, modules=names, seed=seed),
        f"{choice.subset} weights a layer": adapters.RandomSubset(choice.subset, names, seed),
    }
    kept = {name: Backbone(method, backbone_prefix(model)) for name, method in found.items()}
    why = f"{type(model).__name__} has no parameter that it would train"
    left_out = {name: why for name, method in kept.items() if not _trains(model, method)}
    return {name: method for name, method in kept.items() if name not in left_out}, left_out


def _trains(model: nn.Module, method: Method) -> bool:
    """True if a method trains a parameter of the model."""
    if any(method.adapts(name) for name in layers_of(model)):
        return True
    return any(
        method.share(f"{prefix}.{name}" if prefix else name, p, module, None)
        for prefix, module in model.named_modules()
        for name, p in module.named_parameters(recurse=False)
    )
