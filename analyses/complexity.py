"""What does a method cost on one linear layer? Formulas, counted parameters and measured time (the paper's Table 4).

The layer maps n features to m, for T tokens; r is a method's rank, p the number of Propulsion's vectors. The formulas
count the multiply-adds of one forward and one backward pass, which includes the gradient of the layer's input, as in
the middle of a network. The measured time is divided by that of the frozen layer. Where this ratio differs from that of
the formulas, the difference is due to memory traffic and overhead, which the formulas do not count.

    python -m analyses.complexity
"""

import statistics
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from peft import get_peft_model
from sympy import Symbol
from sympy.parsing.sympy_parser import implicit_multiplication, parse_expr, split_symbols, standard_transformations
from torch import nn

from analyses.core.analysis import Analysis, Findings, Output
from analyses.records import Block, Metric, Result, number, summary_of_blocks
from analyses.subjects.cost import StepClock
from propulsion.methods import option_config

COST = "seconds"

WARM_UP = 3


@dataclass(frozen=True)
class Config(Output):
    """Options of the analysis."""

    n: int = 768
    """Input features of the layer."""
    m: int = 768
    """Output features of the layer."""
    tokens: int = 2048
    """Number of tokens in the batch."""
    rank: int = 8
    """Rank of the methods that have one."""
    vectors: int = 4
    """Number of vectors of Propulsion with several vectors."""
    repeats: int = 15
    """Timed passes of each method; the methods take turns."""
    device: str = "cpu"
    """Torch device, such as cpu or cuda."""


@dataclass(frozen=True)
class Cost:
    """One method on one layer.

    Attributes:
        parameters: Formula of the trained parameters.
        operations: Formula of the multiply-adds of a forward and backward pass.
        options: peft's options of the method; None if it is not a peft method.
    """

    parameters: str
    operations: str
    options: Callable[[Config], dict[str, Any]] | None = None


COSTS = {
    "frozen": Cost("0", "2Tmn"),
    "full": Cost("mn + m", "3Tmn + Tm"),
    "bitfit": Cost("m", "2Tmn + Tm"),
    "propulsion": Cost("m", "2Tmn + 3Tm", lambda config: {}),
    "propulsion, p vectors": Cost("pm", "2Tmn + 3Tm + 3pm", lambda config: {"vectors": config.vectors}),
    "ia3": Cost("m", "2Tmn + 3Tm", lambda config: {"feedforward_modules": []}),
    "lora": Cost("r(m + n)", "2Tmn + 3Tr(m + n)", lambda config: {"r": config.rank}),
    "vera": Cost("r + m", "2Tmn + 2Tr(m + n) + 3T(r + m)", lambda config: {"r": config.rank}),
    "loha": Cost("2r(m + n)", "2Tmn + 3Tmn + 6rmn", lambda config: {"r": config.rank}),
}


def value_of(formula: str, config: Config) -> int:
    """The value of a formula in m, n, r, p and T, where adjacent letters are multiplied.

    >>> value_of("2Tr(m + n)", Config(tokens=3, rank=4, m=5, n=6))
    264
    """
    sizes = {"m": config.m, "n": config.n, "r": config.rank, "p": config.vectors, "T": config.tokens}
    letters = {letter: Symbol(letter) for letter in sizes}
    found = parse_expr(formula, letters, (*standard_transformations, split_symbols, implicit_multiplication))
    return int(found.subs({letters[letter]: size for letter, size in sizes.items()}))


def build(name: str, config: Config) -> nn.Module:
    """A linear layer prepared for training by a method."""
    torch.manual_seed(0)
    model: Any = nn.Sequential(OrderedDict(layer=nn.Linear(config.n, config.m)))  # Methods target the name "layer".
    options = COSTS[name].options
    if options is not None:
        method = name.partition(",")[0]
        return get_peft_model(model, option_config(method, {"target_modules": ["layer"], **options(config)}))
    model.requires_grad_(name == "full")
    model.layer.bias.requires_grad_(name in ("full", "bitfit"))
    return model


def find(config: Config) -> Findings:
    """Count the parameters of every method and time its passes."""
    models = {name: build(name, config).to(config.device) for name in COSTS}
    x = torch.randn(config.tokens, config.n, device=config.device, requires_grad=True)
    g = torch.randn(config.tokens, config.m, device=config.device)
    seconds: dict[str, list[float]] = {name: [] for name in COSTS}
    for _ in range(WARM_UP + config.repeats):
        for name, model in models.items():  # Methods take turns, so that a busy machine slows all of them alike.
            clock = StepClock()
            clock.on_step_begin(None, None, None)
            model(x).backward(g)
            clock.on_step_end(None, None, None)
            seconds[name] += clock.seconds
    rows = [_row(name, config, models[name], seconds) for name in COSTS]
    metrics = [Metric("time over frozen", row["time_ratio"], None, None, "", "initialisation", row["method"], "")
               for row in rows]  # fmt: skip
    model = {"name": f"one linear layer, {config.n} to {config.m}"}
    return Findings(metrics, tables={"methods": rows}, model=model, dataset={"name": "random"})


def _row(name: str, config: Config, model: nn.Module, seconds: dict[str, list[float]]) -> dict[str, Any]:
    cost, frozen = COSTS[name], value_of(COSTS["frozen"].operations, config)
    own, base = seconds[name][WARM_UP:], seconds["frozen"][WARM_UP:]
    return {
        "method": name,
        "parameters_formula": cost.parameters,
        "parameters": value_of(cost.parameters, config),
        "counted": sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad),
        "operations_formula": cost.operations,
        "operations_ratio": value_of(cost.operations, config) / frozen,
        "seconds": statistics.median(own),
        "time_ratio": statistics.median(a / b for a, b in zip(own, base)),
    }


@summary_of_blocks
def summary(result: Result) -> Iterator[Block]:
    """One row for each method."""
    header = ["method", "trained", "by formula", "counted", "multiply-adds", "over frozen", "time over frozen"]
    yield header, [
        [row["method"], row["parameters_formula"], f"{row['parameters']:,}", f"{row['counted']:,}",
         row["operations_formula"], number(row["operations_ratio"]), number(row["time_ratio"])]
        for row in result.tables["methods"]
    ]  # fmt: skip


ANALYSIS = Analysis(
    "complexity", Config, find, summary,
    least=dict.fromkeys(("n", "m", "tokens", "rank", "vectors", "repeats"), 1),
)  # fmt: skip
run = ANALYSIS.run

if __name__ == "__main__":
    ANALYSIS.command(__doc__)
