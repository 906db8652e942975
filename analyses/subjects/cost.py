"""Measurements of cost: time of a training step and peak memory; and the memory budget of kernels."""

import resource
import statistics
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

from propulsion.errors import UserError

_SKIPPED_STEPS = 5  # Not timed: threads and memory start up.


class StepClock(TrainerCallback):
    """Seconds of every optimizer step, forward and backward passes included."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self._start = 0.0

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Note the time at which the step starts."""
        self._start = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Add the duration of the step to `seconds`."""
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.seconds.append(time.perf_counter() - self._start)

    def median(self) -> float:
        """Median duration of a step in seconds, without the first few steps if there are more."""
        return statistics.median(self.seconds[_SKIPPED_STEPS:] or self.seconds)


def reset_peak(device: torch.device | str) -> None:
    """Reset the peak that `peak_bytes` reports; this works on CUDA devices and on Linux."""
    if torch.device(device).type == "cuda":
        torch.cuda.init()  # The reset is an error before CUDA is initialised.
        torch.cuda.reset_peak_memory_stats(device)
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    except OSError:
        return


def peak_bytes(device: torch.device | str) -> int:
    """Peak memory in bytes since `reset_peak`: memory allocated on CUDA, else resident memory of the process."""
    if torch.device(device).type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))
    except (OSError, StopIteration):
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024


@contextmanager
def memory_budget(gigabytes: float | None, options: str = "--n-examples") -> Iterator[float | None]:
    """Yield the number of bytes that kernels may use in the block; None without a budget.

    Raises:
        UserError: The computation in the block needs more; the message names the options that reduce it.
    """
    try:
        yield None if gigabytes is None else gigabytes * 1e9
    except MemoryError as error:
        raise UserError(f"{error} ({options}, --memory-budget-gb)") from error
