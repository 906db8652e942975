"""Configurations and results as options of a command line, by which each can be computed again."""

import dataclasses
from collections.abc import Mapping
from typing import Any, TypeVar

from analyses.core.cells import leaves
from analyses.records import plain
from propulsion.errors import UserError

C = TypeVar("C")


def configured(config: type[C], options: Mapping[str, Any]) -> C:
    """Return a configuration with its defaults but for some options, each named as on the command line.

    An option of a configuration within, which has no prefix on the command line, has none here.

    Raises:
        UserError: There is no such option.
    """
    own = {field.name for field in dataclasses.fields(config)} & options.keys()  # pyright: ignore[reportArgumentType]
    changed, left = _changed(config(**{name: options[name] for name in own}), options)
    if left:
        raise UserError(f"{config.__module__} has no option {', '.join(sorted(left))}")
    return changed


def options_of(config: Any) -> dict[str, Any]:
    """Return the options of a configuration, or of one as a result stores it, by name and as JSON has them."""
    return _by_name(config if isinstance(config, Mapping) else plain(dataclasses.asdict(config)))


def default_options(config: type[Any]) -> dict[str, Any]:
    """Return the defaults of a configuration's options by name; an option without a default is left out."""
    found = {}
    for field in dataclasses.fields(config):
        if field.default is not dataclasses.MISSING:
            found[field.name] = plain(field.default)
        elif field.default_factory is not dataclasses.MISSING:
            found[field.name] = plain(field.default_factory())
    return _by_name(found)


def words(options: Mapping[str, Any], defaults: Mapping[str, Any]) -> list[str]:
    """Return the options that differ from their defaults as words of a command line."""
    return [
        word for name, value in options.items() if name not in defaults or value != defaults[name]
        for word in _option(name, value)
    ]  # fmt: skip


def _by_name(config: Mapping[str, Any]) -> dict[str, Any]:
    """Options by the last part of their paths, since those of nested configurations have no prefix."""
    return {path.rpartition(".")[2]: value for path, value in leaves(config)}


def _changed(config: Any, options: Mapping[str, Any]) -> tuple[Any, set[str]]:
    """Return the configuration with these options, and those that it and the configurations in it do not have."""
    found, left = {}, set(options)
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            found[field.name], unknown = _changed(value, options)
            left &= unknown
        elif field.name in options:
            found[field.name] = options[field.name]
            left.discard(field.name)
    return dataclasses.replace(config, **found), left


def _option(name: str, value: Any) -> list[str]:
    """Return a switch for a truth value; otherwise the option and a word for each item of its value."""
    flag = f"--{name.replace('_', '-')}"
    if isinstance(value, bool):
        return [flag if value else f"--no-{name.replace('_', '-')}"]
    if isinstance(value, list | tuple):
        return [flag, *map(_word, value)]
    return [flag, _word(value)]


def _word(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) and float(f"{value:g}") == value else str(value)
