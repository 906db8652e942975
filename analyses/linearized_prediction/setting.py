"""The options of `analyses.linearized_prediction`, and the data, methods and learning rates that its cells share."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tyro
from datasets import Dataset
from torch import Tensor

from analyses.core.analysis import GridOutput
from analyses.subjects.learning_rates import factors_of
from analyses.subjects.options import DataOptions
from analyses.subjects.readout import Readout
from propulsion.data import TaskData, load_task_data
from propulsion.errors import UserError
from propulsion.methods import Method, parse_methods
from propulsion.training import TrainingOptions

_LABEL_SCALE = 1.0  # Regression targets, which stand for differences of logits, are plus and minus this.


@dataclass(frozen=True)
class Config(DataOptions, GridOutput):
    """Options of the analysis."""

    task: str = "demo"
    """Classification task of two classes."""
    model: str | None = None
    """Name (`python -m propulsion.models` lists them), hub name, folder or GGUF file of a pre-trained model; by default
    minilm, or smollm2-135m for label words."""
    readout: tyro.conf.OmitArgPrefixes[Readout] = field(default_factory=Readout)
    """What the outputs are read from: a new head, or label words."""
    # A factory, since the documentation site reads words with a colon in a signature as a reference.
    methods: tuple[str, ...] = field(default_factory=lambda: ("full", "propulsion:positions=all", "lora"))
    """Methods, each NAME or NAME:OPTION=VALUE,OPTION=VALUE; the others are compared with the first."""
    again: tuple[str, ...] = ("full",)
    """Methods whose networks are trained a second time, with another data order and dropout."""
    sizes: tuple[int, ...] = (16, 32)
    """Training-set sizes; each training set contains the smaller ones."""
    n_test: int = 128
    """Number of held-out rows, the same for all seeds."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Seeds of the training rows, the head, the data order, dropout and the methods' own random draws."""
    training: tyro.conf.OmitArgPrefixes[TrainingOptions] = field(
        default_factory=lambda: TrainingOptions(max_steps=100, max_length=96)
    )
    """How every network is trained; each run replaces the seed by its own."""
    train: bool = True
    """Train networks; otherwise kernels are compared only with each other and with the labels."""
    sign_limit: int = 128
    """Largest size with sign-gradient kernels, which cost n squared times the number of parameters; 0 for none."""
    permutations: int = 20
    """Permutations of the training labels, for comparison."""
    comparison: Path | None = None
    """Result of analyses.method_comparison whose learning rates are used."""
    memory_budget_gb: float | None = None
    """Memory for features and kernels in GB; by default half of the free memory."""


@dataclass(frozen=True)
class Setting:
    """The data, methods and learning rates that all cells share.

    Attributes:
        config: The configuration.
        methods: Methods by their text in the configuration.
        data: All training rows, and the held-out ones; with a prompt if label words are read.
        factors: Factor on the default learning rates, by method.
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
        return config.readout.load(config.model, num_labels=2, seed=seed, device=config.device, **config.loading)

    def rows(self, size: int, seed: int) -> Dataset:
        """The training rows of a size, the first of a permutation, so that larger sets contain smaller ones."""
        order = np.random.default_rng(seed).permutation(len(self.data.train))
        return self.data.train.select(order[:size].tolist())

    def targets(self, size: int, seed: int) -> Tensor:
        """Regression targets ``(n,)`` of the training rows.

        Raises:
            UserError: All rows are of one class.
        """
        labels = np.asarray(self.rows(size, seed)[self.data.task.label_column])
        if len(np.unique(labels)) < 2:
            raise UserError(f"the {size} training rows of seed {seed} are of one class: raise the smallest of --sizes")
        return torch.from_numpy(_LABEL_SCALE * np.where(labels == 1, 1.0, -1.0))


def setting_of(config: Config) -> Setting:
    """Load the data, methods and learning rates that all cells share.

    Raises:
        UserError: Options, data or learning rates cannot be used.
    """
    methods = parse_methods(config.methods)
    if not config.sizes:
        raise UserError("there must be a size")
    if unknown := [text for text in config.again if text not in methods]:
        raise UserError(f"{unknown[0]} cannot be trained again: it is not one of the methods")
    data = load_task_data(config.task, data_dir=config.data_dir)
    if data.task.is_regression or data.task.num_labels != 2:
        raise UserError(f"{config.task} is not a task of two classes, which one difference of logits can tell apart")
    if max(config.sizes) > len(data.train):
        raise UserError(f"{config.task} has {len(data.train)} training rows; the largest of --sizes asks for more")
    n_test = min(config.n_test, len(data.validation))
    data = load_task_data(config.task, data_dir=config.data_dir, n_validation=n_test, seed=0)
    if config.readout.in_words:
        data = config.readout.rows(data)
        # The readout takes the place of a head, which no adapter changes.
        readout = {"exclude_modules": ["lm_head"]}
        methods = {t: m.with_defaults(**readout) if m.name == "propulsion" else m for t, m in methods.items()}
    return Setting(config, methods, data, factors_of(methods, config.comparison, config.task))
