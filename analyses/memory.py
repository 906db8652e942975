"""Memory and time of training by each method, each measured in a process of its own (the paper's Figure 4).

Peak memory is that of the whole process on a CPU, and what was allocated on an accelerator. It depends on the batch,
not on how long training goes on, so a few steps tell it. "over the model" is the peak less what the loaded, adapted
model takes by itself: gradients, optimizer, activations.

    python -m analyses.memory --task sst2 --data-dir glue
"""

import json
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import tyro
from transformers import TrainerCallback

from analyses.core.command_line import option
from analyses.core.errors import run_command
from analyses.method_comparison import Config as ComparisonConfig
from analyses.publish import publish
from analyses.records import Metric, Result, environment, format_table, number
from analyses.subjects.cost import peak_bytes, reset_peak
from analyses.subjects.training_run import RunConfig, training_run
from propulsion.errors import UserError
from propulsion.methods import Method, parse_methods
from propulsion.training import TrainingOptions

_MEGABYTE = 2**20


@dataclass(frozen=True)
class Config:
    """Peak memory and time of a step, a fresh process for each method and round."""

    task: str = "demo"
    """Classification or regression task."""
    methods: tuple[str, ...] = ComparisonConfig.methods
    """Methods, each NAME or NAME:OPTION=VALUE,OPTION=VALUE."""
    rounds: int = 3
    """Processes of each method, in turn."""
    run: tyro.conf.OmitArgPrefixes[RunConfig] = field(
        default_factory=lambda: RunConfig(
            n_train=400, n_validation=50,
            training=TrainingOptions(max_steps=12, per_device_train_batch_size=32, max_length=64),
        )
    )  # fmt: skip
    """What each run is."""
    output_dir: Path = Path("results/memory")
    """Result folder."""
    overwrite: bool = False
    """Replace an earlier result in that folder."""
    child: str | None = None
    """Measure this method in this process, and write what was found into child_output."""
    child_output: Path | None = None
    """File of the child's JSON."""


class _Before(TrainerCallback):
    """Memory when the model is loaded and adapted, before the first step."""

    def __init__(self) -> None:
        self.bytes = 0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        device = kwargs["model"].device
        reset_peak(device)
        self.bytes = peak_bytes(device)


def measure(config: Config, method: str) -> dict[str, Any]:
    """One method, in this process."""
    before = _Before()
    data = config.run.load(config.task)
    found = training_run(config.run, data, Method.parse(method), seed=0, callbacks=[before])
    kept = ("trained_parameters", "seconds_per_step", "peak_bytes")
    return {name: found[name] for name in kept} | {"model_bytes": before.bytes}


def run(config: Config) -> Result:
    """Measure every method in turn, `rounds` times.

    Raises:
        UserError: Unusable options, data, model or method.
    """
    started = time.time()
    if config.rounds < 1:
        raise UserError(f"rounds is {config.rounds}, expected at least 1")
    parse_methods(config.methods)
    config.run.load(config.task)  # Mistakes in the data are said once, before any process starts.
    found: dict[str, list[dict[str, Any]]] = {text: [] for text in config.methods}
    for _ in range(config.rounds):
        for text in config.methods:
            print(f"{text} ...", flush=True)
            found[text].append(_in_own_process(config, text))
    rows = [{"method": text} | _summarised(runs) for text, runs in found.items()]
    metrics = [
        Metric(name, float(row[name]), None, None, unit, "trained", row["method"], "")
        for row in rows
        for name, unit in (("peak_bytes", "bytes"), ("over_model_bytes", "bytes"), ("seconds_per_step", "s"))
    ]
    runs = [
        {"method": text, "round": place} | entry for text, each in found.items() for place, entry in enumerate(each)
    ]
    return Result(
        analysis="memory", config=asdict(config), seed=0, metrics=metrics, tables={"methods": rows, "runs": runs},
        arrays={}, model=config.run.model_identity(), dataset={"name": config.task},
        environment=environment(), seconds={"total": time.time() - started}, coverage={},
    )  # fmt: skip


def _summarised(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Medians over the rounds."""
    row = {name: statistics.median(run[name] for run in runs) for name in ("peak_bytes", "seconds_per_step")}
    over = statistics.median(run["peak_bytes"] - run["model_bytes"] for run in runs)
    return row | {"over_model_bytes": over, "trained_parameters": runs[0]["trained_parameters"]}


def _in_own_process(config: Config, method: str) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "found.json"
        command = [sys.executable, "-m", "analyses.memory", "--task", config.task, "--child", method, "--child-output",
                   str(file), *_words(config.run)]  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            last = done.stderr.strip().splitlines()[-1:] or ["no message"]
            raise UserError(f"method {method} failed: {last[0].removeprefix('error: ')}")
        return json.loads(file.read_text(encoding="utf-8"))


def _words(run: RunConfig) -> list[str]:
    """A run's configuration as options."""
    training = {name: value for name, value in asdict(run.training).items() if name != "seed"}
    fields = {name: value for name, value in vars(run).items() if name != "training"} | training
    return [word for name, value in fields.items() if value is not None for word in option(name, value)]


def summary(result: Result, *, markdown: bool = False) -> str:
    """One row a method."""
    rows = [
        [row["method"], number(row["peak_bytes"] / _MEGABYTE), number(row["over_model_bytes"] / _MEGABYTE),
         number(row["seconds_per_step"]), f"{row['trained_parameters']:,}"]
        for row in result.tables["methods"]
    ]  # fmt: skip
    return format_table(["method", "peak MB", "over the model, MB", "s/step", "trained"], rows, markdown=markdown)


def main(config: Config) -> None:
    """Run, print, write the result folder, draw the figure; or be a child."""
    if config.child is not None:
        if config.child_output is None:
            raise UserError("child needs child_output")
        config.child_output.write_text(json.dumps(measure(config, config.child)), encoding="utf-8")
        return
    config = replace(config, child_output=None)
    publish(lambda: run(config), config.output_dir, summary=summary, overwrite=config.overwrite, about="")


if __name__ == "__main__":
    run_command(lambda: main(tyro.cli(Config, prog="python -m analyses.memory", description=__doc__)))
