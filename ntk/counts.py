"""Counters of the code paths that a computation of kernels took.

If a fast path never runs, the kernels are still right, so comparing kernels does not show it. Benchmarks report these
counts beside their timings, and tests check that every path counted here does run.
"""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

BY_RULE = "operations by rule"
BY_EXAMPLE = "operations example by example"
BY_REFERENCE = "parameters by the reference"
CONTRACTED = "contractions"
PASSES = "passes"

_counted: ContextVar[Counter[tuple[str, str]] | None] = ContextVar("counted", default=None)


@contextmanager
def counting() -> Iterator[Counter[tuple[str, str]]]:
    """Count the paths taken inside the block, also by checks of the model: (kind, what) -> number of times.

    | kind                            | what                                                        |
    |---------------------------------|-------------------------------------------------------------|
    | `operations by rule`            | the function of torch; see `ntk.structured.rules.RULES`     |
    | `operations example by example` | the function of torch, which has no rule for such a call    |
    | `parameters by the reference`   | the parameter's name                                        |
    | `contractions`                  | "pairs of tokens" or "formed features", one for a parameter |
    | `passes`                        | "batches" of examples times "segments" of the model, "tiles"|
    """
    counts: Counter[tuple[str, str]] = Counter()
    token = _counted.set(counts)
    try:
        yield counts
    finally:
        _counted.reset(token)


def note(kind: str, what: str, times: int = 1) -> None:
    """Add ``times`` to a count; do nothing outside of :func:`counting`."""
    counts = _counted.get()
    if counts is not None:
        counts[kind, what] += times


def by_kind(counts: Counter[tuple[str, str]]) -> dict[str, dict[str, int]]:
    """The counts as nested dictionaries for JSON; a kind without counts has an empty dictionary."""
    kinds = (BY_RULE, BY_EXAMPLE, BY_REFERENCE, CONTRACTED, PASSES)
    return {kind: {what: n for (k, what), n in sorted(counts.items()) if k == kind} for kind in kinds}
