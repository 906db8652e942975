"""List the analyses, one on each line: ``python -m analyses``."""

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

_FOLDER = Path(__file__).parent


@dataclass(frozen=True)
class Question:
    """One analysis, as its source describes it.

    Attributes:
        name: Its module within `analyses`.
        words: The first sentence of its docstring.
        cost: The time that its default configuration takes on two cores: the constant COST of the module.
    """

    name: str
    words: str
    cost: str


def questions() -> Iterator[Question]:
    """Yield every module and package that has a constant COST; they are parsed, not imported."""
    for source in sorted([*_FOLDER.glob("*.py"), *_FOLDER.glob("*/__init__.py")]):
        tree = ast.parse(source.read_text(encoding="utf-8"))
        for line in tree.body:
            if isinstance(line, ast.Assign) and ast.unparse(line.targets[0]) == "COST":
                text = " ".join((ast.get_docstring(tree) or "").split())
                name = source.parent.name if source.name == "__init__.py" else source.stem
                yield Question(name, re.split(r"(?<=[.?]) ", text, maxsplit=1)[0], ast.literal_eval(line.value))


def main() -> None:
    """Print the name, the cost and the first sentence of every analysis."""
    found = sorted(questions(), key=lambda question: question.name)
    names, costs = (max(len(getattr(question, field)) for question in found) for field in ("name", "cost"))
    print("python -m analyses.NAME --help lists the options; times are for the default configuration on two cores\n")
    for question in found:
        print(f"{question.name:<{names}}  {question.cost:<{costs}}  {question.words}")


if __name__ == "__main__":
    main()
