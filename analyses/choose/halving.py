"""Successive halving within a budget of seconds (Jamieson and Talwalkar 2016): how many candidates train how long."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from propulsion.errors import UserError

KEPT = 3
"""One candidate in this many goes on, and trains this many times as long."""
LAST = 2
"""Number of candidates that are compared at the end."""
FEWEST_STEPS = 10
"""Fewer steps than these say nothing about a method."""
FOR_PREDICTORS = 0.15
"""Share of the budget that is kept for the predictors beside the choice."""


@dataclass(frozen=True)
class Cost:
    """What a run takes.

    Attributes:
        fixed: Seconds of loading, measuring the learning rate and scoring.
        step: Seconds of an optimizer step.
    """

    fixed: float
    step: float

    def of(self, steps: int) -> float:
        """Seconds of a run of this many steps."""
        return self.fixed + self.step * steps


@dataclass(frozen=True)
class Rung:
    """A round in which candidates train equally long.

    Attributes:
        candidates: How many candidates train.
        steps: Optimizer steps of each.
    """

    candidates: int
    steps: int


def sizes(candidates: int) -> list[int]:
    """The number of candidates in each round: all, then a third, rounded up, until `LAST` are left.

    >>> sizes(14), sizes(2), sizes(1)
    ([14, 5, 2], [2], [1])
    """
    found = [candidates]
    while found[-1] > LAST:
        found.append(max(LAST, math.ceil(found[-1] / KEPT)))
    return found


def rungs(candidates: int, first: int, most: int) -> list[Rung]:
    """The rounds that begin with runs of `first` steps, each `KEPT` times as long as the one before, at most `most`.

    Rounds of equal length are one, the first of them, since a further run of the same length would be the same run.
    """
    found: list[Rung] = []
    for k, size in enumerate(sizes(candidates)):
        steps = min(first * KEPT**k, most)
        if not found or steps > found[-1].steps:
            found.append(Rung(size, steps))
    return found


def seconds_of(plan: Sequence[Rung], cost: Cost) -> float:
    """Seconds of all runs of a plan."""
    return sum(rung.candidates * cost.of(rung.steps) for rung in plan)


def affordable(candidates: int, cost: Cost, *, seconds: float, spent: float, most: int) -> int:
    """The largest number of candidates, at least two of several, whose shortest rounds a budget allows.

    Args:
        candidates: Number of candidates.
        cost: What a run is expected to take.
        seconds: The budget.
        spent: Seconds of it that are spent already.
        most: Steps of the longest run.

    Raises:
        UserError: There is no such number; the message says how large the budget must be for two, and for all.
    """
    room = seconds * (1 - FOR_PREDICTORS) - spent
    fewest = min(candidates, LAST)
    found = [n for n in range(fewest, candidates + 1) if _least(n, cost, most) <= room]
    if not found:
        needed = f"{minutes_for(fewest, cost, spent, most):g} for {fewest}"
        more = (
            f", and {minutes_for(candidates, cost, spent, most):g} for all {candidates}" if candidates > fewest else ""
        )
        raise UserError(
            f"a budget of {seconds / 60:g} minutes is too small: candidates need about {needed}{more}; raise "
            "--budget-minutes"
        )
    return max(found)


def minutes_for(candidates: int, cost: Cost, spent: float, most: int) -> float:
    """The smallest budget in minutes for a number of candidates, to a tenth of a minute."""
    return math.ceil(10 * (_least(candidates, cost, most) + spent) / (1 - FOR_PREDICTORS) / 60) / 10


def _least(candidates: int, cost: Cost, most: int) -> float:
    """Seconds of the shortest rounds of some candidates."""
    return seconds_of(rungs(candidates, min(FEWEST_STEPS, most), most), cost)


def plan(candidates: int, cost: Cost, *, seconds: float, spent: float, most: int) -> list[Rung]:
    """The longest rounds that a budget allows, of `affordable` candidates.

    Args:
        candidates: Number of candidates.
        cost: What a run is expected to take.
        seconds: The budget.
        spent: Seconds of it that are spent already.
        most: Steps of the longest run.
    """
    room = seconds * (1 - FOR_PREDICTORS) - spent
    low, high = min(FEWEST_STEPS, most), most  # The cost grows with the steps of the first round.
    while low < high:
        middle = (low + high + 1) // 2
        if seconds_of(rungs(candidates, middle, most), cost) <= room:
            low = middle
        else:
            high = middle - 1
    return rungs(candidates, low, most)


def best(scores: Mapping[str, tuple[float, float]], count: int) -> list[str]:
    """The `count` best candidates of a round, by score and then by loss; an undefined score is the worst.

    Args:
        scores: Score and loss of each candidate.
        count: How many go on.
    """

    def badness(name: str) -> tuple[float, float]:
        score, loss = scores[name]
        return (-score if math.isfinite(score) else math.inf, loss if math.isfinite(loss) else math.inf)

    return sorted(scores, key=badness)[:count]
