"""The command that computes a stored result again, from the configuration it carries."""

import dataclasses
import importlib
import shlex
from collections.abc import Iterator, Mapping
from pathlib import PurePosixPath
from typing import Any

from analyses.core.command_line import option
from analyses.records import Result, plain

# Options that say where a run writes and how it is cut into calls, and not what is computed.
_NOT_THE_EXPERIMENT = {"output_dir", "runs_dir", "overwrite", "max_runs", "partial", "child", "child_output"}

# Options that name the folder of another result.
_READ_RESULTS = {"comparison", "rates_from"}


def arguments(result: Result, others: Mapping[str, str] | None = None) -> list[str]:
    """The options of its analysis that differ from their defaults, as words of a command line.

    Args:
        result: The result.
        others: By the name of another result, its folder, which options that read that result then name.
    """
    defaults = _default_options(result)
    words = []
    for name, value in stored_options(result).items():
        if name in _NOT_THE_EXPERIMENT or value == defaults.get(name) or value == "":
            continue
        if name in _READ_RESULTS:
            value = next((folder for other, folder in (others or {}).items() if value.endswith(f"/{other}")), value)
        words += option(name, value)
    return words


def stored_options(result: Result) -> dict[str, Any]:
    """The options of a result by name; options that are newer than it have the values that it was computed with."""
    stored = dict(_leaves(result.config))
    options = _default_options(result)
    # Before these options, every classifier was that of transformers, and every learning rate was fixed by its role.
    older = {"pooling": "pooler", "learning_rate": None, "head_learning_rate": None}
    return stored | {name: value for name, value in older.items() if name in options and name not in stored}


def command(result: Result, output_dir: PurePosixPath | str, others: Mapping[str, str] | None = None) -> str:
    """The same as one line for a shell, writing to a folder."""
    words = ["python", "-m", f"analyses.{result.analysis}", *arguments(result, others)]
    return shlex.join([*words, "--output-dir", str(output_dir)])


def _default_options(result: Result) -> dict[str, Any]:
    return dict(_leaves(_defaults(importlib.import_module(f"analyses.{result.analysis}").Config)))


def _defaults(config: Any) -> dict[str, Any]:
    """Defaults of a configuration, as they would be stored; an option without one has none."""
    found = {}
    for field in dataclasses.fields(config):
        if field.default is not dataclasses.MISSING:
            found[field.name] = plain(field.default)
        elif field.default_factory is not dataclasses.MISSING:
            found[field.name] = plain(field.default_factory())
    return found


def _leaves(config: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Options by name; those of nested configurations have no prefix on the command line."""
    for name, value in config.items():
        if isinstance(value, Mapping):
            yield from _leaves(value)
        else:
            yield name, value


NOTE = (
    "Computed through BERT's pooler, which is untrained in the packaged MiniLM-L6: a Gaussian matrix beside a bias of "
    "zeros, through which all that is learnt must pass. The checkpoint's own configuration says mean pooling, which is "
    "the default now; these numbers are from before it, and wait to be computed anew. With --pooling pooler the same "
    "commands still give them."
)
"""What every document of such a result says of it."""


def through_pooler(result: Result) -> bool:
    """Whether a result is of the packaged encoder, read through its pooler."""
    options = stored_options(result)
    return options.get("pooling") == "pooler" and not options.get("model") and options.get("head") != "label_words"
