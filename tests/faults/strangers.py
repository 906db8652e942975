"""Mistakes of a first-time user of six commands: `python -m tests.faults.strangers` tries all and prints a table.

Each line of a table is a command, the words after it, and what the message must name. The words may use the files that
`made` describes, in a folder named made.
"""

import json
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"

from analyses.core.errors import run_command
from ntk.store.__main__ import main as store
from propulsion import predict
from propulsion import train as train_command
from propulsion.command_line import parsed
from tests.analyses.test_every_analysis import ANALYSES
from tests.faults.inputs import GOOD, adapter, finished, loop, model
from tests.faults.mistakes import Mistake, Row, command, print_table, quiet, rows

SHORT = "--use-cpu --disable-tqdm --max-steps 1 --output-dir run"
OWN = "--text-columns text --label-column topic"
KERNELS = """
import torch

def model():
    torch.manual_seed(0)
    return torch.nn.Linear(3, 2).double()

def rows():
    return torch.eye(3, dtype=torch.float64)

def words():
    return "a fine film"

def none():
    return None

def wide():
    return torch.ones(2, 5, dtype=torch.float64)

def scaled():
    return lambda outputs, inputs: outputs / 0

number = 5
"""

FILES: dict[str, object] = {
    "good/train.jsonl": GOOD, "good/validation.jsonl": GOOD,
    "topics.csv": "text,topic\n" + "".join(f"a fine film {i},{'good' if i % 2 else 'bad'}\n" for i in range(60)),
    "one_class.csv": "text,topic\na,good\nb,good\nc,good\n",
    "no_rows.csv": "text,topic\n",
    "gaps.csv": "text,topic\na fine film,good\n,bad\ndull,bad\nfine,good\n",
    "blank_label.csv": "text,topic\na fine film,good\ndull,\nplot,bad\nfilm,good\n",
    "every_row_its_class.csv": "text,topic\n" + "".join(f"film {i},topic {i}\n" for i in range(9)),
    "numbers.csv": "text,topic\na,1.5\nb,nan\nc,2.5\nd,3.5\n",
    "semicolons.csv": "text;topic\na;good\nb;bad\n",
    "excel.xlsx": "PK", "list.txt": "a fine film\n",
    "new.csv": "text\na fine film\n", "other_column.csv": "review\na fine film\n", "empty.csv": "",
    "topics.toml": 'data_dir = "topics.csv"\ntext_columns = ["text"]\nlabel_column = "topic"\n',
    "broken.toml": "data_dir = ", "lists.toml": "text_columns = 5\n",
    "unknown.toml": 'data_dir = "topics.csv"\ntext_column = "text"\nlabel_column = "topic"\n',
    "notes/readme.txt": "notes",
    "kernels.py": KERNELS, "broken_kernels.py": "def model(:\n",
}  # fmt: skip

TRAIN = [
    ("--data-dir made/topics.csv --text-columns txt --label-column topic", "txt.*did you mean text|txt"),
    ("--data-dir made/topics.csv --text-columns text --label-column topics", "topics"),
    ("--data-dir made/topics.csv --text-columns text text --label-column topic", "text"),
    ("--data-dir made/topics.csv --text-columns topic --label-column topic", "topic"),
    ("--data-dir made/topics.csv --text-columns text topic text --label-column topic", "text"),
    (f"--data-dir made/one_class.csv {OWN}", "one_class.csv|one class|good"),
    (f"--data-dir made/no_rows.csv {OWN}", "no_rows.csv"),
    (f"--data-dir made/empty.csv {OWN}", "empty.csv"),
    (f"--data-dir made/gaps.csv {OWN}", "gaps.csv has 4 rows, too few"),
    (f"--data-dir made/blank_label.csv {OWN}", "no topic: row 2"),
    (f"--data-dir made/numbers.csv {OWN}", "row 2.*topic|nan"),
    (f"--data-dir made/semicolons.csv {OWN}", "text"),
    (f"--data-dir made/excel.xlsx {OWN}", "excel.xlsx"),
    (f"--data-dir made/list.txt {OWN}", "list.txt"),
    (f"--data-dir made/notes {OWN}", "notes"),
    (f"--data-dir made/loop {OWN}", "loop"),
    (f"--data-dir made/topics.csv {OWN} --task sst2", "sst2"),
    ("--task-file made/broken.toml", "broken.toml"),
    ("--task-file made/lists.toml", "text_columns|lists.toml"),
    ("--task-file made/unknown.toml", "text_column"),
    ("--task-file made", "made"),
    ("--task sst2 --data-dir made/good/train.jsonl", "train.jsonl"),
    ("--task sst2 --data-dir made/good --model made/good", "made/good"),
    ("--task sst2 --data-dir made/good --model made/notes/readme.txt", "readme.txt"),
    ("--task sst2 --data-dir made/good --output-dir made/good", "made/good holds something else"),
    ("--task sst2 --data-dir made/good --output-dir made/topics.csv", "topics.csv"),
    ("--task sst2 --data-dir made/good --output-dir made/good --overwrite-output-dir", "made/good holds"),
    ("--task sst2 --data-dir made/good --adapter made/run", "made/run"),
]
"""Options of `python -m propulsion.train`."""

PREDICT = [
    ("made/run --data-dir made/new.csv --text-columns review", "review"),
    ("made/run --data-dir made/other_column.csv", "sentence"),
    ("made/run --data-dir made/empty.csv --text-columns text", "empty.csv"),
    ("made/run --data-dir made/new.csv --text-columns text --output made/topics.csv/out.csv", "topics.csv"),
    ("made/run --data-dir made/list.txt", "list.txt"),
    ("made/run --data-dir made/new.csv --text-columns text --output made/new.csv", "new.csv exists already"),
    ("made/run --data-dir made/new.csv --text-columns text --output made/run/files.json", "unknown format"),
    ("made/run --data-dir made/new.csv --text-columns text --output made/notes --overwrite", "notes"),
    ("made/run --data-dir made/new.csv --text-columns text --batch-size 0", "batch_size"),
    ("made/run --data-dir made/new.csv --text-columns text --max-length 0", "max_length"),
    ("made/run --data-dir made/new.csv --text-columns text --max-length -5", "max_length"),
    ("made/run --data-dir made/new.csv --text-columns text --device gpu", "gpu"),
    ("made/run/result.json --data-dir made/new.csv", "result.json is no folder"),
    ("made/notes --data-dir made/new.csv", "notes holds no saved model"),
    ("made/run/checkpoint-2 --data-dir made/new.csv --text-columns text --model made/notes", "notes"),
    ("made/adapter --data-dir made/new.csv --text-columns text --pooling meen", "meen"),
    ("made/run --task-file made/broken.toml", "broken.toml"),
]
"""Words after `python -m propulsion.predict`."""

ANALYSES_OF = [
    ("choose", f"--data-dir made/one_class.csv {OWN}", "one_class.csv|one class|good"),
    ("choose", f"--data-dir made/every_row_its_class.csv {OWN}", "every_row_its_class|class|rows"),
    ("choose", f"--data-dir made/topics.csv {OWN} --model made/notes", "notes"),
    ("choose", f"--data-dir made/topics.csv {OWN} --candidates lora lora", "lora"),
    ("choose", f"--data-dir made/topics.csv {OWN} --max-length 99", "^max_length is 99, expected 3 to 32[^;]*$"),
    ("choose", f"--data-dir made/topics.csv {OWN} --output-dir made/topics.csv", "topics.csv"),
    ("kernel_distance", f"--data-dir made/topics.csv {OWN} --n-examples 99999", "n_examples|99999|rows"),
    ("kernel_distance", "--task sst2 --data-dir made/good --model made/adapter", "adapter"),
    ("kernel_distance", f"--data-dir made/numbers.csv {OWN}", "row 2|nan"),
    ("kernel_distance", "--task sst2 --data-dir made/good --seeds 1 1", "seeds|1"),
    ("kernel_distance", "--task sst2 --data-dir made/good --output-dir made/good", "made/good"),
    ("decomposition", "--task sst2 --data-dir made/good --model made/notes", "notes"),
    ("decomposition", "--task sst2 --data-dir made/good --head label_words --model made/model", "encoder"),
    ("decomposition", f"--data-dir made/gaps.csv {OWN}", "gaps.csv has 4 rows, too few"),
    ("decomposition", "--task squad --data-dir made/good", "squad"),
    ("decomposition", "--task sst2 --data-dir made/good --null-draws -1", "null_draws"),
]
"""An analysis and its options."""

STORE = [
    ("", "path"),
    ("made/notes", "notes"),
    ("made/nowhere", "nowhere"),
    ("made/topics.csv", "topics.csv"),
    ("store --block", "block"),
    ("store --block ten", "ten"),
    ("store --block 0 --model made.kernels:model --inputs a=made.kernels:rows", "block"),
    ("store --reduce trce", "trce"),
    ("store --modle x", "modle"),
    ("store --inputs a=made.kernels:rows", "--inputs needs --model"),
    ("store --model made.kernels", "MODULE:FUNCTION"),
    ("store --model made.nothing:model", "nothing"),
    ("store --model made.kernels:modle", "modle"),
    ("store --model made.kernels:number", "number"),
    ("store --model made.broken_kernels:model", "broken_kernels|syntax"),
    ("store --model made.kernels:words --inputs a=made.kernels:rows", "model|Module|str"),
    ("store --model made.kernels:model --inputs made.kernels:rows", "KEY=MODULE:FUNCTION"),
    ("store --model made.kernels:model --inputs a=made.kernels:words", "input|str|tensor"),
    ("store --model made.kernels:model --inputs a=made.kernels:none", "input|None|tensor"),
    ("store --model made.kernels:model --inputs a=made.kernels:wide", "shape|size|column|mat"),
    ("store --model made.kernels:model --inputs a=made.kernels:rows b=made.kernels:wide", "'b'"),
    ("store --model made.kernels:model --inputs a=made.kernels:rows --params nothing", "nothing"),
    ("store --model made.kernels:model --inputs a=made.kernels:rows --output made.kernels:scaled", "finite|NaN"),
    ("store --model made.kernels:model --inputs a=made.kernels:rows --memory-budget-gb nan", "memory"),
    ("store --model made.kernels:model --inputs a=made.kernels:rows --memory-budget-gb 0", "memory"),
    ("store --model made.kernels:model --inputs a=made.kernels:rows --memory-budget-gb 1e-9", "memory"),
    ("made/topics.csv --model made.kernels:model --inputs a=made.kernels:rows", "topics.csv"),
    ("made/notes --model made.kernels:model --inputs a=made.kernels:rows", "notes"),
]
"""Words after `python -m ntk.store`."""


def made(folder: Path) -> None:
    """The files that the words name: tables, task files, a model, an adapter, a finished run, functions for a store."""
    for name, content in FILES.items():
        path = folder / "made" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    loop(folder / "made" / "loop")
    for name, source in (("model", model()), ("adapter", adapter()), ("run", finished())):
        shutil.copytree(source, folder / "made" / name)


def _prepared(call, text: str, folder: Path) -> None:
    made(folder)
    before = _contents(folder)
    try:
        call(text.split())
    finally:
        for name in [name for name in sys.modules if name.partition(".")[0] == "made"]:
            del sys.modules[name]
        sys.path[:] = [path for path in sys.path if path != str(folder)]
        if (after := _contents(folder)) != before:
            raise AssertionError(f"changed {sorted(map(str, after.items() ^ before.items()))[:4]}")


def _contents(folder: Path) -> dict[str, bytes]:
    paths = [path for path in folder.rglob("*") if path.is_file() and "__pycache__" not in path.parts]
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


def _train(words: list[str]) -> None:
    start = [*SHORT.split(), *(() if "--model" in words else ("--model", "made/model"))]
    command(lambda: run_command(lambda: train_command.main(train_command.parse([*start, *words]))), ())


def _predict(words: list[str]) -> None:
    command(lambda: run_command(lambda: predict.main(parsed(predict.Config, prog="p", description=""))), words)


def _analyse(name: str, words: list[str]) -> None:
    place = () if "--output-dir" in words else ("--output-dir", "result")
    model_given = () if "--model" in words else ("--model", "made/model")
    command(lambda: ANALYSES[name].command("help"), [*place, *model_given, *words])


def mistakes() -> Iterator[Mistake]:
    """All mistakes of this module."""
    for text, names in TRAIN:
        yield Mistake("propulsion.train", text, partial(_prepared, _train, text), names)
    for text, names in PREDICT:
        yield Mistake("propulsion.predict", text, partial(_prepared, _predict, text), names)
    for name, text, names in ANALYSES_OF:
        call = partial(_prepared, partial(_analyse, name), text)
        yield Mistake(f"analyses.{name}", text, call, names)
    for text, names in STORE:
        yield Mistake("ntk.store", text, partial(_prepared, partial(command, store), text), names)


def run() -> list[Row]:
    """Try all mistakes, and count them by command."""
    with quiet(), tempfile.TemporaryDirectory() as folder:
        return rows(list(mistakes()), Path(folder))


if __name__ == "__main__":
    sys.exit(bool(print_table(run())))
