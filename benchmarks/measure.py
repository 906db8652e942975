"""Run one measurement in this process, so that the peak memory is that of the measurement; print one line of JSON."""

import copy
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
import torch
import tyro
from torch import Tensor

import ntk
from analyses.records import plain
from analyses.subjects.cost import peak_bytes
from benchmarks.baselines import bare_passes, torch_func_ntk
from benchmarks.jobs import ADAPTERS, JOBS, Job
from ntk.adapters import Full, Method, Propulsion
from ntk.counts import by_kind, counting
from propulsion.training import apply_propulsion

Batch = dict[str, Tensor]
PROFILED = 16  # Number of examples in a profile.


@dataclass(frozen=True)
class Measurement:
    """Options of the command."""

    job: str
    measure: str
    data_dir: Path | None = None
    device: str = "cpu"
    agreement: bool = False
    """Only compare with torch.func on a few examples in float64."""
    profile: bool = False
    """Only measure the share of time of each operation."""


def main(config: Measurement) -> None:
    """Run the measurement and print it as JSON."""
    job = JOBS[config.job]
    model, batch = job.load(job.examples, config.data_dir, config.device)
    if config.agreement:
        print(json.dumps(agreement(model, first(batch, job.agree_on), job)))
        return
    compute = measures(model, job)[config.measure]
    compute(first(batch, 2))  # So that threads and libraries have started before the timing.
    if config.profile:
        found = profile(lambda: compute(first(batch, PROFILED)))
    else:
        mask = batch.get("attention_mask")
        tokens = job.examples if mask is None else int(mask.sum())
        found = timing(lambda: compute(batch), job.repeats) | {"tokens": tokens}
    print(json.dumps(found))


def measures(model: torch.nn.Module, job: Job) -> dict[str, Callable]:
    """The computations that can be timed on a batch, by name."""
    budget = job.memory_budget

    def methods(some: dict[str, Method]) -> Callable:
        return lambda batch: ntk.adapter_kernels(model, batch, some, memory_budget=budget)

    return {
        "full": lambda batch: ntk.empirical_ntk(model, batch, method="structured", memory_budget=budget),
        "torch.func": lambda batch: torch_func_ntk(model, batch, job.tile),
        "jacobian": lambda batch: ntk.empirical_ntk(model, batch, method="jacobian", memory_budget=budget),
        "bare": lambda batch: bare_passes(model, batch),
        "adapters": methods({"full": Full(), **ADAPTERS}),
        "Propulsion": methods({"Propulsion": Propulsion()}),
    }


def timing(compute: Callable, repeats: int) -> dict[str, Any]:
    """Seconds of the first call, which has no memory to reuse; the median of later calls; and peak memory.

    The seconds that `torch_func_ntk` spends on computing Jacobians again are subtracted. `ran` has the counts of
    `ntk.counts` for the last call, which are empty for baselines.
    """
    seconds: list[float] = []
    ran: dict[str, dict[str, int]] = {}
    for _ in range(1 + repeats):
        synchronize()
        start = time.perf_counter()
        with counting() as counted:
            found = compute()
        synchronize()
        again = found[1] if isinstance(found, tuple) else 0.0
        seconds.append(time.perf_counter() - start - again)
        ran = by_kind(counted)
        del found
    later = statistics.median(seconds[1:] or seconds)
    return {"first_seconds": seconds[0], "seconds": later, "peak_bytes": peak(), "ran": ran}


def profile(compute: Callable, most: int = 12) -> dict[str, float]:
    """Share of the time spent in each kind of operation, the largest first."""
    on_gpu = torch.cuda.is_available()
    with torch.profiler.profile() as found:
        compute()
        synchronize()
    times = {e.key: e.self_device_time_total if on_gpu else e.self_cpu_time_total for e in found.key_averages()}
    total = sum(times.values())
    return {key: times[key] / total for key in sorted(times, key=times.__getitem__, reverse=True)[:most]}


def agreement(model: torch.nn.Module, batch: Batch, job: Job) -> dict[str, float]:
    """Relative errors (Frobenius) in float64: full fine-tuning against torch.func, Propulsion against a peft model.

    A job with the measure "jacobian" is compared with that in place of torch.func.

    Tests compare the other methods' kernels with the gradients of peft's own layers. "in float32" is the error of the
    float32 kernel, which is the timed one.
    """
    rounded = measures(model, job)["full"](batch).double()
    model = model.double()
    batch = {name: value.double() if value.is_floating_point() else value for name, value in batch.items()}
    compute = measures(model, job)
    # torch.func cannot differentiate some layers (an LSTM in float64).
    own = "jacobian" in job.measures
    full = compute["jacobian"](batch) if own else torch_func_ntk(model, batch, 1)[0]
    errors = {
        "full": relative_error(compute["full"](batch), full),
        "full, in float32": relative_error(rounded, full),
    }
    if not job.adapted:
        return errors
    beside = compute["adapters"](batch)
    wrapped = apply_propulsion(copy.deepcopy(model), degree=1, positions=("all",), train_head=False)
    scales = ntk.empirical_ntk(
        wrapped, batch, params=lambda name, p: p.requires_grad and "classifier" not in name, method="jacobian"
    )
    return {
        "full": errors["full"],
        "full beside adapters": relative_error(beside["full"], full),
        "Propulsion beside others": relative_error(beside["Propulsion"], scales),
        "Propulsion alone": relative_error(compute["Propulsion"](batch)["Propulsion"], scales),
        "full, in float32": errors["full, in float32"],
    }


def relative_error(found: Tensor, expected: Tensor) -> float:
    """|found - expected| / |expected|."""
    return float((found - expected).norm() / expected.norm())


def first(batch: Batch, count: int) -> Batch:
    """The batch's first examples."""
    return {name: value[:count] for name, value in batch.items()}


def peak() -> int:
    """Largest memory of this process, or of the accelerator if there is one, in bytes."""
    return peak_bytes("cuda" if torch.cuda.is_available() else "cpu")


def in_own_process(module: str, *words: str) -> dict[str, Any]:
    """Run a command of this package and return the JSON in the last line that it prints.

    Raises:
        SystemExit: The command failed.
    """
    command = [sys.executable, "-m", f"benchmarks.{module}", *words]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def write_json(path: Path, content: Any) -> None:
    """Write a file of strict JSON, in which a number that is not finite is null."""
    path.write_text(json.dumps(plain(content), indent=1, allow_nan=False) + "\n", encoding="utf-8")


def write_document(path: Path, template: str, **parts: Any) -> None:
    """Write a page from a template in this file's folder."""
    loader = jinja2.FileSystemLoader(Path(__file__).parent)
    pages = jinja2.Environment(loader=loader, trim_blocks=True, undefined=jinja2.StrictUndefined)
    path.write_text(pages.get_template(template).render(parts).rstrip() + "\n", encoding="utf-8")


def synchronize() -> None:
    """Wait until the accelerator has finished its work."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


if __name__ == "__main__":
    main(tyro.cli(Measurement))
