"""The configuration of the experiment, the order of its settings, and the command."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import tyro

from analyses.choose.analysis import Config as Choice
from analyses.core.analysis import Analysis, Findings, GridOutput, Runs
from analyses.foresight.findings import scored
from analyses.foresight.setting import Measured, Setting, SettingCells
from analyses.foresight.tables import AUTOMATIC, summary
from analyses.foresight.tasks import FROM_DOCSTRINGS, load, texts_of
from analyses.subjects.training_run import RunConfig
from propulsion.data import TaskData, check_folders
from propulsion.errors import UserError
from propulsion.methods import check_options, parse_methods
from propulsion.training import TrainingOptions

LARGE, FEW = 2000, 3
"""Settings of so many rows, or more, are for so many seeds only."""
GRID_ROWS = 512
"""Number of training rows of the settings in which multiples of the rates are tried."""


@dataclass(frozen=True)
class Config(GridOutput):
    """Options of the experiment."""

    tasks: tuple[str, ...] = ("demo",)
    """Classification and regression tasks; among them may be stsb_classes, swapped, belongs, module and library, which
    are made from other tasks' rows and from docstrings of installed packages."""
    # A factory, since the documentation site reads words with a colon in a signature as a reference.
    candidates: tuple[str, ...] = field(default_factory=lambda: Choice().candidates)
    """Methods, each NAME or NAME:OPTION=VALUE,OPTION=VALUE; by default those of analyses.choose."""
    sizes: tuple[int, ...] = (128, 512, 2000)
    """Numbers of training rows; of a task that has fewer, all of them."""
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    """Seeds of the rows, the head, the data order, dropout and the methods' random draws; of 2,000 rows and more, the
    first three."""
    grid_tasks: tuple[str, ...] = ()
    """Tasks on which, at 512 training rows, multiples of the automatic rates are tried."""
    factors: tuple[float, ...] = (1 / 3, 3.0)
    """Those multiples, besides 1."""
    n_examples: int = 48
    """Training rows of the kernels."""
    resamples: int = 2000
    """Bootstrap resamples of tasks and seeds."""
    run: tyro.conf.OmitArgPrefixes[RunConfig] = field(
        default_factory=lambda: RunConfig(
            pooling="mean", training=TrainingOptions(max_steps=300, per_device_train_batch_size=16, max_length=64)
        )
    )
    """Options of every run; the number of training rows and the seed are those of the setting."""
    partial: bool = False
    """Write a result although settings are missing, from those that are complete."""


def settings_of(config: Config) -> list[Setting]:
    """All settings in the order in which they are computed: what the plan leaves out first comes last."""
    found = [
        Setting(task, rows, seed)
        for place, seed in enumerate(config.seeds) for rows in config.sizes for task in config.tasks
        if rows < LARGE or place < FEW
    ]  # fmt: skip
    places = {seed: place for place, seed in enumerate(config.seeds)}
    return sorted(found, key=lambda one: (one.rows >= LARGE, places[one.seed] >= FEW, one.rows, places[one.seed]))


def find(config: Config, runs: Runs) -> Findings | None:
    """Compute the missing cells, and score all predictors on the complete settings; None if some are missing."""
    with_files = dict.fromkeys(texts_of(task) for task in config.tasks if task not in FROM_DOCSTRINGS)
    check_folders([*with_files], config.run.data_dir)
    methods = parse_methods(config.candidates)
    complete: list[Measured] = []
    data: dict[Setting, TaskData] = {}
    for setting in settings_of(config):
        rows = load(config.run, setting.task, setting.rows, setting.seed)
        if _is_repeated(setting, rows, config.sizes):
            continue
        cells = runs.of(rows, config.run.identity(rows))
        own = SettingCells(cells, setting, config.run, rows, methods)
        with_grid = setting.task in config.grid_tasks and setting.rows == GRID_ROWS
        measured = own.measured(config.n_examples, config.factors if with_grid else ())
        if measured is not None:
            complete.append(measured)
            data[setting] = rows
    if not complete or (runs.missing and not config.partial):
        return None
    tables, metrics = scored(complete, data, config.resamples)
    missing = [{"cells": len(runs.missing), "settings": len(settings_of(config)) - len(complete)}]
    tasks = dict.fromkeys(measured.setting.task for measured in complete)
    return Findings(
        metrics,
        tables=tables | {"missing": missing},
        model=config.run.model_identity(),
        dataset={"name": ", ".join(tasks), "tasks": list(tasks),
                 "fingerprints": {str(setting): rows.fingerprint for setting, rows in data.items()}},
    )  # fmt: skip


def _is_repeated(setting: Setting, rows: TaskData, sizes: Sequence[int]) -> bool:
    """Whether a task has so few rows that a smaller size gave the same setting."""
    return any(len(rows.train) <= size < setting.rows for size in sizes)


def _check(config: Config) -> None:
    for method in parse_methods(config.candidates).values():
        check_options(method)
        if method.name == "none":
            raise UserError("candidate none trains nothing: leave it out")
    if not config.tasks or not config.sizes:
        raise UserError("there must be a task and a number of training rows")
    if unknown := [task for task in config.grid_tasks if task not in config.tasks]:
        raise UserError(f"grid_tasks names {unknown[0]}, which is not among the tasks")
    if 1 in config.factors:
        raise UserError("factors must be other than 1, which is always computed")


ANALYSIS = Analysis(
    "foresight", Config, find, summary,
    least={"sizes": 16, "n_examples": 0, "resamples": 2},
    above={"factors": 0},
    check=_check,
    # Candidate, steps, rates and seed of a cell are its own, as are task, rows and model.
    free=("tasks", "candidates", "sizes", "seeds", "grid_tasks", "factors", "n_examples", "resamples", "partial",
          "run.data_dir", "run.model"),
    about=lambda config: "intervals: 95 %, bootstrap over tasks, then over seeds within tasks",
    finding=lambda result: "; ".join(
        f"{row['hypothesis']} {row['outcome']}" for row in result.tables["hypotheses"] if row["truth"] == AUTOMATIC
    ),
)  # fmt: skip
run = ANALYSIS.run
