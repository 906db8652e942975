"""The pooling of hidden states that a checkpoint declares.

Checkpoints of sentence-transformers list their modules in `modules.json`, each with a folder: the transformer, a
pooling with a configuration, and perhaps more. Local folders and models on the hub are read alike.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

from propulsion.errors import UserError

MODULES_FILE = "modules.json"

# By sentence-transformers' name of a pooling, that of `--pooling`, which has no others.
_OURS = {"mean": "mean", "cls": "first"}
# Older files have one flag for each pooling.
_FLAGS = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    "pooling_mode_weightedmean_tokens": "weightedmean",
    "pooling_mode_lasttoken": "lasttoken",
}


@dataclass(frozen=True)
class Declaration:
    """The pooling and the further modules that a checkpoint declares.

    Attributes:
        mode: Sentence-transformers' name of the pooling, or names joined by " with "; "" if none is declared.
        unused: Names of further modules, which a classifier leaves out, in one text; "" if there are none.
        transformer: Folder of the transformer within the checkpoint; "" for the checkpoint itself.
        unknown: Whether the hub could not be reached.
    """

    mode: str = ""
    unused: str = ""
    transformer: str = ""
    unknown: bool = False

    @property
    def pooling(self) -> str | None:
        """The pooling's name for `--pooling`; None if no pooling is declared, or one that `--pooling` does not have."""
        return _OURS.get(self.mode)


def declared_pooling(source: str) -> Declaration:
    """Read the declaration of a checkpoint, which is a local folder or a name on the hub.

    Raises:
        UserError: A file is damaged, or one that is declared is missing.
    """
    try:
        modules = _read(source, MODULES_FILE)
    except LocalEntryNotFoundError:
        return Declaration(unknown=True)
    if modules is None:
        return Declaration()
    if not isinstance(modules, list) or not all(isinstance(m, dict) and "type" in m for m in modules):
        raise UserError(f"{MODULES_FILE} of {source} is damaged: expected a list of modules, each with a type")
    modes: list[str] = []
    unused: list[str] = []
    transformer = ""
    for module in modules:
        kind, folder = str(module["type"]).rpartition(".")[2], str(module.get("path") or "")
        if kind == "Transformer":
            transformer = folder
        elif kind == "Pooling":
            modes += _modes(source, folder)
        elif kind.endswith("Pooling") and kind != "WeightedLayerPooling":
            modes.append(kind)
        else:
            unused.append(f"{kind} ({folder})" if folder else kind)
    return Declaration(" with ".join(modes), ", ".join(unused), transformer)


def _modes(source: str, folder: str) -> Sequence[str]:
    name = f"{folder}/config.json" if folder else "config.json"
    try:
        config = _read(source, name)
    except LocalEntryNotFoundError:
        config = None
    if not isinstance(config, Mapping):
        raise UserError(f"{MODULES_FILE} of {source} declares a pooling, but {name} is missing or damaged")
    modes: Any = config.get("pooling_mode")
    if modes is None:
        modes = [mode for flag, mode in _FLAGS.items() if config.get(flag)]
        modes += [flag for flag, on in config.items() if flag.startswith("pooling_mode_") and on and flag not in _FLAGS]
    modes = [modes] if isinstance(modes, str) else modes
    if not isinstance(modes, list):
        raise UserError(f"{name} of {source} is damaged: pooling_mode is {modes!r}, expected text or a list")
    return [str(mode) for mode in modes] or ["mean"]  # sentence-transformers' own default.


def _read(source: str, name: str) -> Any:
    """The content of a file of a checkpoint; None if it has no such file.

    Raises:
        LocalEntryNotFoundError: The hub cannot be reached.
        UserError: The file is not JSON.
    """
    folder = Path(source)
    if folder.is_dir():
        path = folder / name
        if not path.is_file():
            return None
    else:
        try:
            path = Path(hf_hub_download(source, name))
        except LocalEntryNotFoundError:
            raise
        except (EntryNotFoundError, HFValidationError, HfHubHTTPError):
            return None  # Loading the model itself will raise, with a message.
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"cannot read {name} of {source}: it is damaged") from error
