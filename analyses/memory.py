"""How much memory and time does training take with each method? Each has its own process (the paper's Figure 4).

Peak memory is that of the whole process on a CPU, and the allocated memory on an accelerator. It depends on the batch
and not on the number of steps, so a few steps are enough. "over the model" is the peak minus the memory when the model
is loaded and adapted: gradients, optimizer state and activations.

    python -m analyses.memory --task sst2 --data-dir glue
"""

import json
import pickle
import statistics
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import tyro
from transformers import TrainerCallback

from analyses.core.analysis import Analysis, Findings, Output
from analyses.core.child import run_python
from analyses.core.errors import run_command
from analyses.method_comparison import Config as ComparisonConfig
from analyses.records import Block, Metric, Result, number, summary_of_blocks
from analyses.subjects.cost import peak_bytes, reset_peak
from analyses.subjects.training_run import RunConfig, TaskRuns, training_run
from propulsion.data.own import own_task
from propulsion.errors import UserError
from propulsion.methods import Method
from propulsion.training import TrainingOptions

COST = "six minutes"

_MEGABYTE = 2**20


@dataclass(frozen=True)
class Config(TaskRuns, Output):
    """Options of the analysis."""

    methods: tuple[str, ...] = ComparisonConfig.methods
    """Methods, each NAME or NAME:OPTION=VALUE,OPTION=VALUE."""
    rounds: int = 3
    """Processes for each method; the methods take turns, and medians over rounds are reported."""
    run: tyro.conf.OmitArgPrefixes[RunConfig] = field(
        default_factory=lambda: RunConfig(
            n_train=400, n_validation=50,
            training=TrainingOptions(max_steps=12, per_device_train_batch_size=32, max_length=64),
        )
    )  # fmt: skip
    """Options of every run."""


class _Before(TrainerCallback):
    """Records the memory when the model is loaded and adapted, before the first step."""

    def __init__(self) -> None:
        self.bytes = 0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        device = kwargs["model"].device
        reset_peak(device)
        self.bytes = peak_bytes(device)


def find(config: Config) -> Findings:
    """Measure every method in turn, `rounds` times.

    Raises:
        UserError: A method cannot be measured.
    """
    data = config.run.load(config.task)  # So that a mistake in the data is reported once, before any process starts.
    found: dict[str, list[dict[str, Any]]] = {text: [] for text in config.methods}
    for _ in range(config.rounds):
        for text in config.methods:
            print(f"{text} ...", flush=True)
            found[text].append(_in_own_process(config, text))
    rows = [{"method": text} | _summarised(runs) for text, runs in found.items()]
    units = {"peak_bytes": "bytes", "over_model_bytes": "bytes", "seconds_per_step": "s"}
    metrics = [
        Metric(name, float(row[name]), None, None, unit, "trained", row["method"], "")
        for row in rows
        for name, unit in units.items()
    ]
    runs = [{"method": text, "round": i} | entry for text, each in found.items() for i, entry in enumerate(each)]
    return Findings(
        metrics, tables={"methods": rows, "runs": runs}, model=config.run.model_identity(),
        dataset={"name": config.task, "fingerprint": data.fingerprint},
    )  # fmt: skip


def _summarised(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Medians over the rounds."""
    row = {name: statistics.median(run[name] for run in runs) for name in ("peak_bytes", "seconds_per_step")}
    over = statistics.median(run["peak_bytes"] - run["model_bytes"] for run in runs)
    return row | {"over_model_bytes": over, "trained_parameters": runs[0]["trained_parameters"]}


def _in_own_process(config: Config, method: str) -> dict[str, Any]:
    asked = pickle.dumps((config.run, config.task, method)).hex()
    program = "import sys; from analyses.memory import child; child(sys.argv[1])"
    done = run_python(["-c", program, asked], capture_output=True, text=True)
    if done.returncode:
        last = done.stderr.strip().splitlines()[-1:] or ["no message"]
        raise UserError(f"method {method} failed: {last[0].removeprefix('error: ')}")
    return json.loads(done.stdout.splitlines()[-1])


def child(asked: str) -> None:
    """Measure one method in this process, and print the measurements as JSON in the last line.

    Args:
        asked: The pickled `RunConfig`, task and method, in hexadecimal digits.
    """

    def measure() -> None:
        run, task, method = pickle.loads(bytes.fromhex(asked))
        own_task(run)  # Tasks made from a user's rows are known to the process that made them.
        before = _Before()
        measured = training_run(run, run.load(task), Method.parse(method), seed=0, callbacks=[before])
        kept = ("trained_parameters", "seconds_per_step", "peak_bytes")
        print(f"\n{json.dumps({name: measured[name] for name in kept} | {'model_bytes': before.bytes})}")

    run_command(measure)


@summary_of_blocks
def summary(result: Result) -> Iterator[Block]:
    """One row for each method."""
    yield ["method", "peak MB", "over the model, MB", "s/step", "trained"], [
        [row["method"], number(row["peak_bytes"] / _MEGABYTE), number(row["over_model_bytes"] / _MEGABYTE),
         number(row["seconds_per_step"]), f"{row['trained_parameters']:,}"]
        for row in result.tables["methods"]
    ]  # fmt: skip


ANALYSIS = Analysis("memory", Config, find, summary, least={"rounds": 1})
run = ANALYSIS.run

if __name__ == "__main__":
    ANALYSIS.command(__doc__)
