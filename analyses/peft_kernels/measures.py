"""Metrics with their intervals, and tables, from the kernels of all seeds."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

import ntk
from analyses.core.comparison import KERNEL_METRICS, SeedComparison
from analyses.peft_kernels.mean_split import PARTS
from analyses.peft_kernels.methods import FULL, REFERENCE, with_degree
from analyses.records import Metric

LABELS = "labels"
# The metrics of a pair of kernels that the tables of many methods show.
_METRICS = ("alignment", "cka", "trace_ratio")


def label_kernel(labels: np.ndarray, *, regression: bool) -> Tensor:
    """The kernel ``(n, n)`` of the labels: 1 for equal classes and 0 for others, or the product of two values."""
    y = torch.from_numpy(labels).double()
    return y[:, None] * y if regression else (y[:, None] == y).double()


def method_metrics(comparison: SeedComparison, names: Sequence[str], top: int) -> list[Metric]:
    """Metrics of every method's kernel alone, against the labels, and against full fine-tuning."""
    metrics = []
    overlap = partial(ntk.eigenspace_overlap, rank=top)
    for name in names:
        metrics += [comparison.metric(metric, name) for metric in KERNEL_METRICS]
        metrics.append(comparison.keep("label_cka", ntk.cka, "", name, LABELS))
        if name == FULL:
            continue
        metrics += [comparison.metric(metric, FULL, name) for metric in _METRICS]
        metrics.append(comparison.keep("eigenspace_overlap", overlap, "", FULL, name))
        if name.startswith(REFERENCE) and "degree" not in name:
            metrics.append(comparison.keep("k_star", ntk.matching_degree, "", FULL, name))
    return metrics


def split_metrics(comparison: SeedComparison) -> list[Metric]:
    """Metrics of Propulsion and BitFit against full fine-tuning of the same layers, and the parts' trace shares."""
    metrics = []
    for part in PARTS:
        for other in (f"Propulsion, {part}", "BitFit"):
            metrics += [comparison.metric(m, f"linear: full, {part}", f"linear: {other}") for m in _METRICS]
    for name in ("full", "Propulsion"):
        for part in PARTS[1:]:
            pair = (f"linear: {name}, {part}", f"linear: {name}, whole")
            metrics.append(comparison.keep("trace_share", ntk.trace_ratio, "", *pair))
    return metrics


def split_table(metrics: Sequence[Metric]) -> list[dict[str, Any]]:
    """Shares of the trace of the common part, the residual part and the cross terms, which sum to 1."""
    table = []
    for name in ("full", "Propulsion"):
        shares = {m.left.rpartition(", ")[2]: m for m in metrics
                  if m.name == "trace_share" and m.left.startswith(f"linear: {name},")}  # fmt: skip
        row: dict[str, Any] = {"kernel": name, "cross": 1 - sum(metric.value for metric in shares.values())}
        for part, metric in shares.items():
            row |= {part: metric.value, f"{part}_low": metric.low, f"{part}_high": metric.high}
        table.append(row)
    return table


def degree_table(comparison: SeedComparison, degrees: Sequence[float]) -> list[dict[str, Any]]:
    """One row for each degree k: tr K(k) / tr K(1), and ||K(k) - k^2 K(1)|| / ||k^2 K(1)||, 0 if only sizes differ."""
    rows = []
    for k in degrees:
        name = with_degree(k)
        deviation = max(ntk.kernel_distance(each[REFERENCE] * k**2, each[name]) for each in comparison.kernels)
        ratio = comparison.mean(ntk.trace_ratio, name, REFERENCE)
        rows.append({"degree": k, "trace_ratio": ratio, "expected": k**2, "deviation": deviation})
    return rows


def angle_table(comparison: SeedComparison, names: Sequence[str], top: int) -> list[dict[str, Any]]:
    """Principal angles in degrees between the leading eigenspaces of each method and full fine-tuning, seed means."""
    rows = []
    for name in names:
        try:
            found = [ntk.principal_angles(kernels[FULL], kernels[name], top) for kernels in comparison.kernels]
            angles = torch.stack(found).mean(0).rad2deg().tolist()
        except ntk.UndefinedMetricError:
            angles = None
        rows.append({"method": name, "degrees": angles})
    return rows


def map_tables(comparison: SeedComparison, names: Sequence[str]) -> dict[str, list[dict[str, Any]]]:
    """Mean CKA over seeds of every two methods, and a map: points for methods, closer for a higher CKA.

    Methods with an undefined CKA have no point.
    """
    values = {(a, b): comparison.mean(ntk.cka, a, b) for i, a in enumerate(names) for b in names[i:]}  # symmetric
    matrix = np.array([[values.get((a, b), values.get((b, a))) for b in names] for a in names], dtype=float)
    kept = [i for i in range(len(names)) if np.isfinite(matrix[i, i])]
    points, shares = classical_scaling(matrix[np.ix_(kept, kept)])
    return {
        "similarity": [
            {"left": a, "right": b, "cka": matrix[i, j]} for i, a in enumerate(names) for j, b in enumerate(names)
        ],
        "embedding": [{"method": names[i], "x": x, "y": y} for i, (x, y) in zip(kept, points.tolist(), strict=True)],
        "embedding_axes": [{"axis": axis, "share": share} for axis, share in zip("xy", shares.tolist(), strict=True)],
    }


def classical_scaling(similarity: np.ndarray, dimensions: int = 2) -> tuple[np.ndarray, np.ndarray]:
    """Coordinates ``(m, dimensions)`` of m objects from their similarities, and the share of variance of each axis.

    A CKA is the cosine between two centred kernels, so that d^2 = 2 (1 - CKA) is the squared distance of the two at
    unit length. Classical scaling (Torgerson 1952) then gives the principal components of the kernels,
    B = -H D^2 H / 2 = H S H with H = I - 1 1^T / m. The sign of an axis makes its largest coordinate positive.

    Args:
        similarity: ``(m, m)``, symmetric, 1 on the diagonal, finite.
        dimensions: Number of axes; those beyond the rank of B are zero.
    """
    S = np.asarray(similarity, dtype=float)
    B = S - S.mean(0) - S.mean(1, keepdims=True) + S.mean()
    values, vectors = np.linalg.eigh((B + B.T) / 2)
    values, vectors = values[::-1].clip(0), vectors[:, ::-1]
    vectors = vectors * np.where(np.abs(vectors).max(0) == vectors.max(0), 1.0, -1.0)
    total = values.sum()
    shares = values / total if total > 0 else values
    padding = (0, max(0, dimensions - len(S)))
    coordinates = np.pad(vectors * np.sqrt(values), ((0, 0), padding))
    return coordinates[:, :dimensions], np.pad(shares, padding)[:dimensions]
