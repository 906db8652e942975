"""Put faults to the commands at random moments, and flip bits of all that they store; prints one table.

`python -m tests.faults` takes about half an hour; `--help` lists its options. Each command is a process of its own.
It gets SIGKILL or SIGTERM at a random moment, or a limit on the size of its files, up to three times in a row, or a
second process in its folder; then it runs to its end. It has survived if

- it ended in one line (and the second process named the first), and left no child computing and no partial file in the
  place of a result;
- it used the parts that were finished before, and its end is that of the uninterrupted command, bit for bit: weights,
  metrics, history, predictions, number of steps; tables, arrays, ledger.

A flipped bit is survived if the command that reads the file refuses it in one line that names the file, or if it
provably changes no number that is used: the reason is listed.

Without `--only`, the tables of malformed inputs, of wrong options and of a first-time user's mistakes follow
(`tests.faults.mistakes`).
"""

import argparse
import os
import random
import shutil
import tempfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("MPLBACKEND", "Agg")

import torch
from datasets import config as datasets_config
from datasets import disable_progress_bars
from transformers import AutoTokenizer
from transformers.utils.logging import disable_progress_bar

from propulsion.pretrained import default_model_folder
from tests.faults.commands import every_command
from tests.faults.flips import everything_stored, try_flips
from tests.faults.inputs import run as malformed_inputs
from tests.faults.mistakes import print_table, tiny_model
from tests.faults.options import run as wrong_options
from tests.faults.processes import KINDS, Command, fault, finish
from tests.faults.strangers import run as mistakes_of_strangers

FLIPS = "flipped bits"


def try_command(
    command: Command, place: Path, kinds: Sequence[str], times: int, draw: random.Random
) -> tuple[str, list[str]]:
    """A line of the table, and what went wrong."""
    expected, problems, row = place / "whole", [], f"{command.name:34}"
    seconds = finish(command, expected)
    for kind in kinds:
        failed = []
        for number in range(times):
            folder = place / f"{'-'.join(command.name.split())}-{number}"
            if problem := fault(command, folder, expected, kind, seconds, draw):
                failed.append(f"{command.name}, {kind}: {problem}")
            shutil.rmtree(folder, ignore_errors=True)
        row += f"{f'{times - len(failed)} / {times}':>14}"
        problems += failed
    shutil.rmtree(expected)
    return row, problems


def command() -> int:
    """Print the table, and return 1 if something was not survived."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.faults", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--times", type=int, default=1, help="faults of each kind for each command (default 1)")
    parser.add_argument("--bits", type=int, default=2, help="bits of each file (default 2; 0 for none)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the random moments and bits (default 0)")
    parser.add_argument("--kinds", nargs="*", choices=KINDS, default=list(KINDS), help="kinds of faults (default all)")
    parser.add_argument("--only", nargs="+", default=[""], help="commands and files whose name begins so (default all)")
    options = parser.parse_args()
    torch.set_num_threads(1)
    disable_progress_bars()
    disable_progress_bar()
    draw, problems = random.Random(options.seed), []
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        datasets_config.HF_DATASETS_CACHE = place / "cache"
        tokenizer = AutoTokenizer.from_pretrained(default_model_folder())
        model = tiny_model(place / "model", tokenizer=tokenizer, width=32, positions=64)
        if options.kinds:
            head = "".join(f"{kind:>14}" for kind in options.kinds)
            print(f"survived / tried, seed {options.seed}\n{'':34}{head}", flush=True)
            for name, one in every_command(model).items():
                if name.startswith(tuple(options.only)):
                    row, failed = try_command(one, place, options.kinds, options.times, draw)
                    print("\n".join([row, *failed]), flush=True)
                    problems += failed
        if options.bits:
            problems += _flip(model, place, tuple(options.only), options.bits, draw)
    if options.only == [""]:
        for table in (malformed_inputs, wrong_options, mistakes_of_strangers):
            problems += print_table(table())
    print(f"\n{len(problems)} not survived")
    return 1 if problems else 0


def _flip(model: Path, place: Path, only: tuple[str, ...], bits: int, draw: random.Random) -> list[str]:
    problems, reasons = [], Counter()
    print(f"\n{FLIPS:34}{'files':>14}{'tried':>14}{'refused':>14}{'no effect':>14}{'not survived':>14}", flush=True)
    for stored in everything_stored(model, place / "stored"):
        if stored.name.startswith(only):
            found = try_flips(stored, place / "copy", draw, each=bits)
            numbers = (len(stored.files), found.tried, found.refused, found.unused.total(), len(found.problems))
            print("\n".join([f"{stored.name:34}" + "".join(f"{n:>14}" for n in numbers), *found.problems]), flush=True)
            problems += found.problems
            reasons += Counter({f"{stored.name}: {why}": count for why, count in found.unused.items()})
    print("\nwithout effect:\n" + "\n".join(f"{count:>6}  {why}" for why, count in reasons.items()))
    return problems


if __name__ == "__main__":
    raise SystemExit(command())
