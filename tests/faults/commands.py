"""The commands that faults are put to, each on a tiny configuration."""

import importlib
import json
import os
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import tyro

from analyses import method_comparison
from analyses.claims import __main__ as claims
from analyses.claims import plan
from analyses.claims.judge import load_tree
from analyses.core import child
from analyses.core.analysis import Analysis, GridOutput
from analyses.core.cells import ARRAYS
from analyses.kernel_distance import analysis as kernel_distance
from analyses.records import RESULT_FILE, RecordError, Result, load_result, read_arrays
from analyses.records.checked import strict_json
from analyses.subjects.training_run import RunConfig
from propulsion.train import main as train
from propulsion.training import TrainingOptions
from propulsion.training.checkpoints import checkpoints
from propulsion.training.manifest import Manifest
from tests.faults.processes import Command
from tests.faults.runs import CASES, configuration
from tests.faults.runs import differences as training_differences

TRAINING = TrainingOptions(
    max_steps=2, per_device_train_batch_size=4, max_length=32, learning_rate=0.01, head_learning_rate=0.01
)
RESULT, LEDGER = "result", "ledger.json"
CARRIED_OUT = ("kernel_distance", "method_comparison", "parameter_count", "johnson_lindenstrauss", "delta_weights")
"""The analyses that the commands carry out."""


def every_command(model: Path) -> dict[str, Command]:
    """All commands by name, on a model: the cases of training, two analyses with cells, and the claims."""
    for name in CARRIED_OUT:  # Otherwise each forked process would import them.
        importlib.import_module(f"analyses.{name}")
        importlib.import_module(f"figures.{name}")
    found = [_training(case, model) for case in CASES]
    found += [
        _analysis(method_comparison.ANALYSIS, compared(model)),
        _analysis(kernel_distance.ANALYSIS, measured(model)),
    ]
    # 1 if one of its runs failed, 2 if its own reports cannot be written.
    found.append(Command("claims", partial(judged, model), _finished, _unreadable, _claims_differences, failed=(1, 2)))
    return {command.name: command for command in found}


def _training(case: str, model: Path) -> Command:
    def carry_out(folder: Path) -> None:
        train(configuration(model, folder / "run", case))

    def damaged(folder: Path) -> str:
        run = folder / "run"
        found = [Manifest(run).damaged(checkpoint) for checkpoint in checkpoints(run)]
        return ", ".join(filter(None, found))

    def differences(folder: Path, expected: Path) -> list[str]:
        return training_differences(folder / "run", expected / "run")

    return Command(f"train: {case}", carry_out, lambda folder: (), damaged, differences)


def _analysis(analysis: Analysis[Any], config: Callable[[Path], GridOutput]) -> Command:
    def differences(folder: Path, expected: Path) -> list[str]:
        return result_differences(load_result(folder / RESULT), load_result(expected / RESULT))

    def done(folder: Path) -> bool:
        return (folder / RESULT / RESULT_FILE).exists()

    return Command(
        analysis.name, lambda folder: analysis.publish(config(folder)), _finished, _unreadable, differences, done
    )


# --- configurations -------------------------------------------------------------------------------------------------


def compared(model: Path) -> Callable[[Path], method_comparison.Config]:
    """The configuration of a comparison of two methods, by the folder."""
    run = RunConfig(model=str(model), n_train=16, n_validation=12, degree=3, training=TRAINING)
    return lambda folder: method_comparison.Config(
        output_dir=folder / RESULT, methods=("full", "head"), tuning_steps=1, rate_extensions=0,
        seeds=(0, 1), run=run,
    )  # fmt: skip


def measured(model: Path) -> Callable[[Path], kernel_distance.Config]:
    """The configuration of a measurement of kernels for two seeds, by the folder."""
    return lambda folder: kernel_distance.Config(
        output_dir=folder / RESULT, model=str(model), n_examples=4, n_validation=8, training=TRAINING, seeds=(0, 1),
        null_draws=1, resamples=2,
    )  # fmt: skip


def claimed(model: Path) -> list[plan.Run]:
    """Runs without and with cells, of which one reads the result of another."""
    short = {"max_steps": 2, "per_device_train_batch_size": 4, "max_length": 32, "n_train": 16, "n_validation": 12}
    own: dict[str, Any] = {"model": str(model), "learning_rate": 0.01, "head_learning_rate": 0.01, **short}
    methods = ("full", "head")
    return [
        plan.run("parameter_count"),
        plan.run("johnson_lindenstrauss", dimensions=(4, 16), draws=200),
        plan.run("method_comparison/demo", methods=methods, seeds=(0,), tuning_steps=1, rate_extensions=0,
                 **own),
        plan.rated("delta_weights", "demo", methods=methods, **own),
    ]  # fmt: skip


def judged(model: Path, folder: Path) -> None:
    """Carry out the claims with the runs of `claimed`, whose processes are forked."""
    plan.quick_plan, plan.run_python = partial(claimed, model), _run_forked
    claims.main(claims.Config(quick=True, output_dir=folder / "claims"))


def _run_forked(words: Sequence[str], **options: Any) -> Any:
    """As `run_python`, but the child carries out its command where it would start the interpreter.

    It is started, and ended with its parent, as any child of `run_python`; but it need not import torch.
    """
    end_with_parent = child._end_with_parent

    def carry_out(parent: int) -> None:
        end_with_parent(parent)
        os.closerange(3, 1000)  # As at the start of a program; the parent waits for that.
        sys.stdout, sys.stderr = os.fdopen(1, "w", buffering=1), os.fdopen(2, "w", buffering=1)
        code = 1
        try:
            module = sys.modules[words[1]]
            claims.run_command(lambda: module.ANALYSIS.publish(tyro.cli(module.Config, args=list(words[2:]))))
            code = 0
        except SystemExit as stop:
            code = stop.code if isinstance(stop.code, int) else 1
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            os._exit(code)

    child._end_with_parent = carry_out
    try:
        return child.run_python(words, **options)
    finally:
        child._end_with_parent = end_with_parent


# --- what a folder holds --------------------------------------------------------------------------------------------


def _visible(folder: Path, pattern: str) -> Iterator[Path]:
    """The files of a name below a folder that are in no hidden folder."""
    for path in folder.rglob(pattern):
        if not any(part.startswith(".") for part in path.relative_to(folder).parts):
            yield path


def _cells(folder: Path) -> list[Path]:
    return [path for path in _visible(folder, "*.json") if path.parent.name.endswith("-runs")]


def _finished(folder: Path) -> list[Path]:
    """The files of finished cells and results; the results of a single analysis end its command."""
    cells = [path.with_suffix(suffix) for path in _cells(folder) for suffix in (".json", ".npz")]
    return [path for path in (*cells, *_visible(folder, RESULT_FILE)) if path.exists()]


def _unreadable(folder: Path) -> str:
    try:
        for path in _visible(folder, RESULT_FILE):
            load_result(path.parent)
        for path in _cells(folder):
            content = strict_json(path.read_bytes())
            if content.get(ARRAYS) is not None:
                read_arrays(path.with_suffix(".npz"), content[ARRAYS], content["arrays_sha256"])
        for path in _visible(folder, LEDGER):
            strict_json(path.read_bytes())
        if empty := [path.name for path in _visible(folder, "report.html") if not path.stat().st_size]:
            return f"{empty[0]} is empty"
    except (RecordError, ValueError, KeyError) as error:
        return f"unreadable: {error}"
    return ""


def result_differences(one: Result, other: Result) -> list[str]:
    """The names of the parts in which two results differ, apart from times, memory, machine and folders."""
    names = ("metrics", "tables", "arrays", "model", "dataset", "coverage")
    return [name for name in names if comparable(getattr(one, name)) != comparable(getattr(other, name))]


def comparable(value: Any) -> Any:
    """Some content as text and bytes, in which NaN equals NaN, without what depends on times and memory."""
    if isinstance(value, Mapping):
        return {k: comparable(v) for k, v in value.items() if "seconds" not in str(k) and k != "peak_bytes"}
    if isinstance(value, list | tuple):
        return [comparable(one) for one in value]
    if isinstance(value, np.ndarray):
        return value.dtype.str, value.shape, value.tobytes()
    return repr(value)


def _claims_differences(folder: Path, expected: Path) -> list[str]:
    one, other = (load_tree(place / "claims") for place in (folder, expected))
    names = [
        f"{name}: {part}" for name in one.keys() & other.keys() for part in result_differences(one[name], other[name])
    ]
    ledgers = [json.loads((place / "claims" / LEDGER).read_text("utf-8"))["rows"] for place in (folder, expected)]
    return [*sorted(one.keys() ^ other.keys()), *sorted(names), *([LEDGER] if ledgers[0] != ledgers[1] else [])]
