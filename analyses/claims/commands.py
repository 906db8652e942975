"""The command that computes a stored result again, from the configuration it carries."""

import importlib
import shlex
from collections.abc import Mapping
from pathlib import PurePosixPath
from typing import Any

from analyses.core.command_line import default_options, options_of, words
from analyses.records import Result

# Options that say where a run writes and how it is cut into calls, and not what is computed.
_NOT_THE_EXPERIMENT = {"output_dir", "runs_dir", "overwrite", "max_runs", "partial", "child", "child_output"}

# Options that some analyses had once, and that changed intervals alone.
_GONE = {"resamples"}

# Options that name the folder of another result.
_READ_RESULTS = {"comparison", "rates_from"}
_PATHS = _READ_RESULTS | {"model", "models"}


def arguments(result: Result, others: Mapping[str, str] | None = None) -> list[str]:
    """The options of its analysis that differ from their defaults, as words of a command line.

    Args:
        result: The result.
        others: By the name of another result, its folder, which options that read that result then name.
    """
    options = {}
    for name, value in stored_options(result).items():
        if name in _NOT_THE_EXPERIMENT or value == "":
            continue
        if name in _READ_RESULTS and value is not None:
            # The longest name: "mpnet-base/method_comparison/sst2" also ends in "/method_comparison/sst2".
            found = [other for other in others or {} if value.endswith(f"/{other}")]
            value = (others or {})[max(found, key=len)] if found else value
        options[name] = value
    return words(options, _default_options(result))


def stored_options(result: Result) -> dict[str, Any]:
    """The options of a result by name; options that are newer than it have the values that it was computed with."""
    stored = options_of(result.config)
    options = _default_options(result)
    # Before these options, every classifier was that of transformers, and every learning rate was fixed by its role.
    older = {"pooling": "pooler", "learning_rate": None, "head_learning_rate": None}
    kept = {name: value for name, value in stored.items() if name in options or name not in _GONE}
    return kept | {name: value for name, value in older.items() if name in options and name not in stored}


def differing(result: Result, config: Any) -> dict[str, tuple[Any, Any]]:
    """The options in which a result's configuration is not this one: by name, the result's value and this one's.

    Options that say where a run writes do not count. Of an option that names a model or another result, only the last
    part of its path counts, and of a degree that was left to the task nothing does.
    """
    stored = _default_options(result) | stored_options(result)
    asked = {name: value for name, value in options_of(config).items() if name not in _NOT_THE_EXPERIMENT}
    different = {}
    for name, value in asked.items():
        if _comparable(name, stored[name]) != _comparable(name, value) and not (name == "degree" and value is None):
            different[name] = stored[name], value
    return different


def _comparable(name: str, value: Any) -> Any:
    if name in _PATHS and value:
        return [PurePosixPath(one).name for one in ([value] if isinstance(value, str) else value)]
    return value


def command(result: Result, output_dir: PurePosixPath | str, others: Mapping[str, str] | None = None) -> str:
    """The same as one line for a shell, writing to a folder."""
    line = ["python", "-m", f"analyses.{result.analysis}", *arguments(result, others)]
    return shlex.join([*line, "--output-dir", str(output_dir)])


def _default_options(result: Result) -> dict[str, Any]:
    return default_options(importlib.import_module(f"analyses.{result.analysis}").Config)


NOTE = (
    "These numbers were computed through BERT's pooler. In the packaged MiniLM-L6 that pooler was never trained: it "
    "is a Gaussian matrix with a bias of zeros, and all that a method learns must pass through it. The checkpoint's "
    "configuration declares mean pooling, which is now the default. The numbers have not been computed again since; "
    "the same commands with --pooling pooler reproduce them."
)
"""What every document of such a result says of it."""


def through_pooler(result: Result) -> bool:
    """Whether a result is of the packaged encoder, read through its pooler."""
    options = stored_options(result)
    return options.get("pooling") == "pooler" and not options.get("model") and options.get("head") != "label_words"
