"""What every predictor says of every candidate of a setting; larger is predicted to be better."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from analyses.choose.predictors import PREDICTORS, Evidence, Predictor, label_alignment
from analyses.choose.trial import evidence_of, score_and_loss
from analyses.core.cells import ARRAYS
from analyses.foresight.setting import BUDGETS, EARLY, FIRST, Measured

Values = Mapping[str, float | None]
"""By candidate, a value; None where it is undefined."""

BEFORE, EARLIER, BASELINE, COMMAND, FITTED = "before any step", "early", "baseline", "command", "fitted"
LORA, FULL = "lora:r=8", "full"
PARAMETERS = "log parameters"
RANDOM_HEAD, PROBED_HEAD = "kernel regression, random head", "kernel regression"
ALIGNMENT, LATER_ALIGNMENT = "label alignment", "label alignment after 5 %"
OTHER_TASKS, COMBINATION = "mean rank on other tasks", "fitted combination"
ALWAYS_LORA, ALWAYS_FULL = "always LoRA of rank 8", "always full"
_AFTER_FIRST = ("training loss", "LogME")
"""Predictors of `analyses.choose` that are known after the first early run only."""


def early_loss(share: float) -> str:
    """The name of the held-out loss after a share of the steps."""
    return f"early loss, {100 * share:.0f} %"


def early_score(share: float) -> str:
    """The name of the held-out score after a share of the steps."""
    return f"early score, {100 * share:.0f} %"


def command(share: float) -> str:
    """The name of the command's choice with a share of the steps of all final runs."""
    return f"the command, {100 * share:.0f} %"


@dataclass(frozen=True)
class Entry:
    """A predictor of the experiment.

    Attributes:
        kind: BEFORE, EARLIER, BASELINE, COMMAND or FITTED.
        of_kernels: Whether it is computed from a kernel.
        value: From a setting and a candidate to its value; None of what is fitted.
        ranks: Whether it orders all candidates, so that it has a rank correlation.
    """

    kind: str
    of_kernels: bool
    value: Callable[[Measured, str], float | None] | None
    ranks: bool = True


def values_of(measured: Measured) -> dict[str, dict[str, float | None]]:
    """The values of all predictors that are not fitted, by name and candidate; not finite ones are None."""
    found = {}
    for name, entry in ENTRIES.items():
        if entry.value is not None:
            each = {candidate: entry.value(measured, candidate) for candidate in measured.final}
            found[name] = {c: v if v is not None and math.isfinite(v) else None for c, v in each.items()}
    return found


def _of_evidence(predictor: Predictor, kernels: str) -> Callable[[Measured, str], float | None]:
    def value(measured: Measured, candidate: str) -> float | None:
        first = measured.early[FIRST][candidate]
        if first["failed"]:
            return None
        evidence: Evidence = evidence_of(measured.part, first, getattr(measured, kernels), candidate)
        found = predictor.function(evidence)
        return None if found is None else predictor.sign * found

    return value


def _early(share: float, which: int, sign: int) -> Callable[[Measured, str], float | None]:
    def value(measured: Measured, candidate: str) -> float | None:
        run = measured.early[share][candidate]
        return None if run["failed"] else sign * score_and_loss(run)[which]

    return value


def _later_alignment(measured: Measured, candidate: str) -> float | None:
    kernel = measured.early[FIRST][candidate].get(ARRAYS, {}).get("kernel")
    if kernel is None:
        return None
    labels = np.asarray(measured.part.train[measured.part.task.label_column])[: len(kernel)]
    regression = measured.part.task.is_regression
    return label_alignment(torch.from_numpy(kernel), labels, regression=regression, centred=False)


def _place(share: float) -> Callable[[Measured, str], float | None]:
    def value(measured: Measured, candidate: str) -> float | None:
        order: Sequence[str] = measured.orders[share]
        return -float(order.index(candidate)) if candidate in order else None

    return value


def _always(chosen: str) -> Callable[[Measured, str], float | None]:
    return lambda measured, candidate: float(candidate == chosen)


_KERNELS = ("CKA with full", "label alignment", "centred label alignment", "kernel regression", "kernel gradient norm",
            "effective dimension")  # fmt: skip
ENTRIES: dict[str, Entry] = {
    **{
        name: Entry(
            BASELINE if name == PARAMETERS else EARLIER if name in _AFTER_FIRST else BEFORE, name in _KERNELS,
            _of_evidence(predictor, "kernels"),
        )
        for name, predictor in PREDICTORS.items() if name not in ("early score", "early loss")
    },
    RANDOM_HEAD: Entry(BEFORE, True, _of_evidence(PREDICTORS[PROBED_HEAD], "random_head")),
    LATER_ALIGNMENT: Entry(EARLIER, True, _later_alignment),
    **{early_score(share): Entry(EARLIER, False, _early(share, 0, 1)) for share in EARLY},
    **{early_loss(share): Entry(EARLIER, False, _early(share, 1, -1)) for share in EARLY},
    **{command(share): Entry(COMMAND, False, _place(share)) for share in BUDGETS},
    COMBINATION: Entry(FITTED, False, None),
    OTHER_TASKS: Entry(BASELINE, False, None),
    ALWAYS_LORA: Entry(BASELINE, False, _always(LORA), ranks=False),
    ALWAYS_FULL: Entry(BASELINE, False, _always(FULL), ranks=False),
}  # fmt: skip
"""The predictors by name. "Most trained parameters" is the choice of `PARAMETERS`."""
assert {*_KERNELS, *_AFTER_FIRST, PARAMETERS} <= PREDICTORS.keys()
