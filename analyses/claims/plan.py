"""The runs behind the ledger, in quick and in full size, and how each is carried out once in its own process."""

import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from analyses.claims.claim import TRIED_RATES, Claim
from analyses.claims.judge import matching
from analyses.records import RESULT_FILE
from propulsion.data.tasks import get_labelled_task
from propulsion.errors import UserError

LOGS = "logs"
MARK = "QUICK"
"""Name of the file that marks a folder of quick runs, so that no ledger mixes the two sizes."""
ROOT = "{root}"
"""Stands in arguments for the folder of all results."""

Launch = Callable[[Sequence[str], Path], int]


@dataclass(frozen=True)
class Run:
    """One analysis run once.

    Attributes:
        name: Its result folder below the root; its first part is the analysis.
        arguments: Its options.
        after: Results that it reads.
    """

    name: str
    arguments: tuple[str, ...] = ()
    after: tuple[str, ...] = ()

    def command(self, root: Path) -> list[str]:
        """The words of its command line."""
        options = [word.replace(ROOT, str(root)) for word in self.arguments]
        return ["python", "-m", f"analyses.{self.name.split('/')[0]}", *options, "--output-dir", str(root / self.name)]


def words(options: str) -> tuple[str, ...]:
    """Options as they are typed."""
    return tuple(options.split())


def rated(name: str, task: str, options: tuple[str, ...]) -> Run:
    """A run at the learning rates that the comparison of methods chose on a task."""
    comparison = f"method_comparison/{task}"
    return Run(name, (*options, "--comparison", f"{ROOT}/{comparison}"), (comparison,))


_FEW_METHODS = "--methods full propulsion:positions=all propulsion:positions=attn lora head"
_TINY = "--max-steps 6 --per-device-train-batch-size 8 --n-train 48 --n-validation 24 --max-length 32"


def quick_plan() -> list[Run]:
    """The demonstration task, which needs neither data nor network, at sizes that show how all of it works."""
    return [
        Run("parameter_count"),
        Run("johnson_lindenstrauss", words("--draws 2000")),
        Run("width_convergence", words("--widths 32 64 128 256 --draws 4 --activations linear relu gelu erf")),
        Run("theorem1", words("--width 128 --n-in 128 --draws 2 --transformer-widths 16 32 --transformer-draws 2 "
                              "--n-examples 8")),
        Run("degree_scale", words("--widths 32 64 --depths 1 2 --draws 2 --n-examples 4")),
        Run("complexity", words("--n 256 --m 256 --tokens 256 --repeats 5")),
        Run("peft_kernels/demo", words("--n-examples 8 --seeds 0 1 --resamples 50 --null-draws 1 --top 4")),
        Run("kernel_distance/demo", words("--n-examples 8 --max-steps 12 --per-device-train-batch-size 8 "
                                          "--resamples 50 --null-draws 1")),
        Run("memory", words("--methods full propulsion:positions=all lora --rounds 1 --max-steps 3 "
                            "--per-device-train-batch-size 8 --n-train 24 --n-validation 8 --max-length 32")),
        Run("method_comparison/demo", words(f"{_FEW_METHODS} --seeds 0 1 {_TINY} --tuning-steps 3 --rate-extensions 0 "
                                            "--resamples 100")),
        rated("convergence", "demo", words(f"{_FEW_METHODS} --seeds 0 1 --every 3 {_TINY}")),
        rated("delta_weights", "demo",
              words(f"--methods full propulsion:positions=all propulsion:positions=attn lora {_TINY}")),
        Run("kernel_drift/demo", words(f"--n-examples 8 --n-jacobians 3 --seeds 0 1 --checkpoints 1 --resamples 50 "
                                       f"--null-draws 1 --methods full propulsion:positions=all {_TINY}")),
        Run("spectrum/demo", words("--n-examples 12 --seeds 0 1 --null-draws 20 "
                                   "--methods full propulsion:positions=all lora")),
        Run("linearized_prediction/demo", words("--sizes 16 --n-test 24 --seeds 0 1 --sign-limit 0 --again "
                                                "--permutations 5 --methods full propulsion:positions=all "
                                                "--max-steps 6 --per-device-train-batch-size 8 --max-length 32")),
        *(Run(f"ablation/{factor}", words(f"--factor {factor} --seeds 0 1 {_TINY}"))
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
    first = tasks[0]
    every = () if data_dir is None else ("--data-dir", data_dir.as_posix())

    def of(task: str) -> tuple[str, ...]:
        return ("--task", task, *every)

    models = () if language_model is None else ("--models", language_model.as_posix())
    small = words("--max-steps 60 --n-train 960 --n-validation 400") + FIXED
    # Scales on few layers learn nothing in runs so short, at the rate that suits scales on all.
    longer = words("--max-steps 150 --n-train 2400 --n-validation 400 --rate-multiplier 2")
    sizes = {"positions": longer + GROUPED + FIXED}
    plan = [
        Run("parameter_count"),
        Run("theorem1", of(first)),
        Run("width_convergence"),
        Run("johnson_lindenstrauss"),
        Run("complexity"),
        Run("degree_scale", ("--tasks", *tasks, *every, "--n-examples", "16", *models)),
        Run("memory", of(first) + FIXED),
        *(Run(f"peft_kernels/{task}", of(task) + words("--n-examples 128 --memory-budget-gb 5")) for task in tasks),
        *(Run(f"kernel_distance/{task}", of(task) + words("--n-examples 128 --seeds 0 1 2 --memory-budget-gb 8")
              + DISTANCES.get(task, DISTANCE) + FIXED) for task in tasks),
        *(run for task in tasks for run in _comparisons(task, every)),
        rated("convergence", first, of(first) + words("--max-steps 100 --every 20 --n-train 1600 --n-validation 300")
              + GROUPED + FIXED),
        rated("delta_weights", first, of(first) + words("--n-validation 400") + GROUPED + FIXED),
        *(rated(f"kernel_drift/{task}", task, of(task) + words("--n-examples 128") + DRIFTS.get(task, DRIFT) + FIXED)
          for task in tasks),
        *(Run(f"spectrum/{task}", of(task) + words("--n-examples 128")) for task in tasks),
        *(rated(f"linearized_prediction/{task}", task,
                of(task) + words("--sizes 32 128 512 --n-test 128 --again --max-steps 60") + FIXED)
          for task in tasks if get_labelled_task(task).num_labels == 2),
        Run("pooling", ("--tasks", "demo", first, *every)),
        Run("default_rates", ("--tasks", *tasks, *every)),
        *(Run(f"ablation/{factor}", (*of(first), "--factor", factor, *sizes.get(factor, small)))
          for factor in ("degree_fixed_rate", "degree", "positions", "vectors", "init_value", "layers")),
    ]  # fmt: skip
    if language_model is not None:
        data = () if data_dir is None else ("--data-dir", (data_dir / "sst2").as_posix())
        size = words("--max-steps 30 --max-train-samples 240 --max-eval-samples 150")
        plan.append(Run("instruction_tuning", (*data, "--model", language_model.as_posix(), *size)))
        in_words = ("--model", language_model.as_posix(), "--head", "label_words")
        plan += [
            Run("peft_kernels/sst2-label_words", of("sst2") + in_words + words("--n-examples 64 --memory-budget-gb 4")),
            Run("linearized_prediction/sst2-label_words", of("sst2") + in_words + words(
                "--sizes 32 --n-test 64 --seeds 0 --again --max-steps 20 --per-device-train-batch-size 8 "
                "--sign-limit 32") + FIXED),
        ]  # fmt: skip
    if gpu:
        plan += [
            Run("memory/gpu", of("rte") + words("--rounds 1 --per-device-train-batch-size 128 --max-length 128 "
                                                "--device cuda") + FIXED),
            rated("convergence/gpu", first, of(first) + words("--max-steps 600 --every 60 --n-train 9600 "
                                                              "--n-validation 872 --device cuda") + GROUPED + FIXED),
        ]  # fmt: skip
    return plan


FIXED = words("--learning-rate None --head-learning-rate None")
"""The rates of what is published: the fixed ones of each role, and what comparisons chose as multiples of them."""
GROUPED = words("--train-sampling-strategy group_by_length")
COMPARISONS = {
    "sst2": words("--max-steps 150 --tuning-steps 150 --rate-extensions 4 --n-train 2400"),
    "stsb": words("--max-steps 250 --tuning-steps 250 --rate-extensions 4 --n-train 2000 --n-validation 500 --bf16"),
    "cola": words("--max-steps 800 --tuning-steps 400 --per-device-train-batch-size 32 --n-train 8551 "
                  "--n-validation 1043 --bf16"),
    "rte": words("--max-steps 700 --max-length 128 --n-train 2489 --n-validation 277 --bf16"),
}  # fmt: skip
COMPARISON = words("--max-steps 250 --tuning-steps 100 --n-train 2000 --n-validation 500")
DISTANCES = {
    # In fewer steps, both models give one answer.
    "cola": words("--max-steps 600 --per-device-train-batch-size 32 --bf16") + GROUPED,
    "rte": words("--max-steps 200 --bf16") + GROUPED,
    "stsb": words("--max-steps 200 --bf16"),
}
"""How the two models of each task are trained whose kernels are compared; by default `DISTANCE`."""
DISTANCE = words("--max-steps 200")
DRIFTS = {
    "stsb": words("--max-steps 250 --n-train 2000 --n-validation 500 --bf16"),
    "cola": words("--max-steps 400 --per-device-train-batch-size 32 --n-train 8551 --n-validation 400 --bf16")
            + GROUPED,
    "rte": words("--max-steps 350 --lr-scheduler-type constant_with_warmup --n-train 2489 --bf16") + GROUPED,
}  # fmt: skip
"""How each task is trained while drift is measured, nearly as in its comparison; by default `DRIFT`."""
DRIFT = words("--max-steps 100 --n-train 1600 --n-validation 400")
RATES = {"rte": words("--max-steps 1000 --tuning-steps 1000 --max-length 128 --n-train 2489 --n-validation 277")}
"""Comparisons that try learning rates for that of the same task, which chooses by the score: what fits RTE's rows makes
the held-out loss worse, so that by the loss the rate is chosen at which least is learnt."""


def _comparisons(task: str, every: tuple[str, ...]) -> list[Run]:
    """Methods against each other on a task."""
    # On STS-B, where length tells the source, batches of similar lengths slow the learning down.
    grouped = FIXED if task == "stsb" else GROUPED + FIXED
    name, options = f"method_comparison/{task}", ("--tasks", task, *every)
    own = (*options, *COMPARISONS.get(task, COMPARISON), *grouped)
    if task not in RATES:
        return [Run(name, own)]
    rated = name + TRIED_RATES
    return [
        Run(rated, (*options, *RATES[task], *grouped)),
        Run(name, (*own, "--rates-from", f"{ROOT}/{rated}", "--chosen-by", "score"), (rated,)),
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
    for place, run in enumerate(plan, 1):
        head = f"[{place:>{len(str(len(plan)))}}/{len(plan)}] {run.name}"
        if is_complete(root / run.name):
            print(f"{head}: there already", flush=True)
        elif waits := [name for name in run.after if name in failed]:
            failed[run.name] = f"waits for {', '.join(waits)}"
            print(f"{head}: {failed[run.name]}", flush=True)
        else:
            print(f"{head} ...", flush=True)
            started = time.monotonic()
            message = _run(run, root, launch or in_own_process)
            if message is not None:
                failed[run.name] = message
            print(f"{head}: {message or 'done'}, {time.monotonic() - started:.0f} s", flush=True)
    return failed


def is_complete(folder: Path) -> bool:
    """Whether a result folder is there; it appears only when it is whole."""
    return (folder / RESULT_FILE).is_file()


def in_own_process(command: Sequence[str], log: Path) -> int:
    """Run a command, its output in a file; its exit code, negative for the signal that killed it."""
    with log.open("w", encoding="utf-8") as output:
        words = [sys.executable, *command[1:]]
        return subprocess.run(words, stdout=output, stderr=subprocess.STDOUT, check=False).returncode


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
