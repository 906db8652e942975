"""Measure the cost of exact kernels, as ratios within one run: `python -m benchmarks.kernels`.

For every job, kernels are first compared with those of torch.func, and nothing is timed if they differ. Then the
measures take turns, each in a fresh process. Results are written to `docs/benchmarks/`: one JSON file for each job, and
a table of all jobs. `notes.md` there is written by hand.
"""

import json
import statistics
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from analyses.records import environment, format_table, number
from benchmarks.jobs import ADAPTERS, GIGABYTE, JOBS, Job
from benchmarks.measure import in_own_process, write_document, write_json
from ntk.structured.rules import RULES, name_of
from propulsion.command_line import parsed
from propulsion.errors import UserError, run_command

BASELINES = ("bare", "torch.func", "jacobian")
AGREE = 1e-10  # Relative error in float64, as in the tests.
AGREE_FLOAT32 = 1e-4  # Relative error of the float32 kernels, which are the timed ones.


@dataclass(frozen=True)
class Config:
    """Options of the command."""

    jobs: list[str] = field(default_factory=lambda: [name for name in JOBS if name != "roberta-large-256"])
    """Jobs to measure: any of minilm-32, minilm-128, minilm-1024, roberta-large-64, roberta-large-256, resnet18-gn-32,
    resnet18-bn-32, resnet18-gn-8, depthwise-32, lstm-32."""
    data_dir: Path | None = None
    """Folder with SST-2's train.jsonl and validation.jsonl; without it, the Hugging Face hub."""
    device: str = "cpu"
    """Torch device, such as cpu or cuda."""
    output_dir: Path = Path("docs/benchmarks")
    """Folder of the results."""
    keep_timings: bool = False
    """Keep the stored timings, and renew only the agreement with torch.func and the profiles."""


def main(config: Config) -> None:
    """Measure every job, and write the table of all stored results."""
    for name in config.jobs:
        if name not in JOBS:
            raise UserError(f"no job {name!r}; there are {', '.join(JOBS)}")
    config.output_dir.mkdir(parents=True, exist_ok=True)
    for name in config.jobs:
        file = config.output_dir / f"{name}{'' if config.device == 'cpu' else '-' + config.device}.json"
        errors = {"relative_errors": agreement(name, config)}
        if config.keep_timings:
            result = json.loads(file.read_text(encoding="utf-8")) | errors
        else:
            result = measure_job(name, JOBS[name], config) | errors
            write(file, result)  # So that the timings are not lost if the process is killed while it profiles.
        result["profiles"] = profiles(name, config)
        write(file, result)
        print(format_table(HEADER, list(rows(result))), flush=True)
    write_tables(config.output_dir)


def agreement(name: str, config: Config) -> dict[str, float]:
    """Relative errors of a job's kernels; the command exits if they are too large."""
    errors = child(name, JOBS[name].measures[0], config, "--agreement")
    print(f"{JOBS[name].title}: agreement {errors}", flush=True)
    if not all(error <= (AGREE_FLOAT32 if "float32" in key else AGREE) for key, error in errors.items()):
        raise SystemExit(f"kernels of {name} do not agree with torch.func: {errors}; nothing was timed")
    return errors


def profiles(name: str, config: Config) -> dict[str, dict[str, float]]:
    """Profiles of this project's own measures: the share of time of each operation."""
    own = [measure for measure in JOBS[name].measures if measure not in BASELINES]
    return {measure: child(name, measure, config, "--profile") for measure in own}


def measure_job(name: str, job: Job, config: Config) -> dict[str, Any]:
    """Run all rounds of all measures of a job."""
    found: dict[str, list[dict]] = {measure: [] for measure in job.measures}
    for _ in range(job.rounds):
        for measure in job.measures:
            found[measure].append(child(name, measure, config))
            print(f"  {measure}: {found[measure][-1]}", flush=True)
    return {"job": name, "title": job.title, "device": config.device, "measures": found, "profiles": {},
            "environment": environment()}  # fmt: skip


def write(file: Path, result: dict[str, Any]) -> None:
    """Write the JSON file of a job."""
    write_json(file, result)


def title(result: dict[str, Any]) -> str:
    """The name of a job in tables, with the accelerator if it ran on one."""
    accelerator = result["environment"]["accelerator"]
    return result["title"] + ("" if result["device"] == "cpu" else f", {accelerator}")


def child(name: str, measure: str, config: Config, *flags: str) -> dict[str, Any]:
    """Run one measurement in its own process."""
    data = ["--data-dir", str(config.data_dir)] if config.data_dir else []
    return in_own_process("measure", "--job", name, "--measure", measure, *flags, "--device", config.device, *data)


HEADER = (
    "job and measure", "first call, s", "later calls, s", "peak, GB", "over bare", "torch.func over it",
    "jacobian over it",
)  # fmt: skip


def rows(result: dict[str, Any]) -> Iterator[list[str]]:
    """Yield one row for each measure; ratios are of later calls, medians over rounds."""
    measures = result["measures"]
    yield [f"**{title(result)}**", *[""] * (len(HEADER) - 1)]
    for name, runs in measures.items():
        peak = max(run["peak_bytes"] for run in runs) / GIGABYTE
        times = [number(statistics.median(run[key] for run in runs)) for key in ("first_seconds", "seconds")]
        ratios = ratio(measures, name, "bare"), *(ratio(measures, slow, name) for slow in ("torch.func", "jacobian"))
        yield [name, *times, f"{peak:.2f}", *map(number, ratios)]


def ratio(measures: dict[str, list[dict]], left: str, right: str, key: str = "seconds") -> float | None:
    """Median over rounds of one measure's time divided by another's; None if one was not measured."""
    if left not in measures or right not in measures:
        return None
    return statistics.median(a[key] / b[key] for a, b in zip(measures[left], measures[right], strict=True))


def targets(result: dict[str, Any]) -> Iterator[list[str]]:
    """Yield one row for each target, with what was measured and whether the target is reached."""
    measures = result["measures"]
    for target in JOBS[result["job"]].targets:
        found = {key: ratio(measures, target.measure, target.against, key) for key in ("first_seconds", "seconds")}
        peak = max(run["peak_bytes"] for run in measures[target.measure])
        fast = all(value is not None and value <= target.ratio for value in found.values())
        verdict = "reached" if fast else "missed"
        if target.peak is not None and fast != (peak <= target.peak):
            verdict = "time missed, memory reached" if not fast else "time reached, memory missed"
        limit = "" if target.peak is None else f"{target.peak / GIGABYTE:.1f}"
        yield [f"{title(result)}: {target.measure} over {target.against}", number(target.ratio),
               number(found["first_seconds"]), number(found["seconds"]), limit, f"{peak / GIGABYTE:.2f}",
               verdict]  # fmt: skip


def write_tables(folder: Path) -> None:
    """Write `README.md` in the folder from the JSON files there."""
    files = [file for file in sorted(folder.glob("*.json")) if file.stem.removesuffix("-cuda") in JOBS]
    results = [json.loads(file.read_text(encoding="utf-8")) for file in files]
    results.sort(key=lambda r: (r["device"], list(JOBS).index(r["job"])))
    costs = format_table(HEADER, [row for r in results for row in rows(r)], markdown=True)
    never = unused(results)
    reach = ("ratio", "at most", "first call", "later calls", "GB at most", "peak, GB", "verdict")
    verdicts = format_table(reach, [row for r in results for row in targets(r)], markdown=True)
    own = [(r, name, runs[-1]) for r in results for name, runs in r["measures"].items() if name not in BASELINES]
    write_document(
        folder / "README.md", "README.md.jinja", adapters=len(ADAPTERS), costs=costs, verdicts=verdicts,
        ran=[f"{title(r)}, {name}: {ran(run)}" for r, name, run in own],
        never="not known" if never is None else ", ".join(never) or "none",
        errors=[f"{title(r)}: " + ", ".join(f"{k} {e:.1e}" for k, e in r["relative_errors"].items()) for r in results],
        shares=[f"{title(r)}, {name}: {shares(p)}" for r in results for name, p in r["profiles"].items()],
    )  # fmt: skip


def ran(run: dict[str, Any]) -> str:
    """The counts of one process as text."""
    if "ran" not in run:
        return "measured before this was counted"
    return "; ".join(
        f"{kind}: " + (", ".join(f"{what} {n}" for what, n in counts.items()) or "none")
        for kind, counts in run["ran"].items()
    )


def unused(results: list[dict[str, Any]]) -> list[str] | None:
    """Rules and contractions that no measured call used; None if a measurement did not count them."""
    own = [runs[-1].get("ran") for r in results for name, runs in r["measures"].items() if name not in BASELINES]
    if not all(own):
        return None
    taken = {what for counted in own for counts in counted.values() for what in counts}
    ways = dict.fromkeys([*map(name_of, RULES), "pairs of tokens", "formed features"])
    return [way for way in ways if way not in taken]


def shares(profile: dict[str, float]) -> str:
    """The larger shares of a profile as text."""
    return ", ".join(f"{key.removeprefix('aten::')} {share:.0%}" for key, share in profile.items() if share > 0.03)


if __name__ == "__main__":
    run_command(lambda: main(parsed(Config, prog="python -m benchmarks.kernels", description=__doc__)))
