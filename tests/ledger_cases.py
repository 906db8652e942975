"""Planted results for every claim of the ledger, with chosen values for the numbers that its judge reads."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from scipy import special

from analyses.claims.theory import COVERED, DROPPED
from analyses.claims.training import ALL
from analyses.method_comparison import CHANGE
from analyses.records import Metric, Result
from analyses.subjects.paired_scores import BEST_ANSWER

Value = float | tuple[float, float, float]
Folders = dict[str, Result]


def planted(analysis: str, metrics: list[Metric] | None = None, **parts: Any) -> Result:
    """A result with only the given content."""
    empty: dict[str, Any] = {"config": {}, "tables": {}, "arrays": {}, "model": {}, "dataset": {}, "environment": {},
                             "seconds": {}, "coverage": {}, "seed": 0}  # fmt: skip
    return Result(analysis=analysis, metrics=metrics or [], **(empty | parts))


def metric(name: str, value: Value, stage: str, left: str, right: str = "") -> Metric:
    middle, low, high = value if isinstance(value, tuple) else (value, None, None)
    return Metric(name, middle, low, high, "", stage, left, right)


def around(value: float, half: float = 0.001) -> Value:
    return value, value - half, value + half


SMALL = around(0.05)
NEARLY_ALL = around(0.95)
PARTLY_ALIKE = around(0.6)
CHANCE = around(0.7)
NOTHING = around(0.0)
BETTER = around(0.1)
WORSE = around(-0.3)
GOOD = around(0.8)
HALF = around(0.5)


def reference(
    task: str = "sst2", *, above: Value = BETTER, head: Value = WORSE, change: Value | None = NOTHING
) -> Folders:
    """The comparison of methods that says whether full fine-tuning has learnt a task, which it has by default.

    Args:
        task: The task.
        above: Full fine-tuning minus the best single answer.
        head: The head alone minus full fine-tuning.
        change: The change of full fine-tuning over the last third of the steps; None if it was not measured.
    """
    metrics = [
        metric("accuracy", GOOD, task, "full"),
        metric("accuracy", HALF, task, "head"),
        metric("accuracy", above, f"{task}, difference", "full", BEST_ANSWER),
        metric("accuracy", head, f"{task}, difference", "head", "full"),
    ]
    if change is not None:
        metrics.append(metric(CHANGE, change, f"{task}, {CHANGE}", "full"))
    return {f"method_comparison/{task}": planted("method_comparison", metrics, tables={"summary": []})}


# --- theory ---------------------------------------------------------------------------------------------------------


def distances(
    task: str = "sst2", *, raw: Value = SMALL, cka: Value = NEARLY_ALL, null: Value = CHANCE,
    stage: str = "initialisation", drift: tuple[float, float] = (0.05, 0.05),
) -> Folders:  # fmt: skip
    pair = ("full_backbone", "propulsion_z")
    metrics = [
        metric("relative_frobenius", raw, stage, *pair),
        metric("cka", cka, stage, *pair),
        metric("cka", null, stage, pair[0], "random subset of 9 weights"),
        metric("cka", around(0.1), stage, pair[0], "Propulsion, examples permuted"),
        metric("cka", around(1.0), stage, pair[0], "Gaussian sketch of size 9"),
    ]
    rows = [{"kernel": k, "relative_frobenius": d, "cka": 0.9} for k, d in zip(pair, drift)]
    tables = {"drift": [*rows, {"kernel": "full_all", "relative_frobenius": 9.0, "cka": 0.1}]}
    config = {"degree": 15, "pooling": "mean"}
    found = planted("kernel_distance", metrics, config=config, tables=tables)
    return {f"kernel_distance/{task}": found} | reference(task)


def trained(task: str = "sst2", **numbers: Any) -> Folders:
    return distances(task, stage="trained", **numbers)


def cases(
    *, limit: float = 1e-16, biases: float = 1e-16, biases_literal: float = 0.05,
    dropped: float = 0.2, dropped_literal: float = 0.05,
) -> Folders:  # fmt: skip
    """Literal and corrected distances by case; cases that lack a condition violate the corrected theorem by default."""
    numbers = dict.fromkeys(COVERED, (limit, limit)) | {"ReLU, biases trained": (biases_literal, biases)}
    numbers |= {name: (dropped_literal, dropped) for name in DROPPED}
    rows = [{"case": n, "compared": "limit", "literal": a, "corrected": b} for n, (a, b) in numbers.items()]
    rows.append({"case": "ReLU, finite", "compared": "width 9", "literal": 1.0, "corrected": 1.0})
    return {"theorem1": planted("theorem1", tables={"cases": rows})}


def layers(task: str = "sst2", *, raw: float = 0.05) -> Folders:
    """Two kernels summed over the linear layers of a model, at a relative distance."""
    full = np.array([[2.0, 1.0], [1.0, 3.0]])
    kernels = {"full": full, "Propulsion": (1 - raw) * full, "output matrix": 9 * full}
    arrays = {f"initialisation.{name}": kernel for name, kernel in kernels.items()}
    return {"decomposition": planted("decomposition", arrays=arrays, config={"task": task})}


def widths(*, gaps: dict[str, float] | None = None, slope: Value = (-0.5, -0.55, -0.45)) -> Folders:
    metrics = [metric("slope", slope, "initialisation", "propulsion", "relu, ntk"),
               metric("slope", around(-3.0), "initialisation", "propulsion", "gelu, ntk"),
               metric("slope", around(-3.0), "initialisation", "propulsion", "relu, standard")]  # fmt: skip
    rows = [{"activation": a, "parametrization": p, "width": w, "gap_of_the_limits": g, "gap": g}
            for a, g in (gaps or {"linear": 0.0}).items() for p in ("ntk", "standard") for w in (8, 16)]  # fmt: skip
    return {"width_convergence": planted("width_convergence", metrics, tables={"widths": rows})}


def bound(above: float, cells: float = 200.0) -> Folders:
    counts = {
        "cells": cells,
        "cells_above_bound": above,
        "cells_beside_exact_tail": 0.0,
        "median_bound_over_exact": 9.0,
    }
    metrics = [metric(name, value, "initialisation", "projection") for name, value in counts.items()]
    return {"johnson_lindenstrauss": planted("johnson_lindenstrauss", metrics)}


def drifts(name: str, full: Value, propulsion: Value, task: str = "sst2") -> Folders:
    values = {"full": full, ALL: propulsion, "lora": around(9.0)}
    metrics = [metric(name, value, "trained", method) for method, value in values.items()]
    metrics += [metric(f"null_{name}", around(n), "trained", "full", f"null {n}") for n in (1.4, 1.2)]
    metrics.append(metric(name, around(9.0), "initialisation", "full"))
    return {f"kernel_drift/{task}": planted("kernel_drift", metrics)} | reference(task)


def predictions(
    *, kernels: Value = NEARLY_ALL, networks: Value = NEARLY_ALL, own: Value = NEARLY_ALL,
    own_propulsion: Value | None = None, chance: Value = PARTLY_ALIKE,
) -> Folders:  # fmt: skip
    metrics = [metric("kernel_agreement", around(0.1), "n=16", "full", ALL)]
    pairs = {("kernel_", "full", ALL): kernels, ("trained_", "full", ALL): networks,
             ("", "full", "gradient flow"): own, ("", ALL, "gradient flow"): own_propulsion or own,
             ("", "lora", "gradient flow"): around(0.1)}  # fmt: skip
    for (prefix, left, right), value in pairs.items():
        metrics.append(metric(f"{prefix or 'prediction_'}agreement", value, "n=32", left, right))
        metrics.append(metric(f"{prefix}independent_errors_agreement", chance, "n=32", left, right))
    sizes = {"sizes": [{"size": 16}, {"size": 32}]}
    return {"linearized_prediction/sst2": planted("linearized_prediction", metrics, tables=sizes)} | reference()


def degrees(*numbers: tuple[float, float, float]) -> Folders:
    """k* of pre-trained models on tasks whose degree is 10."""
    rows = [{"kind": "pre-trained", "model": f"m{i}, t", "matching_degree": k, "low": low, "high": high,
             "expected": 10.0, "paper_degree": 10.0} for i, (k, low, high) in enumerate(numbers)]  # fmt: skip
    rows.append(rows[0] | {"kind": "random network", "matching_degree": 999.0, "low": 999.0, "high": 999.0})
    return {"degree_scale": planted("degree_scale", tables={"ratios": rows})}


# --- training -------------------------------------------------------------------------------------------------------


def counts(large: int, base: int = 86_018, total: int = 355_361_794) -> Folders:
    rows = [{"model": "base", "everything": base, "total": 124_647_170},
            {"model": "large", "everything": large, "total": total}]  # fmt: skip
    return {"parameter_count": planted("parameter_count", tables={"counts": rows})}


def layer(*, lora: int = 160, propulsion: int = 10, bitfit: int = 10, time: float = 1.0, rival: float = 1.1,
          counted: int | None = None) -> Folders:  # fmt: skip
    numbers = {"frozen": (0, 1.0), "full": (900, 1.5), "bitfit": (bitfit, rival), "propulsion": (propulsion, time),
               "propulsion, p vectors": (2 * propulsion, time), "lora": (lora, 1.4)}  # fmt: skip
    rows = [{"method": m, "parameters": p, "counted": p, "time_ratio": t} for m, (p, t) in numbers.items()]
    rows[3]["parameters"] = propulsion if counted is None else counted
    return {"complexity": planted("complexity", tables={"methods": rows}, config={"rank": 8})}


def compared(task: str = "sst2", *, own: Value = NOTHING, over: Value = BETTER, trained: tuple[int, int] = (170, 20),
             p: float = 0.001, **of_reference: Any) -> Folders:  # fmt: skip
    """A comparison of Propulsion with full fine-tuning (`own`) and LoRA (`over`), whose difference has p-value p."""
    (found,) = reference(task, **of_reference).values()
    stage = f"{task}, difference"
    values = {"full": own, "lora": over}
    found.metrics.extend(metric("accuracy", value, stage, ALL, right) for right, value in values.items())
    sizes = {"full": 1000, ALL: trained[1], "lora": trained[0], "head": 10}
    rows = [{"task": task, "method": m, "trained_parameters": n} for m, n in sizes.items()]
    differences = [
        {"task": task, "metric": "accuracy", "left": ALL, "right": right, "degrees": 10.0,
         "error": abs(value[0] if isinstance(value, tuple) else value) / _student(p)}
        for right, value in values.items()
    ]  # fmt: skip
    found.tables.update(summary=rows, comparisons=differences)
    return {f"method_comparison/{task}": found}


def _student(p: float) -> float:
    """The quantile at which Student's test with 10 degrees of freedom has a two-sided p-value."""
    return float(special.stdtrit(10.0, 1 - p / 2))


def peaks(**others: list[float]) -> Folders:
    """Peak memory of every round, Propulsion's being 100 and 102."""
    each = {ALL: [100.0, 102.0], "full": [999.0, 999.0], "head": [1.0, 1.0]} | others
    rows = [{"method": m, "peak_bytes": p} for m, values in each.items() for p in values]
    return {"memory": planted("memory", tables={"runs": rows})}


def curves(own: list[float], **others: list[float]) -> Folders:
    """Mean scores over the steps of every seed, of Propulsion (All) and of other methods."""
    values = {ALL: own, "full": [0.99] * len(own), "head": [0.98] * len(own)} | others
    arrays = {f"scores.{name}": np.array(scores)[:, None] for name, scores in values.items()}
    found = planted("convergence", arrays=arrays, dataset={"name": "sst2", "metric": "accuracy"})
    return {"convergence": found} | reference()


def settings(factor: str, chance: float = 0.0, **scores: Sequence[float | None]) -> Folders:
    """Scores of every seed by setting; an underscore stands for a space."""
    rows = [{"setting": label.removeprefix("_").replace("_", " "), "scores": s} for label, s in scores.items()]
    dataset = {"chance": chance, "metric": "accuracy"}
    return {f"ablation/{factor}": planted("ablation", tables={"settings": rows}, dataset=dataset)}


def deltas(*, z: tuple[float, float] = (0.99, 1.01), central: tuple[float, float] = (0.995, 1.005),
           rank: Value = (1.0, 0.95, 1.0)) -> Folders:  # fmt: skip
    names = ("z q0", "z q0.05", "z q0.5", "z q0.95", "z q1")
    row = {"method": ALL} | dict(zip(names, np.array([z[0], central[0], 1.0, central[1], z[1]]).tolist()))
    metrics = [metric("rank_share", rank, "trained", ALL), metric("rank_share", (0.02, 0.02, 0.02), "trained", "lora")]
    tables = {"methods": [row, {"method": "lora"}]}
    return {"delta_weights": planted("delta_weights", metrics, tables=tables, dataset={"name": "sst2"})} | reference()


def tuned(own: Value, model: str) -> Folders:
    metrics = [metric("accuracy", around(0.5), "trained", "none"), metric("accuracy", own, "trained", "propulsion")]
    metrics.append(metric("accuracy", around(0.0), "difference", "propulsion", "none"))
    return {"instruction_tuning": planted("instruction_tuning", metrics, model={"name": model}, dataset={"name": "t"})}
