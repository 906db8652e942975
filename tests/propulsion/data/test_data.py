"""Rows from files: all formats give the same rows, unusable rows are refused, draws are stratified and seeded."""

import csv
import dataclasses
import errno
import gzip
import json
import os
import pathlib
from collections import Counter

import datasets
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from task_rows import ROWS
from transformers import AutoTokenizer

from analyses.subjects.batch import held_out
from analyses.subjects.readout import prompted
from analyses.subjects.training_run import tuning_split
from propulsion.data import (
    check_folders,
    check_inputs,
    draw_rows,
    load_task_data,
    sampling,
    tokenize,
    tokenize_cached,
    tokens,
)
from propulsion.data.kinds import Limits
from propulsion.data.kinds.base import columns_of
from propulsion.data.tasks import Task, get_task
from propulsion.errors import UserError

TRAIN = [{"sentence": f'a "fine" film, number {i}', "label": int(i % 4 == 0)} for i in range(12)]
VALIDATION = [{"sentence": "1999", "label": 0}, {"sentence": "NA", "label": 1}, {"sentence": "élan, vital", "label": 1}]


def write_jsonl(path, rows):
    path.with_suffix(".jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")


def write_json(path, rows):
    path.with_suffix(".json").write_text(json.dumps(rows, indent=1), encoding="utf-8")


def write_csv(path, rows):
    with path.with_suffix(".csv").open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def write_tsv(path, rows):
    lines = ["\t".join(rows[0]), *("\t".join(map(str, row.values())) for row in rows)]
    path.with_suffix(".tsv").write_text("\n".join(lines), encoding="utf-8")


def write_parquet(path, rows):
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path.with_suffix(".parquet"))


WRITERS = {"jsonl": write_jsonl, "json": write_json, "csv": write_csv, "tsv": write_tsv, "parquet": write_parquet}


def folder_of(tmp_path, train=None, validation=None, write=write_jsonl):
    write(tmp_path / "train", TRAIN if train is None else train)
    write(tmp_path / "validation", VALIDATION if validation is None else validation)
    return tmp_path


@pytest.mark.parametrize("write", WRITERS.values(), ids=WRITERS)
def test_every_format_reads_the_same_rows(tmp_path, write):
    (tmp_path / "reference").mkdir()
    reference = load_task_data("sst2", data_dir=folder_of(tmp_path / "reference"))
    data = load_task_data("sst2", data_dir=folder_of(tmp_path, write=write))
    assert list(data.validation["sentence"]) == ["1999", "NA", "élan, vital"]
    assert list(data.train["label"]) == [row["label"] for row in TRAIN]
    assert data.fingerprint == reference.fingerprint


def test_label_names_stand_for_numbers(tmp_path):
    (tmp_path / "numbers").mkdir()
    named = [{**row, "label": ("negative", "positive")[row["label"]]} for row in TRAIN]
    data = load_task_data("sst2", data_dir=folder_of(tmp_path, train=named))
    assert data.fingerprint == load_task_data("sst2", data_dir=folder_of(tmp_path / "numbers")).fingerprint


def test_fingerprint_follows_the_rows(tmp_path):
    folder = folder_of(tmp_path)
    whole = load_task_data("sst2", data_dir=folder).fingerprint
    assert load_task_data("sst2", data_dir=folder, n_train=6).fingerprint != whole
    (changed := [dict(row) for row in TRAIN])[0]["sentence"] += "!"
    assert load_task_data("sst2", data_dir=folder_of(tmp_path, train=changed)).fingerprint != whole


def test_demo_needs_no_files():
    data = load_task_data("demo")
    assert {len(set(split["label"])) for split in (data.train, data.validation)} == {2}
    assert not set(data.train["sentence"]) & set(data.validation["sentence"])


def changed(row, **columns):
    return [*TRAIN[:row], {**TRAIN[row], **columns}, *TRAIN[row + 1 :]]


@pytest.mark.parametrize(
    ("train", "message"),
    [
        ([{"text": "x", "label": 0}], "lacks the column sentence of task sst2; its columns are: text, label"),
        ([{"sentence": "x"}], "lacks the column label"),
        ([], "has no rows"),
        (changed(4, sentence=None), "row 5: sentence is None, expected text"),
        (changed(2, label=2), r"row 3: label 2 is not one of 0 \(negative\), 1 \(positive\)"),
        (changed(2, label=0.5), "row 3: label 0.5 is not one of"),
        (changed(2, label="good"), "row 3: label 'good' is not a number"),
        (changed(2, label=float("nan")), r"row 3: the label is missing \(NaN\)"),
        (changed(2, label=None), "row 3: label None is not a number"),
        (changed(0, label=-1), "row 1: the label is -1, which stands for none in GLUE's test sets"),
        (TRAIN[1:4], r"has one label only \(0\)"),
    ],
)
def test_unusable_rows_are_named(tmp_path, train, message):
    with pytest.raises(UserError, match=message) as caught:
        load_task_data("sst2", data_dir=folder_of(tmp_path, train=train))
    assert "\n" not in str(caught.value)
    assert "train.jsonl" in str(caught.value)


def test_a_header_without_rows(tmp_path):
    folder = folder_of(tmp_path)
    (folder / "train.jsonl").unlink()
    (folder / "train.csv").write_text("sentence,label\n")
    with pytest.raises(UserError, match=r"train.csv has no rows"):
        load_task_data("sst2", data_dir=folder)


@pytest.mark.parametrize(
    ("task", "label", "number"),
    [
        ("sst2", "Positive", 1), ("sst2", " NEGATIVE ", 0), ("sst2", "True", 1), ("sst2", "false", 0),
        ("sst2", True, 1), ("sst2", 1.0, 1), ("sst2", "1.0", 1), ("sst2", " 0", 0), ("cola", "TRUE", 1),
        ("rte", "Not entailment", 1), ("mrpc", "not-equivalent", 0), ("qqp", False, 0), ("mnli", "Neutral", 1),
    ],
)  # fmt: skip
def test_a_label_is_read_as_the_one_thing_that_it_can_mean(tmp_path, task, label, number):
    rows = [ROWS[task][0] | {"label": label}, *(ROWS[task] * 2)]
    data = load_task_data(task, data_dir=folder_of(tmp_path, train=rows, validation=ROWS[task]))
    assert data.train["label"][0] == number


@pytest.mark.parametrize(
    ("task", "label", "message"),
    [
        ("rte", True, r"row 1: label True could be any of 0 \(entailment\), 1 \(not_entailment\): give the number"),
        ("rte", "false", "row 1: label 'false' could be any of"),
        ("mnli", "True", "row 1: label 'True' could be any of"),
        ("sst2", "1_0", "row 1: label '1_0' is not a number"),
        ("sst2", [1], r"row 1: label \[1\] is not a number"),
        ("sst2", 10**400, "row 1: label 1000.*[.]{3} is not a number"),
        ("sst2", "", "row 1: label '' is not a number: expected 0"),
        ("stsb", True, "row 1: label True is not a number: expected a number from 0.0 to 5.0"),
        ("stsb", "2,5", "row 1: label '2,5' is not a number"),
    ],
)
def test_a_label_that_could_mean_several_things_is_refused(tmp_path, task, label, message):
    rows = [ROWS[task][0] | {"label": label}, *(ROWS[task] * 2)]
    with pytest.raises(UserError, match=message):
        load_task_data(task, data_dir=folder_of(tmp_path, train=rows, validation=ROWS[task]))


def test_names_of_labels_that_read_as_other_labels_are_refused():
    with pytest.raises(ValueError, match="label 0 of task stars has the name '1', which reads as another label"):
        Task("stars", ("text",), ("1", "2"), ("accuracy",), 15)
    assert Task("stars", ("text",), ("0", "1"), ("accuracy",), 15).num_labels == 2


@pytest.mark.parametrize("text", [None, 5, True, ["a"], {"a": "b"}, "", " \n", "\ud800"])
@pytest.mark.parametrize("task", ["sst2", "sst2_instruction"])
def test_what_is_no_text_is_never_made_one(tmp_path, task, text):
    with pytest.raises(UserError, match=r"train.jsonl, row 3: .*sentence") as caught:
        load_task_data(task, data_dir=folder_of(tmp_path, train=changed(2, sentence=text)))
    assert "\n" not in str(caught.value)


def test_of_two_texts_one_may_be_empty(tmp_path):
    rows = [ROWS["qqp"][0] | {"question2": ""}, *ROWS["qqp"]]
    assert load_task_data("qqp", data_dir=folder_of(tmp_path, train=rows, validation=rows)).train["question2"][0] == ""
    rows[0]["question1"] = ""
    with pytest.raises(UserError, match="row 1: no text in question1 or question2"):
        load_task_data("qqp", data_dir=folder_of(tmp_path, train=rows, validation=rows))


def test_a_key_that_is_not_used_may_be_lacking_and_one_that_is_used_may_not(tmp_path):
    rows = [{**TRAIN[0], "idx": 0}, {**TRAIN[1], "note": None}, *TRAIN[2:]]
    data = load_task_data("sst2", data_dir=folder_of(tmp_path, train=rows))
    assert list(data.train["sentence"]) == [row["sentence"] for row in TRAIN]
    del rows[1]["label"]
    with pytest.raises(UserError, match=r"train.jsonl, row 2: lacks the column label; its columns are: sentence, note"):
        load_task_data("sst2", data_dir=folder_of(tmp_path, train=rows))


def test_all_rows_of_both_splits_are_checked_and_the_first_named(tmp_path):
    train = [{**row, "sentence": None} for row in TRAIN[:5]] + TRAIN[5:]
    validation = [*VALIDATION, {"sentence": "x", "label": 2}]
    with pytest.raises(UserError) as caught:
        load_task_data("sst2", data_dir=folder_of(tmp_path, train=train, validation=validation))
    none = "sentence is None, expected text"
    assert str(caught.value) == (
        f"{tmp_path / 'train.jsonl'}: 5 of 12 rows cannot be used: row 1: {none}; row 2: {none}; row 3: {none}; and 2 "
        f"more; {tmp_path / 'validation.jsonl'}, row 4: label 2 is not one of 0 (negative), 1 (positive)"
    )


def test_samples_beyond_the_rows_of_both_splits_are_told_together(tmp_path):
    message = r"cannot draw 13 rows from .*train.jsonl: it has 12; ask for 1 to 12, .*; cannot draw 4 rows .*it has 3"
    with pytest.raises(UserError, match=message):
        load_task_data("sst2", data_dir=folder_of(tmp_path), n_train=13, n_validation=4)


def test_compressed_files_are_read_and_others_are_named(tmp_path):
    folder = folder_of(tmp_path)
    fingerprint = load_task_data("sst2", data_dir=folder).fingerprint
    (folder / "train.JSONL.gz").write_bytes(gzip.compress((folder / "train.jsonl").read_bytes()))
    with pytest.raises(UserError, match="ambiguous train file"):
        load_task_data("sst2", data_dir=folder)
    (folder / "train.jsonl").unlink()
    assert load_task_data("sst2", data_dir=folder).fingerprint == fingerprint
    (folder / "train.JSONL.gz").rename(folder / "train.jsonl.zip")
    with pytest.raises(UserError, match=r"no train file .*compressed or not; there is train.jsonl.zip"):
        load_task_data("sst2", data_dir=folder)


def test_a_folder_that_cannot_be_read_is_one_line(tmp_path, monkeypatch):
    def denied(path):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(type(tmp_path), "iterdir", denied)
    with pytest.raises(UserError, match=r"cannot read the folder .*: Permission denied"):
        load_task_data("sst2", data_dir=tmp_path)


@pytest.mark.parametrize("score", [5.1, -0.1, 50])
def test_regression_labels_stay_in_range(tmp_path, score):
    rows = [{"sentence1": "a", "sentence2": "b", "label": value} for value in (0.0, 2.5, score)]
    with pytest.raises(UserError, match=f"row 3: label {score} is outside 0.0 to 5.0"):
        load_task_data("stsb", data_dir=folder_of(tmp_path, train=rows, validation=rows[:2]))


def test_regression_labels_are_float32(tmp_path):
    rows = [{"sentence1": "a", "sentence2": "b", "label": value} for value in (0, 2.5)]
    data = load_task_data("stsb", data_dir=folder_of(tmp_path, train=rows, validation=rows))
    assert data.train.features["label"].dtype == "float32"


@pytest.mark.parametrize(
    ("prepare", "message"),
    [
        (lambda folder: (folder / "validation.jsonl").unlink(), "no validation file in .*looked for validation with"),
        (lambda folder: write_csv(folder / "train", TRAIN), "ambiguous train file in .*train.jsonl, train.csv"),
        (lambda folder: (folder / "train.jsonl").write_text('{"a": 1}\n{"a": \n'), "not valid JSON at line 2"),
        (lambda folder: (folder / "train.jsonl").write_text('{"a": 1}\n{"b": 1}\n'), "its columns are: a, b"),
        (lambda folder: (folder / "train.jsonl").write_text("[1]"), "row 1: expected an object of columns, found int"),
        (lambda folder: (folder / "train.jsonl").write_bytes(b"\xff\xfe\xfa"), "row 1: not UTF-8 text .*0xff"),
    ],
)
def test_unreadable_files(tmp_path, prepare, message):
    prepare(folder_of(tmp_path))
    with pytest.raises(UserError, match=message) as caught:
        load_task_data("sst2", data_dir=tmp_path)
    assert "\n" not in str(caught.value)


def test_ragged_csv_names_the_line(tmp_path):
    folder = folder_of(tmp_path, write=write_csv)
    with (folder / "train.csv").open("a") as file:
        file.write("one,two,three\n")
    with pytest.raises(UserError, match=r"train.csv, row 13 \(line 14\): expected 2 fields, found 3"):
        load_task_data("sst2", data_dir=folder)


def test_missing_folder(tmp_path):
    with pytest.raises(UserError, match=r"data folder .*nowhere does not exist"):
        load_task_data("sst2", data_dir=tmp_path / "nowhere")


def test_a_data_folder_is_a_tasks_own_or_holds_it(tmp_path):
    own = tmp_path / "sst2"
    own.mkdir()
    folder_of(own)
    (tmp_path / "rte").mkdir()
    found = [load_task_data("sst2", data_dir=folder).fingerprint for folder in (own, tmp_path)]
    assert found[0] == found[1]
    # The packaged rows are used unless the folder itself has rows.
    assert load_task_data("demo", data_dir=tmp_path).fingerprint == load_task_data("demo").fingerprint
    assert load_task_data("demo", data_dir=own).fingerprint == found[0]


def test_two_tasks_are_not_read_from_one_tasks_files(tmp_path):
    (tmp_path / "sst2").mkdir()
    folder_of(tmp_path / "sst2")
    check_folders(("demo", "sst2"), tmp_path)
    check_folders(("sst2", "sst2"), tmp_path)
    with pytest.raises(UserError, match=r"demo and sst2 have no folders of their own in .*sst2"):
        check_folders(("demo", "sst2"), tmp_path / "sst2")


def test_hub_out_of_reach_says_what_to_give():
    with pytest.raises(UserError, match=r"cannot get nyu-mll/glue \(sst2\).*give --data-dir") as caught:
        load_task_data("sst2")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("n", "expected"), [(2, {0: 1, 1: 1}), (4, {0: 3, 1: 1}), (8, {0: 6, 1: 2}), (12, {0: 9, 1: 3})]
)
def test_draws_keep_the_classes_proportions(tmp_path, n, expected):
    data = load_task_data("sst2", data_dir=folder_of(tmp_path), n_train=n)
    assert Counter(data.train["label"]) == expected
    assert len(set(data.train["sentence"])) == n


def test_draws_follow_the_seed_and_keep_file_order(tmp_path):
    folder = folder_of(tmp_path)
    loaded = [load_task_data("sst2", data_dir=folder, n_train=6, seed=seed) for seed in (0, 0, 1)]
    draws = [list(data.train["sentence"]) for data in loaded]
    assert draws[0] == draws[1] != draws[2]
    order = [row["sentence"] for row in TRAIN]
    assert draws[0] == sorted(draws[0], key=order.index)
    assert "drawn with seed 1" in loaded[2].source


@pytest.mark.parametrize(
    ("n", "message"), [(13, "cannot draw 13 rows .* it has 12"), (0, "cannot draw 0 rows"), (1, "2 classes, and each")]
)
def test_draws_of_the_wrong_size(tmp_path, n, message):
    with pytest.raises(UserError, match=message):
        load_task_data("sst2", data_dir=folder_of(tmp_path), n_train=n)


def test_draw_rows_draws_from_a_loaded_split(tmp_path):
    data = load_task_data("sst2", data_dir=folder_of(tmp_path))
    drawn = draw_rows(data.train, data.task, 4, seed=0)
    assert Counter(drawn["label"]) == {0: 3, 1: 1}
    assert drawn.features == data.train.features


@pytest.fixture(scope="module")
def tokenizer(tiny_model):
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    tokenizer.model_max_length = 16
    return tokenizer


@pytest.fixture
def long_rows(tmp_path):
    rows = [*TRAIN, {"sentence": "word " * 40, "label": 0}]
    return load_task_data("sst2", data_dir=folder_of(tmp_path, train=rows)).train


def test_tokens_are_unpadded_and_carry_their_labels(tmp_path, tokenizer):
    data = load_task_data("sst2", data_dir=folder_of(tmp_path))
    encoded = tokenize(data.validation, tokenizer, data.task)
    assert [len(ids) for ids in encoded["input_ids"]] == [
        len(tokenizer(row["sentence"]).input_ids) for row in VALIDATION
    ]
    assert list(encoded["labels"]) == [0, 1, 1]


def test_pairs_are_told_apart(tokenizer, tmp_path):
    rows = [{"sentence1": "one", "sentence2": "two", "label": value} for value in (0, 1)]
    data = load_task_data("rte", data_dir=folder_of(tmp_path, train=rows, validation=rows))
    encoded = tokenize(data.train, tokenizer, data.task)
    assert encoded["input_ids"][0] == tokenizer("one", "two").input_ids
    assert set(encoded["token_type_ids"][0]) == {0, 1}


def test_long_examples_are_an_error_unless_cut(long_rows, tokenizer):
    with pytest.raises(UserError, match=r"1 of 13 examples are longer than .*16 tokens .longest: 42"):
        tokenize(long_rows, tokenizer, get_task("sst2"))
    assert max(len(ids) for ids in tokenize(long_rows, tokenizer, get_task("sst2"), max_length=10)["input_ids"]) == 10


def test_too_long_rows_of_both_splits_are_named_by_their_places(tmp_path, tokenizer):
    long = {"sentence": "word " * 40, "label": 0}
    folder = folder_of(tmp_path, train=[*TRAIN, *[long] * 5], validation=[*VALIDATION, long])
    data = load_task_data("sst2", data_dir=folder)
    with pytest.raises(UserError) as caught:
        check_inputs(data, tokenizer, Limits())
    assert str(caught.value) == (
        f"{folder / 'train.jsonl'}: 5 of 17 examples are longer than the model's limit of 16 tokens (longest: 42): row "
        f"13, row 14, row 15, and 2 more; {folder / 'validation.jsonl'}: 1 of 4 examples are longer than the model's "
        "limit of 16 tokens (longest: 42): row 4; give max_length (16 or less) to truncate them, or shorten them"
    )
    drawn = load_task_data("sst2", data_dir=folder, n_validation=3, seed=5)
    assert long["sentence"] in drawn.validation["sentence"]
    with pytest.raises(UserError, match=r"validation.jsonl: 1 of 3 .*: row 4;"):
        check_inputs(dataclasses.replace(drawn, train=drawn.train.select([0])), tokenizer, Limits())
    selected = dataclasses.replace(data, validation=data.validation.select([3]))
    with pytest.raises(UserError, match=r"validation rows: 1 of 1 .*: example 1;"):
        check_inputs(selected, tokenizer, Limits())


def test_too_long_rows_are_named_by_their_places_wherever_they_are_read(tmp_path, tokenizer):
    """Among examples drawn for kernels, in a prompt, and among training rows held out for learning rates."""
    long = {"sentence": "word " * 40, "label": 0}
    folder = folder_of(tmp_path, train=[long, *TRAIN], validation=[*VALIDATION, *TRAIN, long])
    data = load_task_data("sst2", data_dir=folder)
    with pytest.raises(UserError, match=r"validation.jsonl: 1 of 15 .*: row 16;"):
        held_out(data, tokenizer, 15, next(seed for seed in range(9) if 15 in draw(data, 15, seed)))
    with pytest.raises(UserError, match=r"train.jsonl: 1 of 13 .*: row 1; .*validation.jsonl: 1 of 16 .*: row 16;"):
        check_inputs(prompted(data, "{text}"), tokenizer, Limits())
    with pytest.raises(UserError, match=r"^[^;]*train.jsonl: 1 of [0-9]+ .*: row 1;"):
        check_inputs(tuning_split(data), tokenizer, Limits())


def draw(data, n, seed):
    return sampling.draw(data.task, "rows", columns_of(data.validation), n, seed)


@pytest.mark.parametrize(
    ("label", "message"),
    [
        ("9" * 400, "label '9+\\.\\.\\. is not one of"),
        ("0_1", "label '0_1' is not a number"), ("\ud800", "is not a number"), ([1], "is not a number"),
    ],
)  # fmt: skip
def test_a_label_that_is_none_is_one_line(tmp_path, label, message):
    folder = folder_of(tmp_path, train=[*TRAIN, {"sentence": "more", "label": label}])
    with pytest.raises(UserError, match=rf"train.jsonl, row 13: .*{message}") as caught:
        load_task_data("sst2", data_dir=folder)
    assert len(str(caught.value)) < 300 + len(str(folder))


@pytest.mark.parametrize("task", ["sst2", "demo"])
@pytest.mark.parametrize("method", ["is_dir", "iterdir"])
def test_a_folder_without_permission_is_one_line(tmp_path, monkeypatch, task, method):
    def refused(self, *_):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr(pathlib.Path, method, refused)
    with pytest.raises(UserError, match=f"cannot read the folder {tmp_path}: Permission denied"):
        load_task_data(task, data_dir=tmp_path)


@pytest.mark.parametrize("name", ["a" * 300, "circle", "circle/inside"])
def test_a_folder_of_no_possible_name_is_one_line(tmp_path, name):
    (tmp_path / "circle").symlink_to("circle")
    with pytest.raises(UserError, match=f"folder {tmp_path / name}"):
        load_task_data("sst2", data_dir=tmp_path / name)


def test_names_of_files_are_found_in_upper_and_lower_case(tmp_path):
    folder_of(tmp_path)
    (tmp_path / "train.jsonl").rename(tmp_path / "Train.JSONL")
    (tmp_path / "validation.jsonl").rename(tmp_path / "VALIDATION.jsonl")
    assert len(load_task_data("sst2", data_dir=tmp_path).train) == len(TRAIN)


def test_rows_with_many_columns_are_refused_in_a_short_line(tmp_path):
    rows = [{f"column{number}": 1 for number in range(2000)}] * 4
    with pytest.raises(UserError, match="its columns are: column0, column1, column2, and 1,997 more") as caught:
        load_task_data("sst2", data_dir=folder_of(tmp_path, train=rows))
    assert len(str(caught.value)) < 1000


@pytest.mark.parametrize("n", [0, -1])
def test_a_stream_of_no_rows_is_refused(tmp_path, n):
    with pytest.raises(UserError, match=f"cannot take {n} rows of a stream"):
        load_task_data("sst2", data_dir=folder_of(tmp_path), n_train=n, streaming=True)


def test_streamed_rows_that_will_be_needed_are_looked_at(tmp_path, tokenizer):
    folder = folder_of(tmp_path, train=[*TRAIN, {"sentence": "word " * 40, "label": 0}])
    data = load_task_data("sst2", data_dir=folder, streaming=True)
    with pytest.raises(UserError, match=r"streamed training rows: 1 of 13 examples are longer .*: example 13;"):
        check_inputs(data, tokenizer, Limits(), streamed=len(TRAIN) + 1)
    encoded = check_inputs(data, tokenizer, Limits(10), streamed=len(TRAIN) + 1)
    assert max(len(row["input_ids"]) for row in encoded) == 10


@pytest.mark.parametrize("max_length", [17, 2, 0, -1])
def test_max_length_out_of_range(long_rows, tokenizer, max_length):
    with pytest.raises(UserError, match=f"max_length is {max_length}, expected 3 to 16"):
        tokenize(long_rows, tokenizer, get_task("sst2"), max_length=max_length)


@pytest.mark.parametrize(
    ("task", "train", "validation"),
    [
        ("mnli", ("nyu-mll/glue", "mnli", "train", None), ("nyu-mll/glue", "mnli", "validation_matched", None)),
        ("gsm8k", ("openai/gsm8k", "main", "train", None), ("openai/gsm8k", "main", "test", None)),
        ("piqa", ("ybisk/piqa", None, "train", "refs/convert/parquet"),
         ("ybisk/piqa", None, "validation", "refs/convert/parquet")),
    ],
)  # fmt: skip
def test_where_on_the_hub_a_task_is(monkeypatch, task, train, validation):
    asked = []

    def load_dataset(path, config, *, split, revision):
        asked.append((path, config, split, revision))
        return datasets.Dataset.from_list(ROWS[task])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    data = load_task_data(task)
    assert asked == [train, validation]
    assert len(data.train) == len(ROWS[task])


def test_pairs_of_snli_that_nobody_agreed_on_are_left_out(monkeypatch):
    rows = [*ROWS["snli"], {"premise": "a", "hypothesis": "b", "label": -1}]
    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **kwargs: datasets.Dataset.from_list(rows))
    assert len(load_task_data("snli").train) == len(ROWS["snli"])


@pytest.mark.parametrize("write", [write_jsonl, write_csv, write_parquet])
def test_streamed_rows_are_the_files_rows(tmp_path, write):
    folder = folder_of(tmp_path, write=write)
    data = load_task_data("sst2", data_dir=folder, streaming=True, n_train=7)
    assert data.stream is not None
    assert len(data.train) == 0
    assert [row["sentence"] for row in data.stream] == [row["sentence"] for row in TRAIN[:7]]
    assert "streamed, the first 7" in data.source


def test_a_streamed_row_that_cannot_be_used_is_named_when_it_comes(tmp_path):
    data = load_task_data("sst2", data_dir=folder_of(tmp_path, train=changed(4, label=7)), streaming=True)
    assert data.stream is not None
    with pytest.raises(UserError, match=r"train.jsonl, row 5: label 7 is not one of"):
        list(data.stream)


def test_a_json_array_is_not_streamed(tmp_path):
    with pytest.raises(UserError, match=r"train.json cannot be streamed, since JSON may be one array: name it .jsonl"):
        load_task_data("sst2", data_dir=folder_of(tmp_path, write=write_json), streaming=True)


def test_rows_without_text_are_left_out_of_what_the_hub_has(monkeypatch):
    rows = [*ROWS["xsum"], ROWS["xsum"][0] | {"document": "\n"}]
    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **kwargs: datasets.Dataset.from_list(rows))
    data = load_task_data("xsum")
    assert len(data.train) == len(ROWS["xsum"])
    assert "3 of 3 train rows (1 without text left out)" in data.source


def test_tokens_are_kept_and_found_again(tmp_path, tokenizer, monkeypatch):
    data = load_task_data("sst2", data_dir=folder_of(tmp_path))
    first = tokenize_cached(data, tokenizer, Limits(12), tmp_path / "cache")
    kept = list((tmp_path / "cache").iterdir())
    assert len(kept) == 1
    tokenize_cached(data, tokenizer, Limits(11), tmp_path / "cache")
    assert len(list((tmp_path / "cache").iterdir())) == 2
    monkeypatch.setattr(tokens, "kind_of", lambda task: None)  # No row can be encoded any more.
    again = tokenize_cached(data, tokenizer, Limits(12), tmp_path / "cache")
    assert again[:] == first[:]


def test_tokens_that_are_not_as_they_were_written_are_encoded_again(tmp_path, tokenizer):
    data = load_task_data("sst2", data_dir=folder_of(tmp_path))
    first = tokenize_cached(data, tokenizer, Limits(12), tmp_path / "cache")[:]
    (kept,) = (tmp_path / "cache").iterdir()
    content = kept.read_bytes()
    place = content.index(np.asarray(first["input_ids"][0], dtype=np.int32).tobytes())
    kept.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
    assert tokenize_cached(data, tokenizer, Limits(12), tmp_path / "cache")[:] == first
    assert kept.read_bytes() == content


def test_a_cache_that_cannot_be_written_costs_nothing_but_time(tmp_path, tokenizer):
    data = load_task_data("sst2", data_dir=folder_of(tmp_path))
    (tmp_path / "file").write_text("")
    assert len(tokenize_cached(data, tokenizer, Limits(12), tmp_path / "file" / "cache")) == len(TRAIN)
