"""The folder of a training run: finding out which run it holds, and writing results into it."""

import contextlib
import dataclasses
import json
import math
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peft import PeftModel
from transformers import PreTrainedTokenizerBase
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from propulsion.adapters import explain_loading, save_base
from propulsion.atomic import beside
from propulsion.errors import UserError, WriteError, explained
from propulsion.pretrained import pooling_of
from propulsion.training.checkpoints import checkpoints, clear_leftovers, latest_checkpoint, remove_checkpoint, steps_of
from propulsion.training.learning_rates import RoleRate
from propulsion.training.manifest import MANIFEST, Manifest
from propulsion.training.trainer import TaskTrainer
from propulsion.user_files import expanded

RECORD, RATES, RESULT, PREDICTIONS, MODEL = "run.json", "rates.json", "result.json", "predictions.json", "model"
LENGTHS = ("max_steps", "num_train_epochs")
"""Fields that set the length of a run; with larger values a run is continued."""
_EXTENDED = "extended_at"
ANOTHER = "name another --output-dir"
ANEW = f"{ANOTHER}, or pass --overwrite-output-dir to start anew"
"""What the messages about a folder that cannot be used advise, in the options of `propulsion.train`."""


@dataclass(frozen=True)
class FolderState:
    """What a folder holds when a run starts in it.

    Attributes:
        finished: The run's stored result if the run is finished, otherwise None.
        extended_at: Steps after which the run was made longer, in order; the last one may be by this call.
        replaces: Whether an earlier run is to be removed first.
    """

    finished: dict[str, Any] | None = None
    extended_at: tuple[int, ...] = ()
    replaces: bool = False


def check_folder(output: Path, *, overwrite: bool) -> None:
    """Make sure that a folder does not exist, is empty, or holds a run. Changes nothing.

    Raises:
        UserError: It is a file, or holds other files.
    """
    with explained(f"use the folder {output}"):
        if (output.exists() or output.is_symlink()) and not output.is_dir():
            what = "a link to itself" if output.is_symlink() else "a file"
            raise UserError(f"{output} is {what}, expected a folder: {ANOTHER}")
        manifest = Manifest(output)
        names, known = manifest.others(), manifest.exists
        if known and overwrite:
            _refuse_to_lose(manifest, [output / name for name in names if _is_a_runs(name)])
        if known or not names:
            return
    shown = f"{names[0]}{'' if len(names) == 1 else f' and {len(names) - 1} more'}"
    what = "files that no run is known to have written" if RECORD in names else "something else"
    listed = f", and a {MANIFEST} that is damaged or of another program" if (output / MANIFEST).exists() else ""
    raise UserError(f"{output} holds {what} ({shown}){listed}: {ANOTHER}, which is empty or holds a run")


def folder_state(output: Path, identity: Mapping[str, Any], *, overwrite: bool) -> FolderState:
    """Compare the run in a folder, which `check_folder` has accepted, with the run to be started. Changes nothing.

    `identity` holds what two runs must have in common for one to resume the other (`config.identity`). With
    `overwrite`, an earlier run is to be removed, whatever its identity.

    Raises:
        UserError: It holds another run, or a finished one whose files are damaged or missing.
    """
    if overwrite:
        return FolderState(replaces=bool(Manifest(output).others()))
    stored = _read(output / RECORD, dict, ANOTHER)
    if stored is None:
        if leftovers := [name for name in Manifest(output).others() if _is_a_runs(name)]:
            raise UserError(f"{output} has {leftovers[0]} but no {RECORD} that says of which run: {ANEW}")
        return FolderState()
    extended = tuple(stored.pop(_EXTENDED, ()))
    if stored == identity:
        if (finished := result_of(output)) is not None:
            _check_finished(output)
        return FolderState(finished, extended)
    names = sorted(name for name in {*stored, *identity} if stored.get(name) != identity.get(name))
    if set(names) <= set(LENGTHS) and _longer(output, stored, identity):
        return FolderState(None, (*extended, _to_go_on_from(output, identity)))
    shown = ", ".join(f"{name} {_short(stored.get(name))} there, {_short(identity.get(name))} here" for name in names)
    raise UserError(f"{output} holds a run of another configuration ({shown}): {ANEW}")


def _check_finished(output: Path) -> None:
    """Check that the model and the predictions of a finished run are as the run wrote them."""
    for path in (output / MODEL, output / PREDICTIONS):
        if damage := Manifest(output).damaged(path):
            last = latest_checkpoint(output)
            again = "trains again" if last is None else f"writes both again from {last.name}"
            raise UserError(
                f"{output} holds a finished run, but {damage}: put it back, or remove {path.name} and {RESULT}, and "
                f"the same command {again}"
            )


def claim(output: Path, identity: Mapping[str, Any], state: FolderState) -> None:
    """Record this run in the folder: as a new run, in place of an earlier one, or as the continuation of one.

    Files that the earlier run did not write are kept.

    Raises:
        UserError: A file that no run wrote would be lost, or the folder cannot be written.
    """
    manifest = Manifest(output)
    record = dict(identity) | ({_EXTENDED: list(state.extended_at)} if state.extended_at else {})
    with explained(f"use the folder {output}"):
        names = manifest.others()
        if not names and not manifest.exists:
            manifest.start()
        if state.replaces:
            _refuse_to_lose(manifest, [output / name for name in names if _is_a_runs(name)])
            _clear(manifest)
        elif names:
            # These files will be replaced. Checkpoints with foreign files in them are never removed later.
            _refuse_to_lose(manifest, [output / name for name in names if name in (MODEL, RESULT, PREDICTIONS)])
            clear_leftovers(output)
        if _read(output / RECORD, dict, ANOTHER) != record:
            for path in (output / RESULT, output / PREDICTIONS):
                if path.exists():
                    _set_aside(manifest, path, state.extended_at[-1])
            manifest.write_json(output / RECORD, record)


def _is_a_runs(name: str) -> bool:
    """Whether a run reads a file or folder of this name."""
    return name in (RECORD, RATES, RESULT, PREDICTIONS, MODEL) or name.startswith(f"{PREFIX_CHECKPOINT_DIR}-")


def _refuse_to_lose(manifest: Manifest, paths: Sequence[Path]) -> None:
    for path in paths:
        if others := manifest.not_own(path):
            raise UserError(
                f"{others[0]} is not as the run in {manifest.folder} wrote it, and would be lost: move it away, or "
                f"{ANOTHER}"
            )


def _clear(manifest: Manifest) -> None:
    """Remove what a run wrote; its result goes first, so that a half-removed run never looks finished."""
    folder = manifest.folder
    clear_leftovers(folder)
    for path in [folder / RESULT, folder / PREDICTIONS, *reversed(checkpoints(folder))]:
        if path.is_dir():
            remove_checkpoint(path)
        elif path.exists():
            manifest.remove(path)
    for path in sorted(manifest.own(), key=lambda path: path == folder / RECORD):
        manifest.remove(path)
    manifest.start()
    if kept := manifest.others():
        print(f"the earlier run in {folder} is removed; kept, since it did not write them: {', '.join(kept)}")


def _set_aside(manifest: Manifest, path: Path, step: int) -> None:
    """Keep a result file of a shorter run under a name with its number of steps."""
    kept = path.with_name(f"{path.stem}-{step}{path.suffix}")
    if kept.exists():
        if manifest.not_own(kept):
            raise UserError(f"{kept} is in the way of the shorter run's {path.name}, which is kept there: move it away")
        manifest.remove(kept)
    manifest.record({kept.name: path})
    os.rename(path, kept)


def _longer(output: Path, stored: Mapping[str, Any], identity: Mapping[str, Any]) -> bool:
    """Whether a run is longer than the one in its folder."""
    steps, before = identity["max_steps"], stored["max_steps"]
    if steps > 0:
        taken = max(steps_of(latest_checkpoint(output)), (result_of(output) or {"steps": 0})["steps"])
        return steps > (before if before >= 0 else taken)
    return steps == before and identity["num_train_epochs"] > stored["num_train_epochs"]


def _to_go_on_from(output: Path, identity: Mapping[str, Any]) -> int:
    last = latest_checkpoint(output)
    if last is None and (output / RESULT).exists():
        raise UserError(f"{output} holds a finished run without a checkpoint, from which it could go on: {ANEW}")
    if identity["method"] == "adalora":
        raise UserError(f"adalora plans its ranks for the steps it was started with, and cannot go on longer: {ANEW}")
    return steps_of(last)


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 40 else f"{text[:12]}..."


def save_model(trainer: TaskTrainer, destination: Path, tokenizer: PreTrainedTokenizerBase, base: str) -> None:
    """Write the trained model or adapter with its tokenizer and the fingerprint of its base model, all or nothing.

    Raises:
        UserError: It cannot be written.
    """
    partial = beside(destination)
    with explained(f"write {destination}", WriteError), _removed_after_an_error(partial):
        if trainer.args.should_save:
            shutil.rmtree(partial, ignore_errors=True)
        sharding = trainer.accelerator.state.fsdp_plugin if trainer.is_fsdp_enabled else None
        if sharding is not None:  # Checkpoints may be sharded; the model is saved whole.
            sharding.set_state_dict_type("FULL_STATE_DICT")
        trainer.save_model(str(partial))
        if trainer.args.should_save:
            tokenizer.save_pretrained(partial)
            if isinstance(trainer.model, PeftModel):
                save_base(partial, base, getattr(trainer.model, "config", None), pooling_of(trainer.model))
            explain_loading(partial, trainer.model)
            manifest = Manifest(destination.parent)
            if destination.exists():
                # `claim` has checked this before training; files may have been added since.
                _refuse_to_lose(manifest, [destination])
                remove_checkpoint(destination)  # Renames it first, as a model may not be half removed either.
            manifest.publish(partial, destination)


@contextlib.contextmanager
def _removed_after_an_error(partial: Path) -> Iterator[None]:
    """Remove a partial folder if the block raises, since it takes space on a disk that may be full."""
    try:
        yield
    except Exception:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def finish(output: Path, result: Mapping[str, Any], predictions: Sequence[Any]) -> None:
    """Write the predictions and then the result; a run that has its result is finished.

    Raises:
        UserError: It cannot be written.
    """
    manifest = Manifest(output)
    with explained(f"write {output / RESULT}", WriteError):
        for path, content in ((output / PREDICTIONS, predictions), (output / RESULT, result)):
            if path.exists():  # From a call that was killed between the two, or from somebody else.
                _refuse_to_lose(manifest, [path])
                manifest.remove(path)
            manifest.write_json(path, content)


def result_of(output: Path) -> dict[str, Any] | None:
    """The stored result of a run; None if the run is not finished.

    Raises:
        UserError: The file is damaged.
    """
    found = _read(output / RESULT, dict)
    if found is not None and isinstance(found.get("metrics"), dict):  # JSON has no other word for not-a-number.
        found["metrics"] = {name: math.nan if value is None else value for name, value in found["metrics"].items()}
    return found


def predictions_of(output: Path) -> list[Any] | None:
    """The predictions of a finished run, one for each validation row; None if there are none.

    Raises:
        UserError: The file is damaged.
    """
    return _read(expanded(output) / PREDICTIONS, list)


def store_rates(output: Path, rates: Mapping[str, RoleRate]) -> None:
    """Write the measured learning rates, by role.

    Raises:
        UserError: They cannot be written.
    """
    with explained(f"write {output / RATES}"):
        content = {role: dataclasses.asdict(rate) for role, rate in rates.items()}
        Manifest(output).write_json(output / RATES, content)


def rates_of(output: Path) -> dict[str, RoleRate] | None:
    """The learning rates that the run in a folder measured, by role; None if it has measured none yet.

    Raises:
        UserError: The file is damaged, was changed, or is missing although there is a checkpoint.
    """
    _refuse_to_lose(Manifest(output), [output / RATES])
    rates = _read(output / RATES, dict, ANEW)
    if rates is None and (last := latest_checkpoint(output)) is not None:
        raise UserError(f"{last} is there, but not the learning rates it was trained at, {output / RATES}: {ANEW}")
    return rates and {role: RoleRate(**rate) for role, rate in rates.items()}


def _read(path: Path, kind: type, remedy: str = "remove it, and run the same command again") -> Any:
    if not path.is_file():
        return None
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} is damaged ({error}): {remedy}") from error
    if not isinstance(content, kind):
        raise UserError(f"{path} is damaged: {remedy}")
    manifest = Manifest(path.parent)
    if manifest.exists and (damage := manifest.damaged(path)):
        raise UserError(f"{path} is damaged ({damage}): {remedy}")
    return content
