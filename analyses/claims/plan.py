"""The runs behind the ledger, in quick and in full size, and how each is carried out once in its own process."""

import importlib
import math
import subprocess
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from analyses.claims.claim import TRIED_RATES, Claim
from analyses.claims.commands import differing
from analyses.claims.judge import matching, placed
from analyses.core.analysis import Output
from analyses.core.child import run_python
from analyses.core.command_line import configured, default_options, options_of, words
from analyses.records import RESULT_FILE, RecordError, load_result
from propulsion.data.tasks import get_labelled_task
from propulsion.errors import UserError

LOGS = "logs"
MARK = "QUICK"
"""Name of the file that marks a folder of quick runs, so that no ledger mixes the two sizes."""
Launch = Callable[[Sequence[str], Path], int]


@dataclass(frozen=True)
class Earlier:
    """The folder of another run's result, as the value of an option that reads it."""

    name: str


@dataclass(frozen=True)
class Run:
    """One analysis run once.

    Attributes:
        name: Its result folder below the root; its first part is the analysis, after the model's folder if it is of
            another model than the default one.
        options: Options by name, of those that differ from the analysis' defaults.
    """

    name: str
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def after(self) -> tuple[str, ...]:
        """Names of the runs whose results it reads."""
        return tuple(value.name for value in self.options.values() if isinstance(value, Earlier))

    def config(self, root: Path) -> Output:
        """The configuration of its analysis, which writes below a folder.

        Raises:
            UserError: The analysis has no such option.
        """
        read = {name: root / value.name for name, value in self.options.items() if isinstance(value, Earlier)}
        return configured(self._config, {**self.options, **read, "output_dir": root / self.name})

    def command(self, root: Path) -> list[str]:
        """The words of the command line of that configuration."""
        options = options_of(self.config(root))
        return ["python", "-m", f"analyses.{self._analysis}", *words(options, default_options(self._config))]

    @property
    def _analysis(self) -> str:
        return placed(self.name)[1].split("/")[0]

    @property
    def _config(self) -> type[Output]:
        return importlib.import_module(f"analyses.{self._analysis}").Config


def run(name: str, /, **options: Any) -> Run:
    """A run with these options."""
    return Run(name, options)


def rated(name: str, task: str, /, **options: Any) -> Run:
    """A run at the learning rates that the comparison of methods chose on a task."""
    return Run(name, options | {"comparison": Earlier(f"method_comparison/{task}")})


Options = dict[str, Any]
_SHORT: Options = {
    "max_steps": 6, "per_device_train_batch_size": 8, "n_train": 48, "n_validation": 24, "max_length": 32,
}  # fmt: skip
_FEW_METHODS = ("full", "propulsion:positions=all", "propulsion:positions=attn", "lora", "head")


def quick_plan() -> list[Run]:
    """The demonstration task, which needs neither data nor network, at sizes that show how all of it works."""
    methods, seeds = _FEW_METHODS, (0, 1)
    return [
        run("parameter_count"),
        run("johnson_lindenstrauss", draws=2000),
        run("width_convergence", widths=(32, 64, 128, 256), draws=4, activations=("linear", "relu", "gelu", "erf")),
        run("theorem1", width=128, n_in=128, draws=2, transformer_widths=(16, 32), transformer_draws=2),
        run("degree_scale", widths=(32, 64), depths=(1, 2), draws=2, n_examples=4),
        run("complexity", n=256, m=256, tokens=256, repeats=5),
        run("peft_kernels/demo", n_examples=8, seeds=seeds, resamples=50, null_draws=1, top=4),
        run("kernel_distance/demo", n_examples=8, max_steps=12, per_device_train_batch_size=8, resamples=50,
            null_draws=1),
        run("memory", methods=("full", "propulsion:positions=all", "lora"), rounds=1,
            **_SHORT | {"max_steps": 3, "n_train": 24, "n_validation": 8}),
        run("method_comparison/demo", methods=methods, seeds=seeds, tuning_steps=3, rate_extensions=0,
            **_SHORT),
        rated("convergence", "demo", methods=methods, seeds=seeds, every=3, **_SHORT),
        rated("delta_weights", "demo", methods=methods[:4], **_SHORT),
        run("kernel_drift/demo", n_examples=8, n_jacobians=3, seeds=seeds, checkpoints=(1.0,), resamples=50,
            null_draws=1, methods=methods[:2], **_SHORT),
        run("spectrum/demo", n_examples=12, seeds=seeds, null_draws=20, methods=(*methods[:2], "lora")),
        run("linearized_prediction/demo", sizes=(16,), n_test=24, seeds=seeds, sign_limit=0, again=(),
            permutations=5, methods=methods[:2], max_steps=6, per_device_train_batch_size=8, max_length=32),
        *(run(f"ablation/{factor}", factor=factor, seeds=seeds, **_SHORT)
          for factor in ("degree_fixed_rate", "positions", "vectors", "init_value")),
    ]  # fmt: skip


def full_plan(
    tasks: Sequence[str], data_dir: Path | None, language_model: Path | None, *, gpu: bool = False
) -> list[Run]:
    """The runs that docs/results publishes, the cheap ones first.

    Args:
        tasks: GLUE tasks; analyses of one task take the first.
        data_dir: Folder with a folder of each task's data; else the Hugging Face hub.
        language_model: Causal language model for what is generated; without it that is left out.
        gpu: Whether there is a GPU, for the runs that measure one.
    """
    first, tasks = tasks[0], tuple(tasks)
    source = {"data_dir": data_dir}
    on_first = source | {"task": first}
    models = () if language_model is None else (language_model.as_posix(),)
    small = FIXED | {"max_steps": 60, "n_train": 960, "n_validation": 400}
    # Scales on few layers learn nothing in runs so short, at the rate that suits scales on all.
    longer = {"max_steps": 150, "n_train": 2400, "n_validation": 400, "rate_multiplier": 2.0}
    sizes = {"positions": longer | GROUPED | FIXED}
    plan = [
        run("parameter_count"),
        run("theorem1"),
        run("width_convergence", draws=48),
        run("johnson_lindenstrauss"),
        run("complexity"),
        run("degree_scale", tasks=tasks, n_examples=16, models=models, **source),
        run("memory", **on_first, **FIXED),
        *(run(f"peft_kernels/{task}", task=task, n_examples=128, memory_budget_gb=5.0, **source) for task in tasks),
        *(run(f"kernel_distance/{task}", task=task, n_examples=128, seeds=(0, 1, 2), memory_budget_gb=8.0, **source,
              **DISTANCES.get(task, DISTANCE), **FIXED) for task in tasks),
        *(one for task in tasks for one in _comparisons(task, source)),
        rated("convergence", first, max_steps=100, every=20, n_train=1600, n_validation=300, **on_first, **GROUPED,
              **FIXED),
        rated("delta_weights", first, n_validation=400, **on_first, **GROUPED, **FIXED),
        *(rated(f"kernel_drift/{task}", task, task=task, n_examples=128, **source, **DRIFTS.get(task, DRIFT), **FIXED)
          for task in tasks),
        *(run(f"spectrum/{task}", task=task, n_examples=128, **source) for task in tasks),
        *(rated(f"linearized_prediction/{task}", task, task=task, sizes=(32, 128, 512), n_test=128, again=(),
                max_steps=60, **source, **FIXED)
          for task in tasks if get_labelled_task(task).num_labels == 2),
        run("pooling", tasks=("demo", first), **source),
        run("default_rates", tasks=tasks, **source),
        run("decomposition", task=first, n_examples=128, seeds=(0, 1, 2), **source),
        run(f"lora_law/{first}", task=first, n_examples=64, draws=3, memory_budget_gb=4.0, **source),
        run("choose", budget_minutes=30.0, max_length=64, max_steps=100, n_train=200, n_validation=80,
            candidates=("full", "lora:r=8", "propulsion", "bitfit", "head", "ia3")),
        *(run(f"ablation/{factor}", factor=factor, **on_first, **sizes.get(factor, small))
          for factor in ("degree_fixed_rate", "degree", "positions", "vectors", "init_value", "layers")),
    ]  # fmt: skip
    for model in models:
        of_words = {"task": "sst2", "model": model, "head": "label_words", **source}
        plan += [
            run("instruction_tuning", data_dir=data_dir and data_dir / "sst2", model=model, max_steps=30,
                max_train_samples=240, max_eval_samples=150),
            run("peft_kernels/sst2-label_words", n_examples=64, memory_budget_gb=4.0, **of_words),
            run("linearized_prediction/sst2-label_words", sizes=(32,), n_test=64, seeds=(0,), again=(), max_steps=20,
                per_device_train_batch_size=8, sign_limit=32, **of_words, **FIXED),
        ]  # fmt: skip
    if gpu:
        plan += [
            run("memory/gpu", task="rte", rounds=1, per_device_train_batch_size=128, max_length=128, device="cuda",
                **source, **FIXED),
            rated("convergence/gpu", first, max_steps=600, every=60, n_train=9600, n_validation=872, device="cuda",
                  **on_first, **GROUPED, **FIXED),
        ]  # fmt: skip
    return plan


FIXED: Options = {"learning_rate": None, "head_learning_rate": None}
"""The rates of what is published: the fixed ones of each role, and what comparisons chose as multiples of them."""
GROUPED: Options = {"train_sampling_strategy": "group_by_length"}
BF16: Options = {"bf16": True}
COMPARISONS: Mapping[str, Options] = {
    "sst2": {"max_steps": 150, "tuning_steps": 150, "rate_extensions": 4, "n_train": 2400},
    "stsb": {"max_steps": 250, "tuning_steps": 250, "rate_extensions": 4, "n_train": 2000, "n_validation": 500} | BF16,
    "cola": {"max_steps": 800, "tuning_steps": 400, "per_device_train_batch_size": 32, "n_train": 8551,
             "n_validation": 1043} | BF16,
    "rte": {"max_steps": 700, "max_length": 128, "n_train": 2489, "n_validation": 277} | BF16,
}  # fmt: skip
COMPARISON: Options = {"max_steps": 250, "tuning_steps": 100, "n_train": 2000, "n_validation": 500}
DISTANCES: Mapping[str, Options] = {
    # In fewer steps, both models give one answer.
    "cola": {"max_steps": 600, "per_device_train_batch_size": 32} | BF16 | GROUPED,
    "rte": {"max_steps": 200} | BF16 | GROUPED,
    "stsb": {"max_steps": 200} | BF16,
}
"""How the two models of each task are trained whose kernels are compared; by default `DISTANCE`."""
DISTANCE: Options = {"max_steps": 200}
DRIFTS: Mapping[str, Options] = {
    "stsb": {"max_steps": 250, "n_train": 2000, "n_validation": 500} | BF16,
    "cola": {"max_steps": 400, "per_device_train_batch_size": 32, "n_train": 8551, "n_validation": 400} | BF16
            | GROUPED,
    "rte": {"max_steps": 350, "lr_scheduler_type": "constant_with_warmup", "n_train": 2489} | BF16 | GROUPED,
}  # fmt: skip
"""How each task is trained while drift is measured, nearly as in its comparison; by default `DRIFT`."""
DRIFT: Options = {"max_steps": 100, "n_train": 1600, "n_validation": 400}
RATES: Mapping[str, Options] = {
    "rte": {"max_steps": 1000, "tuning_steps": 1000, "max_length": 128, "n_train": 2489, "n_validation": 277}
}
"""Comparisons that try learning rates for that of the same task, which chooses by the score: what fits RTE's rows makes
the held-out loss worse, so that by the loss the rate is chosen at which least is learnt."""


def _comparisons(task: str, source: Options) -> list[Run]:
    """Methods against each other on a task."""
    # On STS-B, where length tells the source, batches of similar lengths slow the learning down.
    shared = {"tasks": (task,), **source, **FIXED, **({} if task == "stsb" else GROUPED)}
    name = f"method_comparison/{task}"
    own = shared | COMPARISONS.get(task, COMPARISON)
    if task not in RATES:
        return [Run(name, own)]
    tried = name + TRIED_RATES
    return [
        Run(tried, shared | RATES[task]),
        Run(name, own | {"rates_from": Earlier(tried), "chosen_by": "score"}),
    ]


def needed(plan: Iterable[Run], claims: Sequence[Claim], everything: bool) -> list[Run]:
    """The runs that some claims are judged by, and those whose results they read; or all runs."""
    plan = list(plan)
    if everything:
        return plan
    needs = [need for claim in claims for need in (*claim.needs, *claim.also)]
    names = set(matching(needs, [run.name for run in plan]))
    names |= {name for run in plan if run.name in names for name in run.after}
    return [run for run in plan if run.name in names]


def check_root(root: Path, *, quick: bool) -> None:
    """Make sure that a folder holds runs of one size, and can be written.

    Raises:
        UserError: It holds runs of the other size, or cannot be written.
    """
    mark = root / MARK
    if quick and not mark.exists() and any(root.rglob(RESULT_FILE)):
        raise UserError(f"{root} holds results that --quick did not make: name another --output-dir")
    if not quick and mark.exists():
        raise UserError(f"{root} holds a quick run: name another --output-dir")
    try:
        (root / LOGS).mkdir(parents=True, exist_ok=True)
        if quick:
            mark.write_text("Results of python -m analyses.claims --quick.\n", encoding="utf-8")
    except OSError as error:
        raise UserError(f"cannot write results to {root}: {error.strerror or error}") from error


def carry_out(plan: Sequence[Run], root: Path, launch: Launch | None = None) -> dict[str, str]:
    """Run what has no result yet, each in a process of its own, so that its memory is freed at the end.

    A killed run leaves no partial result; the same call resumes where it was, within a grid too.

    Args:
        plan: The runs, in order.
        root: The folder of all results.
        launch: Runs a command with its output in a file; `in_own_process` by default.

    Returns:
        What went wrong, by the run's name, in one line.
    """
    failed: dict[str, str] = {}
    print(f"{len(plan)} runs; what each prints is in {root / LOGS}", flush=True)
    durations: list[float] = []
    for place, run in enumerate(plan, 1):
        head = f"[{place:>{len(str(len(plan)))}}/{len(plan)}] {run.name}"
        if is_complete(root / run.name):
            if (message := _other(run, root)) is not None:
                failed[run.name] = message
            print(f"{head}: {message or 'there already'}", flush=True)
        elif waits := [name for name in run.after if name in failed]:
            failed[run.name] = f"waits for {', '.join(waits)}"
            print(f"{head}: {failed[run.name]}", flush=True)
        else:
            print(f"{head} ...", flush=True)
            started = time.monotonic()
            message = _run(run, root, launch or in_own_process)
            if message is not None:
                failed[run.name] = message
            durations.append(time.monotonic() - started)
            # Runs differ in length, so this is a rough guess; those that are there already are not computed again.
            rest = (len(plan) - place) * sum(durations) / len(durations) / 60
            left = f"; about {math.ceil(rest)} min for the rest" if rest else ""
            print(f"{head}: {message or 'done'}, {durations[-1]:.0f} s{left}", flush=True)
    return failed


def is_complete(folder: Path) -> bool:
    """Whether a result folder is there; it appears only when it is whole."""
    return (folder / RESULT_FILE).is_file()


def _other(run: Run, root: Path) -> str | None:
    """What sets the result in a run's folder apart from the run, in one line; None if it is of that run."""
    folder = root / run.name
    try:
        different = differing(load_result(folder), run.config(root))
    except RecordError as error:
        return str(error)
    if not different:
        return None
    options = ", ".join(f"{name} {found} instead of {asked}" for name, (found, asked) in different.items())
    return f"{folder} holds a result of another run, with {options}: move it away or name another --output-dir"


def in_own_process(command: Sequence[str], log: Path) -> int:
    """Run a command, its output in a file; its exit code, negative for the signal that killed it."""
    with log.open("w", encoding="utf-8") as output:
        return run_python(command[1:], stdout=output, stderr=subprocess.STDOUT).returncode


def _run(run: Run, root: Path, launch: Launch) -> str | None:
    """Run; one line on what went wrong, or None."""
    log = root / LOGS / f"{run.name.replace('/', '-')}.log"
    code = launch(run.command(root), log)
    # The result decides, since a process that outlived a killed call may have written it meanwhile.
    if is_complete(root / run.name):
        return None
    lines = [line for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    last = lines[-1].strip().removeprefix("error: ") if lines else "no message"
    return f"failed ({'killed' if code < 0 else f'exit {code}'}): {last}"
