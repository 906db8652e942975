"""The command: run or load, judge, print and write."""

import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch

import analyses.claims
from analyses.claims import plan, report
from analyses.claims.judge import TASKS, choose, judge, load_tree
from analyses.claims.model_plan import model_plan
from analyses.claims.page import page, pictures
from analyses.core.errors import run_command
from analyses.core.locks import held
from analyses.records import Result
from analyses.records.atomic import write_texts
from analyses.records.errors import RecordError
from propulsion.command_line import parsed
from propulsion.errors import Interrupted, UserError
from propulsion.pretrained.options import LoadingOptions

_OF_MODELS = {"model", "models"}
"""Options of a run by which it names pre-trained models."""


@dataclass(frozen=True)
class Config(LoadingOptions):
    """The ledger of the paper's claims."""

    quick: bool = False
    """Run the demonstration task at small sizes, and judge that."""
    data_dir: Path | None = None
    """Folder of the task's files, or of several tasks' folders; without it, the Hugging Face hub."""
    tasks: tuple[str, ...] = TASKS
    """Tasks of the full run; what is measured on one task takes the first."""
    model: str | None = None
    """Run what docs/claims/plan.md says on this encoder, by name, hub name or folder, into the folder of its name."""
    language_model: Path | None = None
    """Name, GGUF file or folder of a causal language model, for the full run; without it, none is tuned."""
    load: Path | None = None
    """Judge the result folders below this one, and run nothing."""
    only: tuple[str, ...] = ()
    """Judge these claims alone, and run what they need; all by default."""
    show_plan: bool = False
    """Print the commands of the runs, and stop."""
    output_dir: Path | None = None
    """Folder of results and reports, results/claims or results/claims-quick by default. With --load, folder of the
    reports; without it they are printed and not written."""


def main(config: Config) -> None:
    """Run or load, judge, print, write.

    Raises:
        UserError: Options that contradict each other, an unknown claim, folders that cannot be read or written, or a
            folder in which another process works.
        Interrupted: The process was interrupted; the finished runs are kept.
    """
    claims = choose(config.only)
    if config.load is not None:
        if config.quick or config.show_plan or config.model:
            raise UserError("--load runs nothing: leave out --quick, --show-plan and --model")
        write(config, load_tree(config.load), config.load, config.output_dir)
        return
    root = config.output_dir or Path("results") / ("claims-quick" if config.quick else "claims")
    runs = plan.needed(_plan(config), claims, everything=not config.only)
    if config.show_plan:
        for run in runs:
            print(" ".join(run.command(root)))
        return
    _check_inputs(config)
    plan.check_root(root, quick=config.quick)
    with held(root):
        try:
            failed = plan.carry_out(runs, root)
        except KeyboardInterrupt as error:
            raise Interrupted("the same command goes on from here") from error
        # A folder that holds another run, or a damaged one, is no evidence.
        results = load_tree(root, [run.name for run in runs if run.name not in failed])
        try:
            write(config, results, root, root)
        except RecordError as error:
            raise UserError(
                f"{error}; the results of {len(results)} finished runs in {root} are kept: the same command goes on "
                "from there, or --load judges them and writes elsewhere"
            ) from error
    if failed:
        for name, message in failed.items():
            print(f"{name}: {message}; log in {root / plan.LOGS}", file=sys.stderr)
        raise SystemExit(1)


def _check_inputs(config: Config) -> None:
    """Check the inputs of all runs before the first of them starts."""
    if again := [task for task in config.tasks if config.tasks.count(task) > 1]:
        raise UserError(f"tasks must be different from each other; {again[0]} is given more than once")
    for name, path in (("data_dir", config.data_dir), ("language_model", config.language_model)):
        if path is not None and not path.expanduser().exists():
            raise UserError(f"{name} is {path}, which does not exist")


def write(config: Config, results: Mapping[str, Result], root: Path, folder: Path | None) -> None:
    """Judge the results of a folder, print the table, write the reports into another."""
    content = report.ledger(
        judge(choose(config.only), results), results, report.as_given(root), quick=(root / plan.MARK).exists()
    )
    print(f"\n{report.text(content)}\n")
    if content["quick"]:
        print(f"{report.QUICK}\n")
    if folder is None:
        return
    # Figures read results; only this last step of a command knows of them.
    from figures.all import captions

    files = {
        "claims.md": report.markdown(content, root, folder),
        "ledger.json": report.to_json(content),
        "report.html": page(content, pictures(root, results, captions())),
    }
    write_texts(folder, files)
    print(f"{', '.join(files)} in {folder}")


def _plan(config: Config) -> list[plan.Run]:
    """The runs of the configuration; those of a named model load it with the options of `LoadingOptions`."""
    accepted = {name: True for name, value in config.loading.items() if value}
    if accepted and not (config.model or config.language_model):
        raise UserError(f"{next(iter(accepted))} is of a named model: give it by --model or --language-model")
    runs = _runs(config)
    return [replace(run, options={**run.options, **accepted}) if run.options.keys() & _OF_MODELS else run
            for run in runs]  # fmt: skip


def _runs(config: Config) -> list[plan.Run]:
    if config.quick:
        if config.model:
            raise UserError("--quick is of the default model: leave out --model")
        return plan.quick_plan()
    if not config.tasks:
        raise UserError("name one task at least")
    if config.model:
        return model_plan(config.model, config.tasks, config.data_dir)
    return plan.full_plan(config.tasks, config.data_dir, config.language_model, gpu=torch.cuda.is_available())


if __name__ == "__main__":
    run_command(lambda: main(parsed(Config, prog="python -m analyses.claims", description=analyses.claims.__doc__)))
