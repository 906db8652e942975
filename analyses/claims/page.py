"""The ledger of claims as one HTML file with embedded figures; it needs no script, network or other file."""

import base64
import io
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
from PIL import Image

from analyses.claims.claim import Verdict
from analyses.claims.report import (
    HOW_TO_READ,
    QUICK,
    SYMBOLS,
    commit_in_words,
    counts_in_words,
    met_in_words,
    models_in_words,
    note_in_words,
    null_in_words,
    number_in_words,
    verdict_in_words,
)
from analyses.records import RecordError
from analyses.records.errors import one_line

THEOREM = ("theorem1-literal", "theorem1-corrected", "theorem1-scale")
"""Claims at the top of the page."""
_DPI = 300  # Resolution of the stored figures; a CSS inch has 96 pixels.


@dataclass(frozen=True)
class Picture:
    """A figure as the page embeds it.

    Attributes:
        name: Its result folder and file, as "theorem1/theorem1".
        data: Its PNG, in base64.
        width: Width in pixels of the page, at the printed size.
        height: Height in pixels of the page.
        caption: What the figure shows and what its bars and bands are.
    """

    name: str
    data: str
    width: int
    height: int
    caption: str


def pictures(root: Path, folders: Iterable[str], captions: Mapping[str, str]) -> list[Picture]:
    """Every PNG in the result folders.

    Args:
        root: The folder of all results.
        folders: The result folders below it.
        captions: Captions by the figure's file name without suffix.

    Raises:
        RecordError: A PNG is damaged.
    """
    found = []
    for folder in folders:
        for path in sorted((root / folder).glob("*.png")):
            try:
                data, width, height = _reduced(path)
            except (OSError, SyntaxError, ValueError, zlib.error) as error:  # What Pillow raises of damaged files.
                raise RecordError(
                    f"{path} is damaged ({one_line(error)}): draw it again with python -m figures.all {root}"
                ) from error
            found.append(Picture(f"{folder}/{path.stem}", data, width, height, captions.get(path.stem, path.stem)))
    return found


def page(content: Mapping[str, Any], figures: list[Picture]) -> str:
    """The HTML text of the report."""
    rows = {row["key"]: row for row in content["rows"]}
    of_folder: dict[str, list[Picture]] = {}
    for figure in figures:
        of_folder.setdefault(figure.name.rpartition("/")[0], []).append(figure)
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=True, trim_blocks=True, lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )  # fmt: skip
    environment.filters |= {
        "number": number_in_words, "verdict": verdict_in_words, "null": null_in_words, "commit": commit_in_words,
        "met": met_in_words, "models": models_in_words, "anchor": lambda name: "result-" + name.replace("/", "-"),
        "style": lambda verdict: Verdict(verdict).name.lower(),
    }  # fmt: skip
    return environment.get_template("page.html").render(
        ledger=content, of_folder=of_folder, counts=counts_in_words(content), how=HOW_TO_READ,
        theorem=[rows[key] for key in THEOREM if key in rows], quick=QUICK if content["quick"] else "",
        note=note_in_words(content), symbols={verdict.value: symbol for verdict, symbol in SYMBOLS.items()},
    )  # fmt: skip


def _reduced(path: Path) -> tuple[str, int, int]:
    """A PNG reduced to 256 colours, which looks the same at a third of the size, in base64; its width and height."""
    with Image.open(path) as image:
        reduced = io.BytesIO()
        colours = image.convert("RGB").quantize(256, dither=Image.Dither.NONE)
        colours.save(reduced, "PNG", optimize=True)
        width, height = (round(side * 96 / _DPI) for side in image.size)
    return base64.b64encode(reduced.getvalue()).decode("ascii"), width, height
