"""The tasks of the experiment that are made offline, from GLUE's rows and from docstrings of installed packages.

`load` gives the rows of these tasks and of all others; the made ones are known by name once this module is imported.
"""

from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from analyses.foresight.docstrings import (
    LIBRARIES,
    MODULES,
    Sentence,
    held_out_sources,
    library_sentences,
    module_sentences,
)
from analyses.subjects.training_run import RunConfig
from propulsion.data import SPLITS, OwnTask, TaskData, load_task_data, to_dataset
from propulsion.data.kinds.base import columns_of
from propulsion.data.sampling import draw, select
from propulsion.data.tasks import OWN_TASKS
from propulsion.identity import content_identity

Columns = dict[str, list[Any]]
DEGREE = 15


def _task(name: str, columns: tuple[str, ...], labels: tuple[str, ...]) -> OwnTask:
    return OwnTask(name, columns, labels, ("accuracy",), DEGREE)


def similarity_classes(rows: Mapping[str, list[Any]]) -> Columns:
    """Pairs of STS-B by their similarity: below 2, from 2 to 4, above 4."""
    return dict(rows) | {"label": [0 if score < 2 else 1 if score <= 4 else 2 for score in rows["label"]]}


def swapped_words(rows: Mapping[str, list[Any]]) -> Columns:
    """Sentences as they are (label 0), or with two neighbouring words swapped (label 1), each with chance 1/2.

    Sentences without two different neighbouring words are left out. The draw of a row depends on the rows before it.
    """
    generator = np.random.default_rng(0)
    found: Columns = {"sentence": [], "label": []}
    for sentence in rows["sentence"]:
        words = sentence.split()
        places = [i for i in range(len(words) - 1) if words[i].casefold() != words[i + 1].casefold()]
        if not places:
            continue
        label, place = int(generator.integers(2)), places[int(generator.integers(len(places)))]
        if label:
            words[place : place + 2] = words[place + 1], words[place]
        found["sentence"].append(" ".join(words))
        found["label"].append(label)
    return found


def belonging_hypotheses(rows: Mapping[str, list[Any]]) -> Columns:
    """Hypotheses of RTE with their own premise (label 0) or another one of as many words (label 1), with chance 1/2.

    Rows whose premise is the only one of its number of words are left out.
    """
    generator = np.random.default_rng(0)
    by_length: dict[int, list[str]] = defaultdict(list)
    for premise in dict.fromkeys(rows["sentence1"]):
        by_length[len(premise.split())].append(premise)
    found: Columns = {"sentence1": [], "sentence2": [], "label": []}
    for premise, hypothesis in zip(rows["sentence1"], rows["sentence2"], strict=True):
        others = [other for other in by_length[len(premise.split())] if other != premise]
        if not others:
            continue
        label, other = int(generator.integers(2)), others[int(generator.integers(len(others)))]
        found["sentence1"].append(other if label else premise)
        found["sentence2"].append(hypothesis)
        found["label"].append(label)
    return found


_PAIR = ("sentence1", "sentence2")
FROM_GLUE: Mapping[str, tuple[OwnTask, str, Callable[[Mapping[str, list[Any]]], Columns]]] = {
    "stsb_classes": (_task("stsb_classes", _PAIR, ("different", "related", "alike")), "stsb", similarity_classes),
    "swapped": (_task("swapped", ("sentence",), ("as it is", "swapped")), "sst2", swapped_words),
    "belongs": (_task("belongs", _PAIR, ("own premise", "another premise")), "rte", belonging_hypotheses),
}
"""By name, the task, the task whose rows it is made from, and the function that makes the rows of a split."""
FROM_DOCSTRINGS: Mapping[str, tuple[OwnTask, Callable[[], list[Sentence]]]] = {
    "module": (_task("module", ("sentence",), tuple(MODULES)), module_sentences),
    "library": (_task("library", ("sentence",), tuple(LIBRARIES)), library_sentences),
}
"""By name, the task and the function that finds its rows."""
MADE: Mapping[str, OwnTask] = {name: entry[0] for name, entry in {**FROM_GLUE, **FROM_DOCSTRINGS}.items()}
"""The tasks that this module makes, by name."""
OWN_TASKS.update(MADE)


def texts_of(task: str) -> str:
    """The task whose texts a task has: what is fitted for one of them is fitted without the others."""
    return FROM_GLUE[task][1] if task in FROM_GLUE else task


def load(config: RunConfig, task: str, n_train: int, seed: int) -> TaskData:
    """Draw rows of a task by a seed: `n_train` training rows and the configuration's number of validation rows.

    Where the task has fewer, all of them are taken.
    """
    if task not in MADE:
        return replace(config, n_train=n_train).load(task, seed=seed)
    known = MADE[task]
    whole = _rows(task, config.data_dir)
    sizes = {"train": n_train, "validation": config.n_validation}
    rows = {}
    for split, columns in whole.items():
        n = min(sizes[split], len(columns["label"]))
        rows[split] = select(columns, draw(known, f"the {split} rows of {task}", columns, n, seed))
    train, validation = (to_dataset(known, rows[split]) for split in SPLITS)
    source = f"made by analyses.foresight; drawn with seed {seed}"
    return TaskData(known, train, validation, source, content_identity(rows), all_rows=content_identity(whole))


@lru_cache(maxsize=4)
def _rows(task: str, data_dir: Path | None) -> dict[str, Columns]:
    """All rows of a made task, by split."""
    if task in FROM_GLUE:
        _, origin, make = FROM_GLUE[task]
        data = load_task_data(origin, data_dir=data_dir)
        return {"train": make(columns_of(data.train)), "validation": make(columns_of(data.validation))}
    _, find = FROM_DOCSTRINGS[task]
    found = find()
    apart = held_out_sources(found)
    parts = {
        "train": [r for r in found if r.source not in apart],
        "validation": [r for r in found if r.source in apart],
    }
    return {
        split: {"sentence": [row.text for row in part], "label": [row.label for row in part]}
        for split, part in parts.items()
    }
