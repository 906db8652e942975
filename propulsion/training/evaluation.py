"""Evaluation of a run: every process predicts its share of the validation rows, and all know the metrics."""

from dataclasses import dataclass, field
from typing import Any

from accelerate import PartialState
from accelerate.utils import gather_object

from propulsion.data import TaskData
from propulsion.data.kinds import Limits, kind_of
from propulsion.data.kinds.base import columns_of
from propulsion.data.kinds.instruction import exchanges_of
from propulsion.training.sharding import equal_share


@dataclass
class Evaluation:
    """What says how good a model is, called as often as needed while it is trained.

    Attributes:
        predictions: One a row, of the last call.
    """

    model: Any
    tokenizer: Any
    data: TaskData
    limits: Limits
    predictions: list[Any] = field(default_factory=list)

    def labels(self) -> list[Any]:
        """What the predictions should have been, one a validation row."""
        task, columns = self.data.task, columns_of(self.data.validation)
        if task.kind == "instruction":
            return [exchange.answer for exchange in exchanges_of(columns)]
        return list(columns[task.label_column])

    def __call__(self) -> dict[str, float]:
        """The task's metrics of the model as it is."""
        state, kind, task, rows = PartialState(), kind_of(self.data.task), self.data.task, self.data.validation
        share = rows.select(equal_share(len(rows), state.num_processes, state.process_index))
        found = kind.predict(self.model, self.tokenizer, task, columns_of(share), self.limits)
        if state.num_processes > 1:
            found = gather_object(found)[: len(rows)]
        self.predictions = found
        return kind.measure(task, found, columns_of(rows))

    def names(self) -> list[str]:
        """Names of the metrics, known without a model."""
        kind, rows = kind_of(self.data.task), columns_of(self.data.validation)
        return list(kind.measure(self.data.task, kind.silent(self.data.task, rows), rows))
