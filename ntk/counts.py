"""What a computation of kernels ran, counted.

A way that is never taken makes no kernel wrong, so no comparison of kernels shows it. Benchmarks say what they timed by
this, and tests that every way is taken by something.
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
    """Counts what runs inside, the checks of the model included: (kind, what) -> how often.

    | kind                            | what                                                        |
    |---------------------------------|-------------------------------------------------------------|
    | `operations by rule`            | the function of torch; see :data:`ntk.structured.rules.RULES` |
    | `operations example by example` | the function of torch, which has no rule for such a call    |
    | `parameters by the reference`   | the parameter's name                                        |
    | `contractions`                  | "pairs of tokens" or "formed features", one for a parameter |
    | `passes`                        | "batches" of examples times "segments" of the model, "tiles"|
    """
    found: Counter[tuple[str, str]] = Counter()
    token = _counted.set(found)
    try:
        yield found
    finally:
        _counted.reset(token)


def note(kind: str, what: str, times: int = 1) -> None:
    """Add to what is being counted, if anything is."""
    found = _counted.get()
    if found is not None:
        found[kind, what] += times


def by_kind(found: Counter[tuple[str, str]]) -> dict[str, dict[str, int]]:
    """The counts as nested dictionaries, fit for JSON; every kind is there, with nothing in it if nothing ran."""
    kinds = (BY_RULE, BY_EXAMPLE, BY_REFERENCE, CONTRACTED, PASSES)
    return {kind: {what: n for (k, what), n in sorted(found.items()) if k == kind} for kind in kinds}
