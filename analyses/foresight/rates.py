"""Whether the automatic learning rates are as good as the best of a grid around them, by candidate and task."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float

from analyses.core.intervals import Interval, crossed_interval, mean_interval
from analyses.foresight.setting import Measured, Setting
from analyses.subjects.batch import labels_of
from analyses.subjects.paired_scores import score_rows
from propulsion.data import TaskData


def compared_rates(
    task: str, complete: Sequence[Measured], data: Mapping[Setting, TaskData]
) -> Iterator[dict[str, Any]]:
    """For each candidate, whether no multiple of the automatic rates is better by its interval on a task.

    The interval is that of the mean difference over seeds and validation rows; over rows alone for one seed.
    """
    of_task = [measured for measured in complete if measured.setting.task == task and measured.factors]
    if not of_task:
        return
    metric = data[of_task[0].setting].task.metrics[0]
    for name in of_task[0].final:
        differences = {}
        for factor in of_task[0].factors:
            found = [_difference(one, metric, name, factor, labels_of(data[one.setting])) for one in of_task]
            if factor != 1 and all(one is not None for one in found):
                differences[factor] = _interval(np.array(found))
        better = {factor: one for factor, one in differences.items() if one[1] > 0}
        yield {"task": task, "candidate": name, "good_enough": not better,
               "differences": {f"x {factor:.3g}": list(one) for factor, one in differences.items()}}  # fmt: skip


def _difference(
    measured: Measured, metric: str, name: str, factor: float, labels: np.ndarray
) -> Float[np.ndarray, " rows"] | None:
    """The score at a multiple of the rates less that at the automatic ones, for each validation row; None if a run
    failed."""
    runs = [measured.factors.get(one, {}).get(name) for one in (factor, 1.0)]
    if any(run is None or run[0]["failed"] for run in runs):
        return None
    there, here = (score_rows(metric, np.asarray(run[0]["predictions"])[None], labels)[0] for run in runs if run)
    return there - here


def _interval(differences: Float[np.ndarray, "seeds rows"]) -> Interval:
    return crossed_interval(differences) if len(differences) > 1 else mean_interval(differences[0])
