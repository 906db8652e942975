"""Tasks and their data: loading and checking rows, drawing some of them, tokenizing them, and scoring predictions."""

from propulsion.data.kinds import Limits, kind_of, to_dataset
from propulsion.data.loading import SPLITS, Origin, TaskData, load_task_data
from propulsion.data.own import RowOptions, task_from_columns, with_own_task
from propulsion.data.sampling import draw_rows
from propulsion.data.sources import EMBEDDED, check_folders, task_folder
from propulsion.data.tasks import TASKS, OwnTask, Task, get_task
from propulsion.data.tokens import check_inputs, located, tokenize, tokenize_cached

__all__ = [
    "EMBEDDED", "SPLITS", "TASKS", "Limits", "Origin", "OwnTask", "RowOptions", "Task", "TaskData", "check_folders",
    "check_inputs", "draw_rows", "get_task", "kind_of", "load_task_data", "located", "task_folder",
    "task_from_columns", "to_dataset", "tokenize", "tokenize_cached", "with_own_task",
]  # fmt: skip
