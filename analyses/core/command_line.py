"""Converts options of an analysis to the arguments of its command line."""

from typing import Any


def option(name: str, value: Any) -> list[str]:
    """Arguments that set an option: its flag and value, the flag and each item of a list, or a switch for a bool."""
    flag = f"--{name.replace('_', '-')}"
    if isinstance(value, bool):
        return [flag if value else f"--no-{name.replace('_', '-')}"]
    if isinstance(value, list | tuple):
        return [flag, *map(_word, value)]
    return [flag, _word(value)]


def _word(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) and float(f"{value:g}") == value else str(value)
