"""Kinds of tasks, one module each. A kind defines how rows are checked, encoded, predicted and scored."""

from datasets import Dataset

from propulsion.data.kinds import answers, classification, instruction, summaries, tags
from propulsion.data.kinds.base import Kind, Limits
from propulsion.data.tables import Columns
from propulsion.data.tasks import Task

_KINDS = {
    "classification": classification.KIND,
    "regression": classification.KIND,
    "token_classification": tags.KIND,
    "question_answering": answers.KIND,
    "summarisation": summaries.KIND,
    "instruction": instruction.KIND,
}


def kind_of(task: Task) -> Kind:
    """The functions for tasks of this task's kind."""
    return _KINDS[task.kind]


def to_dataset(task: Task, columns: Columns) -> Dataset:
    """A dataset of checked columns, in the types of the task."""
    return Dataset.from_dict(columns, features=kind_of(task).features(task))


__all__ = ["Kind", "Limits", "kind_of", "to_dataset"]
