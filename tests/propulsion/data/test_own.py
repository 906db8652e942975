"""Tasks made from the columns of a user's rows: labels, splits, files that say it, and mistakes in one line."""

import csv
import dataclasses
import json
from collections import Counter

import datasets
import pyarrow
import pyarrow.parquet
import pytest

from analyses import default_rates, degree_scale, peft_kernels
from analyses.core.cells import settings_of
from analyses.subjects.training_run import RunConfig
from propulsion import train as train_command
from propulsion.data import load_task_data, task_from_columns
from propulsion.data.own import own_task, read_task_file, with_own_task
from propulsion.data.row_values import label_text
from propulsion.data.splitting import held_out
from propulsion.data.tables import Row
from propulsion.data.tasks import OWN_TASKS, OwnTask, Task
from propulsion.errors import UserError
from propulsion.predict import read_new_rows
from propulsion.train import TrainConfig
from propulsion.training import TrainingOptions

SHORT = {"max_steps": 1, "disable_tqdm": True, "learning_rate": 0.01, "head_learning_rate": 0.01}
TOPICS = ("sport", "cooking", "travel", "computing")
ROWS = [{"text": f"a sentence about {TOPICS[i % 4]}, number {i}", "topic": TOPICS[i % 4]} for i in range(40)]


@pytest.fixture(autouse=True)
def own_tasks(monkeypatch):
    monkeypatch.setattr("propulsion.data.own.OWN_TASKS", OWN_TASKS)
    yield
    OWN_TASKS.clear()


def write_csv(path, rows):
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def write_jsonl(path, rows):
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")


def write_parquet(path, rows):
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)


WRITERS = {"rows.csv": write_csv, "rows.jsonl": write_jsonl, "rows.parquet": write_parquet}


def of(path, rows, *, column="topic"):
    """A task and its data from rows of JSON lines."""
    write_jsonl(path / "rows.jsonl", rows)
    task = task_from_columns(path / "rows.jsonl", text_columns=["text"], label_column=column)
    return task, load_task_data(task, data_dir=path / "rows.jsonl")


def labelled(labels):
    return [{"text": f"sentence {i}", "topic": label} for i, label in enumerate(labels)]


@pytest.mark.parametrize("name", WRITERS)
def test_a_file_of_any_format_is_split_alike_and_each_class_is_in_both_parts(tmp_path, name):
    WRITERS[name](tmp_path / name, ROWS)
    task = task_from_columns(tmp_path / name, text_columns=["text"], label_column="topic")
    assert (task.name, task.label_names) == ("rows", tuple(sorted(TOPICS)))
    assert task.metrics == ("accuracy", "matthews")
    data = load_task_data(task, data_dir=tmp_path / name)
    assert Counter(data.train["topic"]) == dict.fromkeys(range(4), 8)
    assert Counter(data.validation["topic"]) == dict.fromkeys(range(4), 2)
    by_text = {row["text"]: row["topic"] for row in ROWS}
    for part in (data.train, data.validation):
        for row in part:
            assert task.label_names[row["topic"]] == by_text[row["text"]]
    write_jsonl(tmp_path / "again.jsonl", ROWS)
    again = load_task_data(task, data_dir=tmp_path / "again.jsonl", seed=5)
    assert list(again.validation["text"]) == list(data.validation["text"])
    assert again.fingerprint == data.fingerprint


def test_a_folder_with_a_validation_file_is_not_split(tmp_path):
    write_csv(tmp_path / "train.csv", ROWS[:24])
    write_jsonl(tmp_path / "dev.jsonl", ROWS[24:])
    task = task_from_columns(tmp_path, text_columns="text", label_column="topic")
    data = load_task_data(task, data_dir=tmp_path)
    assert (len(data.train), len(data.validation)) == (24, 16)


def test_a_train_file_alone_and_a_single_file_of_any_name_are_split(tmp_path):
    for name in ("train.csv", "reviews.csv"):
        folder = tmp_path / name.partition(".")[0]
        folder.mkdir()
        write_csv(folder / name, ROWS)
        task = task_from_columns(folder, text_columns=["text"], label_column="topic")
        assert len(load_task_data(task, data_dir=folder).validation) == 8


@pytest.mark.parametrize(
    ("labels", "names", "numbers"),
    [
        ([1, 2, 3, 4, 5], ("1", "2", "3", "4", "5"), [0, 1, 2, 3, 4]),
        ([5, 10, 1], ("1", "5", "10"), [1, 2, 0]),
        (["1", 2.0, " 2 "], ("1", "2"), [0, 1, 1]),
        ([True, False], ("false", "true"), [1, 0]),
        (["no", "yes", "maybe"], ("maybe", "no", "yes"), [1, 2, 0]),
        ([-1, 1], ("-1", "1"), [0, 1]),
    ],
)
def test_labels_of_any_kind_are_classes_by_name(tmp_path, labels, names, numbers):
    write_jsonl(tmp_path / "train.jsonl", labelled(labels * 6))
    write_jsonl(tmp_path / "validation.jsonl", labelled(labels))
    task = task_from_columns(tmp_path, text_columns=["text"], label_column="topic")
    assert task.label_names == names
    assert list(load_task_data(task, data_dir=tmp_path).validation["topic"]) == numbers


@pytest.mark.parametrize("labels", [[0.5, 1.25, 2.0], ["0.5", "3", "1e1"], list(range(30))])
def test_real_numbers_and_many_whole_ones_are_a_regression(tmp_path, labels):
    task, data = of(tmp_path, labelled(labels * 5))
    values = [float(label) for label in labels]
    assert (task.kind, task.num_labels, task.metrics[0]) == ("regression", 1, "pearson")
    assert task.label_range == (min(values), max(values))
    assert set(data.train["topic"]) <= set(values)
    assert task_from_columns(
        tmp_path / "rows.jsonl", text_columns=["text"], label_column="topic", kind="classification"
    ).num_labels == len(set(values))


def test_rows_of_equal_texts_stay_together():
    rows = [Row(i, values={"text": f"text {i % 10}", "topic": "ab"[i % 2]}) for i in range(60)]
    parts = held_out(rows, ["text"], "topic", by_class=True)
    texts = [{row.values["text"] for row in part} for part in parts.values()]
    assert not texts[0] & texts[1]
    assert len(texts[1]) == 2
    assert [row.number for row in parts["train"]] == sorted(row.number for row in parts["train"])


def test_a_class_of_one_text_is_trained_on():
    rows = [Row(i, values={"text": f"{i}", "topic": "a" if i else "b"}) for i in range(11)]
    assert rows[0] in held_out(rows, ["text"], "topic", by_class=True)["train"]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"text": row["text"]} for row in ROWS], r"has no column topic; its columns are: text"),
        ([{"text": row["text"], "topics": 1} for row in ROWS], r"has no column topic \(did you mean topics\?\)"),
        (labelled([""] * 20), "has no labels in the column topic: name the column .*propulsion.predict"),
        (labelled([None] * 20), "has no labels"),
        (labelled(["sport"] * 20), r"has one label only \('sport'\)"),
        (labelled(["a", "b", "a", "b", "a"]), "has 5 rows, too few to hold some out for validation: label 20"),
        (labelled(["a", "b"] * 10 + [None, ""]), "2 of 22 rows have no topic: row 21, row 22; label them, or"),
        (labelled(["Sport", "sport"] * 10), "'Sport' and 'sport' differ in case only"),
        (labelled([f"label {i}" for i in range(40)]), "has 40 different labels in 40 rows"),
        (labelled([0.5, "x", float("inf")] * 7), r"has|regression|not"),
    ],
)
def test_rows_that_cannot_be_used_are_one_line(tmp_path, rows, message):
    if message.startswith("has|"):
        task, _ = of(tmp_path, rows)  # Texts and numbers together are names.
        assert task.label_names == ("0.5", "inf", "x")
        return
    with pytest.raises(UserError, match=message) as caught:
        of(tmp_path, rows)
    assert "\n" not in str(caught.value)


def test_other_mistakes_are_one_line(tmp_path):
    write_jsonl(tmp_path / "rows.jsonl", ROWS)
    shared = {"text_columns": ["text"], "label_column": "topic"}
    mistakes = [
        ({"text_columns": ["text"], "label_column": "text"}, "another one for labels"),
        ({"text_columns": ["a", "b", "c"], "label_column": "topic"}, "expected one text column, or two"),
        (shared | {"kind": "ranking"}, "kind is 'ranking'"),
        (shared | {"metrics": ["acuracy"]}, r"no metric 'acuracy' \(did you mean accuracy"),
        (shared | {"kind": "regression"}, "is 'sport', which is not a finite number"),
    ]
    for options, message in mistakes:
        with pytest.raises(UserError, match=message):
            task_from_columns(tmp_path / "rows.jsonl", **options)
    for place, message in (("nowhere", "does not exist"), ("rows.txt", "unknown format")):
        (tmp_path / "rows.txt").write_text("x")
        with pytest.raises(UserError, match=message):
            task_from_columns(tmp_path / place, **shared)
    (tmp_path / "more.csv").write_text("text,topic\n")
    with pytest.raises(UserError, match=r"no train file in .*; there is more.csv, rows.jsonl"):
        task_from_columns(tmp_path, **shared)


def test_an_unknown_class_of_named_ones_is_told_with_the_near_miss(tmp_path):
    write_jsonl(tmp_path / "rows.jsonl", ROWS)
    task = task_from_columns(tmp_path / "rows.jsonl", text_columns=["text"], label_column="topic",
                             label_names=["sports", "cooking", "travel", "computing"])  # fmt: skip
    with pytest.raises(UserError, match=r"topic 'sport' is not one of .*did you mean sports"):
        load_task_data(task, data_dir=tmp_path / "rows.jsonl")


TASK_FILES = {
    "task.toml": 'name = "topics"\ndata_dir = "rows"\ntext_columns = ["text"]\nlabel_column = "topic"\n',
    "task.yaml": "name: topics\ndata_dir: rows\ntext_columns: text\nlabel_column: topic\n",
    "task.json": '{"name": "topics", "data_dir": "rows", "text_columns": ["text"], "label_column": "topic"}',
}


@pytest.mark.parametrize("name", TASK_FILES)
def test_a_task_file_says_what_options_say(tmp_path, name):
    (tmp_path / "rows").mkdir()
    write_csv(tmp_path / "rows" / "train.csv", ROWS)
    (tmp_path / name).write_text(TASK_FILES[name])
    by_file = with_own_task(TrainConfig(task_file=tmp_path / name))
    assert (by_file.task, by_file.data_dir) == ("topics", tmp_path / "rows")
    by_options = own_task(TrainConfig(data_dir=tmp_path / "rows", text_columns=("text",), label_column="topic"))
    assert by_options is not None
    assert dataclasses.replace(by_options[0], name="topics") == OWN_TASKS["topics"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("task.toml", "text_columns = [", "cannot be read"),
        ("task.json", "[1]", "holds list"),
        ("task.yaml", "text_colums: [text]", r"unknown entry 'text_colums' \(did you mean text_columns"),
        ("task.yaml", "text_columns: 3", "text_columns is 3, expected a list of texts"),
        ("task.toml", 'text_columns = ["text"]\nlabel_column = "topic"', "need --data-dir too"),
        ("task.txt", "", "unknown format"),
        ("absent.toml", None, "cannot read the task file"),
    ],
)
def test_a_task_file_that_cannot_be_used_is_one_line(tmp_path, name, content, message):
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=message):
        own_task(TrainConfig(task_file=tmp_path / name))


def test_half_of_the_options_or_another_task_are_refused(tmp_path):
    write_csv(tmp_path / "rows.csv", ROWS)
    with pytest.raises(UserError, match="need --label-column too"):
        with_own_task(TrainConfig(data_dir=tmp_path / "rows.csv", text_columns=("text",)))
    shared = {"data_dir": tmp_path / "rows.csv", "text_columns": ("text",), "label_column": "topic"}
    with pytest.raises(UserError, match="--task names sst2"):
        with_own_task(TrainConfig(task="sst2", **shared))
    once = with_own_task(TrainConfig(**shared))
    assert with_own_task(once) == once


def test_pairs_and_a_long_text(tmp_path, tiny_model):
    rows = [{"a": f"first {i}", "b": "word " * (10_000 if i == 7 else 3), "same": i % 2} for i in range(20)]
    write_jsonl(tmp_path / "rows.jsonl", rows)
    options = {"data_dir": tmp_path / "rows.jsonl", "text_columns": ("a", "b"), "label_column": "same",
               "output_dir": tmp_path / "run", "model": str(tiny_model), **SHORT}  # fmt: skip
    with pytest.raises(UserError, match=r"longer than the model's limit of 64 tokens.*give max_length"):
        train_command.run(TrainConfig(**options))
    result = train_command.run(TrainConfig(max_length=32, **options))
    assert result.metrics.keys() == {"accuracy", "matthews"}


def test_a_run_is_resumed_from_rows_that_were_moved(tmp_path, tiny_model):
    shared = {"text_columns": ("text",), "label_column": "topic", "output_dir": tmp_path / "run", "max_length": 32,
              "model": str(tiny_model), **SHORT}  # fmt: skip
    write_csv(tmp_path / "one.csv", ROWS)
    write_jsonl(tmp_path / "other.jsonl", ROWS)
    first = train_command.run(TrainConfig(data_dir=tmp_path / "one.csv", **shared))
    assert train_command.run(TrainConfig(data_dir=tmp_path / "other.jsonl", **shared)).metrics == first.metrics
    write_jsonl(tmp_path / "other.jsonl", [row | {"topic": row["topic"].replace("sport", "art")} for row in ROWS])
    with pytest.raises(UserError, match="another configuration"):
        train_command.run(TrainConfig(data_dir=tmp_path / "other.jsonl", **shared))


def test_analyses_of_own_rows_are_of_their_task(tmp_path, tiny_model):
    write_csv(tmp_path / "reviews.csv", ROWS)
    rows = {"data_dir": tmp_path / "reviews.csv", "text_columns": ("text",), "label_column": "topic"}
    training = TrainingOptions(max_steps=1, per_device_train_batch_size=4, max_length=32, learning_rate=0.01,
                               head_learning_rate=0.01)  # fmt: skip
    run = RunConfig(model=str(tiny_model), n_validation=8, training=training, **rows)
    result = default_rates.run(
        default_rates.Config(methods=("head",), factors=(), resamples=5, run=run, output_dir=tmp_path / "rates")
    )
    assert result is not None
    assert result.config["tasks"] == ("reviews",)
    assert result.tables["summary"][0]["task"] == "reviews"
    kernels = peft_kernels.run(
        peft_kernels.Config(model=str(tiny_model), n_examples=4, seeds=(0,), top=2, null_draws=1, resamples=2,
                            output_dir=tmp_path / "kernels", **rows)
    )  # fmt: skip
    assert kernels is not None
    assert kernels.dataset["label_names"] == sorted(TOPICS)
    assert with_own_task(degree_scale.Config(**rows)).tasks == ("reviews",)


def test_cells_of_own_rows_do_not_depend_on_where_they_lie():
    task = OwnTask("one", ("text",), ("a", "b"), ("accuracy",), 15)
    config = default_rates.Config()
    shared = {"free": default_rates.ANALYSIS.free, "rows": "r", "model": "m"}
    first = settings_of(config, task=task, **shared)
    assert settings_of(config, task=dataclasses.replace(task, name="other"), **shared) == first
    assert settings_of(config, task=dataclasses.replace(task, label_names=("a", "c")), **shared) != first
    table = Task("one", ("text",), ("a", "b"), ("accuracy",), 15)
    assert settings_of(config, task=dataclasses.replace(table, name="other"), **shared) != settings_of(
        config, task=table, **shared
    )


def test_names_of_labels():
    assert [label_text(value) for value in (1.0, 2.5, "x ", False, None, float("nan"))] == [
        "1", "2.5", "x", "false", None, None,
    ]  # fmt: skip


def test_task_files_keep_their_types(tmp_path):
    (tmp_path / "task.yaml").write_text("label_names: [1, 2]\nmetrics: accuracy\n")
    assert read_task_file(tmp_path / "task.yaml") == {"label_names": [1, 2], "metrics": ["accuracy"]}


# --- rows on the hub -------------------------------------------------------------------------------------------------


@pytest.fixture
def on_hub(tmp_path, monkeypatch):
    """Makes a dataset that the hub has under a name, from a folder as the library stores one; returns what is asked."""
    asked = []

    def put(name, splits, *, classes=()):
        found = {split: datasets.Dataset.from_list(rows) for split, rows in splits.items()}
        if classes:
            label = datasets.ClassLabel(names=list(classes))
            found = {split: rows.cast_column("topic", label) for split, rows in found.items()}
        datasets.DatasetDict(found).save_to_disk(tmp_path / "hub" / name)

        def load_dataset(path, config=None):
            asked.append((path, config))
            if path != name:
                raise FileNotFoundError(f"Dataset '{path}' doesn't exist on the Hub")
            return datasets.load_from_disk(tmp_path / "hub" / name)

        monkeypatch.setattr(datasets, "load_dataset", load_dataset)
        return asked

    return put


def test_rows_of_the_hub_are_those_of_a_folder(on_hub, tmp_path):
    asked = on_hub("somebody/topics", {"train": ROWS[:30], "validation": ROWS[30:], "test": ROWS[:1]})
    options = {"text_columns": ["text"], "label_column": "topic"}
    task = task_from_columns("somebody/topics", **options)
    data = load_task_data(task, data_dir="somebody/topics")
    (tmp_path / "topics").mkdir()
    for split, rows in (("train", ROWS[:30]), ("validation", ROWS[30:])):
        write_jsonl(tmp_path / "topics" / f"{split}.jsonl", rows)
    same = task_from_columns(tmp_path / "topics", **options)
    local = load_task_data(same, data_dir=tmp_path / "topics")
    assert task == same
    assert data.fingerprint == local.fingerprint
    assert data.source.startswith("Hugging Face hub, somebody/topics; 30 of 30 train rows")
    assert {*asked} == {("somebody/topics", None)}


def test_numbers_of_classes_have_the_names_of_the_dataset(on_hub):
    rows = [{"text": row["text"], "topic": TOPICS.index(row["topic"])} for row in ROWS]
    asked = on_hub("somebody/topics", {"train": rows}, classes=TOPICS)
    task = task_from_columns("somebody/topics:plain", text_columns=["text"], label_column="topic")
    assert task.label_names == tuple(sorted(TOPICS))
    data = load_task_data(task, data_dir="somebody/topics:plain")
    assert (len(data.train), len(data.validation)) == (32, 8)  # Without a split of that name, a fifth is held out.
    assert {*asked} == {("somebody/topics", "plain")}
    by_text = {row["text"]: row["topic"] for row in ROWS}
    found = zip(data.train["text"], data.train["topic"], strict=True)
    assert all(by_text[text] == task.label_names[topic] for text, topic in found)


def test_a_folder_comes_before_the_hub_and_a_file_is_no_dataset(on_hub, tmp_path, monkeypatch):
    asked = on_hub("somebody/topics", {"train": ROWS})
    monkeypatch.chdir(tmp_path)
    options = {"text_columns": ["text"], "label_column": "topic"}
    with pytest.raises(UserError, match="there is no folder or file somebody/others, and it cannot be got from the"):
        task_from_columns("somebody/others", **options)
    asked.clear()
    with pytest.raises(UserError, match=r"data folder somebody/rows.csv does not exist"):
        task_from_columns("somebody/rows.csv", **options)
    (tmp_path / "somebody" / "mine").mkdir(parents=True)
    write_csv(tmp_path / "somebody" / "mine" / "rows.csv", ROWS)
    assert task_from_columns("somebody/mine", **options).name == "mine"
    assert not asked


def test_a_dataset_without_training_rows_names_its_splits(on_hub):
    on_hub("somebody/topics", {"test": ROWS})
    with pytest.raises(UserError, match="has no split train; it has test"):
        task_from_columns("somebody/topics", text_columns=["text"], label_column="topic")


def test_a_task_file_may_name_a_dataset_of_the_hub(on_hub, tmp_path):
    on_hub("somebody/topics", {"train": ROWS})
    path = tmp_path / "elsewhere" / "task.toml"
    path.parent.mkdir()
    path.write_text('data_dir = "somebody/topics"\ntext_columns = ["text"]\nlabel_column = "topic"\n')
    made = own_task(TrainConfig(task_file=path))
    assert made is not None
    assert str(made[1]) == "somebody/topics"
    assert made[0].name == "topics"


def test_new_rows_may_be_those_of_the_hub(on_hub):
    on_hub("somebody/topics", {"train": ROWS})
    assert read_new_rows("somebody/topics", ["text"]) == [{"text": row["text"]} for row in ROWS]
