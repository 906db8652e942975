"""The folder of a training run: whose it is, and how what was trained gets into it."""

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from peft import PeftModel
from transformers import PreTrainedTokenizerBase

from propulsion.adapters import explain_loading, save_base
from propulsion.errors import UserError
from propulsion.files import write_json
from propulsion.pretrained import pooling_of
from propulsion.trainer import TaskTrainer, clear_leftovers, latest_checkpoint

RECORD, RESULT, PREDICTIONS = "run.json", "result.json", "predictions.json"


def claim(output: Path, identity: Mapping[str, Any], *, overwrite: bool) -> None:
    """Make a run's folder, or make sure that it is this run's.

    Args:
        output: The folder.
        identity: What two runs must have in common for one to go on where the other stopped, as JSON has it.
        overwrite: Whether an earlier run of whatever identity is removed first.

    Raises:
        UserError: It holds another run or something else, or cannot be written.
    """
    record = output / RECORD
    if overwrite and record.exists():
        shutil.rmtree(output)
    try:
        output.mkdir(parents=True, exist_ok=True)
        clear_leftovers(output)
        if not record.exists():
            if latest_checkpoint(output) is None and not (output / RESULT).exists():
                write_json(record, identity)
                return
            found = None
        else:
            found = json.loads(record.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"cannot use the folder {output}: {error.strerror or error}") from error
    except ValueError as error:
        raise UserError(f"{record} is damaged: name another --output-dir, or pass --overwrite-output-dir") from error
    if found is None:
        raise UserError(f"{output} holds a run of something else: name another --output-dir")
    if found != identity:
        names = sorted(name for name in {*found, *identity} if found.get(name) != identity.get(name))
        shown = ", ".join(
            f"{name} {_short(found.get(name))} there, {_short(identity.get(name))} here" for name in names
        )
        raise UserError(
            f"{output} holds a run of another configuration ({shown}): name another --output-dir, or pass "
            "--overwrite-output-dir to start anew"
        )


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 40 else f"{text[:12]}..."


def save_model(trainer: TaskTrainer, destination: Path, tokenizer: PreTrainedTokenizerBase, base: str) -> None:
    """Write what was trained, whole or not at all, with its tokenizer and its base model's fingerprint.

    Raises:
        UserError: It cannot be written.
    """
    partial = destination.with_name(f".{destination.name}.partial")
    try:
        if trainer.args.should_save:
            shutil.rmtree(partial, ignore_errors=True)
        sharding = trainer.accelerator.state.fsdp_plugin if trainer.is_fsdp_enabled else None
        if sharding is not None:  # Checkpoints may be in shards, what is kept is whole.
            sharding.set_state_dict_type("FULL_STATE_DICT")
        trainer.save_model(str(partial))
        if trainer.args.should_save:
            tokenizer.save_pretrained(partial)
            if isinstance(trainer.model, PeftModel):
                save_base(partial, base, getattr(trainer.model, "config", None), pooling_of(trainer.model))
            explain_loading(partial, trainer.model)
            shutil.rmtree(destination, ignore_errors=True)
            os.rename(partial, destination)
    except OSError as error:
        raise UserError(f"cannot write {destination}: {error.strerror or error}; the checkpoints are kept") from error


def finish(output: Path, result: Mapping[str, Any], predictions: Sequence[Any]) -> None:
    """Write what a run found; with its result it is finished.

    Raises:
        UserError: It cannot be written.
    """
    try:
        write_json(output / PREDICTIONS, predictions)
        write_json(output / RESULT, result)
    except OSError as error:
        raise UserError(
            f"cannot write {output / RESULT}: {error.strerror or error}; the checkpoints are kept"
        ) from error


def result_of(output: Path) -> dict[str, Any] | None:
    """What a finished run found; None of a run that is not finished.

    Raises:
        UserError: The file is damaged.
    """
    return _read(output / RESULT, dict)


def predictions_of(output: Path) -> list[Any] | None:
    """What a finished run predicted, row by row; None of a run that kept none.

    Raises:
        UserError: The file is damaged.
    """
    return _read(output.expanduser() / PREDICTIONS, list)


def _read(path: Path, kind: type) -> Any:
    if not path.is_file():
        return None
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path} is damaged ({error}): remove it, and run the same command again") from error
    if not isinstance(found, kind):
        raise UserError(f"{path} is damaged: remove it, and run the same command again")
    return found
