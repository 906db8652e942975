"""Kinds of tasks: how rows are checked, become model inputs, are predicted and scored. One module a kind."""

from propulsion.task_kinds import answers, classification, instruction, summaries, tags
from propulsion.task_kinds.base import Kind, Limits
from propulsion.tasks import Task

_KINDS = {
    "classification": classification.KIND,
    "regression": classification.KIND,
    "token_classification": tags.KIND,
    "question_answering": answers.KIND,
    "summarisation": summaries.KIND,
    "instruction": instruction.KIND,
}


def kind_of(task: Task) -> Kind:
    """How a task's rows are handled."""
    return _KINDS[task.kind]


__all__ = ["Kind", "Limits", "kind_of"]
