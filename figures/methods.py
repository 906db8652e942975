"""Short names and colours of fine-tuning methods, the same in every figure."""

from figures.style import PALETTE


def short(method: str) -> str:
    """A method's name for a figure.

    >>> short("propulsion:positions=attn")
    'propulsion attn'
    """
    name, _, options = method.partition(":")
    return f"{name} {options.removeprefix('positions=')}".strip()


def color_of_method(method: str) -> str:
    """The colour where Propulsion stands against all other methods: orange, or blue."""
    return PALETTE[1] if method.lower().startswith("propulsion") else PALETTE[0]


def color_of_line(place: int) -> str:
    """The colour of a method where each has a line of its own, by its place; they repeat after the last."""
    return PALETTE[place % len(PALETTE)]
