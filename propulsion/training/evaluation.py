"""Evaluation of a run: each process predicts a share of the validation rows, and all of them get the metrics."""

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
    """A callable that predicts the validation rows with a model and returns the task's metrics.

    Attributes:
        predictions: Predictions of the last call, one for each validation row.
    """

    model: Any
    tokenizer: Any
    data: TaskData
    limits: Limits
    predictions: list[Any] = field(default_factory=list)

    def labels(self) -> list[Any]:
        """The right predictions, one for each validation row."""
        task, columns = self.data.task, columns_of(self.data.validation)
        if task.kind == "instruction":
            return [exchange.answer for exchange in exchanges_of(columns)]
        return list(columns[task.label_column])

    def __call__(self) -> dict[str, float]:
        """Predict the validation rows, and return the metrics."""
        state, kind, task, rows = PartialState(), kind_of(self.data.task), self.data.task, self.data.validation
        share = rows.select(equal_share(len(rows), state.num_processes, state.process_index))
        predictions = kind.predict(self.model, self.tokenizer, task, columns_of(share), self.limits)
        if state.num_processes > 1:
            predictions = gather_object(predictions)[: len(rows)]
        self.predictions = predictions
        return kind.measure(task, predictions, columns_of(rows))

    def names(self) -> list[str]:
        """Return the names of the metrics, without calling the model."""
        kind, rows = kind_of(self.data.task), columns_of(self.data.validation)
        return list(kind.measure(self.data.task, kind.trivial(self.data.task, rows), rows))
