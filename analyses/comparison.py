"""What kernels are compared by: the metrics of a pair and those of one kernel."""

from collections.abc import Callable

from torch import Tensor

import ntk

KERNEL_UNIT = "output²/parameter²"

# Metrics of a pair (K1, K2): name -> (function, unit).
PAIR_METRICS: dict[str, tuple[Callable[[Tensor, Tensor], float], str]] = {
    "alignment": (ntk.kernel_alignment, ""),
    "cka": (ntk.cka, ""),
    "relative_frobenius": (ntk.kernel_distance, ""),
    "relative_frobenius_scaled": (lambda a, b: ntk.kernel_distance(a, b, scaled=True), ""),
    "mean_absolute": (lambda a, b: ntk.kernel_distance(a, b, kind="mean_absolute"), KERNEL_UNIT),
    "mean_absolute_scaled": (lambda a, b: ntk.kernel_distance(a, b, kind="mean_absolute", scaled=True), KERNEL_UNIT),
    "max_absolute": (lambda a, b: ntk.kernel_distance(a, b, kind="max_absolute"), KERNEL_UNIT),
    "max_absolute_scaled": (lambda a, b: ntk.kernel_distance(a, b, kind="max_absolute", scaled=True), KERNEL_UNIT),
    "best_scale": (ntk.best_scale, ""),
    "trace_ratio": (ntk.trace_ratio, ""),
}
# Null models have no scale of their own to get right, so only scale-free metrics judge them.
NULL_METRICS = ("alignment", "cka", "relative_frobenius_scaled")
KERNEL_METRICS: dict[str, tuple[Callable[[Tensor], float], str]] = {
    "trace": (ntk.trace, KERNEL_UNIT),
    "effective_rank": (ntk.effective_rank, ""),
}
