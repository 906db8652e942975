"""The scale of each quantity that analyses measure: on it the quantity is unbounded, and its intervals are computed."""

import math
from collections.abc import Mapping, Sequence

import numpy as np

from analyses.core.intervals import FISHER, LOG, LOGIT, Interval, Scale, mean_interval

SCALES: Mapping[str, Scale] = {
    # Kernels are positive semidefinite, so that their alignments are not negative.
    **dict.fromkeys(
        ("alignment", "cka", "kernel_alignment_with_start", "kernel_cka_with_start", "label_cka", "eigenspace_overlap",
         "relative_frobenius_scaled", "relative_distance_best_scale"), LOGIT,
    ),
    **dict.fromkeys(
        ("relative_frobenius", "mean_absolute", "mean_absolute_scaled", "max_absolute", "max_absolute_scaled",
         "best_scale", "trace", "trace_ratio", "trace_share", "k_star", "matching_degree", "relative_kernel_drift",
         "kernel_trace_ratio", "relative_jacobian_drift", "relative_jacobian_drift_same_head", "linearisation_error",
         "linearised_movement", "parameter_drift", "head_drift", "last_loss"), LOG,
    ),
    "linearised_agreement": LOGIT,
    # Scores.
    "accuracy": LOGIT, "f1": LOGIT, "matthews": FISHER, "pearson": FISHER, "spearman": FISHER,
}  # fmt: skip
"""By the name of a metric. The effective rank is missing, since its largest value depends on the kernel: its scale is
`analyses.core.intervals.between(1, n)`."""
_ENDINGS = {
    "agreement": LOGIT, "logit_correlation": FISHER, "logit_correlation_within_classes": FISHER,
}  # fmt: skip


def scale_of(name: str) -> Scale:
    """The scale of a metric by its name; a null model's metric, null_NAME, has that of NAME.

    Raises:
        KeyError: The metric has no scale in this table.
    """
    name = name.removeprefix("null_")
    ending = next((scale for end, scale in _ENDINGS.items() if name.endswith(end)), None)
    return SCALES[name] if ending is None else ending


def limits(difference_of: Scale) -> tuple[float, float]:
    """The least and the greatest difference of two values of a quantity with this scale."""
    width = difference_of.high - difference_of.low
    return -width, width


_ROUNDING = 1e-6
"""How far the rounding of kernels in float32 may carry a metric beyond its bounds."""


def within(values: Sequence[float], scale: Scale) -> list[float]:
    """The values, where one that rounding carried beyond a bound of the scale is that bound."""
    bounded = np.clip(values, scale.low, scale.high)
    return np.where(np.abs(bounded - values) <= _ROUNDING, bounded, values).tolist()


def bounded_mean(values: Sequence[float], scale: Scale) -> Interval:
    """:func:`analyses.core.intervals.mean_interval` of values that rounding may have carried beyond a bound.

    Values further beyond, as a negative CKA, are only possible where a kernel is itself no more than rounding errors:
    the mean then has no interval.
    """
    bounded = within(values, scale)
    if (np.less(bounded, scale.low) | np.greater(bounded, scale.high)).any():
        return Interval(float(np.mean(values)), math.nan, math.nan)
    return mean_interval(bounded, scale)
