"""Predict new rows with a trained classifier: `python -m propulsion.predict results/train --data-dir new_rows.csv`.

The model is the folder of a run of `propulsion.train`, the folder `model` in it, or any folder of a classifier that
transformers or peft saved. The rows need no labels; a column of labels is ignored. Each prediction has the row's number
and texts, the label by its name with the probability of every class, or the value of a regression. Predictions are
written as CSV or JSON lines, by the suffix of `--output`, or printed as CSV without it.

The same in Python:

    from propulsion.predict import predict_rows
    predict_rows("results/train", [{"text": "a new sentence"}])
"""

import csv
import io
import json
import sys
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tyro
from peft.utils import CONFIG_NAME
from peft.utils.save_and_load import load_peft_weights
from scipy.special import softmax

from propulsion.adapters import BASE_FILE, label_names, load_adapter
from propulsion.atomic import write_text
from propulsion.command_line import parsed
from propulsion.data.kinds import Limits
from propulsion.data.kinds.classification import logits
from propulsion.data.own import read_task_file
from propulsion.data.row_values import text
from propulsion.data.sources import own_tables
from propulsion.data.tasks import OwnTask, get_task
from propulsion.errors import Unusable, UserError, did_you_mean, explained, library_errors, listed, run_command
from propulsion.heads import was_read
from propulsion.pretrained import load_model
from propulsion.pretrained.packaged import MODELS
from propulsion.training.run_folder import MODEL, RECORD
from propulsion.user_files import expanded, read_json

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Config:
    """Options of the command."""

    model_folder: tyro.conf.Positional[Path]
    """Folder of a run of propulsion.train, or of a saved classifier or adapter."""
    data_dir: Path | None = None
    """The rows: one file, or a folder with one file or a file named train; by default the task file's."""
    text_columns: tuple[str, ...] = ()
    """The column of the text, or the two columns of a pair; by default those that the run was trained on."""
    task_file: Path | None = None
    """Task file that the run was trained with, for the columns of texts."""
    output: Path | None = None
    """File to write, .csv or .jsonl; by default predictions are printed as CSV."""
    overwrite: bool = False
    """Replace an existing file."""
    model: str | None = None
    """Base model of an adapter; by default the one that the adapter names."""
    pooling: str = "auto"
    """Pooling of the base model of an adapter that does not record its own."""
    max_length: int | None = None
    """Cut inputs to this many tokens; by default as in the run, and otherwise too long inputs are an error."""
    batch_size: int = 64
    """Rows of a batch."""
    device: str | None = None
    """Torch device; by default an accelerator if there is one."""
    trust_remote_code: bool = False
    """Run Python code that comes with the model."""
    allow_unfitting_weights: bool = False
    """Load weights that do not fit the model's config.json, those that are missing at random."""


@dataclass(frozen=True)
class Predictor:
    """A trained classifier or regressor with its tokenizer.

    Attributes:
        model: The model.
        tokenizer: Its tokenizer.
        names: Names of the classes in order; empty for a regression.
        text_columns: The columns of text that it was trained on; empty if that is not recorded.
        max_length: Tokens to which its inputs were cut in training; None if they were not, or that is not recorded.
    """

    model: Any
    tokenizer: Any
    names: tuple[str, ...]
    text_columns: tuple[str, ...] = ()
    max_length: int | None = None

    def predict(
        self, rows: Sequence[Row], *, text_columns: Sequence[str] = (), max_length: int | None = None,
        batch_size: int = 64,
    ) -> list[dict[str, Any]]:  # fmt: skip
        """Predict rows, which need not have labels.

        Args:
            rows: Rows with the columns of text.
            text_columns: The columns of text; by default those of the training.
            max_length: Cut inputs to this many tokens; by default as in training.
            batch_size: Rows of a batch.

        Returns:
            For each row its texts and "prediction": the name of the class, with its "probability" and, by class, the
            "probabilities"; or the value of a regression. Probabilities are the softmax of the logits, in float64.

        Raises:
            UserError: A row lacks a text, or is too long for the model.
        """
        columns = tuple(text_columns) or self.text_columns
        if not 1 <= len(columns) <= 2:
            raise UserError("the columns of text are not recorded with this model: give --text-columns")
        task = OwnTask("new rows", columns, self.names, (), 1.0, label_column="")
        texts = {column: [_text(row, column, number) for number, row in enumerate(rows, start=1)] for column in columns}
        if not rows:
            return []
        limits = Limits(self.max_length if max_length is None else max_length, batch_size=batch_size)
        outputs = np.array(logits(self.model, self.tokenizer, task, texts, limits), dtype=np.float64)
        inputs = [dict(zip(texts, values)) for values in zip(*texts.values())]
        if not self.names:
            return [row | {"prediction": float(value)} for row, (value,) in zip(inputs, outputs)]
        predictions = []
        for row, probabilities in zip(inputs, softmax(outputs, axis=1)):
            best = int(probabilities.argmax())
            predictions.append(row | {
                "prediction": self.names[best], "probability": float(probabilities[best]),
                "probabilities": dict(zip(self.names, probabilities.tolist())),
            })  # fmt: skip
        return predictions


def predict_rows(
    model_folder: Path | str, rows: Sequence[Row], *, text_columns: Sequence[str] = (), **options: Any
) -> list[dict[str, Any]]:
    """Predict rows with the model of a folder: `load_predictor` and `Predictor.predict` in one call.

    Args:
        model_folder: As for `load_predictor`.
        rows: Rows with the columns of text.
        text_columns: The columns of text; by default those of the training.
        options: Further options of `load_predictor`.
    """
    return load_predictor(model_folder, **options).predict(rows, text_columns=text_columns)


def load_predictor(
    model_folder: Path | str, *, model: str | None = None, pooling: str = "auto", device: str | None = None,
    trust_remote_code: bool = False, allow_unfitting_weights: bool = False,
) -> Predictor:  # fmt: skip
    """Load a trained classifier or regressor.

    Args:
        model_folder: Folder of a run of `propulsion.train`, or of a classifier or adapter that was saved.
        model: Base model of an adapter; by default the one that the adapter names.
        pooling: Pooling of the base model of an adapter that does not record its own.
        device: Torch device; by default an accelerator if there is one.
        trust_remote_code: Run Python code that comes with the model.
        allow_unfitting_weights: Load weights that do not fit the model's config.json, those that are missing at random.

    Raises:
        UserError: The folder holds no trained classifier, or it cannot be loaded.
    """
    folder = expanded(model_folder)
    with explained(f"read the folder {folder}"):
        if not folder.is_dir():
            raise UserError(f"{folder} is no folder: name the folder of a run of propulsion.train, or of a saved model")
        run = folder if (folder / RECORD).is_file() else folder.parent
        record = read_json(run / RECORD) if (run / RECORD).is_file() else {}
        if run == folder:
            folder = run / MODEL
            if not folder.is_dir():
                raise UserError(f"{run} holds no trained model yet: the same propulsion.train command finishes the run")
        is_adapter = (folder / CONFIG_NAME).is_file()
        if not is_adapter and not (folder / "config.json").is_file():
            raise UserError(f"{folder} holds no saved model: it has neither config.json nor {CONFIG_NAME}")
    place = device or str(torch.accelerator.current_accelerator() or "cpu")
    shared: dict[str, Any] = {
        "device": place, "trust_remote_code": trust_remote_code, "allow_unfitting_weights": allow_unfitting_weights,
        "task_type": "SEQ_CLS",
    }  # fmt: skip
    recorded = _recorded(record)
    if is_adapter:
        network, tokenizer = _adapted(folder, model, pooling, recorded.get("num_labels"), shared)
    else:
        labels = read_json(folder / "config.json").get("id2label") or dict.fromkeys("01")
        network, tokenizer = load_model(folder, num_labels=len(labels), **shared)
        _refuse_untrained(network, folder)
    count = len(network.config.id2label or "")
    names = tuple(label_names(network.config)) or tuple(map(str, range(count)))
    return Predictor(
        network, tokenizer, () if count == 1 else names, recorded.get("text_columns", ()), recorded.get("max_length")
    )


def _recorded(record: Mapping[str, Any]) -> dict[str, Any]:
    """The columns of text, the number of outputs and the longest input of a run, from its record; empty without one.

    Raises:
        UserError: The run is of another kind of task than classification or regression.
    """
    task = record.get("task")
    if task is None:
        return {}
    if isinstance(task, str):
        known = get_task(task)
        if known.kind not in ("classification", "regression"):
            raise UserError(f"the run is of task {task}, of the kind {known.kind}; this predicts labels of whole texts")
        columns, count = known.text_columns, known.num_labels
    else:
        columns, count = tuple(task["text_columns"]), len(task["label_names"]) or 1
    return {"text_columns": columns, "num_labels": count, "max_length": record.get("max_length")}


def _adapted(
    folder: Path, model: str | None, pooling: str, num_labels: int | None, shared: Mapping[str, Any]
) -> tuple[Any, Any]:
    """The model of a saved adapter on its base model, and its tokenizer."""
    settings = read_json(folder / CONFIG_NAME, needed="peft_type")
    base = read_json(folder / BASE_FILE) if (folder / BASE_FILE).is_file() else {}
    named = model or settings.get("base_model_name_or_path")
    if not named:
        raise UserError(f"the adapter in {folder} does not name its base model: give it by --model")
    # Packaged models are recorded by their names on the hub.
    packaged = next((one.name for one in MODELS.values() if one.hub == named and not one.missing()), named)
    count = num_labels or len(base.get("label_names", ())) or _outputs(folder, settings)
    network, tokenizer = load_model(packaged, num_labels=count, pooling=base.get("pooling", pooling), **shared)
    return load_adapter(network, folder).eval(), tokenizer


def _outputs(folder: Path, settings: Mapping[str, Any]) -> int:
    """The number of outputs of an adapter's head: the fewest rows of a matrix of the modules that it saves."""
    saved = tuple(settings.get("modules_to_save") or ())
    with library_errors(f"the adapter in {folder} cannot be read"):
        weights = load_peft_weights(str(folder), device="cpu")
    rows = [len(w) for name, w in weights.items() if w.ndim == 2 and any(f".{one}." in f".{name}" for one in saved)]
    if not rows:
        raise UserError(f"the adapter in {folder} has no trained head, so that it predicts no labels")
    return min(rows)


def _refuse_untrained(network: Any, folder: Path) -> None:
    """Raise if the head of a model was not read from its folder, and is therefore random."""
    names = {id(p): name for name, p in network.named_parameters()}
    body = getattr(network, network.base_model_prefix, None)
    inside = set() if body is None else {id(p) for p in body.parameters()}
    if random := [names[key] for key in names if key not in inside and not was_read(network.get_parameter(names[key]))]:
        raise UserError(f"the model in {folder} has no trained head: {random[0]} is not in its file; train it first")


def _text(row: Row, column: str, number: int) -> str:
    if column not in row:
        raise UserError(
            f"row {number} has no column {column}{did_you_mean(column, row)}; its columns are: {listed([*row])}"
        )
    try:
        return text(row[column], column, blank=True)
    except UserError as error:
        raise UserError(f"row {number}: {error}") from error


def read_new_rows(data_dir: Path | str, text_columns: Sequence[str]) -> list[dict[str, Any]]:
    """The texts of the rows of a file, or of the one file or the train file in a folder.

    Raises:
        UserError: There is no such file, it cannot be read, or a column is missing.
    """
    table = own_tables(data_dir)["train"]
    rows = []
    for row in table.read():
        if row.problem is not None:
            raise UserError(f"{table.name}, {row.location}: {row.problem}")
        for column in text_columns:
            if column not in row.values:
                close = did_you_mean(column, row.values)
                raise UserError(f"{table.name} has no column {column}{close}; its columns are: {listed([*row.values])}")
        rows.append({column: row.values[column] for column in text_columns})
    if not rows:
        raise UserError(f"{table.name} has no rows")
    return rows


def as_csv(predictions: Iterable[Mapping[str, Any]]) -> str:
    """Predictions as CSV: row, texts, prediction, and for classes the probability and a column of each class."""
    flat = []
    for number, one in enumerate(predictions, start=1):
        classes = one.get("probabilities", {})
        values = {name: value for name, value in one.items() if name != "probabilities"}
        flat.append({"row": number} | values | {f"p({name})": value for name, value in classes.items()})
    if not flat:
        return ""
    written = io.StringIO()
    writer = csv.DictWriter(written, list(flat[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(flat)
    return written.getvalue()


def as_json_lines(predictions: Iterable[Mapping[str, Any]]) -> str:
    """Predictions as JSON lines, one object for each row."""
    return "".join(
        json.dumps({"row": number} | dict(one), ensure_ascii=False) + "\n"
        for number, one in enumerate(predictions, start=1)
    )


FORMATS = {".csv": as_csv, ".jsonl": as_json_lines}
"""The suffixes of files of predictions, and the functions that write them."""


def run(config: Config) -> list[dict[str, Any]]:
    """Predict the rows of a configuration, write them if a file is named, and return them.

    Raises:
        UserError: The model, the rows or the file cannot be used.
    """
    output = None if config.output is None else expanded(config.output)
    if output is not None:
        if output.suffix.lower() not in FORMATS:
            raise UserError(f"output {output} is of an unknown format: expected {', '.join(FORMATS)}")
        if output.exists() and not config.overwrite:
            raise UserError(f"{output} exists already: name another file, or pass --overwrite")
    given = {} if config.task_file is None else read_task_file(config.task_file)
    place = config.data_dir or given.get("data_dir")
    if place is None:
        raise UserError("there must be rows to predict: give --data-dir, a file or a folder")
    if config.batch_size < 1:
        raise UserError(f"batch_size must be at least 1; got {config.batch_size}")
    own_tables(place)  # A mistake in the path is reported before the model is loaded.
    predictor = load_predictor(
        config.model_folder, model=config.model, pooling=config.pooling, device=config.device,
        trust_remote_code=config.trust_remote_code, allow_unfitting_weights=config.allow_unfitting_weights,
    )  # fmt: skip
    columns = config.text_columns or tuple(given.get("text_columns", ())) or predictor.text_columns
    if not columns:
        raise UserError("the columns of text are not recorded with this model: give --text-columns")
    rows = read_new_rows(place, columns)
    try:
        predictions = predictor.predict(
            rows, text_columns=columns, max_length=config.max_length, batch_size=config.batch_size
        )
    except Unusable as error:
        which = listed([f"row {row + 1}" for row in error.examples])
        raise UserError(f"{place}: {error.what}: {which}; {error.remedy}") from error
    if output is not None:
        with explained(f"write {output}"):
            output.parent.mkdir(parents=True, exist_ok=True)
            write_text(output, FORMATS[output.suffix.lower()](predictions))
    return predictions


def main(config: Config) -> None:
    """Predict, and print the predictions, or where they are and how many of each class."""
    predictions = run(config)
    if config.output is None:
        sys.stdout.write(as_csv(predictions))
        return
    counts = Counter(one["prediction"] for one in predictions if isinstance(one["prediction"], str))
    shown = f" ({', '.join(f'{name} {count}' for name, count in counts.most_common())})" if counts else ""
    print(f"{len(predictions)} predictions{shown} in {config.output}")


if __name__ == "__main__":
    run_command(lambda: main(parsed(Config, prog="python -m propulsion.predict", description=__doc__)))
