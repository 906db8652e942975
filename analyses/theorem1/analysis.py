"""The cases of Theorem 1, their kernels and distances, and the command of the analysis."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import ntk
from analyses.core.analysis import Analysis, Findings, Output
from analyses.core.comparison import directions
from analyses.records import Block, Metric, Result, number, summary_of_blocks
from analyses.theorem1.positions import POSITIONS, distances, rows_of, transformer_kernels
from ntk.infinite import ACTIVATIONS, mlp_kernels, propulsion_by_integration, residual_kernels
from ntk.infinite.networks import MLP, Recipe, ResidualMLP, Transformer, is_multiplier
from propulsion.errors import UserError

Kernels = tuple[Tensor, Tensor, Tensor]  # Full fine-tuning of all parameters, of the weights, and Propulsion.
MEASURES = ("literal", "corrected", "best_scale", "cka", "trace_ratio")


@dataclass(frozen=True)
class Config(Output):
    """Options of the analysis."""

    inputs: int = 6
    """Number of random inputs of the random networks."""
    n_in: int = 512
    """Coordinates of an input; the kernel of scales on the input is close to its mean if there are many."""
    width: int = 512
    """Width of the finite networks."""
    depth: int = 3
    """Number of hidden layers, or of transformer blocks."""
    draws: int = 4
    """Finite networks of each kind, whose kernels are averaged."""
    transformer_widths: tuple[int, ...] = (32, 64, 128, 256)
    """Widths of the random transformers that are compared position by position."""
    transformer_draws: int = 8
    """Transformers of each width."""
    seed: int = 0
    """Seed of the inputs and the networks."""


def cases(config: Config) -> Iterator[tuple[str, str, Callable[[], Kernels]]]:
    """Yield every case: its name, the column "compared" of the table, and a function that computes its kernels."""
    generator = torch.Generator().manual_seed(config.seed)
    x = torch.randn(config.inputs, config.n_in, generator=generator, dtype=torch.float64)

    def limit(activation: str, sigma_b: float = 0.0, *, on_input: bool = True) -> Callable[[], Kernels]:
        # Closed forms of one side and integration of the other, so that no formula is compared with itself.
        def compute() -> Kernels:
            network: dict[str, Any] = {"depth": config.depth, "sigma_w": 2**0.5, "sigma_b": sigma_b}
            k = mlp_kernels(x, activation=activation, method="closed", **network)
            scales = propulsion_by_integration(x, activation=ACTIVATIONS[activation], on_input=on_input, **network)
            return k.ntk, k.ntk_weights, scales

        return compute

    def finite(
        make: Callable[[Recipe], torch.nn.Module], inputs: Tensor, without: tuple[str, ...] = ("readout",)
    ) -> Callable[[], Kernels]:
        def compute() -> Kernels:
            kernels = [_finite(make(_recipe(config, draw, without)), inputs) for draw in range(config.draws)]
            return tuple(torch.stack(part).mean(dim=0) for part in zip(*kernels, strict=True))  # pyright: ignore

        return compute

    def residual_limit() -> Kernels:
        k = residual_kernels(x, depth=config.depth, activation="relu", sigma_w=2**0.5)
        return k.ntk, k.weights.sum(0), k.propulsion.sum(0) + k.propulsion_input

    sizes: dict[str, Any] = {"width": config.width, "depth": config.depth, "activation": "relu"}
    tokens = tokens_of(config)
    yield "linear", "limit", limit("linear")
    yield "ReLU", "limit", limit("relu")
    yield "ReLU, finite", f"width {config.width}", finite(lambda r: MLP(config.n_in, recipe=r, **sizes), x)
    yield "leaky ReLU", "limit", limit("leaky_relu")
    yield "ReLU, biases trained", "limit", limit("relu", 0.5)
    yield "ReLU, not on the input", "limit", limit("relu", on_input=False)
    yield "GELU", "limit", limit("gelu")
    yield "erf", "limit", limit("erf")
    yield "residual ReLU", "limit", residual_limit
    residual = finite(lambda r: ResidualMLP(config.n_in, recipe=r, **sizes), x)
    yield "residual ReLU, finite", f"width {config.width}", residual
    transformer = finite(lambda r: Headless(32, width=64, depth=config.depth, recipe=r), tokens, ("input", "readout"))
    yield "transformer, random", "width 64", transformer


def positions(config: Config) -> Iterator[dict[str, Any]]:
    """Yield one row for each position of random transformers of growing width."""
    for width in config.transformer_widths:
        found = transformer_kernels(
            width, depth=2, draws=config.transformer_draws, x=tokens_of(config), seed=config.seed
        )  # fmt: skip
        yield from rows_of(f"random, width {width}", *found)


def tokens_of(config: Config) -> Tensor:
    """Random inputs of the transformers, (inputs, 6, 32)."""
    generator = torch.Generator().manual_seed(config.seed + 1)
    return torch.randn(config.inputs, 6, 32, generator=generator, dtype=torch.float64)


class Headless(Transformer):
    """A transformer with a frozen readout, which has no scales either."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.readout.weight.requires_grad_(False)


def _recipe(config: Config, draw: int, without: tuple[str, ...]) -> Recipe:
    """NTK parametrisation with scales at every position except those in `without`."""

    class Everywhere(Recipe):
        def chosen(self, positions):
            return frozenset(positions) - set(without)

    return Everywhere(generator=torch.Generator().manual_seed(1000 * config.seed + draw), sigma_w=2**0.5)


def _finite(network: torch.nn.Module, x: Tensor) -> Kernels:
    parameters = dict(network.named_parameters())
    full, weights, multipliers = torch.zeros(3, len(x), len(x), dtype=torch.float64)
    for name, kernel in ntk.layer_kernels(network, x, params="trainable", reduce="trace").items():
        if is_multiplier(name, parameters[name]):
            multipliers += kernel
        else:
            full += kernel
            weights += kernel if parameters[name].ndim == 2 else 0
    return full, weights, multipliers


def _check(config: Config) -> None:
    if not config.transformer_widths or any(w < 2 or w % 2 for w in config.transformer_widths):
        raise UserError(f"transformer widths must be even, for two heads; got {config.transformer_widths}")


def find(config: Config) -> Findings:
    """Compute the kernels and distances of every case."""
    rows, arrays = [], {}
    for name, where, compute in cases(config):
        print(f"{name} ...", flush=True)
        full, weights, propulsion = compute()
        corrected = {"corrected": ntk.kernel_distance(weights, propulsion)}
        rows.append({"case": name, "compared": where} | distances(full, propulsion) | corrected)
        for of, kernel in (("full", full), ("weights", weights), ("propulsion", propulsion)):
            arrays[f"{_key(name)}.{of}"] = kernel.numpy()
    print("transformers by position ...", flush=True)
    by_position = list(positions(config))
    return Findings(
        metrics=[
            Metric(measure, row[measure], None, None, "", "initialisation", row["case"], "propulsion")
            for row in rows for measure in MEASURES
        ],
        tables={"cases": rows, "positions": by_position},
        arrays=arrays,
        model={"name": "random networks and their limits"},
        dataset={"name": f"{config.inputs} Gaussian inputs"},
        coverage={"full": "every parameter but a transformer's head", "weights": "matrices and embeddings",
                  "propulsion": "a multiplier on every layer but the readout"},
    )  # fmt: skip


def _key(case: str) -> str:
    """The name of a case in those of its arrays."""
    return case.replace(" ", "_").replace(",", "")


@summary_of_blocks
def summary(result: Result) -> Iterator[Block]:
    """One row for each case, then one for each position of transformers."""
    header = ["case", "compared", "|K_F - K_P| / |K_F|", "of the weights", "best scale", "CKA", "random directions",
              "tr K_F / tr K_P"]  # fmt: skip
    yield header, [
        [r["case"], r["compared"], *(number(r[k]) for k in MEASURES[:4]),
         directions(result, f"{_key(r['case'])}.full", r["cka"]), number(r["trace_ratio"])]
        for r in result.tables["cases"]
    ]  # fmt: skip
    yield "best scale, each position against its own weights"
    by_position = result.tables["positions"]
    networks = list(dict.fromkeys(r["network"] for r in by_position))
    found = {(r["network"], r["position"]): number(r["best_scale"]) for r in by_position}
    yield ["position", *networks], [[p, *(found[network, p] for network in networks)] for p in POSITIONS]


ANALYSIS = Analysis(
    "theorem1", Config, find, summary,
    least={"inputs": 2, "n_in": 1, "width": 2, "depth": 1, "draws": 1, "transformer_draws": 1},
    check=_check,
)  # fmt: skip
run = ANALYSIS.run
