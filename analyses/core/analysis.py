"""The protocol of all analyses: from a configuration to a result folder, tables and figures.

An analysis consists of a configuration (a frozen dataclass that extends `Output`, or `GridOutput` where it trains many
runs), a function that computes the numbers, a function that puts them into tables, and an `Analysis` that joins them:

    ANALYSIS = Analysis("spectrum", Config, find, summary, least={"n_examples": 4})

    if __name__ == "__main__":
        ANALYSIS.command(__doc__)

The `Analysis` provides the command and its options, the checks before anything is computed, the cells of a grid and the
resumption of a killed grid, the result folder, the printed tables and the figure.
"""

import importlib
import math
import operator
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

import numpy as np
import torch

from analyses.core.cells import Cells, Grid, leaves, settings_of
from analyses.core.errors import run_command
from analyses.core.locks import held
from analyses.records import Metric, Result, check_writable, environment, write_result
from propulsion.command_line import parsed
from propulsion.data import TaskData, get_task, with_own_task
from propulsion.errors import UserError, did_you_mean, first_line
from propulsion.methods import check_options as check_method
from propulsion.methods import parse_methods


@dataclass(frozen=True)
class Output:
    """Where an analysis writes."""

    output_dir: Path | None = None
    """Result folder; by default results/ANALYSIS, to which some analyses add the task or another option."""
    overwrite: bool = False
    """Replace an earlier result in that folder."""


@dataclass(frozen=True)
class GridOutput(Output):
    """Where an analysis of many runs writes, and how many it computes in one call."""

    runs_dir: Path | None = None
    """Folder of the finished cells; by default the result folder's name with -runs."""
    max_runs: int | None = None
    """Compute this many cells at most in this call."""


@dataclass(frozen=True)
class Findings:
    """What an analysis computed; the other fields of its `Result` follow from the configuration and the machine.

    Attributes:
        metrics: Numbers with their intervals.
        model: Identity of the model.
        dataset: Identity of the data.
        tables: Further named tables.
        arrays: Kernels, spectra, labels.
        seconds: Wall time of each step; that of the whole call is added to it.
        coverage: Which parameters each kernel covers.
        config: Values that replace those of the configuration because they were chosen during the run, such as the
            task's own degree.
    """

    metrics: list[Metric]
    model: dict[str, Any]
    dataset: dict[str, Any]
    tables: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    arrays: dict[str, np.ndarray] = field(default_factory=dict)
    seconds: dict[str, Any] = field(default_factory=dict)
    coverage: dict[str, str] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)


C = TypeVar("C", bound=Output)


@dataclass(frozen=True)
class Analysis(Generic[C]):
    """One analysis: its options, its computation, its tables and its figure.

    Attributes:
        name: Name of its module, of its results and of its figure's module.
        config: The dataclass of its options.
        find: Computes the findings of a configuration. Where the configuration is a `GridOutput`, it is called with
            the configuration and the `Runs` that keep its cells, and returns None where cells are missing.
        summary: Returns the tables of a result as text; with ``markdown=True``, as Markdown.
        least: By the name of an option, its smallest allowed value; it holds for each item of a tuple.
        above: By the name of an option, the value that it must exceed; it holds for each item of a tuple.
        check: Further checks of the options; raises `UserError`. Called before anything is computed or written.
        free: Options on which no cell of a grid depends (`analyses.core.cells.settings_of`).
        about: Returns in words what the intervals or units of the tables are.
        finding: Returns the last words of the command, which say in one sentence what was found.
        variant: Returns what is added to the name of the default result folder.
        draws: Whether there is a figure, in the module of the same name in `figures`.
    """

    name: str
    config: type[C]
    find: Callable[..., Findings | None]
    summary: Callable[..., str]
    least: Mapping[str, float] = field(default_factory=dict)
    above: Mapping[str, float] = field(default_factory=dict)
    check: Callable[[C], None] = lambda config: None
    free: tuple[str, ...] = ()
    about: Callable[[C], str] = lambda config: ""
    finding: Callable[[Result], str] = lambda result: ""
    variant: Callable[[C], str] = lambda config: ""
    draws: bool = True

    def folder(self, config: C) -> Path:
        """The result folder of a configuration."""
        return config.output_dir or Path("results") / f"{self.name}{self.variant(config)}"

    def run(self, config: C) -> Result | None:
        """Compute a result; of a grid, at most ``max_runs`` missing cells, and None if cells are still missing.

        Raises:
            UserError: Options, data or model cannot be used, a training run diverged, or another process works on the
                same cells.
        """
        config = with_own_task(config)
        self.check_options(config)
        started = time.time()
        if isinstance(config, GridOutput):
            folder = runs_folder(config, self.folder(config))
            runs = Runs(config, self.free, folder)
            with held(folder):
                found = self.find(config, runs)
            if runs.missing:
                print(
                    f"{runs.computed} cells computed, {len(runs.missing)} or more missing: run the same command again"
                )
        else:
            found = self.find(config)
        if found is None:
            return None
        parts = vars(found) | {
            "config": asdict(config) | found.config, "seconds": found.seconds | {"this call": time.time() - started}
        }  # fmt: skip
        return Result(analysis=self.name, seed=seeds_of(config)[0], environment=environment(), **parts)

    def check_options(self, config: C) -> None:
        """Check that every option is in its range, nothing is named twice, and every task and method is known.

        Raises:
            UserError: An option is not so; the message says what was expected.
        """
        for limits, holds, words in ((self.least, operator.ge, "at least"), (self.above, operator.gt, "above")):
            for name, limit in limits.items():
                value = operator.attrgetter(name)(config)
                values = value if isinstance(value, tuple) else (value,)
                if not all(one is None or (math.isfinite(one) and holds(one, limit)) for one in values):
                    raise UserError(f"{name.rpartition('.')[2]} must be {words} {limit:g}; got {value}")
        check_seeds(seeds_of(config))
        for path, value in leaves(asdict(config)):
            name, values = path.rpartition(".")[2], value if isinstance(value, tuple) else (value,)
            if not all(math.isfinite(one) for one in values if isinstance(one, float)):
                raise UserError(f"{name} must be finite; got {value}")
            if isinstance(value, tuple) and (again := [one for one in value if value.count(one) > 1]):
                raise UserError(f"{name} must be different from each other; {again[0]} is given more than once")
        for task in filter(None, (*getattr(config, "tasks", ()), getattr(config, "task", None))):
            get_task(task)
        for device in _devices(config):
            check_device(device)
        if isinstance(methods := getattr(config, "methods", None), tuple):
            for method in parse_methods(methods).values():
                check_method(method)
        self.check(config)

    def publish(self, config: C) -> None:
        """Check that the folder can be written, compute the result, print it, write it and draw its figures.

        Raises:
            UserError: The folder cannot be written, holds a result or is in use by another process; or `run` raises it.
        """
        config = with_own_task(config)
        folder = self.folder(config)
        self.check_options(config)
        check_writable(folder, overwrite=config.overwrite)
        with held(folder):
            result = self.run(config)
            if result is None:
                return
            print(f"\n{self.summary(result)}\n")
            # The figure's module is found by the name of the analysis, so that analyses import no figure.
            draw = importlib.import_module(f"figures.{self.name}").write if self.draws else None
            written = write_result(result, folder, figures=draw, overwrite=config.overwrite)
        about = self.about(config)
        what = "result and figures" if self.draws else "result"
        print(f"{about}{'; ' if about else ''}{what} in {written}")
        if finding := self.finding(result):
            print(f"\n{finding}")

    def command(self, description: str | None) -> None:
        """The command line ``python -m analyses.NAME``, with the docstring of the module as its help."""
        program = f"python -m analyses.{self.name}"
        run_command(lambda: self.publish(parsed(self.config, prog=program, description=description)))


class Runs(Grid):
    """The runs of one grid: each is computed once, in a cell, and read from its file afterwards."""

    def __init__(self, config: GridOutput, free: Sequence[str], folder: Path) -> None:
        super().__init__(folder, config.max_runs)
        self._config, self._free = config, free

    def of(self, data: TaskData, model: str) -> Cells:
        """The cells of this configuration on one task's rows and one model, which is given by its fingerprint."""
        rows = {"task": data.task, "rows": data.fingerprint}
        return Cells(self, settings_of(self._config, free=self._free, model=model, **rows))


def runs_folder(config: Any, result_folder: Path) -> Path:
    """The folder of the cells, or of the training runs, of a configuration."""
    return config.runs_dir or result_folder.with_name(f"{result_folder.name}-runs")


def seeds_of(config: Any) -> tuple[int, ...]:
    """The seeds of a configuration: its field `seeds`, or else its field `seed`; 0 if it has neither field."""
    one = getattr(config, "seed", None if hasattr(config, "seeds") else 0)
    return tuple(getattr(config, "seeds", ())) or (() if one is None else (one,))


def _devices(config: Any) -> set[str]:
    """The devices that a configuration, and the configurations in its fields, name."""
    own = {config.device} if hasattr(config, "device") else set()
    parts = [value for field in fields(config) if is_dataclass(value := getattr(config, field.name))]
    return own.union(*map(_devices, parts))


def check_device(name: str) -> None:
    """Check that a device can compute.

    Raises:
        UserError: There is no such device here, or, like meta, it holds no values.
    """
    try:
        torch.ones(1, device=name).item()
    except (RuntimeError, AssertionError) as error:
        close = did_you_mean(name, ("cpu", "cuda", "mps", "xpu"))
        raise UserError(f"device {name!r}{close} cannot be used here: {first_line(error)}") from error


def check_seeds(seeds: Sequence[int]) -> None:
    """Check the seeds of repetitions.

    Raises:
        UserError: There is no seed, or one is negative or given twice.
    """
    if not seeds or len(set(seeds)) < len(seeds) or min(seeds) < 0:
        raise UserError(f"seeds must be one or more different numbers, none negative; got {tuple(seeds)}")
