"""What a claim, the evidence on it and its verdict are, and the rules that turn the one into the other."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from analyses.records import Metric, Result, interval


class Outcome(StrEnum):
    """What one number says about a claim."""

    MET = "met"
    PARTLY = "met in part"
    UNMET = "not met"
    OPEN = "undecided"


class Verdict(StrEnum):
    """What all numbers together say about a claim."""

    HOLDS = "holds"
    CONDITIONS = "holds with conditions"
    FAILS = "fails"
    UNTESTABLE = "not testable here"
    MISSING = "no result yet"


@dataclass(frozen=True)
class Quantity:
    """A number with its interval, and what it is the number of."""

    label: str
    value: float
    low: float | None = None
    high: float | None = None

    def __str__(self) -> str:
        if not self.has_interval and float(self.value).is_integer():
            return f"{self.value:,.0f}"  # A count.
        return interval(self.value, self.low, self.high)

    @property
    def lower(self) -> float:
        """Lower end; the value itself for a number without an interval."""
        return self.value if self.low is None else self.low

    @property
    def upper(self) -> float:
        """Upper end; the value itself for a number without an interval."""
        return self.value if self.high is None else self.high

    @property
    def has_interval(self) -> bool:
        """Whether it comes with a (finite) interval."""
        return self.low is not None and self.high is not None and math.isfinite(self.low) and math.isfinite(self.high)


def quantity(label: str, metric: Metric) -> Quantity:
    """A stored metric under a label of the ledger's own."""
    return Quantity(label, metric.value, metric.low, metric.high)


@dataclass(frozen=True)
class Evidence:
    """One number that bears on a claim.

    Attributes:
        found: The number.
        outcome: What it says.
        null: What it is compared with: a null model, a rival, or its value without any effect.
        detail: Further numbers of the same run, in words.
    """

    found: Quantity
    outcome: Outcome
    null: Quantity | None = None
    detail: str = ""


@dataclass(frozen=True)
class Rule:
    """How several pieces of evidence become one verdict."""

    words: str
    combine: Callable[[Sequence[Outcome]], Verdict]


Results = Mapping[str, Result]
Judge = Callable[[Results], Iterable[Evidence]]


@dataclass(frozen=True)
class Claim:
    """One claim of the paper, and how it is judged.

    Attributes:
        key: Its name on the command line.
        title: Its name in tables.
        where: Its place in the paper.
        measure: What the numbers are.
        threshold: When one number meets the claim, in words.
        rule: How the verdict follows from all of them.
        needs: Result folders it is judged by; "*" stands for any task, "|" separates what can stand in for each other.
        judge: From the results that `needs` and `also` name to the evidence.
        also: Further folders, looked at where they exist.
    """

    key: str
    title: str
    where: str
    measure: str
    threshold: str
    rule: Rule
    needs: tuple[str, ...]
    judge: Judge
    also: tuple[str, ...] = ()

    @property
    def words(self) -> str:
        """The claim in our words: the docstring of its judge."""
        return " ".join((self.judge.__doc__ or "").split())


def claim(key: str, title: str, **entry: Any) -> Callable[[Judge], Claim]:
    """Make a judge into the claim that it judges, with what `Claim` says of it."""
    return lambda judge: Claim(key, title, judge=judge, **entry)


def _everywhere(outcomes: Sequence[Outcome]) -> Verdict:
    return Verdict.FAILS if Outcome.UNMET in outcomes else _somewhere(outcomes)


def _somewhere(outcomes: Sequence[Outcome]) -> Verdict:
    if set(outcomes) == {Outcome.MET}:
        return Verdict.HOLDS
    if Outcome.MET in outcomes or Outcome.PARTLY in outcomes:
        return Verdict.CONDITIONS
    return Verdict.FAILS if Outcome.UNMET in outcomes else Verdict.UNTESTABLE


EVERYWHERE = Rule(
    "Fails if one number does not meet it; holds if all do; with conditions if some do and the others are undecided or "
    "meet it in part; not testable here if all are undecided.",
    _everywhere,
)
SOMEWHERE = Rule(
    "Holds if every number meets it; with conditions if some do, at least in part; fails if none does and one at least "
    "is decided; not testable here if all are undecided.",
    _somewhere,
)


def at_most(found: Quantity, limit: float) -> Outcome:
    """Whether a number lies at or below a limit with its whole interval, above with its whole interval, or across."""
    if not math.isfinite(found.value):
        return Outcome.OPEN
    if found.upper <= limit:
        return Outcome.MET
    return Outcome.UNMET if found.lower > limit else Outcome.OPEN


def at_least(found: Quantity, limit: float) -> Outcome:
    """The same for a number that should lie at or above a limit."""
    if not math.isfinite(found.value):
        return Outcome.OPEN
    if found.lower >= limit:
        return Outcome.MET
    return Outcome.UNMET if found.upper < limit else Outcome.OPEN


def above(found: Quantity, other: Quantity) -> Outcome:
    """Whether a number lies above another, interval against interval; undecided where they overlap."""
    if found.lower > other.upper:
        return Outcome.MET
    return Outcome.UNMET if found.upper < other.lower else Outcome.OPEN


def all_of(*outcomes: Outcome) -> Outcome:
    """Several tests of one number: not met if one is not, undecided if one is."""
    for outcome in (Outcome.UNMET, Outcome.OPEN, Outcome.PARTLY):
        if outcome in outcomes:
            return outcome
    return Outcome.MET


TRIED_RATES = "-rates"
"""Ends the name of a comparison of methods whose learning rates another of the same task chooses from, and which is no
evidence beside it."""


def by_task(results: Results, analysis: str) -> dict[str, Result]:
    """The results of an analysis that has a folder a task, by the name of that folder."""
    prefix = f"{analysis}/"
    return {name.removeprefix(prefix): result for name, result in results.items() if name.startswith(prefix)}
