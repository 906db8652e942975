"""Single flipped bits in stored files: each is refused in a line that names the file, or changes nothing used."""

import contextlib
import io
import os
import random
import shutil
import warnings
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatch
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer

from analyses import method_comparison
from analyses.core.errors import MISTAKES
from analyses.kernel_distance import analysis as kernel_distance
from analyses.records import load_result
from propulsion.adapters import load_adapter
from propulsion.data import load_task_data, tokenize_cached
from propulsion.data.kinds import Limits
from propulsion.hotswap import hotswap_adapter
from propulsion.identity import model_content
from propulsion.pretrained import load_classifier
from propulsion.train import run
from propulsion.training import run_folder
from tests.faults.commands import comparable, compared, judged, measured
from tests.faults.runs import configuration, outcome

OLDER = "an older checkpoint is not read"
FIGURE = "a figure: it is drawn from the result, and no number is read from it"
WRITTEN = "a report: it is written again, and no number is read from it"


@dataclass(frozen=True)
class Stored:
    """A folder, and what reads it.

    Attributes:
        name: Its name in tables.
        folder: The folder.
        read: Returns all that is used of a copy of the folder, in a form that can be compared; raises one of `MISTAKES`
            where it refuses something.
        unused: Why a flipped bit may be without effect, by the pattern of paths within the folder.
    """

    name: str
    folder: Path
    read: Callable[[Path], Any]
    unused: Mapping[str, str] = field(default_factory=dict)

    @property
    def files(self) -> list[str]:
        """The paths of all files within the folder."""
        return sorted(path.relative_to(self.folder).as_posix() for path in self.folder.rglob("*") if path.is_file())


@dataclass
class Outcomes:
    """What became of flipped bits: how many were tried and refused, why others had no effect, and what went wrong."""

    tried: int = 0
    refused: int = 0
    unused: Counter[str] = field(default_factory=Counter)
    problems: list[str] = field(default_factory=list)


def flip_a_bit(path: Path, place: int) -> None:
    """Flip one bit, counted from the start of the file; size and time stay."""
    times, content = path.stat(), bytearray(path.read_bytes())
    content[place // 8] ^= 1 << place % 8
    path.write_bytes(content)
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))


def try_flips(stored: Stored, scratch: Path, draw: random.Random, *, each: int, most: int | None = None) -> Outcomes:
    """Flip bits of every file of a folder, one at a time, and read the folder after each.

    Args:
        stored: The folder, which is left as it is.
        scratch: The place of a copy, which is removed.
        draw: Draws the bits.
        each: Bits of each file.
        most: Number of files that are drawn; all if None.
    """
    found, expected = Outcomes(), _read(stored, scratch, None)
    assert not isinstance(expected, Exception), expected
    for name in stored.files if most is None else draw.sample(stored.files, min(most, len(stored.files))):
        size = (stored.folder / name).stat().st_size
        for _ in range(each if size else 0):
            place = draw.randrange(8 * size)
            seen = _read(stored, scratch, (name, place))
            found.tried += 1
            what = f"{stored.name}, {name}, bit {place}"
            if isinstance(seen, MISTAKES):
                named = Path(name).name in str(seen)
                found.refused += named
                found.problems += [] if named else [f"{what}: refused without its name: {seen}"]
            elif isinstance(seen, Exception):
                found.problems.append(f"{what}: {type(seen).__name__}: {seen}")
            elif seen != expected:
                found.problems.append(f"{what}: used without a word")
            else:
                reason = next((why for pattern, why in stored.unused.items() if fnmatch(name, pattern)), None)
                found.unused[reason or ""] += reason is not None
                found.problems += [] if reason else [f"{what}: without effect, for no known reason"]
    return found


def _read(stored: Stored, scratch: Path, flip: tuple[str, int] | None) -> Any:
    """What is read of a copy of a folder, or the error that it gives."""
    shutil.rmtree(scratch, ignore_errors=True)
    shutil.copytree(stored.folder, scratch)
    if flip is not None:
        flip_a_bit(scratch / flip[0], flip[1])
    try:
        with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return stored.read(scratch)
    except Exception as error:
        return error
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


# --- what is stored -------------------------------------------------------------------------------------------------


def training_runs(model: Path, place: Path) -> list[Stored]:
    """A finished run, one that is to be resumed and one that is to be made longer; an adapter and a whole model."""
    rates: dict[str, Any] = {"learning_rate": "auto", "head_learning_rate": "auto", "max_steps": 3, "save_steps": 2}
    adapted = configuration(model, place / "adapted", **rates)
    whole = configuration(model, place / "whole", "all weights", max_steps=1, save_strategy="no")
    for config in (adapted, whole):
        run(config)
    adapter = place / "adapted" / "model"
    shutil.copytree(place / "adapted", place / "resumed")
    for name in ("result.json", "predictions.json"):
        (place / "resumed" / name).unlink()
    shutil.rmtree(place / "resumed" / "model")

    def finished(folder: Path) -> Any:
        result = run(replace(adapted, output_dir=folder))
        return comparable([vars(result), run_folder.predictions_of(folder), run_folder.rates_of(folder)])

    def resumed(folder: Path, **changes: Any) -> Any:
        run(replace(adapted, output_dir=folder, **changes))
        adapter = load_adapter(load_classifier(str(model), num_labels=2)[0], folder / "model")
        return comparable([outcome(folder), _state(adapter)])

    return [
        Stored("run, finished", place / "adapted", finished, {
            "checkpoint-*": "a checkpoint of a finished run is not read",
        }),
        Stored("run, resumed", place / "resumed", resumed, {"checkpoint-2/*": OLDER}),
        Stored("run, made longer", place / "adapted", partial(resumed, max_steps=4), {
            "checkpoint-2/*": OLDER, "model/*": "it is written again",
            "predictions.json": "it is kept for the user, and not read",
        }),
        Stored("adapter, loaded", adapter, partial(_loaded, model)),
        Stored("adapter, hotswapped", adapter, partial(_swapped, model, adapter)),
        Stored("model, loaded", place / "whole" / "model", _whole_model, {
            "files.sha256": "a file whose name is damaged there counts as not listed, and is not checked",
        }),
    ]  # fmt: skip


def _state(model: torch.nn.Module) -> Any:
    return {name: weight.numpy() for name, weight in model.state_dict().items()}


def _loaded(model: Path, folder: Path) -> Any:
    adapted = load_adapter(load_classifier(str(model), num_labels=2)[0], folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    return model_content(adapted, tokenizer), repr(adapted.config.id2label), repr(adapted.peft_config)


def _swapped(model: Path, before: Path, folder: Path) -> Any:
    adapted = load_adapter(load_classifier(str(model), num_labels=2)[0], before)
    with torch.no_grad():
        for name, weight in adapted.named_parameters():
            if "propulsion" in name or "modules_to_save" in name:
                weight.zero_()
    hotswap_adapter(adapted, folder)
    return comparable(_state(adapted))


def _whole_model(folder: Path) -> Any:
    return model_content(*load_classifier(str(folder), num_labels=2))


def results(model: Path, place: Path, modules: Sequence[Any] = (method_comparison, kernel_distance)) -> list[Stored]:
    """The result and the cells, with or without arrays, of each of these analyses."""
    found = []
    figures = {"*.png": FIGURE, "*.pdf": FIGURE}
    for module in modules:
        config = compared(model) if module is method_comparison else measured(model)
        name = module.ANALYSIS.name
        module.ANALYSIS.publish(config(place / name))

        def from_cells(folder: Path, module: Any = module, config: Any = config) -> Any:
            result = module.run(replace(config(folder), runs_dir=folder))
            return comparable([result.metrics, result.tables, result.arrays, result.dataset])

        found.append(Stored(f"result, {name}", place / name / "result", _result, figures))
        found.append(Stored(f"cells, {name}", place / name / "result-runs", from_cells))
    return found


def ledgers(model: Path, place: Path) -> list[Stored]:
    """The folder of the claims."""
    judged(model, place / "claims")
    reports = dict.fromkeys(("*/claims.md", "*/ledger.json", "*/report.html"), WRITTEN)
    return [Stored("claims", place / "claims", partial(_claims, model), {
        "*.png": FIGURE, "*.pdf": FIGURE, **reports, "*/logs/*": "what a run printed: it is for the user",
        "*/QUICK": "it is the name of this file that counts", "*-runs/*": "cells of a finished result are not read",
    })]  # fmt: skip


def _result(folder: Path) -> Any:
    result = load_result(folder)
    return comparable(vars(result))


def _claims(model: Path, folder: Path) -> Any:
    errors = io.StringIO()
    with contextlib.redirect_stderr(errors):
        try:
            judged(model, folder)
        except SystemExit:
            raise MISTAKES[0](errors.getvalue()) from None
    return (folder / "claims" / "ledger.json").read_text(encoding="utf-8")


def tokenized_rows(model: Path, place: Path) -> list[Stored]:
    """The rows of a task as model inputs, which runs keep for later runs."""
    data, tokenizer = load_task_data("demo", n_train=16, n_validation=8), AutoTokenizer.from_pretrained(model)
    cache = partial(tokenize_cached, data, tokenizer, Limits(32))
    cache(place / "rows")
    return [
        Stored("tokenized rows", place / "rows", lambda folder: comparable(cache(folder)[:]), {
            "*": "a damaged file is removed, and the rows are tokenized again",
        })
    ]  # fmt: skip


def everything_stored(model: Path, place: Path) -> list[Stored]:
    """Every kind of stored folder, of tiny runs."""
    place.mkdir()
    with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        makers = (training_runs, results, ledgers, tokenized_rows)
        return [stored for make in makers for stored in make(model, place)]
