"""Claims, evidence and verdicts, and the rules by which evidence becomes a verdict."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from analyses.records import Metric, Result, interval


class Outcome(StrEnum):
    """What one number implies for a claim."""

    MET = "met"
    PARTLY = "met in part"
    UNMET = "not met"
    OPEN = "undecided"


class Verdict(StrEnum):
    """What all numbers together imply for a claim."""

    HOLDS = "holds"
    CONDITIONS = "holds with conditions"
    FAILS = "fails"
    UNTESTABLE = "not testable here"
    MISSING = "no result yet"


@dataclass(frozen=True)
class Quantity:
    """A number with its interval, and a label that says what was measured."""

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
        """Lower end of the interval; the value itself if there is no interval."""
        return self.value if self.low is None else self.low

    @property
    def upper(self) -> float:
        """Upper end of the interval; the value itself if there is no interval."""
        return self.value if self.high is None else self.high

    @property
    def has_interval(self) -> bool:
        """True if both ends of the interval are known and finite."""
        return self.low is not None and self.high is not None and math.isfinite(self.low) and math.isfinite(self.high)


def quantity(label: str, metric: Metric) -> Quantity:
    """A stored metric with the label that the ledger gives it."""
    return Quantity(label, metric.value, metric.low, metric.high)


@dataclass(frozen=True)
class Evidence:
    """One number that is evidence for or against a claim.

    Attributes:
        found: The number.
        outcome: Whether it meets the claim's threshold.
        null: The baseline: the number of a null model, of another method, or its value without any effect.
        detail: A note with further numbers of the same run.
    """

    found: Quantity
    outcome: Outcome
    null: Quantity | None = None
    detail: str = ""


@dataclass(frozen=True)
class Rule:
    """How the outcomes of several numbers become one verdict."""

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
        measure: A description of the numbers.
        threshold: A description of when one number meets the claim.
        rule: How the verdict follows from the outcomes of all numbers.
        needs: Result folders that it is judged by; "*" stands for any task, and "|" separates alternatives.
        judge: Function from the results that `needs` and `also` name to the evidence.
        also: Further result folders that are used if they exist.
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
        """The claim in our own words, which are the docstring of `judge`."""
        return " ".join((self.judge.__doc__ or "").split())


def claim(key: str, title: str, **entry: Any) -> Callable[[Judge], Claim]:
    """Decorator that turns a judge into a `Claim`; `entry` has the other fields of `Claim`."""
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
    """Met if the whole interval of a number is at or below a limit, not met if it is above, otherwise undecided."""
    if not math.isfinite(found.value):
        return Outcome.OPEN
    if found.upper <= limit:
        return Outcome.MET
    return Outcome.UNMET if found.lower > limit else Outcome.OPEN


def at_least(found: Quantity, limit: float) -> Outcome:
    """Met if the whole interval of a number is at or above a limit, not met if it is below, otherwise undecided."""
    if not math.isfinite(found.value):
        return Outcome.OPEN
    if found.lower >= limit:
        return Outcome.MET
    return Outcome.UNMET if found.upper < limit else Outcome.OPEN


def above(found: Quantity, other: Quantity) -> Outcome:
    """Met if the interval of a number is above that of another, not met if it is below; undecided if they overlap."""
    if found.lower > other.upper:
        return Outcome.MET
    return Outcome.UNMET if found.upper < other.lower else Outcome.OPEN


def all_of(*outcomes: Outcome) -> Outcome:
    """The outcome of several tests of one number: not met if any is not met, else undecided if any is undecided."""
    for outcome in (Outcome.UNMET, Outcome.OPEN, Outcome.PARTLY):
        if outcome in outcomes:
            return outcome
    return Outcome.MET


TRIED_RATES = "-rates"
"""Suffix of a comparison of methods that only tried learning rates for another one of the same task; it is no further
evidence if that one exists."""


def by_task(results: Results, analysis: str) -> dict[str, Result]:
    """The results of an analysis that has one folder for each task, by the name of that folder."""
    prefix = f"{analysis}/"
    return {name.removeprefix(prefix): result for name, result in results.items() if name.startswith(prefix)}
