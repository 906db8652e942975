"""Runs mistakes of a user in this process, and says of each whether it ended in one clear line.

A mistake has survived if the call raises an exception of the toolkit for mistakes, or the command ends with exit code 2
and one line on stderr; if that line names what is wrong; and if nothing was written.
"""

import contextlib
import io
import os
import re
import sys
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"

import torch
from transformers import BertConfig, BertForSequenceClassification, BertTokenizerFast

from analyses.core.errors import MISTAKES

_LONGEST = 1500  # Characters of a message.
WORDS = ("a", "fine", "film", "dull", "plot", "it", "was", "not", "the", "good", "bad", ".")


@dataclass(frozen=True)
class Mistake:
    """A mistake: what it is about, its name, the call that must be refused, and what the message must match."""

    kind: str
    name: str
    call: Callable[[Path], object]
    names: str
    exceptions: tuple[type[Exception], ...] = MISTAKES

    @property
    def id(self) -> str:
        """A short name for tests."""
        return f"{self.kind}: {self.name}"[:80]


Row = tuple[str, int, int, list[str]]
"""What mistakes are about, how many were tried, how many survived, and the others with what happened."""


def command(main: Callable[[], object], words: Iterable[str]) -> None:
    """Run a command line in this process; raise an exception of the toolkit for its error line.

    Raises:
        MISTAKES: The command ended with exit code 2 and one line.
        AssertionError: It ended in another way.
    """
    out, err, before = io.StringIO(), io.StringIO(), sys.argv
    sys.argv = ["command", *words]
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            main()
    except SystemExit as end:
        lines = [line for line in err.getvalue().splitlines() if line.strip()]
        if end.code != 2 or len(lines) != 1 or not lines[0].startswith("error: "):
            raise AssertionError(f"exit code {end.code} and {len(lines)} lines: {lines[:4]}") from None
        raise MISTAKES[0](lines[0].removeprefix("error: ")) from None
    finally:
        sys.argv = before
    raise AssertionError(f"accepted: {out.getvalue()[-200:]}")


def outcome(mistake: Mistake, folder: Path) -> str:
    """What went wrong with a mistake, or "" if it ended in one clear line; `folder` is empty and is worked in."""
    before, here = _files(folder), Path.cwd()
    os.chdir(folder)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            mistake.call(folder)
        return "accepted"
    except mistake.exceptions as error:
        text = str(error)
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt):
            raise
        place = traceback.extract_tb(error.__traceback__)[-1]
        return f"{type(error).__name__} at {Path(place.filename).name}:{place.lineno}: {str(error)[:300]}"
    finally:
        os.chdir(here)
    if "\n" in text.strip() or not text.strip():
        return f"not one line: {text[:300]!r}"
    if len(text) > _LONGEST:
        return f"{len(text)} characters: {text[:200]!r}"
    if not re.search(mistake.names, text):
        return f"does not name {mistake.names!r}: {text[:500]!r}"
    written = {name: content for name, content in _files(folder).items() if not name.startswith("made")}
    kept = {name: content for name, content in before.items() if not name.startswith("made")}
    return "" if written == kept else f"wrote {sorted(written.keys() ^ kept.keys()) or 'into files'}: {text[:100]}"


def _files(folder: Path) -> dict[str, object]:
    found = {}
    for top, folders, names in os.walk(folder):
        for name in (*folders, *names):
            path = Path(top) / name
            with contextlib.suppress(OSError):
                state = path.lstat()
                found[str(path.relative_to(folder))] = (state.st_size, state.st_mtime_ns) if name in names else None
    return found


def rows(mistakes: Sequence[Mistake], folder: Path) -> list[Row]:
    """Run mistakes, each in a folder of its own below this one, and count those that survived, by kind."""
    tried, failed = Counter(), {}
    for number, mistake in enumerate(mistakes):
        tried[mistake.kind] += 1
        (own := folder / f"{number}").mkdir()
        if problem := outcome(mistake, own):
            failed.setdefault(mistake.kind, []).append(f"{mistake.name}: {problem}")
    return [(kind, count, count - len(failed.get(kind, ())), failed.get(kind, [])) for kind, count in tried.items()]


def print_table(found: Sequence[Row]) -> list[str]:
    """Print the rows, their sum and the exceptions, and return these."""
    width = max(len(kind) for kind, *_ in found)
    for kind, tried, survived, _ in [*found, ("all", sum(r[1] for r in found), sum(r[2] for r in found), [])]:
        print(f"{kind:{width}}  tried {tried:4}  survived {survived:4}")
    problems = [f"{kind}: {problem}" for kind, *_, each in found for problem in each]
    print("\n".join(problems))
    return problems


def tiny_model(folder: Path, *, tokenizer: Any = None, width: int = 16, positions: int = 32) -> Path:
    """Save a one-layer random BERT with a tokenizer; by default with one of a few words."""
    folder.mkdir(parents=True, exist_ok=True)
    if tokenizer is None:
        special = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
        (folder / "vocab.txt").write_text("\n".join((*special, *WORDS)), encoding="utf-8")
        tokenizer = BertTokenizerFast(str(folder / "vocab.txt"), model_max_length=positions)
    torch.manual_seed(0)
    sizes = {"hidden_size": width, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 2 * width}
    config = BertConfig(vocab_size=len(tokenizer), max_position_embeddings=positions, **sizes)
    BertForSequenceClassification(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silence progress bars and the libraries' own messages, and keep caches of rows out of the user's."""
    from datasets import disable_progress_bars
    from transformers.utils import logging

    disable_progress_bars()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    yield
