"""The tables of the experiment."""

from collections.abc import Iterator, Mapping
from typing import Any

from analyses.records import Block, Result, interval, number, summary_of_blocks

RHO, REGRET = "rank correlation", "regret"
AUTOMATIC, SEARCHED = "automatic rates", "best of three rates"
"""The two ground truths."""


@summary_of_blocks
def summary(result: Result) -> Iterator[Block]:
    """For each ground truth the predictors and the hypotheses; then the settings, and what is missing."""
    tables = result.tables
    for truth in dict.fromkeys(row["truth"] for row in tables["scores"]):
        own = {name: [row for row in tables[name] if row["truth"] == truth] for name in ("scores", "hypotheses")}
        top = next(row for row in tables["ceiling"] if row["truth"] == truth)
        yield (
            [f"final scores at {truth}", "known", "rank correlation", "p (Holm)", "regret, points", "undefined"],
            [_row(row) for row in sorted(own["scores"], key=_order)],
        )
        yield f"ceiling, the rank correlation of two seeds: {number(top['rho'])}"
        yield (
            ["", "hypothesis", "outcome", "numbers"],
            [[row["hypothesis"], row["statement"], row["outcome"], row["numbers"]] for row in own["hypotheses"]],
        )
    settings = [row for row in tables["settings"] if row["truth"] == tables["settings"][0]["truth"]]
    yield (
        ["setting", "best candidate", "its score", "best less worst, points"],
        [[f"{row['task']}, {row['rows']} rows, seed {row['seed']}", row["best"], number(row["best_score"]),
          number(row["spread"])] for row in settings],
    )  # fmt: skip
    if missing := tables["missing"][0]["settings"]:
        yield f"{missing} settings of the configuration are not complete, and are left out"


def _row(row: Mapping[str, Any]) -> list[str]:
    return [row["predictor"], row["kind"], interval(row["rho"], row["rho_low"], row["rho_high"]), number(row["p_holm"]),
            interval(row["regret"], row["regret_low"], row["regret_high"]), str(row["undefined"])]  # fmt: skip


def _order(row: Mapping[str, Any]) -> float:
    """The highest rank correlation first; what has none last."""
    return 2.0 if row["rho"] is None else -row["rho"]
