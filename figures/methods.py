"""Short names and colours of fine-tuning methods, which are the same in all figures."""

from figures.style import PALETTE


def short(method: str) -> str:
    """A method's name for a figure.

    >>> short("propulsion:positions=attn")
    'propulsion attn'
    """
    name, _, options = method.partition(":")
    return f"{name} {options.removeprefix('positions=')}".strip()


def color_of_method(method: str) -> str:
    """The colour of a method where Propulsion is contrasted with all others: orange for Propulsion, blue for others."""
    return PALETTE[1] if method.lower().startswith("propulsion") else PALETTE[0]


def color_of_line(place: int) -> str:
    """The colour of a method by its place in the list of methods; colours repeat if there are more methods."""
    return PALETTE[place % len(PALETTE)]
