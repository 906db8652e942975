"""Malformed inputs: `python -m tests.faults.inputs` tries all and prints a table.

Each line of a table is one input: a file that is written into a folder that is otherwise sound, and what the message
must name. Contents are text, bytes, or JSON; a function of a path makes anything else, such as a link.
"""

import io
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from functools import cache, partial
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"

import numpy as np
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

from analyses import readme
from analyses.claims import __main__ as claims
from analyses.core.cells import Grid
from analyses.core.errors import run_command
from analyses.records import Metric, Result, check_writable, load_result, write_result
from figures.figure import redraw
from figures.kernel_distance import write as draw
from propulsion import train as train_command
from propulsion.adapters import load_adapter
from propulsion.command_line import parsed
from propulsion.data import load_task_data
from propulsion.pretrained import load_classifier
from tests.faults.mistakes import Mistake, Row, command, print_table, quiet, rows, tiny_model

NAN = float("nan")
Content = Any
"""Text and bytes as they are; a function of the file's path, called; None removes the file; anything else as JSON."""


def put(path: Path, content: Content) -> None:
    """Write a file."""
    if callable(content):
        content(path)
    elif content is None:
        path.unlink()
    elif isinstance(content, bytes):
        path.write_bytes(content)
    else:
        path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")


def loop(path: Path) -> None:
    """A link to itself."""
    path.unlink(missing_ok=True)
    path.symlink_to(path)


def to_nowhere(path: Path) -> None:
    """A link to a file that does not exist."""
    path.unlink(missing_ok=True)
    path.symlink_to(path.with_name("nothing-there"))


def folder(path: Path) -> None:
    """A folder where a file should be."""
    path.unlink(missing_ok=True)
    path.mkdir()


def half(path: Path) -> None:
    """The first half of a file."""
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flipped(path: Path) -> None:
    """One bit changed."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)


# --- data ------------------------------------------------------------------------------------------------------------

GOOD = '{"sentence": "a fine film", "label": 1}\n{"sentence": "a dull plot", "label": 0}\n'
DEEP = "[" * 100_000


def lines(*values: Any) -> str:
    """Good rows, and one row more for each value, the rest of an object's text."""
    return GOOD + "".join(f"{value}\n" for value in values)


def table(kind: str, **columns: Any) -> bytes:
    """A Parquet file."""
    import pyarrow
    import pyarrow.parquet

    found = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.table(columns), found)
    return found.getvalue() if kind == "whole" else found.getvalue()[:-20]


TEXT_ROWS = [
    ('{"sentence": "x", "label": ' + "9" * 400 + "}", "row 3"),
    ('{"sentence": "x", "label": 1e400}', "row 3.*inf|label"),
    ('{"sentence": "x", "label": -1}', "row 3.*-1"),
    ('{"sentence": "x", "label": 2}', "row 3.*label 2"),
    ('{"sentence": "x", "label": "0_1"}', "row 3.*0_1"),
    ('{"sentence": "x", "label": "1_0"}', "row 3.*1_0"),
    ('{"sentence": "x", "label": "²"}', "row 3"),
    ('{"sentence": "x", "label": "good"}', "row 3.*good"),
    ('{"sentence": "x", "label": ""}', "row 3"),
    ('{"sentence": "x", "label": null}', "row 3.*None"),
    ('{"sentence": "x", "label": NaN}', "row 3.*(missing|NaN)"),
    ('{"sentence": "x", "label": 0.5}', "row 3.*0.5"),
    ('{"sentence": "x", "label": [1]}', "row 3"),
    ('{"sentence": "x", "label": {"a": 1}}', "row 3"),
    ('{"sentence": "x"}', "row 3"),
    ('{"label": 1}', "row 3.*sentence"),
    ('{"sentence": null, "label": 1}', "row 3.*sentence is None"),
    ('{"sentence": 5, "label": 1}', "row 3.*sentence"),
    ('{"sentence": ["x"], "label": 1}', "row 3.*sentence"),
    ('{"sentence": "", "label": 1}', "row 3"),
    ('{"sentence": "   ", "label": 1}', "row 3"),
    ('{"sentence": "\\ud800", "label": 1}', "row 3|line 3"),
    ('{"sentence": "x", "label": 1', "row 3|line 3"),
    ('{"sentence": "x", "label": 1}}', "row 3|line 3"),
    ("{}", "row 3"),
    ("[]", "row 3|line 3"),
    ("5", "row 3|line 3"),
    ('"text"', "row 3|line 3"),
    ("null", "row 3|line 3"),
    ("not json", "row 3|line 3"),
    (DEEP, "row 3|line 3"),
    ('{"a":' * 50_000, "row 3|line 3"),
    ('{"sentence": "x", "sentence": "y", "label": 1}', "row 3|line 3"),
]  # fmt: skip
"""The third row of train.jsonl, and what the message names."""

DATA_FILES: list[tuple[str, Content, str]] = [
    ("train.jsonl", "", "train.jsonl has no rows"),
    ("train.jsonl", "\n\n\n", "train.jsonl has no rows"),
    ("train.jsonl", b"\xff\xfe\x00\x01", "train.jsonl"),
    ("train.jsonl", GOOD.encode("utf-16"), "train.jsonl"),
    ("train.jsonl", GOOD.encode() + b'{"sentence": "\xe9lan", "label": 1}', "train.jsonl"),
    ("train.jsonl", b"\x00" * 1000, "train.jsonl"),
    ("train.jsonl", b"\x1f\x8b\x08\x00 not gzip", "train.jsonl"),
    ("train.jsonl", '{"text": "x", "label": 0}\n', "lacks the column sentence"),
    ("train.jsonl", '{"Sentence": "x", "label": 0}\n', "lacks the column sentence"),
    ("train.jsonl", '{"sentence": "x", "label": 1}\n' * 3, "one label only"),
    ("train.jsonl", folder, "train"),
    ("train.jsonl", loop, "train"),
    ("train.jsonl", to_nowhere, "train"),
    ("train.jsonl", None, "train"),
    ("validation.jsonl", None, "validation"),
    ("validation.jsonl", "", "validation.jsonl has no rows"),
    ("validation.jsonl", "[]", "validation.jsonl"),
    ("train.jsonl.gz", b"not gzip", "train"),
    ("train.csv", "", "train"),
    ("train.json", "[]", "train"),
]
"""A file beside a good validation.jsonl and train.jsonl; two files of one split are a mistake too."""

ONE_FILE: list[tuple[str, Content, str]] = [
    ("train.json", "[]", "train.json has no rows"),
    ("train.json", "{}", "train.json"),
    ("train.json", "5", "train.json"),
    ("train.json", "null", "train.json"),
    ("train.json", "[1, 2]", "train.json"),
    ("train.json", "[{", "train.json"),
    ("train.json", DEEP, "train.json"),
    ("train.json", '[{"sentence": "x", "label": NaN}, {"sentence": "y", "label": 0}]', "train.json"),
    ("train.json", b"\xff\xfe", "train.json"),
    ("train.json.gz", b"not gzip", "train.json.gz"),
    ("train.jsonl.gz", b"\x1f\x8b\x08\x00\x00\x00\x00\x00\x00\x03half", "train.jsonl.gz"),
    ("train.jsonl.bz2", b"BZh9 not", "train.jsonl.bz2"),
    ("train.jsonl.xz", b"\xfd7zXZ\x00 not", "train.jsonl.xz"),
    ("train.jsonl.zip", b"PK\x03\x04", "train"),
    ("train.csv", "sentence,label\n", "train.csv has no rows"),
    ("train.csv", "sentence,label\nx\n", "row 1"),
    ("train.csv", "sentence,label\nx,0,extra\ny,1\n", "row 1"),
    ("train.csv", "sentence,label\nx,zero\ny,1\n", "row 1.*zero"),
    ("train.csv", 'sentence,label\n"x,0\ny,1\n', "train.csv"),
    ("train.csv", "text;label\nx;0\n", "lacks the column sentence"),
    ("train.csv", "sentence,sentence,label\nx,y,0\n", "train.csv.*sentence"),
    ("train.csv", b"sentence,label\n\xff\xfe,0\n", "train.csv"),
    ("train.csv", b"sentence,label\nx\x00y,0\n", "train.csv"),
    ("train.csv", "sentence,label\n" + "x" * 200_000 + ",0\ny,2\n", "train.csv"),
    ("train.tsv", "sentence\tlabel\nx\n", "row 1"),
    ("train.tsv", "sentence,label\nx,0\n", "lacks the column"),
    ("train.tsv", "sentence\tlabel\nx\t7\n", "label '?7"),
    ("train.parquet", b"PAR1", "train.parquet"),
    ("train.parquet", b"", "train.parquet"),
    ("train.parquet", b"not parquet at all", "train.parquet"),
    ("train.parquet", lambda path: put(path, table("cut", sentence=["x", "y"], label=[0, 1])), "train.parquet"),
    ("train.parquet", lambda path: put(path, table("whole", text=["x"], label=[0])), "lacks the column sentence"),
    ("train.parquet", lambda path: put(path, table("whole", sentence=[1, 2], label=[0, 1])), "sentence"),
    ("train.parquet", lambda path: put(path, table("whole", sentence=["x", "y"], label=[0.5, 1])), "0.5"),
    ("train.txt", GOOD, "train"),
    ("training.jsonl", GOOD, "train"),
]
"""The only file of the training split."""

OTHER_TASKS: list[tuple[str, Content, str]] = [
    ("rte", {"sentence1": "a", "label": 0}, "sentence2"),
    ("rte", {"sentence1": "a", "sentence2": 5, "label": 0}, "sentence2"),
    ("rte", {"sentence1": "a", "sentence2": "b", "label": True}, "True"),
    ("stsb", {"sentence1": "a", "sentence2": "b", "label": "high"}, "high"),
    ("stsb", {"sentence1": "a", "sentence2": "b", "label": None}, "label"),
    ("stsb", '{"sentence1": "a", "sentence2": "b", "label": 1e400}', "label"),
    ("mnli", {"premise": "a", "hypothesis": "b", "label": 3}, "label 3"),
    ("squad", {"context": "a b", "question": "c", "answers": {"text": ["a"], "answer_start": [-1]}}, "answer"),
    ("squad", {"context": "a b", "question": "c", "answers": {"text": ["z"], "answer_start": [0]}}, "answer"),
    ("squad", {"context": "a b", "question": "c", "answers": {"text": ["a"], "answer_start": []}}, "answer"),
    ("squad", {"context": "a b", "question": "c", "answers": []}, "answer"),
    ("squad", {"context": "a b", "question": "c", "answers": None}, "answer"),
    ("squad", {"context": "a b", "question": "c", "answers": {"text": ["a"], "answer_start": [10**30]}}, "answer"),
    ("squad", {"context": "", "question": "c", "answers": {"text": ["a"], "answer_start": [0]}}, "context"),
    ("conll2003", {"tokens": ["a", "b"], "ner_tags": [0]}, "ner_tags|tokens"),
    ("conll2003", {"tokens": ["a"], "ner_tags": [99]}, "99"),
    ("conll2003", {"tokens": ["a"], "ner_tags": ["B-NOTHING"]}, "B-NOTHING"),
    ("conll2003", {"tokens": "a b", "ner_tags": [0, 0]}, "tokens"),
    ("conll2003", {"tokens": [5], "ner_tags": [0]}, "tokens"),
    ("conll2003", {"tokens": [], "ner_tags": []}, "tokens"),
    ("xsum", {"document": "a", "summary": None}, "summary"),
    ("xsum", {"document": ["a"], "summary": "b"}, "document"),
    ("boolq", {"question": "a", "passage": "b", "answer": "perhaps"}, "answer|perhaps"),
    ("piqa", {"goal": "a", "sol1": "b", "label": 0}, "sol2"),
    ("hellaswag", {"ctx": "a", "endings": "b", "label": 0}, "endings"),
    ("arc_easy", {"question": "a", "choices": {"text": ["b"], "label": []}, "answerKey": "A"}, "choices"),
    ("arc_easy", {"question": "a", "choices": {"text": ["b"], "label": ["A"]}, "answerKey": "Z"}, "answerKey|Z"),
    ("gsm8k", {"question": "a", "answer": "no number"}, "answer"),
]  # fmt: skip
"""A task, and both of its files' only row."""


def read_data(
    name: str, content: Content, place: Path, *, alone: bool = False, task: str = "sst2", **options: Any
) -> None:
    data = place / "made"
    data.mkdir()
    put(data / "validation.jsonl", GOOD)
    if not alone:
        put(data / "train.jsonl", GOOD)
    put(data / name, content)
    load_task_data(task, data_dir=data, **options)


def read_task(task: str, row: Content, place: Path) -> None:
    data = place / "made"
    data.mkdir()
    for split in ("train", "validation"):
        put(data / f"{split}.jsonl", f"{row if isinstance(row, str) else json.dumps(row)}\n")
    load_task_data(task, data_dir=data)


def read_stream(content: Content, place: Path) -> None:
    data = place / "made"
    data.mkdir()
    put(data / "validation.jsonl", GOOD)
    put(data / "train.jsonl", content)
    stream = load_task_data("sst2", data_dir=data, streaming=True).stream
    assert stream is not None
    list(stream)


# --- models and adapters ---------------------------------------------------------------------------------------------


def weights(change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> Callable[[Path], None]:
    """A file of weights after a change."""

    def write(path: Path) -> None:
        changed = change(load_file(path))
        save_file({k: v.contiguous().clone() for k, v in changed.items()}, path, metadata={"format": "pt"})

    return write


def merged(**values: Any) -> Callable[[Path], None]:
    """A file of JSON with these values changed."""
    return lambda path: put(path, json.loads(path.read_text()) | values)


NO_OBJECTS: list[Content] = ["", "[]", "null", "5", '"x"', "{", DEEP, b"\xff\xfe\x00", b"\x00" * 10, folder, loop]

MODEL_FILES: list[tuple[str, Content, str]] = [
    *(("config.json", content, "config.json|model") for content in NO_OBJECTS),
    *(("tokenizer_config.json", content, "tokenizer_config.json|tokenizer") for content in NO_OBJECTS[1:8]),
    *(("tokenizer.json", content, "tokenizer") for content in NO_OBJECTS[1:8]),
    ("config.json", None, "config.json|cannot load"),
    ("config.json", "{}", "model_type|cannot load"),
    ("config.json", merged(num_hidden_layers="six"), "num_hidden_layers"),
    ("config.json", merged(num_hidden_layers=-1), "do not fit|num_hidden_layers|cannot load"),
    ("config.json", merged(num_hidden_layers=2), "missing"),
    ("config.json", merged(num_hidden_layers=0), "without a place|do not fit"),
    ("config.json", merged(hidden_size=0), "cannot load"),
    ("config.json", merged(hidden_size=-4), "cannot load"),
    ("config.json", merged(hidden_size=10**12), "cannot load|shape|memory"),
    ("config.json", merged(hidden_size=24), "shape"),
    ("config.json", merged(vocab_size=10), "shape|embeddings"),
    ("config.json", merged(num_attention_heads=3), "cannot load"),
    ("config.json", merged(num_attention_heads=0), "cannot load"),
    ("config.json", merged(hidden_act="nothing"), "nothing"),
    ("config.json", merged(hidden_dropout_prob=7), "7|dropout"),
    ("config.json", merged(model_type="nothing"), "nothing|cannot load"),
    ("config.json", merged(model_type="gpt2"), "do not fit"),
    ("config.json", merged(model_type=["bert"]), "cannot load"),
    ("config.json", merged(dtype="float99"), "float99"),
    ("config.json", merged(id2label=5), "id2label|TypeError"),
    ("config.json", merged(max_position_embeddings=4), "shape"),
    ("config.json", merged(auto_map={"AutoConfig": "code.Config"}, model_type="own"), "code|trust|cannot load"),
    ("model.safetensors", b"", "cannot load the weights"),
    ("model.safetensors", b"\xff" * 100, "cannot load the weights"),
    ("model.safetensors", (10**18).to_bytes(8, "little") + b"{}", "cannot load the weights"),
    ("model.safetensors", half, "cannot load the weights"),
    ("model.safetensors", None, "cannot load the weights"),
    ("model.safetensors", folder, "cannot load the weights"),
    ("model.safetensors", weights(lambda w: {k: v / 0 for k, v in w.items()}), "not finite"),
    ("model.safetensors", weights(lambda w: {k: v * 0 for k, v in w.items()}), "same number"),
    ("model.safetensors", weights(lambda w: {f"other.{k}": v for k, v in w.items()}), "no weight|without a place"),
    ("model.safetensors", weights(lambda w: {k: v for k, v in w.items() if "query" not in k}), "missing.*query"),
    ("model.safetensors", weights(lambda w: {k: v[:1] for k, v in w.items()}), "shape|no weight"),
    ("model.safetensors", weights(lambda w: w | {"bert.encoder.other": torch.ones(3)}), "without a place"),
    ("model.safetensors.index.json", "[]", "index.json"),
    ("modules.json", "5", "modules.json"),
    ("modules.json", "[5]", "modules.json"),
    ("modules.json", "{", "modules.json"),
]
"""A file of a model's folder that is otherwise sound, and what the message names."""

ADAPTER_FILES: list[tuple[str, Content, str]] = [
    *(("adapter_config.json", content, "adapter_config.json") for content in NO_OBJECTS[:9]),
    ("adapter_config.json", folder, "adapter_config.json"),
    ("adapter_config.json", loop, "adapter_config.json"),
    ("adapter_config.json", None, "adapter_config.json"),
    ("adapter_config.json", "{}", "peft_type"),
    ("adapter_config.json", merged(peft_type="NOTHING"), "NOTHING"),
    ("adapter_config.json", merged(peft_type=5), "does not fit|peft_type"),
    ("adapter_config.json", merged(r=-1), "does not fit"),
    ("adapter_config.json", merged(r="two"), "does not fit"),
    ("adapter_config.json", merged(r=99), "does not fit"),
    ("adapter_config.json", merged(target_modules=["nothing"]), "does not fit"),
    ("adapter_config.json", merged(target_modules="((("), "does not fit"),
    ("adapter_config.json", merged(target_modules=["key"]), "does not fit"),
    ("adapter_config.json", merged(task_type="NOTHING"), "NOTHING|does not fit"),
    ("adapter_config.json", merged(lora_dropout="x"), "does not fit"),
    ("adapter_model.safetensors", b"", "does not fit|damaged"),
    ("adapter_model.safetensors", b"[]", "does not fit|damaged"),
    ("adapter_model.safetensors", half, "does not fit|damaged"),
    ("adapter_model.safetensors", None, "does not fit|adapter_model"),
    ("adapter_model.safetensors", folder, "does not fit|adapter_model"),
    ("adapter_model.safetensors", weights(lambda w: {k: v / 0 for k, v in w.items()}), "not finite"),
    (
        "adapter_model.safetensors",
        weights(lambda w: {k: v for k, v in w.items() if "lora_A" not in k}),
        "lacks.*lora_A",
    ),
    ("adapter_model.safetensors", weights(lambda w: w | {"other": torch.ones(2)}), "no place for"),
    ("adapter_model.safetensors", weights(lambda w: {k: v[:1] for k, v in w.items()}), "does not fit"),
    *(("base_model.json", content, "base_model.json") for content in NO_OBJECTS[:9]),
    ("base_model.json", "{}", "fingerprint"),
    ("base_model.json", {"fingerprint": "another"}, "another base model"),
    ("base_model.json", {"fingerprint": 5}, "another base model|base_model.json"),
    ("base_model.json", {"fingerprint": "x", "pooling": "mean"}, "pooling"),
]
"""A file of an adapter's folder that is otherwise sound."""


@cache
def _temporary() -> Any:
    return tempfile.TemporaryDirectory()


@cache
def model() -> Path:
    """The folder of a sound model."""
    return tiny_model(Path(_temporary().name) / "model")


@cache
def adapter() -> Path:
    """The folder of a sound adapter of the model."""
    network, _ = load_classifier(model(), num_labels=2)
    path = Path(_temporary().name) / "adapter"
    get_peft_model(network, LoraConfig(r=2, target_modules=["query"], task_type="SEQ_CLS")).save_pretrained(path)
    return path


def load_damaged_model(name: str, content: Content, place: Path) -> None:
    made = shutil.copytree(model(), place / "made")
    if name == "tokenizer.json":
        (made / "vocab.txt").unlink()
    put(made / name, content)
    load_classifier(made, num_labels=2)


def load_damaged_adapter(name: str, content: Content, place: Path) -> None:
    made = shutil.copytree(adapter(), place / "made")
    put(made / name, content)
    load_adapter(load_classifier(model(), num_labels=2)[0], made)


# --- results ---------------------------------------------------------------------------------------------------------


@cache
def result() -> Path:
    """The folder of a sound result."""
    kernels = {f"initialisation.{name}": np.eye(3) + 0.1 for name in ("full_backbone", "propulsion_z")}
    metric = Metric("cka", 0.9, 0.8, 0.95, "", "initialisation", "full_backbone", "propulsion_z")
    found = Result(
        analysis="kernel_distance", config={"degree": 15}, seed=0, metrics=[metric], tables={"scores": [{"a": 1}]},
        arrays=kernels | {"labels": np.array([0, 1, 0])}, model={"name": "m"}, dataset={"name": "demo"},
        environment={}, seconds={}, coverage={"full_backbone": "weights"},
    )  # fmt: skip
    return write_result(found, Path(_temporary().name) / "result")


def dropped(name: str) -> Callable[[Path], None]:
    """A file of JSON without a key."""

    def write(path: Path) -> None:
        content = json.loads(path.read_text())
        del content[name]
        put(path, content)

    return write


def huge(path: Path) -> None:
    """An array whose header says 1.2 TB."""
    np.savez(path, labels=np.zeros(3))
    content = path.read_bytes()
    path.write_bytes(
        content.replace(b"(3,), }       ", b"(150000000000,), }"[:14]).replace(b"(3,)", b"(9" + b"9" * 1 + b")")
    )


FIELDS = ("analysis", "seed", "config", "metrics", "tables", "arrays", "model", "dataset", "environment", "seconds",
          "coverage", "format")  # fmt: skip
RESULT_FILES: list[tuple[str, Content, str]] = [
    *(("result.json", content, "result.json|result folder") for content in NO_OBJECTS),
    ("result.json", "{}", "not of this project"),
    ("result.json", None, "incomplete"),
    ("result.json", half, "result.json"),
    ("result.json", '{"format": 1, "format": 1, "analysis": "x"}', "twice"),
    ("result.json", '{"format": NaN, "analysis": "x"}', "NaN"),
    *(("result.json", dropped(name), f"{name}|not of this project") for name in FIELDS),
    *(("result.json", merged(**{name: 5.5}), f"{name}|format") for name in FIELDS),
    ("result.json", merged(format=99), "99"),
    ("result.json", merged(extra=1), "extra"),
    ("result.json", merged(metrics=[5]), "metric"),
    ("result.json", merged(metrics=[{"name": "cka"}]), "metric"),
    ("result.json", merged(tables={"a": 5}), "table"),
    ("result.json", merged(tables={"a": [5]}), "table"),
    ("result.json", merged(arrays={"labels": 5}), "array"),
    ("result.json", merged(arrays={"labels": {"shape": [4]}}), "do not match"),
    ("result.json", merged(arrays={"labels": {"shape": ["x"]}}), "do not match"),
    ("result.json", merged(arrays={}), "not listed"),
    ("result.json", merged(coverage={"a": 5}), "words"),
    ("kernels.npz", b"", "kernels.npz"),
    ("kernels.npz", b"not a zip", "kernels.npz"),
    ("kernels.npz", half, "kernels.npz"),
    ("kernels.npz", None, "kernels.npz"),
    ("kernels.npz", folder, "kernels.npz"),
    ("kernels.npz", loop, "kernels.npz"),
    ("kernels.npz", huge, "kernels.npz"),
    ("kernels.npz", lambda path: np.savez(path, labels=np.array([0, 1, 0])), "do not match"),
    ("kernels.npz", lambda path: np.savez(path, labels=np.array(["x", object()], dtype=object)), "kernels.npz"),
    ("kernels.npz", lambda path: np.save(path.open("wb"), np.zeros(3)), "kernels.npz"),
]
"""A file of a result without checksums."""

SUMS: list[tuple[str, Content, str]] = [
    ("result.json", flipped, "result.json is damaged"),
    ("kernels.npz", flipped, "kernels.npz is damaged"),
    ("SHA256SUMS", "", "SHA256SUMS is damaged"),
    ("SHA256SUMS", "nothing here\n", "SHA256SUMS is damaged"),
    ("SHA256SUMS", b"\xff\xfe\x00", "SHA256SUMS is damaged"),
    ("SHA256SUMS", flipped, "damaged"),
    ("SHA256SUMS", half, "damaged"),
    ("SHA256SUMS", folder, "SHA256SUMS"),
    ("SHA256SUMS", loop, "SHA256SUMS|result.json"),
]
"""A file of a result with checksums."""


def read_result(name: str, content: Content, place: Path, *, checked: bool = False) -> None:
    made = shutil.copytree(result(), place / "made")
    if not checked:
        (made / "SHA256SUMS").unlink()
    put(made / name, content)
    load_result(made)


def drawn(content: Content, place: Path) -> None:
    made = shutil.copytree(result(), place / "made")
    (made / "SHA256SUMS").unlink()
    put(made / "result.json", content)
    redraw("kernel_distance", draw, made, place / "out")


def read_block(text: str, place: Path) -> None:
    shutil.copytree(result(), place / "made" / "run")
    put(place / "made" / "README.md", text)
    command(lambda: run_command(lambda: readme.main(parsed(readme.Config, prog="p", description=""))), ["made"])


def judge(name: str, content: Content, place: Path) -> None:
    run = shutil.copytree(result(), place / "made" / "run")
    put(run / name, content)
    command(
        lambda: run_command(lambda: claims.main(parsed(claims.Config, prog="p", description=""))), ["--load", "made"]
    )


def read_cell(content: Content, place: Path) -> None:
    made = place / "made"
    Grid(made).cell("cell", {"a": 1}, lambda: {"value": 1})
    (file,) = made.glob("*.json")
    put(file, content)
    Grid(made).cell("cell", {"a": 1}, lambda: {"value": 1})


NAMES: list[tuple[str, Callable[[Path], object], str]] = [
    ("a folder's name of 300 characters", lambda place: check_writable(place / ("a" * 300)), "name too long"),
    ("a null byte in a name", lambda place: check_writable(place / "a\0b"), "null"),
    (
        "a result in a link to itself",
        lambda place: (loop(place / "made"), check_writable(place / "made" / "x")),
        "made",
    ),
    ("a result over a file", lambda place: (put(place / "made", "x"), check_writable(place / "made")), "made"),
    ("a result below a file", lambda place: (put(place / "made", "x"), check_writable(place / "made" / "x")), "made"),
    ("a result in /proc", lambda place: check_writable("/proc/nothing/result"), "/proc"),
    ("a result that is /dev/null", lambda place: check_writable("/dev/null"), "/dev/null"),
    (
        "a model in a link to itself",
        lambda place: (loop(place / "made"), load_classifier(place / "made", num_labels=2)),
        "made",
    ),
    ("a model's name of 300 characters", lambda place: load_classifier("a" * 300, num_labels=2), "a" * 300),
    ("a model's name with a null byte", lambda place: load_classifier("a\0b", num_labels=2), "a.*b"),
    ("a model's file", lambda place: load_classifier(model() / "config.json", num_labels=2), "config.json"),
    (
        "an adapter in a link to itself",
        lambda place: (loop(place / "made"), load_adapter(None, place / "made")),
        "made",
    ),
    ("an adapter's name of 300 characters", lambda place: load_adapter(None, place / ("a" * 300)), "too long"),
    (
        "data in a link to itself",
        lambda place: (loop(place / "made"), load_task_data("sst2", data_dir=place / "made")),
        "made",
    ),
    ("data's name of 300 characters", lambda place: load_task_data("sst2", data_dir=place / ("a" * 300)), "too long"),
    (
        "data in a file",
        lambda place: (put(place / "made", "x"), load_task_data("sst2", data_dir=place / "made")),
        "made",
    ),
    ("a result's name of 300 characters", lambda place: load_result(place / ("a" * 300)), "too long|not a result"),
    ("a result in a link to itself, read", lambda place: (loop(place / "made"), load_result(place / "made")), "made"),
    ("a result with a null byte, read", lambda place: load_result(place / "a\0b"), "null|not a result"),
]

# --- runs of propulsion.train ----------------------------------------------------------------------------------------

TRAIN = "--use-cpu --disable-tqdm --max-steps 2 --max-train-samples 8 --max-eval-samples 8 --save-steps 1 --degree 3"
RATES = "--learning-rate 0.01 --head-learning-rate 0.01"


@cache
def finished() -> Path:
    """The folder of a finished run of two steps, with a checkpoint after each."""
    path = Path(_temporary().name) / "run"
    words = [*TRAIN.split(), *RATES.split(), "--model", str(model()), "--output-dir", str(path)]
    try:
        command(lambda: train_command.main(train_command.parse(words)), ())
    except AssertionError:  # It must be accepted.
        assert (path / "result.json").exists()
    return path


RUN_FILES: list[tuple[str, Content, str]] = [
    *(("run.json", content, "run.json") for content in [*NO_OBJECTS[:9], folder, loop]),
    ("run.json", "{}", "another configuration|run.json"),
    ("run.json", merged(seed=7), "run.json is not as it was written"),
    ("run.json", None, "run.json"),
    *(("result.json", content, "result.json") for content in [*NO_OBJECTS[:9], "{}", flipped, half]),
    *(("files.json", content, "files.json") for content in NO_OBJECTS[:9]),
    ("predictions.json", "[]", "predictions.json"),
    ("predictions.json", None, "predictions.json"),
    ("model/adapter_model.safetensors", flipped, "adapter_model.safetensors"),
    ("model/adapter_model.safetensors", None, "adapter_model.safetensors"),
    ("model/adapter_config.json", "{}", "adapter_config.json"),
]
"""A file of a finished run, whose command is called again."""

CHECKPOINT_FILES: list[tuple[str, Content, str]] = [
    (name, content, "checkpoint-2 is damaged")
    for name in ("adapter_model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json")
    for content in (b"", flipped, half, None)
] + [
    ("trainer_state.json", "[]", "checkpoint-2 is damaged"),
    ("trainer_state.json", "{}", "checkpoint-2 is damaged"),
    ("optimizer.pt", b"\x80\x04cos\nsystem\n(S'true'\ntR.", "checkpoint-2 is damaged"),
]
"""A file of the last checkpoint of a run that was killed at its end."""


def go_on(name: str, content: Content, place: Path, *, killed: bool = False) -> None:
    made = shutil.copytree(finished(), place / "made")
    if killed:
        for path in ("result.json", "predictions.json"):
            (made / path).unlink()
        shutil.rmtree(made / "model")
    put(made / name, content)
    words = [*TRAIN.split(), *RATES.split(), "--model", str(model()), "--output-dir", "made"]
    command(lambda: run_command(lambda: train_command.main(train_command.parse(words))), ())


# --- all -------------------------------------------------------------------------------------------------------------


def _shown(content: Content) -> str:
    text = getattr(content, "__name__", None) or repr(content)
    return text if len(text) < 60 else f"{text[:40]}... ({len(text):,} characters)"


def mistakes() -> Iterator[Mistake]:
    """All mistakes of this module."""
    for text, names in TEXT_ROWS:
        call = partial(read_data, "train.jsonl", lines(text))
        yield Mistake("rows of data", _shown(text), call, names)
    for text in (lines(TEXT_ROWS[3][0]), lines(TEXT_ROWS[22][0]), lines(DEEP), "", "\n\n"):
        yield Mistake("streams of data", _shown(text), partial(read_stream, text), "train.jsonl")
    for name, content, names in DATA_FILES:
        yield Mistake("files of data", f"{name} {_shown(content)}", partial(read_data, name, content), names)
    for name, content, names in ONE_FILE:
        call = partial(read_data, name, content, alone=True)
        yield Mistake("files of data", f"{name} alone {_shown(content)}", call, names)
    for task, row, names in OTHER_TASKS:
        yield Mistake("rows of other tasks", f"{task} {_shown(row)}", partial(read_task, task, row), names)
    for name, content, names in MODEL_FILES:
        yield Mistake("files of models", f"{name} {_shown(content)}", partial(load_damaged_model, name, content), names)
    for name, content, names in ADAPTER_FILES:
        call = partial(load_damaged_adapter, name, content)
        yield Mistake("files of adapters", f"{name} {_shown(content)}", call, names)
    for name, content, names in RESULT_FILES:
        yield Mistake("files of results", f"{name} {_shown(content)}", partial(read_result, name, content), names)
    for name, content, names in SUMS:
        call = partial(read_result, name, content, checked=True)
        yield Mistake("files of results", f"with checksums, {name} {_shown(content)}", call, names)
    for content in (merged(arrays={}, metrics=[]), merged(analysis="spectrum"), "[]"):
        yield Mistake("figures", _shown(content), partial(drawn, content), "made")
    for text in (
        "<!-- table: nothing -->\n<!-- end -->\n",
        "<!-- table: run -->\n",
        "<!-- table: .. -->\n<!-- end -->\n",
    ):
        yield Mistake("pages of results", text, partial(read_block, text), "README|result|made")
    for name, content in (("result.json", "[]"), ("result.json", "{}"), ("kernels.npz", b""), ("SHA256SUMS", "")):
        yield Mistake("claims", f"{name} {_shown(content)}", partial(judge, name, content), name)
    for content in [*NO_OBJECTS[:9], "{}", half, flipped, folder, loop]:
        yield Mistake("cells of grids", _shown(content), partial(read_cell, content), "made")
    for name, call, names in NAMES:
        yield Mistake("names and links", name, call, names)
    for name, content, names in RUN_FILES:
        yield Mistake("files of runs", f"{name} {_shown(content)}", partial(go_on, name, content), names)
    for name, content, names in CHECKPOINT_FILES:
        call = partial(go_on, f"checkpoint-2/{name}", content, killed=True)
        yield Mistake("files of checkpoints", f"{name} {_shown(content)}", call, names)


def run() -> list[Row]:
    """Try all mistakes, and count them by kind."""
    with quiet(), tempfile.TemporaryDirectory() as path:
        return rows(list(mistakes()), Path(path))


if __name__ == "__main__":
    sys.exit(bool(print_table(run())))
