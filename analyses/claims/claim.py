"""Claims, evidence and verdicts, and the rules by which evidence becomes a verdict."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import PurePosixPath
from typing import Any

from analyses.core.scales import limits, scale_of
from analyses.records import Metric, Result, interval


class Outcome(StrEnum):
    """What one number implies for a claim."""

    MET = "met"
    PARTLY = "partly met"
    UNMET = "not met"
    OPEN = "undecided"
    UNTESTABLE = "not testable"


class Verdict(StrEnum):
    """What all numbers together, over all models, imply for a claim."""

    HOLDS = "holds"
    WHERE = "holds where"
    IN_PART = "holds in part"
    FAILS = "fails"
    OPEN = "open"
    UNTESTABLE = "not testable"
    MISSING = "no result yet"


@dataclass(frozen=True)
class Quantity:
    """A number with its interval, a label that says what was measured, and its possible values."""

    label: str
    value: float
    low: float | None = None
    high: float | None = None
    possible: tuple[float, float] = (-math.inf, math.inf)

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

    @property
    def leaves(self) -> bool:
        """True if the interval contains values that the quantity cannot have."""
        least, most = self.possible
        return self.has_interval and (self.lower < least - _ROUNDING or self.upper > most + _ROUNDING)


_ROUNDING = 1e-9


def quantity(label: str, metric: Metric) -> Quantity:
    """A stored metric with the label that the ledger gives it, and its possible values where its scale is known."""
    try:
        scale = scale_of(metric.name)
    except KeyError:
        return Quantity(label, metric.value, metric.low, metric.high)
    possible = limits(scale) if "difference" in metric.stage else (scale.low, scale.high)
    return Quantity(label, metric.value, metric.low, metric.high, possible)


@dataclass(frozen=True)
class Evidence:
    """One number that is evidence for or against a claim.

    Attributes:
        found: The number.
        outcome: Whether it meets the claim's threshold.
        null: The baseline: the number of a null model, of another method, or its value without any effect.
        detail: A note with further numbers of the same run.
        model: The model that it is of; "" for the model of the folder that it is from.
        p: Two-sided p-value of the test that it equals its threshold, where it is a comparison of methods or settings.
        corrected: The outcome after Holm's correction over the comparisons of its claim on its model.
    """

    found: Quantity
    outcome: Outcome
    null: Quantity | None = None
    detail: str = ""
    model: str = ""
    p: float | None = None
    corrected: Outcome | None = None


@dataclass(frozen=True)
class Rule:
    """How the outcomes of several numbers become one verdict."""

    words: str
    combine: Callable[[Sequence[Outcome]], Verdict]


MORE_MODELS = "--model mpnet-base --data-dir glue"
"""Options that run what a claim needs on a model of the paper's size."""

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
        judge: Function from the results of one model that `needs` and `also` name to the evidence; of several needs, it
            uses those that are there.
        settle: What would settle the claim.
        plan_command: Options of ``python -m analyses.claims --only KEY`` that run what would settle it, or a whole
            command that starts with "python"; "" if no run of this project can.
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
    settle: str
    plan_command: str = MORE_MODELS
    also: tuple[str, ...] = ()

    @property
    def settling_command(self) -> str:
        """The command that runs what would settle it; "" if there is none."""
        if not self.plan_command or self.plan_command.startswith("python "):
            return self.plan_command
        return f"python -m analyses.claims --only {self.key} {self.plan_command}"

    @property
    def words(self) -> str:
        """The claim in our own words, which are the docstring of `judge`."""
        return " ".join((self.judge.__doc__ or "").split())


def claim(key: str, title: str, **entry: Any) -> Callable[[Judge], Claim]:
    """Decorator that turns a judge into a `Claim`; `entry` has the other fields of `Claim`."""
    return lambda judge: Claim(key, title, judge=judge, **entry)


def _counted(outcomes: Sequence[Outcome]) -> tuple[int, int, int, int]:
    """The numbers of outcomes that are met, partly met, not met and undecided."""
    met, partly, unmet, undecided = (outcomes.count(o) for o in list(Outcome)[:4])
    return met, partly, unmet, undecided


def _everywhere(outcomes: Sequence[Outcome]) -> Verdict:
    met, partly, unmet, undecided = _counted(outcomes)
    if unmet:
        return Verdict.FAILS
    if undecided:
        return Verdict.OPEN
    return Verdict.IN_PART if partly else Verdict.HOLDS if met else Verdict.UNTESTABLE


def _somewhere(outcomes: Sequence[Outcome]) -> Verdict:
    met, partly, unmet, undecided = _counted(outcomes)
    if met:
        return Verdict.WHERE if partly or unmet or undecided else Verdict.HOLDS
    if partly:
        return Verdict.IN_PART
    return Verdict.FAILS if unmet else Verdict.OPEN if undecided else Verdict.UNTESTABLE


EVERYWHERE = Rule(
    "Everywhere: fails if one number is not met; open if none is and some are undecided; holds in part if all are "
    "decided and some are met in part; holds if all are met. Numbers that are not testable count nowhere.",
    _everywhere,
)
SOMEWHERE = Rule(
    "Where: holds if all numbers are met; holds where some are, which the verdict names; holds in part if none is met "
    "and some are in part; fails if none is, not even in part, and some are not met; open if all are undecided. "
    "Numbers that are not testable count nowhere.",
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


RANDOM = "random networks"
"""The model of evidence from networks with random weights and from their limits."""
LAYER = "one linear layer"
"""The model of counts and times of a single layer."""
DEFAULT_MODEL = "minilm"
"""The model of results that are in no model's folder."""


def model_of(result: Result) -> str:
    """The model of a result that is in no model's folder, where it is not the default one; else ""."""
    name = PurePosixPath(str(result.model.get("name", "MiniLM"))).name
    return "" if name.startswith("MiniLM") else name.partition(".")[0]


TRIED_RATES = "-rates"
"""Suffix of a comparison of methods that only tried learning rates for another one of the same task; it is no further
evidence if that one exists."""


def by_task(results: Results, analysis: str) -> dict[str, Result]:
    """The results of an analysis that has one folder for each task, by the name of that folder."""
    prefix = f"{analysis}/"
    return {name.removeprefix(prefix): result for name, result in results.items() if name.startswith(prefix)}
