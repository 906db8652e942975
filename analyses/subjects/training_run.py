"""One training run of one method on one task: its scores, losses, times, memory and predictions."""

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import tyro
from scipy.special import logsumexp

from analyses.core.cells import Cells
from analyses.subjects.batch import labels_of
from analyses.subjects.cost import StepClock, peak_bytes, reset_peak
from analyses.subjects.learning_rates import tuned_factors
from analyses.subjects.options import EncoderOptions
from propulsion.data import TaskData, check_folders, load_task_data
from propulsion.data.metrics import METRICS
from propulsion.data.tasks import get_labelled_task, get_task
from propulsion.errors import UserError
from propulsion.methods import Method, apply_method, check_options, trainable_parameters
from propulsion.training import TrainingOptions, evaluate, predict, train
from propulsion.training.trainer import isolated_randomness


@dataclass(frozen=True)
class RunConfig(EncoderOptions):
    """Options that all runs of a grid share."""

    n_train: int = 1600
    """Training rows drawn, the same for all runs; all of them where the task has fewer."""
    n_validation: int = 1000
    """Validation rows drawn, the same for all runs; all of them where the task has fewer."""
    degree: float | None = None
    """Propulsion's degree; by default the paper's for the task."""
    training: tyro.conf.OmitArgPrefixes[TrainingOptions] = field(
        default_factory=lambda: TrainingOptions(max_steps=100, max_length=96)
    )
    """Training options of every run; the seed among them is replaced by that of the run."""

    def __post_init__(self) -> None:
        for name in ("n_train", "n_validation"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} must be at least 1; got {getattr(self, name)}")
        if self.degree is not None:
            check_options(Method("propulsion", {"degree": self.degree}))

    def load(self, task: str, *, seed: int = 0) -> TaskData:
        """Draw the rows of a task, which must be a classification or a regression, by a seed."""
        get_labelled_task(task)
        whole = load_task_data(task, data_dir=self.data_dir)
        sizes = {"n_train": len(whole.train), "n_validation": len(whole.validation)}
        wanted = {name: min(getattr(self, name), size) for name, size in sizes.items()}
        return load_task_data(task, data_dir=self.data_dir, **wanted, seed=seed)

    def load_all(self, tasks: Sequence[str]) -> dict[str, TaskData]:
        """Draw the rows of several tasks, each from a folder of its own."""
        check_folders(tasks, self.data_dir)
        return {task: self.load(task) for task in tasks}


@dataclass(frozen=True)
class TaskRuns:
    """Training runs on one task."""

    task: str = "demo"
    """Classification or regression task."""
    run: tyro.conf.OmitArgPrefixes[RunConfig] = field(default_factory=RunConfig)
    """Options of each run."""


@dataclass(frozen=True)
class RatedRuns(TaskRuns):
    """Training runs of several methods on one task, at learning rates that were chosen earlier."""

    comparison: Path | None = None
    """Result of analyses.method_comparison whose learning rates are used."""

    def factors(self, methods: Iterable[str]) -> dict[str, float]:
        """Factor on its default learning rate of each method; 1 without a comparison, or if it lacks the method."""
        tuned = tuned_factors(self.comparison, self.task)
        return {text: tuned.get(text, 1.0) for text in methods}


class ScoreCurve(StepClock):
    """Records the first metric on the validation rows during training; the clock stops while it is computed.

    Attributes:
        points: For each recorded step, `step`, `score`, and `seconds`, the time that the steps up to it took.
    """

    def __init__(self, config: RunConfig, data: TaskData, when: Callable[[int, int], bool]) -> None:
        """A curve without points.

        Args:
            config: Options of the run.
            data: The rows.
            when: Whether the score is recorded after a step, by its number, from 0 on, and the number of all steps.
        """
        super().__init__()
        self._data, self._when, self._max_length = data, when, config.training.max_length
        self._tokenizer = config.start(data, seed=0)[1]
        self.points: list[dict[str, float]] = []

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Record the score before the first step if asked for."""
        self._measure(state, kwargs["model"])

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Stop the clock, and record the score if asked for."""
        super().on_step_end(args, state, control)
        self._measure(state, kwargs["model"])

    def _measure(self, state: Any, model: Any) -> None:
        if self._when(state.global_step, state.max_steps):
            # Scoring draws no random numbers from the run's stream, so that the run is the same with and without it.
            with isolated_randomness():
                found = evaluate(model, self._tokenizer, self._data, max_length=self._max_length)
            self.points.append(
                {"step": state.global_step, "seconds": sum(self.seconds, 0.0), "score": next(iter(found.values()))}
            )


def dataset_identity(data: TaskData) -> dict[str, Any]:
    """Identity of a task and its rows, as stored in results."""
    names = None if data.task.is_regression else list(data.task.label_names)
    return {
        "name": data.task.name,
        "task": data.task.name,
        "label_names": names,
        "fingerprint": data.fingerprint,
        "all_rows": data.all_rows,
    }


def method_cells(
    cells: Cells, task: str, methods: Mapping[str, Method], factors: Mapping[str, float], seeds: Sequence[int],
    compute: Callable[..., Mapping[str, Any]],
) -> dict[str, list[dict[str, Any]]]:  # fmt: skip
    """By method, the cells of all seeds; cells that are still missing are left out.

    Args:
        cells: Where the cells are kept.
        task: Name of the task.
        methods: Methods by their text.
        factors: By method, the factor on its default learning rate.
        seeds: Seeds of the runs.
        compute: Computes a cell; called with `method`, `factor` and `seed`.
    """
    found: dict[str, list[dict[str, Any]]] = {text: [] for text in methods}
    for seed in seeds:
        for text, method in methods.items():
            label, factor = f"{task}.{text}.x{factors[text]:.3g}.seed{seed}", factors[text]
            cell = cells.cell(label, compute, method=method, factor=factor, seed=seed)
            if cell is not None:
                found[text].append({"seed": seed, "rate_factor": factor} | cell)
    return found


def tuning_split(data: TaskData, share: float = 0.25) -> TaskData:
    """The training rows alone, with a share of them as validation rows, on which learning rates are chosen."""
    order = np.random.default_rng(0).permutation(len(data.train))
    cut = int(share * len(order))
    parts = [sorted(part.tolist()) for part in (order[cut:], order[:cut])]
    train, validation = rows = [data.train.select(part) for part in parts]
    sources = [origin for origin in data.origins if origin.rows is data.train]
    origins = tuple(o.part(split, part) for o in sources for split, part in zip(rows, parts, strict=True))
    return dataclasses.replace(data, train=train, validation=validation, origins=origins)


def training_run(
    config: RunConfig,
    data: TaskData,
    method: Method,
    *,
    seed: int,
    rate_multiplier: float = 1.0,
    callbacks: Any = (),
    keep_model: bool = False,
    keep_logits: bool = False,
    load: Callable[[], tuple[Any, Any]] | None = None,
    task_type: str = "SEQ_CLS",
) -> dict[str, Any]:
    """Train a fresh model by a method and evaluate it on the validation rows.

    The head, the rows and their order depend on the seed alone, and not on the method.

    Args:
        config: Options that all runs of a grid share.
        data: The rows.
        method: The method.
        seed: Seed of the head, the data order, dropout and the method's own random parameters.
        rate_multiplier: Factor on the learning rates, applied on top of that of the configuration.
        callbacks: Callbacks of the trainer, called at every step.
        keep_model: Return the trained model.
        keep_logits: Return the logits of the validation rows, ``(n, c)``.
        load: Loads the model and its tokenizer, in place of a pre-trained model with a head drawn from the seed.
        task_type: peft's name of the task type, which determines whether a method trains a head.

    Returns:
        `scores`, `validation_loss`, `losses` by step, `predictions`, `trained_parameters`, `learning_rates`,
        `seconds_per_step` (the median), `peak_bytes` of the process during the run (of the accelerator, on one), and,
        if kept, `model` and `tokenizer`, and `logits`.
    """
    reset_peak(config.device)
    degree = data.task.degree if config.degree is None else config.degree
    model, tokenizer = config.start(data, seed=seed) if load is None else load()
    model = apply_method(model, method.with_defaults(degree=degree), task_type=task_type, seed=seed)
    rate_multiplier *= config.training.rate_multiplier
    training = dataclasses.replace(config.training, seed=seed, rate_multiplier=rate_multiplier)
    clock = StepClock()
    result = train(model, tokenizer, data, training, callbacks=[clock, *callbacks])
    outputs = predict(model, tokenizer, data, max_length=training.max_length).double().numpy()
    predictions = outputs[:, 0] if data.task.is_regression else outputs.argmax(axis=1)
    kept = ({"model": model, "tokenizer": tokenizer} if keep_model else {}) | (
        {"logits": outputs} if keep_logits else {}
    )
    return kept | {
        "scores": scores(data.task.name, predictions, labels_of(data)),
        "validation_loss": mean_loss(data, outputs),
        "losses": result.losses,
        "predictions": predictions,
        "trained_parameters": trainable_parameters(model),
        "learning_rates": result.learning_rates,
        "seconds_per_step": clock.median(),
        "peak_bytes": peak_bytes(config.device),
    }


def scores(task: str, predictions: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """The metrics of a task on predictions, by name."""
    return {name: METRICS[name](predictions, labels) for name in get_task(task).metrics}


def chance_score(data: TaskData) -> float:
    """The best score on the task's first metric from predicting one class for all validation rows; 0 if undefined."""
    if data.task.is_regression:
        return 0.0  # A constant has no correlation.
    labels = labels_of(data)
    each = [next(iter(scores(data.task.name, np.full_like(labels, c), labels).values()))
            for c in range(data.task.num_labels)]  # fmt: skip
    return max((score for score in each if np.isfinite(score)), default=0.0)


def mean_loss(data: TaskData, outputs: np.ndarray) -> float:
    """Mean loss of the validation rows: cross-entropy of logits ``(n, c)``, squared error of a regression's output."""
    labels = labels_of(data)
    if data.task.is_regression:
        return float(np.mean((outputs[:, 0] - labels) ** 2))
    return float(np.mean(logsumexp(outputs, axis=1) - outputs[np.arange(len(labels)), labels]))
