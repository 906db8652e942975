"""Kills, full disks, two writers and flipped bits, a few of each; `python -m tests.faults` tries many more."""

import os
import random
import sys

import pytest

from analyses import method_comparison
from tests.faults.commands import every_command
from tests.faults.flips import results, tokenized_rows, training_runs, try_flips
from tests.faults.processes import FULL_DISK, TWO_WRITERS, fault, finish

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="it reads /proc")


@pytest.fixture(scope="module")
def whole(tiny_model, tmp_path_factory):
    """A command, the folder of an uninterrupted call of it, and the seconds that this took."""
    commands, folders = every_command(tiny_model), {}

    def made(name):
        if name not in folders:
            folder = tmp_path_factory.mktemp("whole") / "folder"
            folders[name] = commands[name], folder, finish(commands[name], folder)
        return folders[name]

    return made


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("method_comparison", "SIGTERM"),
        ("kernel_distance", "SIGKILL"),
        ("claims", "SIGKILL"),
        ("method_comparison", FULL_DISK),
        ("train: linear", TWO_WRITERS),
        ("method_comparison", TWO_WRITERS),
    ],
)
def test_a_command_ends_as_if_there_had_been_no_fault(whole, tmp_path, name, kind):
    command, expected, seconds = whole(name)
    assert fault(command, tmp_path / "folder", expected, kind, seconds, random.Random(1), most=1) == ""


@pytest.fixture(scope="module")
def stored(tiny_model, tmp_path_factory):
    """What a run, an analysis with cells and the tokenizer leave on the disk, by name."""
    place = tmp_path_factory.mktemp("stored")
    with pytest.MonkeyPatch().context() as patch:
        patch.setattr(os, "fsync", lambda descriptor: None)
        found = [
            *training_runs(tiny_model, place), *results(tiny_model, place, [method_comparison]),
            *tokenized_rows(tiny_model, place),
        ]  # fmt: skip
    return {one.name: one for one in found}


@pytest.mark.parametrize(
    ("name", "most"),
    [
        ("run, finished", 4),
        ("run, resumed", 3),
        ("adapter, loaded", 4),
        ("adapter, hotswapped", 3),
        ("model, loaded", 3),
        ("result, method_comparison", 5),
        ("cells, method_comparison", 3),
        ("tokenized rows", 1),
    ],
)
def test_a_flipped_bit_is_refused_or_without_effect(stored, tmp_path, name, most):
    found = try_flips(stored[name], tmp_path / "copy", random.Random(2), each=1, most=most)
    assert found.problems == []
    assert found.tried == most
    assert found.refused + found.unused.total() == most
