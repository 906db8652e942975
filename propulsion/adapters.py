"""Saved adapters and the base model they belong to."""

import json
from pathlib import Path
from typing import Any

from peft import PeftModel
from safetensors import SafetensorError

from propulsion.errors import UserError, first_line
from propulsion.files import write_json
from propulsion.pretrained import fingerprint

BASE_FILE = "base_model.json"


def save_base(folder: Path, base: str) -> None:
    """Write beside an adapter which weights it was trained on: their `fingerprint`."""
    write_json(folder / BASE_FILE, {"fingerprint": base})


def load_adapter(model: Any, folder: Path, *, trainable: bool = False) -> Any:
    """Put a saved adapter on its base model.

    Args:
        model: The base model, with the head of the task.
        folder: A folder that `propulsion.train` or peft's `save_pretrained` wrote.
        trainable: Whether the adapter is to be trained further.

    Raises:
        UserError: The folder holds no adapter, or one of another base model.
    """
    folder = folder.expanduser()
    if not (folder / "adapter_config.json").is_file():
        raise UserError(f"{folder} holds no adapter: it has no adapter_config.json")
    record = folder / BASE_FILE
    if record.is_file():
        expected = json.loads(record.read_text(encoding="utf-8"))["fingerprint"]
        if fingerprint(model) != expected:
            raise UserError(f"the adapter in {folder} is of another base model: its weights are not these")
    try:
        return PeftModel.from_pretrained(model, str(folder), is_trainable=trainable)
    except (RuntimeError, ValueError, KeyError, OSError, SafetensorError) as error:
        raise UserError(
            f"the adapter in {folder} does not fit this model, and may be of another base model: {first_line(error)}"
        ) from error
