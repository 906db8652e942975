"""Finding, reading and removing the checkpoints of a run on disk."""

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
    """Turn an error of reading a checkpoint in the block into a `UserError` that names the checkpoint."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except (OSError, RuntimeError, ValueError, LookupError, TypeError, EOFError, pickle.UnpicklingError,
            SafetensorError) as error:  # fmt: skip
        raise error if isinstance(error, UserError) else damaged(checkpoint, first_line(error)) from error


def damaged(checkpoint: Path | str | None, what: str) -> UserError:
    """The error to raise for a checkpoint that is damaged, with the remedy."""
    return UserError(
        f"{checkpoint} is damaged ({what}): remove it, and the same command resumes from the checkpoint before it, or "
        "starts anew"
    )


def checkpoints(folder: Path) -> list[Path]:
    """The complete checkpoints of a run, the oldest first."""
    names = re.compile(rf"{PREFIX_CHECKPOINT_DIR}-\d+")
    paths = (path for path in folder.glob(f"{PREFIX_CHECKPOINT_DIR}-*") if names.fullmatch(path.name) and path.is_dir())
    return sorted(paths, key=steps_of)


def steps_of(checkpoint: Path | None) -> int:
    """The number of steps after which a checkpoint was written; 0 if there is no checkpoint."""
    return 0 if checkpoint is None else int(checkpoint.name.rpartition("-")[2])


def latest_checkpoint(folder: Path) -> Path | None:
    """The newest complete checkpoint of a run; None if there is none."""
    return next(reversed(checkpoints(folder)), None)


def clear_leftovers(folder: Path) -> None:
    """Remove the parts of checkpoints that a killed process was writing or removing."""
    for name in (STAGING, REMOVED):
        shutil.rmtree(folder / name, ignore_errors=True)


def remove_checkpoint(checkpoint: Path) -> None:
    """Remove a checkpoint; the caller has made sure that the run wrote all of it."""
    # It is renamed first, so that no folder named checkpoint-N is ever incomplete.
    hidden = checkpoint.with_name(REMOVED)
    shutil.rmtree(hidden, ignore_errors=True)
    os.rename(checkpoint, hidden)
    shutil.rmtree(hidden, ignore_errors=True)
