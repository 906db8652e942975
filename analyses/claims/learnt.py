"""Whether full fine-tuning, the reference of claims on trained models, has learnt a task."""

import math
from dataclasses import replace

from analyses.claims.claim import Evidence, Outcome, Results
from analyses.method_comparison import CHANGE, REFERENCE
from analyses.records import Metric
from analyses.subjects.paired_scores import BEST_ANSWER

CONVERGED = 0.01
"""Change of the mean score over the last third of the steps below which training has converged."""
COMPARISONS = "method_comparison/*"
"""The results that say whether the reference has learnt."""


def reason_not_learnt(results: Results, task: str) -> str:
    """Why full fine-tuning counts as not having learnt a task; "" if it has.

    It has learnt if its score is above that of the best single answer, and above that of the head alone, each with the
    whole interval of the difference, and if its mean score on the validation rows changed by less than one point over
    the last third of the steps.

    Args:
        results: The results of one model, among them its comparison of methods on the task.
        task: The task.
    """
    found = results.get(f"method_comparison/{task}")
    if found is None:
        return "no comparison of methods says whether full fine-tuning has learnt this task"
    score = next((m.name for m in found.metrics if m.stage == task), "")
    stage = f"{task}, difference"
    if not _above(found.find(score, stage=stage, left=REFERENCE, right=BEST_ANSWER)):
        return "full fine-tuning is not above the best single answer"
    if not _above(found.find(score, stage=stage, left="head", right=REFERENCE), sign=-1):
        return "full fine-tuning is not above the head alone"
    change = found.find(CHANGE, stage=f"{task}, {CHANGE}", left=REFERENCE)
    if change is None or math.isnan(change.value):
        return "whether full fine-tuning had converged was not measured"
    return "" if abs(change.value) < CONVERGED else "full fine-tuning had not converged"


def _above(metric: Metric | None, sign: int = 1) -> bool:
    """Whether a difference, times a sign, is above 0 with its whole interval."""
    if metric is None:
        return False
    end = metric.low if sign > 0 else metric.high
    return end is not None and sign * end > 0


def if_learnt(evidence: Evidence, results: Results, task: str) -> Evidence:
    """The evidence, which is not testable if the reference has not learnt the task."""
    reason = reason_not_learnt(results, task)
    if not reason:
        return evidence
    detail = f"{evidence.detail}; {reason}" if evidence.detail else reason
    return replace(evidence, outcome=Outcome.UNTESTABLE, detail=detail)
