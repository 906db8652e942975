"""From complete settings to the tables: scores of predictors, settings, hypotheses, the ceiling."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from analyses.core.intervals import holm
from analyses.foresight import fitted
from analyses.foresight.hypotheses import judge
from analyses.foresight.rates import compared_rates
from analyses.foresight.scores import Draws, ceiling, correlation, regret
from analyses.foresight.setting import Measured, Setting, final_score, searched_scores
from analyses.foresight.tables import AUTOMATIC, REGRET, RHO, SEARCHED
from analyses.foresight.tasks import texts_of
from analyses.foresight.values import BEFORE, COMBINATION, EARLIER, ENTRIES, OTHER_TASKS, values_of
from analyses.records import STAGES, Metric, plain
from propulsion.data import TaskData


def scored(
    complete: Sequence[Measured], data: Mapping[Setting, TaskData], resamples: int
) -> tuple[dict[str, list[dict[str, Any]]], list[Metric]]:
    """The tables and the metrics of some complete settings, by each ground truth.

    Args:
        complete: The settings.
        data: The rows of each.
        resamples: Bootstrap resamples of tasks and seeds.
    """
    values = [values_of(measured) for measured in complete]
    automatic = [{name: final_score(run) for name, run in measured.final.items()} for measured in complete]
    searched = [searched_scores(measured) for measured in complete]
    tasks = dict.fromkeys(measured.setting.task for measured in complete)
    rates = [row for task in tasks for row in compared_rates(task, complete, data)]
    enough = [row["good_enough"] for row in rates]
    tables = _scored(complete, values, automatic, AUTOMATIC, resamples, enough)
    with_grid = [(m, value, best) for m, value, best in zip(complete, values, searched) if best is not None]
    if with_grid:
        measured, value, best = zip(*with_grid)
        other = _scored(measured, value, best, SEARCHED, resamples, enough)
        tables = {name: table + other[name] for name, table in tables.items()}
    metrics = [
        Metric(name, row[key], row[f"{key}_low"], row[f"{key}_high"], unit, STAGES[1], row["predictor"], row["truth"])
        for row in tables["scores"]
        for name, key, unit in ((RHO, "rho", ""), (REGRET, "regret", "points"))
        if row[key] is not None and math.isfinite(row[key])
    ]
    candidates = [
        _candidate_row(measured, value, final, best, name)
        for measured, value, final, best in zip(complete, values, automatic, searched) for name in measured.final
    ]  # fmt: skip
    # As a stored result has them: not-a-number becomes None.
    return plain(tables | {"candidates": candidates, "rates": rates}), metrics


def _scored(
    complete: Sequence[Measured], values: Sequence[Mapping[str, Mapping[str, float | None]]],
    finals: Sequence[Mapping[str, float]], truth: str, resamples: int, rates: Sequence[bool],
) -> dict[str, list[dict[str, Any]]]:  # fmt: skip
    """The tables of scores, of settings, of hypotheses and of the ceiling by one ground truth."""
    names = list(complete[0].final)
    settings = [(m.setting.task, m.setting.rows, m.setting.seed) for m in complete]
    scores = np.array([[final[name] for name in names] for final in finals])
    table = {predictor: [[each[predictor][name] for name in names] for each in values] for predictor in values[0]}
    known = {predictor: rows for predictor, rows in table.items() if ENTRIES[predictor].kind in (BEFORE, EARLIER)}
    for predictor, found in (
        (OTHER_TASKS, fitted.mean_ranks(settings, scores, texts_of)),
        (
            COMBINATION,
            fitted.combination(settings, known, scores, texts_of),
        ),
    ):
        if found is not None:
            table[predictor] = found.tolist()
    draws = Draws(settings, resamples)
    rho = {
        p: np.array([correlation(*pair) for pair in zip(rows, scores.tolist())])
        for p, rows in table.items()
        if ENTRIES[p].ranks
    }
    lost = {p: np.array([regret(*pair) for pair in zip(rows, scores.tolist())]) for p, rows in table.items()}
    adjusted = dict(zip(rho, holm([draws.p_value(one) for one in rho.values()])))
    rows = [
        {"truth": truth, "predictor": p, "kind": ENTRIES[p].kind,
         **_with_ends("rho", draws.interval(rho[p]) if p in rho else (None, None, None)), "p_holm": adjusted.get(p),
         **_with_ends("regret", draws.interval(lost[p])),
         "undefined": sum(value is None for row in table[p] for value in row)}
        for p in ENTRIES if p in table
    ]  # fmt: skip
    of_settings = [
        {"truth": truth, "task": task, "rows": size, "seed": seed, "best": names[int(own.argmax())],
         "best_score": own.max(), "spread": 100 * np.ptp(own),
         "rho": {p: one[place] for p, one in rho.items()}, "regret": {p: one[place] for p, one in lost.items()}}
        for place, ((task, size, seed), own) in enumerate(zip(settings, scores))
    ]  # fmt: skip
    top = ceiling(dict(zip(settings, scores.tolist())))
    return {
        "scores": rows,
        "settings": of_settings,
        "hypotheses": [{"truth": truth} | vars(one) for one in judge(draws, rho, lost, rates)],
        "ceiling": [{"truth": truth, "rho": top.value, "lowest": top.low, "highest": top.high}],
    }


def _with_ends(name: str, found: Sequence[float | None]) -> dict[str, float | None]:
    return {name: found[0], f"{name}_low": found[1], f"{name}_high": found[2]}


def _candidate_row(
    measured: Measured, values: Mapping[str, Mapping[str, float | None]], final: Mapping[str, float],
    searched: Mapping[str, float] | None, name: str,
) -> dict[str, Any]:  # fmt: skip
    setting, run = measured.setting, measured.final[name]
    return {"task": setting.task, "rows": setting.rows, "seed": setting.seed, "candidate": name, "score": final[name],
            "searched_score": searched and searched[name], "failed": run["failed"],
            "learning_rates": run.get("learning_rates", {}), "trained_parameters": run.get("trained_parameters"),
            "values": {predictor: each[name] for predictor, each in values.items()}}  # fmt: skip
