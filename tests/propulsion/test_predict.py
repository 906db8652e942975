"""Predictions on new rows: names and probabilities, of whole models and adapters, by the command and by a function."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from propulsion import predict as command
from propulsion import train as train_command
from propulsion.data import load_task_data
from propulsion.data.tasks import OWN_TASKS
from propulsion.errors import UserError
from propulsion.predict import Config, load_predictor, predict_rows, run
from propulsion.train import TrainConfig

TOPICS = ("art", "food", "sport")
ROWS = [{"text": f"a sentence about {TOPICS[i % 3]}, number {i}", "topic": TOPICS[i % 3]} for i in range(30)]
NEW = [{"text": "one sentence"}, {"text": "food, food and food"}, {"text": "sport " * 30}]


def write(path, rows):
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def runs(tmp_path_factory, tiny_model):
    """Folders of runs of three classes, fully trained and by LoRA, and of a regression by Propulsion."""
    folder = tmp_path_factory.mktemp("runs")
    classes = write(folder / "rows.jsonl", ROWS)
    values = write(folder / "values.jsonl", [{"text": row["text"], "grade": i / 7} for i, row in enumerate(ROWS)])
    kinds = {"full": ("topic", classes), "lora": ("topic", classes), "propulsion": ("grade", values)}
    for method, (label, rows) in kinds.items():
        train_command.run(TrainConfig(
            data_dir=rows, text_columns=("text",), label_column=label, model=str(tiny_model), method=method,
            max_steps=2, learning_rate=0.01, head_learning_rate=0.01, max_length=32, disable_tqdm=True,
            output_dir=folder / method,
        ))  # fmt: skip
    OWN_TASKS.clear()  # The folder alone says what the model predicts.
    return folder


@pytest.mark.parametrize("method", ["full", "lora"])
def test_names_and_probabilities_are_those_of_the_run(runs, method):
    found = predict_rows(runs / method, NEW)
    assert [row["text"] for row in found] == [row["text"] for row in NEW]
    predictor = load_predictor(runs / method)
    assert (predictor.names, predictor.text_columns, predictor.max_length) == (TOPICS, ("text",), 32)
    inputs = predictor.tokenizer([row["text"] for row in NEW], padding=True, truncation=True, max_length=32,
                                 return_tensors="pt")  # fmt: skip
    with torch.no_grad():
        expected = predictor.model(**inputs).logits.double().softmax(dim=1)
    for row, probabilities in zip(found, expected, strict=True):
        np.testing.assert_allclose(list(row["probabilities"].values()), probabilities, rtol=1e-5)
        assert row["prediction"] == TOPICS[int(probabilities.argmax())]
        assert row["probability"] == max(row["probabilities"].values())


@pytest.mark.parametrize("method", ["full", "lora", "propulsion"])
def test_predictions_on_validation_rows_are_those_of_the_run(runs, method):
    label, rows = ("grade", "values") if method == "propulsion" else ("topic", "rows")
    train = TrainConfig(data_dir=runs / f"{rows}.jsonl", text_columns=("text",), label_column=label)
    data = load_task_data(train_command.with_own_task(train).task, data_dir=train.data_dir)
    stored = json.loads((runs / method / "predictions.json").read_text())
    found = predict_rows(runs / method / "model", [{"text": text} for text in data.validation["text"]])
    if method == "propulsion":
        np.testing.assert_allclose([row["prediction"] for row in found], stored, rtol=1e-5)
        assert found[0].keys() == {"text", "prediction"}
    else:
        assert [TOPICS.index(row["prediction"]) for row in found] == stored


def test_a_saved_model_away_from_its_run_needs_the_columns_alone(runs, tmp_path):
    for method in ("full", "lora", "propulsion"):
        (runs / method / "model").rename(tmp_path / method)
        try:
            with pytest.raises(UserError, match=r"columns of text are not recorded.*--text-columns"):
                predict_rows(tmp_path / method, NEW)
            found = predict_rows(tmp_path / method, NEW, text_columns=["text"])
        finally:
            (tmp_path / method).rename(runs / method / "model")
        same = predict_rows(runs / method, NEW)
        assert [row["prediction"] for row in found[:2]] == [row["prediction"] for row in same[:2]]


@pytest.mark.parametrize("suffix", [".csv", ".jsonl"])
def test_the_command_writes_a_file_and_replaces_none_unasked(runs, tmp_path, suffix, capsys):
    new = write(tmp_path / "new.jsonl", [{"id": 3} | row for row in NEW])
    config = Config(runs / "full", data_dir=new, output=tmp_path / f"out{suffix}")
    command.main(config)
    assert "3 predictions (" in capsys.readouterr().out
    lines = (tmp_path / f"out{suffix}").read_text(encoding="utf-8").splitlines()
    if suffix == ".csv":
        assert lines[0] == "row,text,prediction,probability,p(art),p(food),p(sport)"
        assert len(lines) == 4
    else:
        assert json.loads(lines[2])["row"] == 3
    with pytest.raises(UserError, match="exists already"):
        run(config)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["new.jsonl", f"out{suffix}"]
    command.main(Config(runs / "full", data_dir=new))
    assert capsys.readouterr().out.startswith("row,text,prediction,")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"text_columns": ("txt",)}, r"no column txt \(did you mean text\?\); its columns are: text"),
        ({"data_dir": None}, "give --data-dir"),
        ({"output": "out.xlsx"}, "unknown format: expected .csv, .jsonl"),
        ({"batch_size": 0}, "batch_size must be at least 1"),
        ({"max_length": 1000}, "max_length is 1000"),
    ],
)
def test_mistakes_are_one_line(runs, tmp_path, options, message):
    new = write(tmp_path / "new.jsonl", NEW)
    values = {"data_dir": new} | options
    values |= {"output": tmp_path / values["output"]} if "output" in values else {}
    with pytest.raises(UserError, match=message) as caught:
        run(Config(runs / "full", **values))
    assert "\n" not in str(caught.value)


def test_rows_that_cannot_be_predicted_are_named(runs, tmp_path):
    with pytest.raises(UserError, match="row 2 has no column text"):
        predict_rows(runs / "full", [NEW[0], {"words": "x"}])
    with pytest.raises(UserError, match="row 1: text is 3, expected text"):
        predict_rows(runs / "full", [{"text": 3}])
    assert predict_rows(runs / "full", []) == []


def test_what_is_no_trained_classifier_is_refused(runs, tmp_path, tiny_model):
    for folder, message in (
        (tmp_path / "absent", "is no folder"),
        (tmp_path, "holds no saved model"),
    ):
        with pytest.raises(UserError, match=message):
            load_predictor(folder)
    encoder = tmp_path / "encoder"
    encoder.mkdir()
    for path in tiny_model.iterdir():
        (encoder / path.name).write_bytes(path.read_bytes())
    weights = load_file(encoder / "model.safetensors")
    kept = {name: weight for name, weight in weights.items() if not name.startswith("classifier")}
    save_file(kept, encoder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"has no trained head: classifier.weight is not in its file"):
        load_predictor(encoder)
