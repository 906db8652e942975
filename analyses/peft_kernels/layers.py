"""Agreement of the kernels of full fine-tuning and Propulsion by block and kind of layer.

Both kernels are sums over layers: K_F of the kernels of all weights (and of biases and norms), K_P of the kernels of
the vectors z of every layer. Each place in the network, a kind of layer in a block, has a term in both sums.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

import ntk
from analyses.core.comparison import SeedComparison
from analyses.peft_kernels.methods import FULL, REFERENCE
from analyses.subjects.parameters import SelectedParameters, is_backbone
from ntk.adapters import Method, Propulsion, layers_of
from propulsion.positions import resolve

# Kinds of layers in a block, in the order in which they run; layers of other kinds are in no block.
KINDS = ("query", "key", "value", "attention", "attention output", "MLP up", "MLP down")
EMBEDDING, POOLER, OTHER, VECTORS = "embedding", "pooler", "other", "biases and norms"
_POSITIONS = {"query": "query", "key": "key", "value": "value", "attention output": "attention_output"}


@dataclass(frozen=True)
class Place:
    """Layers of one kind in one block.

    Attributes:
        kind: One of `KINDS`; or `EMBEDDING`, `POOLER`, `OTHER` or `VECTORS`, which have no block.
        block: Number of the block; None outside of blocks.
        modules: Names of the layers; empty for `VECTORS`.
        parameters: Names of the parameters that full fine-tuning trains there.
    """

    kind: str
    block: int | None
    modules: tuple[str, ...]
    parameters: tuple[str, ...]

    @classmethod
    def of(cls, row: Mapping[str, Any]) -> "Place":
        """A place from its fields, as a stored cell has them."""
        return cls(row["kind"], row["block"], tuple(row["modules"]), tuple(row["parameters"]))

    @property
    def label(self) -> str:
        """Its name in tables."""
        return label_of(self.kind, self.block)


def label_of(kind: str, block: int | None) -> str:
    """The name of a place in tables."""
    return kind if block is None else f"block {block}, {kind}"


def places_of(model: Any) -> list[Place]:
    """Every place of a model's backbone, by block and kind; each parameter of the backbone is in one place.

    Of a block's MLP layers the last counts as "MLP down" and those before it, including gates, as "MLP up". "attention"
    is a layer that computes query, key and value at once. An embedding that is tied to the readout counts as an
    embedding, with both of its uses.
    """
    kinds = _kinds(model)
    found: dict[tuple[int | None, str], tuple[list[str], list[str]]] = {}
    names = {id(p): name for name, p in model.named_parameters()}
    for module, layer in layers_of(model).items():
        kind = kinds.get(module, POOLER if "pooler" in module.split(".") else OTHER)
        block = _block(module) if kind in KINDS else None
        modules, weights = found.setdefault((block, kind), ([], []))
        modules.append(module)
        weight = names.pop(id(layer._parameters.get("weight")), None)  # A shared weight belongs to its first layer.
        weights.extend([] if weight is None else [weight])
    counted = {name for _, weights in found.values() for name in weights}
    rest = [name for name, _ in model.named_parameters() if is_backbone(model, name) and name not in counted]
    if rest:
        found[None, VECTORS] = ([], rest)
    order = (EMBEDDING, *KINDS, POOLER, OTHER, VECTORS)
    places = [Place(kind, block, tuple(m), tuple(w)) for (block, kind), (m, w) in found.items()]
    return sorted(places, key=lambda p: (order.index(p.kind) if p.block is None else 1, p.block or 0,
                                         order.index(p.kind)))  # fmt: skip


def place_methods(places: Sequence[Place]) -> dict[str, Method]:
    """Full fine-tuning and Propulsion of each place, with the names "full: LABEL" and "Propulsion: LABEL"."""
    methods: dict[str, Method] = {}
    for place in places:
        own = frozenset(place.parameters)
        methods[f"full: {place.label}"] = SelectedParameters(lambda name, parameter, own=own: name in own)
        if place.modules:
            methods[f"Propulsion: {place.label}"] = Propulsion(modules=frozenset(place.modules).__contains__)
    return methods


def agreement(places: Sequence[Place], comparison: SeedComparison) -> list[dict[str, Any]]:
    """One row for each place: means over seeds, and the 95 % intervals of the CKAs.

    | column | |
    |---|---|
    | kind, block, layers | the place, and the number of its layers |
    | cka | CKA of the place's two kernels |
    | propulsion_cka | CKA of the place's K_P with the whole K_F |
    | full_cka | CKA of the place's K_F with the whole K_F |
    | full_share, propulsion_share | the place's share of tr K_F and of tr K_P |

    Each CKA has its interval in columns with ``_low`` and ``_high``. A value that a place does not have is None.
    """
    rows = []
    for place in places:
        full, propulsion = f"full: {place.label}", f"Propulsion: {place.label}" if place.modules else None
        row: dict[str, Any] = {"kind": place.kind, "block": place.block, "layers": len(place.modules)}
        for column, left, right in (("cka", full, propulsion), ("propulsion_cka", FULL, propulsion),
                                    ("full_cka", FULL, full)):  # fmt: skip
            found = comparison.measure("cka", ntk.cka, "", left, right) if right else None
            ends = (None, None, None) if found is None else (found.value, found.low, found.high)
            row |= dict(zip((column, f"{column}_low", f"{column}_high"), ends, strict=True))
        row["full_share"] = comparison.mean(ntk.trace_ratio, full, FULL)
        row["propulsion_share"] = comparison.mean(ntk.trace_ratio, propulsion, REFERENCE) if propulsion else None
        rows.append(row)
    return rows


def _kinds(model: Any) -> Mapping[str, str]:
    """The kind of each layer at one of the positions that the model's family names."""
    kinds: dict[str, str] = {name: kind for kind, p in _POSITIONS.items() for name in _at(model, p)}
    kinds |= {name: "attention" for name in _at(model, "attn") if name not in kinds}
    kinds |= {name: EMBEDDING for name in _at(model, "embedding")}
    mlp, last = _at(model, "mlp"), {}
    for name, _ in model.named_modules():
        if name in mlp:
            kinds[name] = "MLP up"
            last[_block(name)] = name
    return kinds | {name: "MLP down" for name in last.values()}


def _at(model: nn.Module, position: str) -> set[str]:
    """Layers at a position; empty if the model has no such position."""
    try:
        return resolve(model, position)
    except ValueError:
        return set()


def _block(name: str) -> int | None:
    return next((int(part) for part in name.split(".")[:-1] if part.isdigit()), None)
