"""The task table: the paper's degrees, and consistent entries."""

import pytest

from propulsion.data.metrics import METRICS
from propulsion.data.tasks import KINDS, TASKS, get_task
from propulsion.errors import UserError
from propulsion.train import TrainConfig
from propulsion.training.presets import PRESETS, describe


def test_degrees_are_those_of_the_paper():
    paper = {"sst2": 15, "rte": 15, "cola": 20, "stsb": 20, "mrpc": 55, "qqp": 15, "mnli": 20, "qnli": 55,
             "squad": 35, "squad_v2": 35, "xsum": 35, "cnn_dailymail": 25, "gsm8k": 15, "boolq": 15}  # fmt: skip
    assert {name: TASKS[name].degree for name in paper} == paper


@pytest.mark.parametrize("task", TASKS.values(), ids=lambda task: task.name)
def test_entries_are_consistent(task):
    assert task.kind in KINDS
    assert task.is_regression == (task.kind == "regression")
    assert task.num_labels == (len(task.label_names) or 1)
    assert (task.exchange is not None) == (task.kind == "instruction")
    if task.kind in ("classification", "regression"):
        assert set(task.metrics) <= METRICS.keys()


def test_unknown_task_lists_the_known():
    with pytest.raises(UserError, match=r"unknown task 'sst'.*sst2, rte"):
        get_task("sst")


@pytest.mark.parametrize("preset", PRESETS.values(), ids=lambda preset: preset.name)
def test_presets_are_runs(preset):
    config = TrainConfig(**preset.options)
    assert config.degree == get_task(config.task).degree
    text = describe(preset)
    assert f"--task {config.task}" in text
    assert len(text.splitlines()) == 3


def test_presets_cover_the_papers_experiments():
    assert {preset.options["task"] for preset in PRESETS.values()} == TASKS.keys() - {"demo", "sst2_instruction"}
    assert "Degree: 15 in the paper, 55 in the notebook." in PRESETS["glue-rte-roberta-base-all"].notes
    assert "Degree" not in PRESETS["glue-mrpc-roberta-base-all"].notes
