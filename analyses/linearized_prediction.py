"""Does the kernel predict what training gives? Kernel predictions against networks trained by the same methods.

For each training-set size and seed, on the same held-out rows: what regression and gradient flow under a method's
tangent kernel at initialisation predict, and regression under its sign-gradient kernel (for Adam; Malladi et al. 2023),
against the network that the method really trains. Scores, agreement of the predicted classes beside what chance and
independent errors would give, correlation of the logits with the initial ones subtracted; whether the methods' kernels
regress to the same labels, and whether their networks agree. Nulls: the kernel of last hidden states, the head alone,
the majority class, the untrained network, permuted labels; and, as what could at best be reached, a network trained
again with another data order.

    python -m analyses.linearized_prediction --task sst2 --data-dir glue --sizes 32 128 512 --n-test 128 \\
        --comparison results/method_comparison/sst2 --output-dir results/linearized_prediction/sst2

Tasks of two classes. Kernels are of one output, the difference of the two logits: cross-entropy depends on nothing
else, so that gradient flow on it is exactly that of this output. A head is random, or the label words of a language
model (--head label_words), which has no head to train. A killed run goes on where it was.
"""

import hashlib
import json
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tyro
from datasets import Dataset, concatenate_datasets
from torch import Tensor

import ntk
from analyses import kernel_prediction as predictions
from analyses.grid import Grid
from analyses.linearized_prediction_tables import (
    FLOW,
    HIDDEN,
    MAJORITY,
    REGRESSION,
    SIGN,
    START,
    WITH_HEAD,
    Outcome,
    measures,
    summary,
)
from analyses.method_kernels import HEAD, Tangents, model_inputs, tangents, with_head
from analyses.readout import Readout
from analyses.results import Metric, Result, check_writable, environment, write_result
from analyses.seeds import check_seeds, mean_interval, tuned_factors
from analyses.training_run import RunConfig, training_run
from propulsion.data import TaskData, load_task_data
from propulsion.errors import UserError, run_command
from propulsion.methods import Method, parse_methods
from propulsion.training import TrainingConfig, predict

_LABEL_SCALE = 1.0  # Regression targets are plus and minus this, logit differences.
_ANOTHER_ORDER = 1000  # Added to the seed of a network trained again.


@dataclass(frozen=True)
class Config:
    """Kernel predictions against trained networks, methods x sizes x seeds."""

    task: str = "demo"
    """Classification task of two classes."""
    data_dir: Path | None = None
    """Folder with one folder a task, each with train and validation files; without it, the Hugging Face hub."""
    model: str | None = None
    """Hub name or folder of a pre-trained model; by default the packaged MiniLM-L6, or SmolLM2 for label words."""
    readout: tyro.conf.OmitArgPrefixes[Readout] = field(default_factory=Readout)
    """What the outputs are read from."""
    methods: tuple[str, ...] = ("full", "propulsion:positions=all", "lora")
    """Methods, each NAME or NAME:OPTION=VALUE,OPTION=VALUE; the first is what the others are compared with."""
    again: tuple[str, ...] = ("full",)
    """Methods whose networks are trained once more, with another data order and dropout."""
    sizes: tuple[int, ...] = (16, 32)
    """Training-set sizes; each set holds the smaller ones."""
    n_test: int = 128
    """Held-out rows, the same for all seeds."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Seeds of the training rows, the head, the data order, dropout and what methods draw."""
    training: tyro.conf.OmitArgPrefixes[TrainingConfig] = field(
        default_factory=lambda: TrainingConfig(steps=100, batch_size=16, max_length=96)
    )
    """How every network is trained; its seed is replaced by each run's own."""
    train: bool = True
    """Train networks; without, the kernels are compared with each other and with the labels alone."""
    sign_limit: int = 128
    """Sign-gradient kernels for sizes up to this, since they take n squared times all parameters; 0 for none."""
    permutations: int = 20
    """Permutations of the training labels behind that null."""
    comparison: Path | None = None
    """Result of analyses.method_comparison whose learning rates are used."""
    memory_budget_gb: float | None = None
    """Memory for features and kernels in GB; by default half of what is free."""
    runs_dir: Path | None = None
    """Folder of the finished cells; by default the result folder's name with -runs."""
    max_runs: int | None = None
    """Compute this many cells at most in this call."""
    output_dir: Path = Path("results/linearized_prediction")
    """Result folder."""
    overwrite: bool = False
    """Replace an earlier result in that folder."""
    device: str = "cpu"
    """Torch device, such as cpu or cuda."""


@dataclass(frozen=True)
class Setting:
    """What all cells share.

    Attributes:
        config: the configuration.
        methods: by their text.
        data: all training rows, and the held-out ones, prompted for label words.
        factors: on default learning rates, by method.
    """

    config: Config
    methods: dict[str, Method]
    data: TaskData
    factors: dict[str, float]

    @property
    def task_type(self) -> str:
        """peft's name of the task."""
        return self.config.readout.task_type

    def load(self, seed: int) -> tuple[Any, Any]:
        """The model before training, and its tokenizer."""
        config = self.config
        return config.readout.load(config.model, num_labels=2, seed=seed, device=config.device)

    def rows(self, size: int, seed: int) -> Dataset:
        """The training rows of a size: the first of a permutation, so that sizes are nested."""
        order = np.random.default_rng(seed).permutation(len(self.data.train))
        return self.data.train.select(order[:size].tolist())

    def targets(self, size: int, seed: int) -> Tensor:
        """Regression targets ``(n,)`` of the training rows.

        Raises:
            UserError: The rows are of one class.
        """
        labels = np.asarray(self.rows(size, seed)["label"])
        if len(np.unique(labels)) < 2:
            raise UserError(f"the {size} training rows of seed {seed} are of one class: raise the smallest of --sizes")
        return torch.from_numpy(_LABEL_SCALE * np.where(labels == 1, 1.0, -1.0))


def run(config: Config) -> Result | None:
    """Compute what is missing, up to ``max_runs``, and summarise; None if cells are still missing.

    Raises:
        UserError: Unusable options, data or model; a run that diverged; cells of other settings.
    """
    started = time.time()
    setting = _setting(config)
    grid = _grid(setting)
    outcomes: list[Outcome] = []
    for seed in config.seeds:
        outcomes += _outcomes(setting, grid, seed)
    if grid.missing:
        print(f"{grid.computed} cells computed, {len(grid.missing)} missing: run the same command again")
        return None
    return _result(setting, outcomes, time.time() - started)


def _setting(config: Config) -> Setting:
    methods = parse_methods(config.methods)
    check_seeds(config.seeds)
    if not config.sizes:
        raise UserError("there must be a size")
    if unknown := [text for text in config.again if text not in methods]:
        raise UserError(f"{unknown[0]} cannot be trained again: it is none of the methods")
    if min(config.sizes) < 4 or config.permutations < 1:
        raise UserError("sizes must be at least 4, and permutations at least 1")
    folder = None if config.data_dir is None else config.data_dir.expanduser() / config.task
    data = load_task_data(config.task, data_dir=folder)
    if data.task.is_regression or data.task.num_labels != 2:
        raise UserError(f"{config.task} is no task of two classes, which a single logit difference would tell apart")
    if max(config.sizes) > len(data.train):
        raise UserError(f"{config.task} has {len(data.train)} training rows; the largest of --sizes asks for more")
    n_test = min(config.n_test, len(data.validation))
    data = load_task_data(config.task, data_dir=folder, n_validation=n_test, seed=0)
    if config.readout.in_words:
        data = config.readout.rows(data)
        # The readout stands for the head, which no adapter touches.
        readout = {"exclude_modules": ["lm_head"]}
        methods = {t: m.with_defaults(**readout) if m.name == "propulsion" else m for t, m in methods.items()}
    factors = tuned_factors(config.comparison, config.task)
    if absent := [text for text in methods if factors and text not in factors]:
        raise UserError(f"{config.comparison} holds no learning rate of {', '.join(absent)}")
    return Setting(config, methods, data, {text: factors.get(text, 1.0) for text in methods})


def _grid(setting: Setting) -> Grid:
    config = setting.config
    # What only says which cells there are is in their names.
    shared = (
        "task", "model", "readout", "training", "permutations", "device",
    )  # fmt: skip
    settings = {name: value for name, value in asdict(config).items() if name in shared}
    settings |= {"n_test": len(setting.data.validation), "fingerprint": setting.data.fingerprint}
    folder = config.runs_dir or config.output_dir.with_name(f"{config.output_dir.name}-runs")
    return Grid(folder, settings, config.max_runs)


def _outcomes(setting: Setting, grid: Grid, seed: int) -> list[Outcome]:
    """One outcome a size; none where a cell is missing."""
    config = setting.config
    which = hashlib.sha256(json.dumps([config.methods, config.sizes]).encode()).hexdigest()[:8]
    small = tuple(size for size in config.sizes if size <= config.sign_limit)
    cells = [grid.cell(f"kernels-{which}.seed{seed}", lambda: _kernel_cell(setting, seed))]
    if small:
        name = f"sign-kernels-{which}-{'-'.join(map(str, small))}.seed{seed}"
        cells.append(grid.cell(name, lambda: _sign_cell(setting, small, seed)))
    trained: dict[tuple[str, int, bool], dict[str, Any] | None] = {}
    for size in config.sizes if config.train else ():
        for text in config.methods:
            for again in (False, True) if text in config.again else (False,):
                name = f"trained.{text}.x{setting.factors[text]:.3g}.n{size}{'.again' if again else ''}.seed{seed}"

                def compute(text: str = text, size: int = size, again: bool = again) -> dict[str, Any]:
                    return _training_cell(setting, text, size, seed, again=again)

                trained[text, size, again] = grid.cell(name, compute)
    if any(cell is None for cell in (*cells, *trained.values())):
        return []
    return [_outcome(setting, size, seed, [c for c in cells if c is not None], trained) for size in config.sizes]


def _outcome(setting: Setting, size: int, seed: int, cells: list[dict[str, Any]], trained: Mapping) -> Outcome:
    kernels = cells[0]
    found = [entry for cell in cells for entry in cell["predictions"] if entry["size"] == size]
    return Outcome(
        size=size,
        seed=seed,
        labels=np.asarray(setting.data.validation["label"]),
        f0=np.asarray(kernels["f0"]),
        kernel={(e["predictor"], e["method"]): np.asarray(e["f"]) for e in found},
        strengths={(e["predictor"], e["method"]): e["strength"] for e in found},
        permuted=np.asarray(kernels["permuted"][str(size)]),
        trained={t: np.asarray(c["f"]) for (t, n, again), c in trained.items() if n == size and not again},
        again={t: np.asarray(c["f"]) for (t, n, again), c in trained.items() if n == size and again},
        losses={t: c["last_loss"] for (t, n, again), c in trained.items() if n == size and not again},
    )


# --- cells ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Start:
    """The model before training, on the training rows of one seed and the held-out rows behind them."""

    model: Any
    inputs: dict[str, Tensor]
    tangents: Tangents
    f0: Tensor


def _start(setting: Setting, size: int, seed: int) -> _Start:
    config, data = setting.config, setting.data
    model, tokenizer = setting.load(seed)
    rows = concatenate_datasets([setting.rows(size, seed), data.validation])
    length = config.training.max_length
    degree = data.task.degree
    found = tangents(model, setting.methods, task_type=setting.task_type, seed=seed, degree=degree)
    logits = predict(model, tokenizer, replace(data, validation=rows), max_length=length).double()
    inputs = model_inputs(rows, tokenizer, data.task, max_length=length, device=config.device)
    return _Start(model, inputs, found, logits[:, 1] - logits[:, 0])


def _budget(config: Config) -> float | None:
    return None if config.memory_budget_gb is None else config.memory_budget_gb * 1e9


def _rows(kernel: Tensor, size: int, largest: int) -> Tensor:
    """The kernel ``(rows, rows)`` of the first training rows and all new ones, out of that of the largest set."""
    keep = torch.tensor([*range(size), *range(largest, len(kernel))])
    return kernel[keep][:, keep]


def _kernel_cell(setting: Setting, seed: int) -> dict[str, Any]:
    """Tangent kernels, computed once over all rows, and what they predict at every size."""
    started, config = time.time(), setting.config
    largest = max(config.sizes)
    start = _start(setting, largest, seed)
    try:
        pieces = ntk.adapter_kernels(
            start.model, start.inputs, start.tangents.methods, output=ntk.outputs.margin(), reduce="trace",
            memory_budget=_budget(config), progress=True,
        )  # fmt: skip
    except MemoryError as error:
        raise UserError(f"{error} (--sizes, --n-test, --memory-budget-gb)") from error
    pieces = {name: kernel.cpu() for name, kernel in pieces.items()}
    hidden = ntk.hidden_state_kernel(start.model, start.inputs).detach().cpu()
    headed = HEAD in pieces
    own = {(REGRESSION, text): pieces[text] for text in setting.methods}
    jobs = own | {(FLOW, text): kernel for (_, text), kernel in own.items()}
    if headed:
        both = with_head(pieces, list(setting.methods))
        jobs |= {(WITH_HEAD, text): both[text] for text in setting.methods if text != HEAD}
        jobs[REGRESSION, HEAD] = pieces[HEAD]
    jobs[REGRESSION, HIDDEN] = hidden
    found, permuted = [], {}
    for size in config.sizes:
        y, f0 = setting.targets(size, seed), _first(start.f0, size, largest)
        for (predictor, name), kernel in jobs.items():
            function = predictions.flow if predictor == FLOW else predictions.regression
            f, strength = predictions.predict(function, _rows(kernel, size, largest), y, f0, seed=seed)
            found.append(_entry(size, predictor, name, f, strength))
        first = next(iter(setting.methods))
        chosen = {(e["size"], e["predictor"], e["method"]): e["strength"] for e in found}
        ridge = chosen[size, REGRESSION, first]
        kernel = _rows(pieces[first], size, largest)
        permuted[size] = predictions.permuted_predictions(
            kernel, y, f0, ridge, draws=config.permutations, seed=seed
        ).tolist()  # fmt: skip
        share = float((y > 0).double().mean())
        majority = torch.full((len(setting.data.validation),), 1.0 if share > 0.5 else -1.0, dtype=torch.float64)
        found.append(_entry(size, MAJORITY, "", majority, share))
        found.append(_entry(size, START, "", f0[size:], 0.0))
    return {
        "f0": start.f0[largest:].tolist(),
        "predictions": found,
        "permuted": permuted,
        "traces": {name: float(kernel.double().trace()) for name, kernel in pieces.items()},
        "seconds": time.time() - started,
    }


def _first(values: Tensor, size: int, largest: int) -> Tensor:
    return torch.cat([values[:size], values[largest:]])


def _entry(size: int, predictor: str, method: str, f: Tensor, strength: float) -> dict[str, Any]:
    return {"size": size, "predictor": predictor, "method": method, "f": f.tolist(), "strength": strength}


def _sign_cell(setting: Setting, sizes: tuple[int, ...], seed: int) -> dict[str, Any]:
    """Sign-gradient kernels of all that is trained, each parameter at its own learning rate, as Adam's steps have."""
    started, config, largest = time.time(), setting.config, max(sizes)
    start = _start(setting, largest, seed)
    try:
        pieces = ntk.sign_gradient_kernels(
            start.model, start.inputs, start.tangents.methods, output=ntk.outputs.margin(),
            memory_budget=_budget(config), progress=True,
        )  # fmt: skip
    except MemoryError as error:
        raise UserError(f"{error} (--sign-limit, --n-test, --memory-budget-gb)") from error
    kernels = with_head(
        {name: ntk.reduce_outputs(kernel, "trace").cpu() for name, kernel in pieces.items()},
        list(setting.methods),
        start.tangents.rates,
    )
    found = []
    for size in sizes:
        y, f0 = setting.targets(size, seed), _first(start.f0, size, largest)
        for text, kernel in kernels.items():
            f, strength = predictions.predict(
                predictions.sign_regression, _rows(kernel, size, largest), y, f0, seed=seed
            )
            found.append(_entry(size, SIGN, text, f, strength))
    return {"predictions": found, "seconds": time.time() - started}


def _training_cell(setting: Setting, text: str, size: int, seed: int, *, again: bool) -> dict[str, Any]:
    """The network that a method trains on the training rows, from the same start as the kernels'."""
    config = setting.config
    run_config = RunConfig(training=config.training, device=config.device)
    data = replace(setting.data, train=setting.rows(size, seed))
    found = training_run(
        run_config, data, setting.methods[text], seed=seed + (_ANOTHER_ORDER if again else 0),
        rate_multiplier=setting.factors[text], keep_logits=True, load=lambda: setting.load(seed),
        task_type=setting.task_type,
    )  # fmt: skip
    logits = found["logits"]
    return {
        "f": (logits[:, 1] - logits[:, 0]).tolist(),
        "scores": found["scores"],
        "last_loss": float(np.mean(found["losses"][-10:])),
        "learning_rates": found["learning_rates"],
        "seconds_per_step": found["seconds_per_step"],
        "trained_parameters": found["trained_parameters"],
    }


# --- result ---------------------------------------------------------------------------------------------------------


def _result(setting: Setting, outcomes: list[Outcome], seconds: float) -> Result:
    config = setting.config
    values: dict[tuple[str, str, str, str], list[float]] = {}
    for outcome in outcomes:
        for key, value in measures(outcome, config.methods, setting.data.task.name).items():
            values.setdefault((*key, f"n={outcome.size}"), []).append(value)
    metrics = [
        Metric(name, *mean_interval(sample), "", stage, left, right)
        for (name, left, right, stage), sample in values.items()
    ]
    strengths = [
        {"size": o.size, "seed": o.seed, "predictor": predictor, "method": method, "strength": strength}
        for o in outcomes
        for (predictor, method), strength in o.strengths.items()
        if predictor not in (MAJORITY, START)
    ]
    arrays = {"labels": outcomes[0].labels}
    for o in outcomes:
        arrays[f"f0.seed{o.seed}"] = o.f0
        key = f"n={o.size}.seed{o.seed}"
        arrays |= {f"kernel.{predictor}.{method}.{key}": f for (predictor, method), f in o.kernel.items()}
        arrays |= {f"trained.{method}.{key}": f for method, f in o.trained.items()}
        arrays |= {f"again.{method}.{key}": f for method, f in o.again.items()}
    return Result(
        analysis="linearized_prediction", config=asdict(config), seed=config.seeds[0], metrics=metrics,
        tables={
            "methods": [{"method": text, "rate_factor": setting.factors[text]} for text in config.methods],
            "sizes": [{"size": size} for size in config.sizes],
            "strengths": strengths,
            "losses": [{"size": o.size, "seed": o.seed, "method": t, "last_loss": v}
                       for o in outcomes for t, v in o.losses.items()],
        },
        arrays=arrays, model={"name": config.readout.name_of(config.model), "head": config.readout.head},
        dataset={"name": config.task, "task": config.task, "metric": setting.data.task.metrics[0],
                 "source": setting.data.source.rsplit("/", 1)[-1], "fingerprint": setting.data.fingerprint},
        environment=environment(), seconds={"this call": seconds}, coverage=_coverage(setting),
    )  # fmt: skip


def _coverage(setting: Setting) -> dict[str, str]:
    """Which parameters each kernel covers, and what was left out, in words."""
    config = setting.config
    headed = not config.readout.in_words
    body = (
        "what the method trains in the backbone, without the head"
        if headed
        else "all that the method trains; adapters leave the readout of the vocabulary alone"
    )
    found = {
        REGRESSION: f"{body}; ridge chosen on folds of the training rows",
        FLOW: f"{body}; squared loss, stopped at a time chosen on folds of the training rows",
        SIGN: "all that is trained, each parameter weighed by its learning rate; "
        f"training sets of at most {config.sign_limit} rows",
        "trained": "networks trained by AdamW on cross-entropy, head included" if headed else
        "networks trained by AdamW on the cross-entropy of the label words",
    }  # fmt: skip
    if headed:
        found[WITH_HEAD] = "all that is trained, the head included, at equal learning rates"
    if not config.train:
        found["trained"] = "left out: no network was trained (--no-train)"
    if not any(size <= config.sign_limit for size in config.sizes):
        found[SIGN] = "left out: every size is above --sign-limit"
    return found


def main(config: Config) -> None:
    """Run, print, write the result folder, draw the figure."""
    check_writable(config.output_dir, overwrite=config.overwrite)
    result = run(config)
    if result is None:
        return
    print(f"\n{summary(result)}\n")
    from figures.linearized_prediction import write as draw

    folder = write_result(result, config.output_dir, figures=draw, overwrite=config.overwrite)
    print(f"intervals: 95 %, Student's over {len(config.seeds)} seeds; result and figure in {folder}")


if __name__ == "__main__":
    run_command(lambda: main(tyro.cli(Config, prog="python -m analyses.linearized_prediction", description=__doc__)))
