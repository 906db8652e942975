"""The judgement of the plan's six hypotheses, by thresholds that were fixed before the runs."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from analyses.core.intervals import Interval, holm
from analyses.foresight.scores import Draws
from analyses.foresight.setting import FIRST
from analyses.foresight.values import (
    ALIGNMENT,
    ALWAYS_LORA,
    BEFORE,
    ENTRIES,
    LATER_ALIGNMENT,
    OTHER_TASKS,
    PARAMETERS,
    PROBED_HEAD,
    RANDOM_HEAD,
    command,
    early_loss,
)
from analyses.records import interval

HOLDS, FAILS, UNDECIDED, UNTESTED = "holds", "fails", "undecided", "not tested"
USEFUL, MARGIN = 0.6, 0.15
"""Rank correlation of a useful predictor, and how far it must be above the baselines."""
CLOSE = 1.0
"""Points of mean regret that the command may have."""
CHEAP, DEAR = 0.9, 0.8
"""Shares of method-task pairs in which the automatic rate is good enough, for the rule to hold, and below which it
fails."""
LEVEL = 0.05

Table = Mapping[str, Float[np.ndarray, " settings"]]


@dataclass(frozen=True)
class Judgement:
    """One judged hypothesis.

    Attributes:
        hypothesis: H1 to H6.
        statement: What it says.
        outcome: HOLDS, FAILS, UNDECIDED, or UNTESTED where its data are missing.
        numbers: The numbers behind the outcome, in words.
    """

    hypothesis: str
    statement: str
    outcome: str
    numbers: str


def judge(draws: Draws, rho: Table, regret: Table, rates: Sequence[bool]) -> list[Judgement]:
    """Judge all hypotheses.

    Args:
        draws: Resamples of the settings.
        rho: By predictor, its rank correlation in each setting.
        regret: By predictor, its regret in each setting.
        rates: For each method-task pair of the grid, whether the automatic rate is as good as the best of the grid.
    """
    statements: dict[str, tuple[str, Callable[[], tuple[str, str]]]] = {
        "H1": ("some predictor before any step is useful", lambda: _useful(draws, rho)),
        "H2": ("a kernel's predictor beats the early loss at equal compute", lambda: _beats_early_loss(draws, rho)),
        "H3": ("the command is worth its cost", lambda: _worth_its_cost(draws, regret)),
        "H4": ("kernels at a trained head say more than at a random one",
               lambda: _above(draws, rho, PROBED_HEAD, RANDOM_HEAD)),
        "H5": ("kernels after a little training say more than before",
               lambda: _above(draws, rho, LATER_ALIGNMENT, ALIGNMENT)),
        "H6": ("the rule for rates costs little", lambda: _cheap_rates(rates)),
    }  # fmt: skip
    found = []
    for name, (statement, decide) in statements.items():
        if name != "H6" and len(draws.tasks) < 2:
            found.append(Judgement(name, statement, UNTESTED, "one task has no interval over tasks"))
        else:
            found.append(Judgement(name, statement, *decide()))
    return found


def _useful(draws: Draws, rho: Table) -> tuple[str, str]:
    names = [name for name, entry in ENTRIES.items() if entry.kind == BEFORE]
    if OTHER_TASKS not in rho:
        return UNTESTED, "no task without common texts"
    found = {name: draws.interval(rho[name]) for name in names}
    best = _best(found)
    if best is None:
        return UNTESTED, "no rank correlation is defined"
    holding = [name for name in names if found[name].value >= USEFUL and _far_above(draws, rho, names, name)]
    words = f"best before any step: {best}, {_text(found[best])}"
    for rival in (PARAMETERS, OTHER_TASKS):
        words += f"; above {rival} by {_text(draws.interval(rho[best] - rho[rival]))}"
    if holding:
        return HOLDS, words
    return (FAILS if found[best].high < USEFUL else UNDECIDED), words


def _far_above(draws: Draws, rho: Table, names: Sequence[str], name: str) -> bool:
    """Whether a predictor is above both baselines by the margin, its interval above 0 after Holm's correction too."""
    for rival in (PARAMETERS, OTHER_TASKS):
        difference = draws.interval(rho[name] - rho[rival])
        adjusted = holm([draws.p_value(rho[one] - rho[rival]) for one in names])[names.index(name)]
        if not (difference.value >= MARGIN and difference.low > 0 and adjusted <= LEVEL):
            return False
    return True


def _beats_early_loss(draws: Draws, rho: Table) -> tuple[str, str]:
    names, rival = [name for name, entry in ENTRIES.items() if entry.of_kernels], early_loss(FIRST)
    best = _best({name: draws.interval(rho[name]) for name in names})
    if best is None:
        return UNTESTED, "no rank correlation is defined"
    difference = draws.interval(rho[best] - rho[rival])
    adjusted = holm([draws.p_value(rho[name] - rho[rival]) for name in names])[names.index(best)]
    words = f"best of kernels: {best}; above {rival} by {_text(difference)}, p = {adjusted:.2g} (Holm)"
    if difference.low > 0 and adjusted <= LEVEL:
        return HOLDS, words
    return (FAILS if difference.high < 0 else UNDECIDED), words


def _worth_its_cost(draws: Draws, regret: Table) -> tuple[str, str]:
    own = regret[command(FIRST)]
    mine, lora = draws.interval(own), draws.interval(regret[ALWAYS_LORA])
    below = [draws.interval(own - regret[rival]) for rival in (ALWAYS_LORA, early_loss(FIRST))]
    words = (
        f"mean regret {_text(mine)} points, always LoRA {_text(lora)}; the differences from always LoRA and from "
        f"the early loss are {_text(below[0])} and {_text(below[1])}"
    )
    if mine.value <= CLOSE and all(one.high < 0 for one in below):
        return HOLDS, words
    return (FAILS if mine.low > lora.high else UNDECIDED), words


def _above(draws: Draws, rho: Table, name: str, rival: str) -> tuple[str, str]:
    difference = draws.interval(rho[name] - rho[rival])
    if math.isnan(difference.value):
        return UNTESTED, "no rank correlation is defined"
    words = f"{name} above {rival} by {_text(difference)}"
    if difference.low > 0:
        return HOLDS, words
    return (FAILS if difference.high < 0 else UNDECIDED), words


def _cheap_rates(rates: Sequence[bool]) -> tuple[str, str]:
    if not rates:
        return UNTESTED, "no grid of rates is complete"
    share = sum(rates) / len(rates)
    words = f"{share:.0%} of {len(rates)} method-task pairs"
    return (HOLDS if share >= CHEAP else FAILS if share < DEAR else UNDECIDED), words


def _best(found: Mapping[str, Interval]) -> str | None:
    known = [name for name, one in found.items() if math.isfinite(one.value)]
    return max(known, key=lambda name: found[name].value) if known else None


def _text(found: Interval) -> str:
    return interval(*found)
