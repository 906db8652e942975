"""What can each method learn, and how fast, according to the spectrum of its tangent kernel?

At initialisation, for full fine-tuning, Propulsion and other methods on the same examples, this measures how fast the
eigenvalues decay; the effective dimension tr K (K + ridge)^-1; how much of the labels lies in the leading eigenvectors,
compared with permuted labels; and how long gradient flow takes to learn the labels, at learning rates that make the
traces of all kernels equal. (Gradient flow learns along an eigenvector at a speed proportional to its eigenvalue.)

    python -m analyses.spectrum --task sst2 --data-dir glue/sst2 --output-dir results/spectrum/sst2

Kernels are of the backbone; the head, which is new and trained by every method, has its own row. For two classes the
output is the difference of the logits; for more, kernels are traced over the outputs. Seeds draw the examples, the head
and LoRA's A.
"""

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from scipy import stats
from scipy.optimize import brentq

import ntk
from analyses.core.analysis import Analysis, Findings, Output
from analyses.core.intervals import LOG, LOGIT, Scale, between
from analyses.core.scales import bounded_mean
from analyses.records import STAGES, Block, Metric, Result, load_result, metric_cell, summary_of_blocks
from analyses.subjects.batch import held_out
from analyses.subjects.cost import memory_budget
from analyses.subjects.learning_rates import check_origin
from analyses.subjects.options import KernelOptions
from analyses.subjects.trained_methods import HEAD, check_influence, one_output, tangents, with_head
from propulsion.data import TaskData, load_task_data
from propulsion.errors import UserError
from propulsion.methods import Method, parse_methods

COST = "a minute"

STAGE = STAGES[0]
SHARES = (0.5, 0.9)
"""Shares of the labels' energy for which the time to learn them is reported."""
MEASURED = "steps to 90% of its gain"
"""Metric of `analyses.convergence` with which predicted learning times are compared."""
RIDGES = np.logspace(-5, 2, 36)
"""Ridges, relative to the mean eigenvalue."""
TIMES = np.logspace(-2, 4, 61)
"""Times of gradient flow, relative to one over the mean eigenvalue."""
_LEADING = 8
_UNIT = "1 / mean eigenvalue"


@dataclass(frozen=True)
class Config(KernelOptions, Output):
    """Options of the analysis."""

    task: str = "demo"
    """Classification or regression task."""
    methods: tuple[str, ...] = (
        "full", "propulsion:positions=all", "propulsion:positions=attn", "lora", "bitfit", "ia3",
    )  # fmt: skip
    """Methods, each NAME or NAME:OPTION=VALUE,OPTION=VALUE."""
    n_examples: int = 24
    """Held-out examples."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Seeds of the examples, the head and random matrices."""
    null_draws: int = 100
    """Permutations of the labels, for comparison."""
    convergence: Path | None = None
    """Result folder of analyses.convergence whose measured speeds are compared with the predicted ones."""


@dataclass(frozen=True)
class Spectral:
    """One kernel's spectrum, and the labels' energy along its eigenvectors.

    Attributes:
        values: ``(n,)`` eigenvalues, the largest first, scaled to mean 1.
        energies: ``(n,)`` share of the centred labels' squared norm along each eigenvector; they sum to 1.
        nulls: ``(draws, n)`` the same for permuted labels.
    """

    values: np.ndarray
    energies: np.ndarray
    nulls: np.ndarray


def label_vectors(labels: np.ndarray, *, regression: bool) -> np.ndarray:
    """Centred labels ``(n, columns)`` of norm 1: values, or indicators of the classes.

    Raises:
        UserError: All labels are the same.
    """
    y = labels[:, None].astype(float) if regression else (labels[:, None] == np.unique(labels)).astype(float)
    y -= y.mean(axis=0)
    size = np.linalg.norm(y)
    if not size:
        raise UserError("the drawn examples have one label only: draw more (--n-examples)")
    return y / size


def decompose(kernel: torch.Tensor, y: np.ndarray, *, draws: int, seed: int) -> Spectral:
    """Eigenvalues of a kernel ``(n, n)``, and the energies of the labels and of permuted labels.

    Raises:
        ntk.UndefinedMetricError: The kernel is zero, or has no positive eigenvalue, relative to which others could be.
    """
    K = kernel.double().cpu()
    values, vectors = torch.linalg.eigh((K + K.T) / 2)
    values, vectors = values.flip(0).clamp(min=0).numpy(), vectors.flip(1).numpy()
    if not values[0] > 0:
        raise ntk.UndefinedMetricError("the spectrum of a zero kernel relative to its mean eigenvalue is undefined")
    generator = np.random.default_rng(seed)
    nulls = np.stack([((vectors.T @ y[generator.permutation(len(y))]) ** 2).sum(axis=1) for _ in range(draws)])
    return Spectral(values / values.mean(), ((vectors.T @ y) ** 2).sum(axis=1), nulls)


def effective_dimension(values: np.ndarray, ridges: np.ndarray) -> np.ndarray:
    """tr K (K + ridge I)^-1 from eigenvalues, at each ridge (Zhang 2005; Caponnetto and De Vito 2007)."""
    return (values / (values + ridges[:, None])).sum(axis=1)


def learnt(values: np.ndarray, energies: np.ndarray, times: np.ndarray) -> np.ndarray:
    """1 - |y - f_t|^2 / |y|^2 under gradient flow from f_0 = 0: sum_i energy_i (1 - exp(-2 value_i t))."""
    return -(energies * np.expm1(-2 * values * times[:, None])).sum(axis=1)


def time_to_learn(values: np.ndarray, energies: np.ndarray, share: float) -> float:
    """Time at which `learnt` reaches a share; infinity if too much of the labels lies in the kernel's null space."""
    if energies[values > len(values) * np.finfo(float).eps * values.max()].sum() <= share:
        return math.inf
    low, high = 0.0, 1.0
    while learnt(values, energies, np.array([high]))[0] < share:
        low, high = high, 2 * high
        if not math.isfinite(high):
            return math.inf

    def lacking(time: float) -> float:
        return learnt(values, energies, np.array([time]))[0] - share

    return float(brentq(lacking, low, high, xtol=1e-300))  # pyright: ignore[reportArgumentType]


def find(config: Config) -> Findings:
    """Decompose every method's kernel for every seed, and summarise over seeds."""
    started = time.time()
    methods = parse_methods(config.methods)
    steps = _measured(config)
    data = load_task_data(config.task, data_dir=config.data_dir)
    check_origin(config.convergence, data, config.model_identity, analysis="convergence")
    found: dict[str, list[Spectral]] = {}
    for seed in config.seeds:
        kernels, labels = _kernels(config, methods, data, seed)
        y = label_vectors(labels, regression=data.task.is_regression)
        for name, kernel in kernels.items():
            found.setdefault(name, []).append(decompose(kernel, y, draws=config.null_draws, seed=seed))
        print(f"seed {seed}: {len(kernels)} kernels, {time.time() - started:.0f} s", flush=True)
    metrics = [metric for name, each in found.items() for metric in _metrics(name, each)]
    metrics += against_measured(metrics, steps)
    shown = [*config.methods, *([] if HEAD in config.methods else [HEAD])]
    arrays: dict[str, np.ndarray] = {"ridges": RIDGES, "times": TIMES}
    for name in shown:
        arrays |= {f"{curve}.{name}": values for curve, values in _curves(found[name]).items()}
    return Findings(
        metrics, tables={"methods": [{"method": name} for name in shown]}, arrays=arrays,
        model=config.model_identity(),
        dataset={"name": data.task.name, "task": data.task.name, "source": data.source.rsplit("/", 1)[-1],
                 "fingerprint": data.fingerprint},
        coverage={name: "the head alone" if name == HEAD else "the backbone, without the head" for name in shown}
        | {f"{name} + head": "backbone and head" for name in config.methods if name != HEAD},
    )  # fmt: skip


def _kernels(
    config: Config, methods: dict[str, Method], data: TaskData, seed: int
) -> tuple[dict[str, torch.Tensor], np.ndarray]:
    """Kernels ``(n, n)`` by name, and the labels ``(n,)``.

    The kernels are those of each method's own parameters, of the head, and of both together as "METHOD + head".
    """
    model, tokenizer = config.start(data, seed=seed)
    inputs, labels = held_out(data, tokenizer, config.n_examples, seed, device=config.device)
    wanted = tangents(model, methods, task_type="SEQ_CLS", seed=seed, degree=data.task.degree)
    with memory_budget(config.memory_budget_gb) as budget:
        kernels = ntk.adapter_kernels(
            model, inputs, wanted.methods, output=one_output(data.task), reduce="trace", memory_budget=budget
        )
    own = [text for text in methods if text != HEAD]
    check_influence(kernels)
    return kernels | {f"{text} + head": kernel for text, kernel in with_head(kernels, own).items()}, labels


def _curves(each: Sequence[Spectral]) -> dict[str, np.ndarray]:
    """Curves with one row for each seed; null_alignment has the mean and 95 % quantiles over draws and seeds."""
    nulls = np.concatenate([s.nulls.cumsum(axis=1) for s in each])
    return {
        "eigenvalues": np.stack([s.values / s.values.sum() for s in each]),
        "effective_dimension": np.stack([effective_dimension(s.values, RIDGES) for s in each]),
        "alignment": np.stack([s.energies.cumsum() for s in each]),
        "null_alignment": np.stack([nulls.mean(axis=0), *np.quantile(nulls, (0.025, 0.975), axis=0)]),
        "learnt": np.stack([learnt(s.values, s.energies, TIMES) for s in each]),
    }


def _metrics(name: str, each: Sequence[Spectral]) -> list[Metric]:
    """Means over seeds with Student's intervals; a seed's null is the mean over its draws, for times the median."""
    n = len(each[0].values)
    k = min(_LEADING, n)

    def metric(quantity: str, values: Sequence[float], right: str = "", unit: str = "") -> Metric:
        # Not a number if the value of a seed is not finite.
        scale = scale_of_quantity(quantity, n)
        finite = np.isfinite(values).all()
        bounds = bounded_mean(values, scale) if finite else (math.nan, math.nan, math.nan)
        return Metric(quantity, *bounds, unit, STAGE, name, right)

    def area(energies: np.ndarray) -> float:
        return float(energies.cumsum(axis=-1).mean())

    null, top, area_words = "permuted labels", f"label energy in the top {k}", "area under the alignment curve"
    found = [
        metric("largest eigenvalue, share of the trace", [s.values[0] / s.values.sum() for s in each]),
        metric("effective_rank", [_entropy_rank(s.values) for s in each]),
        metric("effective dimension at 0.01 of the mean eigenvalue",
               [effective_dimension(s.values, np.array([0.01]))[0] for s in each]),
        metric(top, [s.energies[:k].sum() for s in each]),
        metric(top, [s.nulls[:, :k].sum(1).mean() for s in each], null),
        metric(area_words, [area(s.energies) for s in each]),
        metric(area_words, [area(s.nulls) for s in each], null),
    ]  # fmt: skip
    for share in SHARES:
        times = [time_to_learn(s.values, s.energies, share) for s in each]
        of_nulls = [float(np.median([time_to_learn(s.values, draw, share) for draw in s.nulls])) for s in each]
        found.append(metric(f"time to learn {share:.0%}", times, unit=_UNIT))
        found.append(metric(f"time to learn {share:.0%}", of_nulls, null, _UNIT))
    return found


def scale_of_quantity(name: str, n: int) -> Scale:
    """The scale of a metric of this analysis by its name, for kernels of n examples."""
    if name == "effective_rank":
        return between(1.0, n)
    if name.startswith("effective dimension"):
        return between(0.0, n)
    return LOG if name.startswith("time to learn") else LOGIT


def _entropy_rank(values: np.ndarray) -> float:
    p = values[values > 0] / values.sum()
    return float(np.exp(-(p * np.log(p)).sum()))


def _measured(config: Config) -> dict[str, float]:
    """Measured steps by method; empty if no result of analyses.convergence is given."""
    if config.convergence is None:
        return {}
    measured = load_result(config.convergence, analysis="convergence")
    steps = {m.left: m.value for m in measured.metrics if m.name == MEASURED and m.left in config.methods}
    if len(steps) < 3:
        raise UserError(f"{config.convergence} has {len(steps)} of these methods: at least three are needed")
    return steps


def against_measured(metrics: Sequence[Metric], steps: Mapping[str, float]) -> list[Metric]:
    """Spearman's correlation over methods of predicted times and measured steps, with p-value and number of methods.

    Methods whose time is not finite are left out; with fewer than three methods the correlation is not a number.
    """
    found = []
    for share in SHARES if steps else ():
        for suffix in ("", " + head"):
            times = {m.left: m.value for m in metrics if m.name == f"time to learn {share:.0%}" and not m.right}
            pairs = [
                (times[key], steps[text])
                for text in steps
                if math.isfinite(times.get(key := text if text == HEAD else f"{text}{suffix}", math.nan))
            ]
            correlation, p = math.nan, math.nan
            if len(pairs) >= 3:
                correlation, p = (float(x) for x in stats.spearmanr(*zip(*pairs, strict=True)))  # pyright: ignore[reportArgumentType]
            numbers = {"": correlation, ", p-value": p, ", methods": len(pairs)}
            found += [
                Metric(f"rank correlation{name}", value, None, None, "", STAGE,
                       f"time to learn {share:.0%}{suffix}", MEASURED)
                for name, value in numbers.items()
            ]  # fmt: skip
    return found


@summary_of_blocks
def summary(result: Result) -> Iterator[Block]:
    """One row for each method, and the rank correlations with measured speeds if there are any."""
    ranked = [m for m in result.metrics if m.name.startswith("rank correlation")]
    others = [m for m in result.metrics if m not in ranked]
    kernels = list(dict.fromkeys(m.left for m in others))
    quantities = list(dict.fromkeys((m.name, m.right) for m in others))

    def cell(left: str, name: str, right: str) -> str:
        return metric_cell(result.metric(name, stage=STAGE, left=left, right=right))

    # Three quantities in each table, since all quantities, or all kernels, side by side would be too wide.
    for i in range(0, len(quantities), 3):
        shown = quantities[i : i + 3]
        header = [result.dataset["name"], *(f"{name}{', ' if right else ''}{right}" for name, right in shown)]
        yield header, [[left, *(cell(left, *quantity) for quantity in shown)] for left in kernels]
    if ranked:
        kinds = list(dict.fromkeys(m.name for m in ranked))
        found = {(m.left, m.name): f"{m.value:.3g}" for m in ranked}
        rows = [[left, *(found[left, kind] for kind in kinds)] for left in dict.fromkeys(m.left for m in ranked)]
        yield [f"against measured {MEASURED}", *kinds], rows


ANALYSIS = Analysis(
    "spectrum", Config, find, summary,
    least={"n_examples": 4, "null_draws": 1},
    above={"memory_budget_gb": 0},
    about=lambda config: f"intervals: 95 %, Student's over {len(config.seeds)} seeds",
)  # fmt: skip
run = ANALYSIS.run

if __name__ == "__main__":
    ANALYSIS.command(__doc__)
