"""The checkpoints of a run on disk: which there are, how one is read, and how one is removed."""

import contextlib
import os
import pickle
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from propulsion.errors import UserError, first_line

STAGING, REMOVED = ".partial-checkpoint", ".removed-checkpoint"


@contextlib.contextmanager
def reading(checkpoint: Path | str | None) -> Iterator[None]:
    """Turn what goes wrong while a checkpoint is read into the user's business, which it is."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except (OSError, RuntimeError, ValueError, LookupError, TypeError, EOFError, pickle.UnpicklingError,
            SafetensorError) as error:  # fmt: skip
        raise UserError(
            f"{checkpoint} is damaged ({first_line(error)}): remove it, and the same command goes on from the one "
            "before, or starts anew"
        ) from error


def checkpoints(folder: Path) -> list[Path]:
    """The complete checkpoints of a run, the oldest first."""
    names = re.compile(rf"{PREFIX_CHECKPOINT_DIR}-(\d+)")
    found = {path: match for path in folder.glob(f"{PREFIX_CHECKPOINT_DIR}-*") if (match := names.fullmatch(path.name))}
    return sorted((path for path in found if path.is_dir()), key=lambda path: int(found[path][1]))


def latest_checkpoint(folder: Path) -> Path | None:
    """The newest complete checkpoint of a run, if it has one."""
    found = checkpoints(folder)
    return found[-1] if found else None


def clear_leftovers(folder: Path) -> None:
    """Remove what a killed process left half written or half removed."""
    for name in (STAGING, REMOVED):
        shutil.rmtree(folder / name, ignore_errors=True)


def remove_checkpoint(checkpoint: Path) -> None:
    """Remove a checkpoint of which everything is known to be a run's own."""
    # Renamed first: half a checkpoint must not have a checkpoint's name.
    hidden = checkpoint.with_name(REMOVED)
    shutil.rmtree(hidden, ignore_errors=True)
    os.rename(checkpoint, hidden)
    shutil.rmtree(hidden, ignore_errors=True)
