"""Grids: each cell is computed once, also after interruptions, and cells of different experiments do not mix."""

import dataclasses
import errno
import json
import os
from typing import Any

import numpy as np
import pytest

from analyses import convergence
from analyses.core import cells as core_cells
from analyses.core.cells import Cells, Grid, settings_of
from analyses.core.intervals import mean_interval
from analyses.records.atomic import remove_leftovers
from propulsion.data.tasks import get_task
from propulsion.errors import Interrupted, UserError, run_command


def cells(folder, **settings) -> Any:
    return Cells(Grid(folder), settings)


def test_a_cell_is_computed_once(tmp_path):
    calls = []

    def compute():
        calls.append(1)
        return {"value": 0.1, "odd": float("nan")}

    first = cells(tmp_path / "runs", steps=3).cell("a:b/c", compute)
    assert cells(tmp_path / "runs", steps=3).cell("a:b/c", compute) == first == {"value": 0.1, "odd": None}
    assert len(calls) == 1


def test_arrays_come_back_as_they_were(tmp_path):
    arrays = {"initialisation.LoRA, rank 8": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.array([np.nan, 1])}

    def compute():
        return {"value": 1, "arrays": arrays}

    first = cells(tmp_path).cell("seed 0.5", compute)
    again = cells(tmp_path).cell("seed 0.5", lambda: pytest.fail("computed twice"))
    for found in (first, again):
        assert found is not None
        assert found.keys() == {"value", "arrays"}
        assert found["arrays"].keys() == arrays.keys()
        for name, array in arrays.items():
            assert found["arrays"][name].dtype == array.dtype
            np.testing.assert_array_equal(found["arrays"][name], array)
    assert sorted(path.suffix for path in tmp_path.iterdir()) == [".json", ".npz"]
    assert all(path.name.startswith("seed-0.5.") for path in tmp_path.iterdir())


def test_the_number_of_runs_is_limited_and_the_rest_named(tmp_path):
    grid = Grid(tmp_path, max_runs=1)
    assert [Cells(grid, {}).cell(name, lambda: {"x": 1}) for name in "abc"] == [{"x": 1}, None, None]
    assert (grid.computed, grid.missing) == (1, ["b", "c"])
    again = Grid(tmp_path, max_runs=1)
    assert [Cells(again, {}).cell(name, lambda: {"x": 1}) for name in "abc"] == [{"x": 1}, {"x": 1}, None]


def test_an_interrupted_cell_leaves_nothing_and_the_rest_is_said(tmp_path, capsys):
    def interrupted():
        raise KeyboardInterrupt

    grid = cells(tmp_path)
    with pytest.raises(Interrupted, match=r"^0 finished cells are in"):
        grid.cell("a", interrupted)
    assert list(tmp_path.iterdir()) == []
    grid.cell("b", dict)

    def go_on():
        again = cells(tmp_path)
        again.cell("b", interrupted)
        again.cell("c", interrupted)

    with pytest.raises(SystemExit):
        run_command(go_on)
    expected = f"interrupted; 1 finished cells are in {tmp_path}: the same command goes on with c\n"
    assert capsys.readouterr().err == expected


def test_cells_of_other_settings_lie_side_by_side(tmp_path, capsys):
    """Cells of one name are told apart if the shared settings differ, or their own settings."""
    kinds = [({"steps": 3}, 1.0), ({"steps": 4}, 1.0), ({"steps": 3}, 1.0 + 1e-9), ({}, 1.0)]

    def each():
        return [cells(tmp_path, **shared).cell("a", lambda factor, n=n: {"n": n, "at": factor}, factor=factor)
                for n, (shared, factor) in enumerate(kinds)]  # fmt: skip

    first = each()
    assert [found["n"] for found in first] == [0, 1, 2, 3]
    assert "(3 of other settings, rows or weights beside it)" in capsys.readouterr().out
    assert each() == first
    assert len(list(tmp_path.iterdir())) == 4
    (tmp_path / "a.json").write_text('{"found": {"n": 9}, "settings": {}}')  # The format of older versions.
    assert each() == first


def test_a_damaged_cell_is_named(tmp_path):
    cells(tmp_path).cell("a", dict)
    (path,) = tmp_path.iterdir()
    whole = {"cell": "a", "settings": {"cell": {}}, "environment": {}, "found": {}}
    path.write_text(json.dumps(whole))  # A cell without a checksum, as older versions wrote them.
    assert cells(tmp_path).cell("a", lambda: pytest.fail("computed again")) == {}
    damages = [
        "{", "[]", "3", "[" * 100_000, json.dumps(whole)[:-20], json.dumps(whole).replace('"a"', "NaN"),
        *(json.dumps({name: value for name, value in whole.items() if name != gone})
          for gone in ("cell", "settings", "found")),
        *(json.dumps(whole | change) for change in ({"settings": {"of": "others"}}, {"found": 1}, {"more": 1})),
    ]  # fmt: skip
    for damaged in damages:
        path.write_text(damaged)
        with pytest.raises(UserError, match=rf"{path.name} is damaged"):
            cells(tmp_path).cell("a", dict)


def test_a_flipped_bit_in_a_cell_is_found(tmp_path):
    computed = {"score": 0.25, "by": "step 17", "arrays": {"kernel": np.linspace(0, 1, 7)}}
    cells(tmp_path).cell("a", lambda: computed)
    generator = np.random.default_rng(0)
    for path in tmp_path.iterdir():
        content = path.read_bytes()
        for place in generator.integers(0, 8 * len(content), size=60):
            flipped = bytearray(content)
            flipped[place // 8] ^= 1 << place % 8
            path.write_bytes(flipped)
            try:
                found: Any = cells(tmp_path).cell("a", dict)
            except UserError:
                continue
            # What JSON writes in two ways, such as an exponent, is no damage.
            assert path.suffix == ".json"
            assert found["score"] == computed["score"]
            assert found["by"] == computed["by"]
        path.write_bytes(content)


def test_names_that_files_cannot_tell_apart_have_a_file_each(tmp_path):
    names = ("m:a b", "m:a-b", "m a:b", "m" * 300, "m" * 301)
    for _ in range(2):
        found = [cells(tmp_path).cell(name, lambda name=name: {"of": name}) for name in names]
        assert [one["of"] for one in found] == list(names)
    assert len(list(tmp_path.iterdir())) == len(names)


@pytest.mark.parametrize("arrays", [{}, {"arrays": {"kernel": np.ones(3)}}], ids=["text", "arrays"])
def test_a_cell_that_the_disk_has_no_room_for_is_kept_elsewhere(tmp_path, monkeypatch, arrays):
    full = tmp_path / "full"
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    save = core_cells._save

    def no_room(path, *content):
        if path.parent == full:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        save(path, *content)

    with monkeypatch.context() as patch:
        patch.setattr(core_cells, "_save", no_room)
        with pytest.raises(UserError, match="No space left on device; the finished cell is kept in") as caught:
            cells(full).cell("a", lambda: {"x": 1} | arrays)
    (kept,) = [path for path in tmp_path.iterdir() if path.name.startswith("cell-")]
    assert str(kept) in str(caught.value)
    for path in kept.iterdir():
        path.rename(full / path.name)
    assert cells(full).cell("a", lambda: pytest.fail("computed again"))["x"] == 1


def test_students_interval():
    # Mean 2, standard deviation 1, t(0.975; 2 degrees of freedom) = 4.302653.
    assert mean_interval([1.0, 2.0, 3.0]) == pytest.approx((2, 2 - 4.302653 / 3**0.5, 2 + 4.302653 / 3**0.5), rel=1e-6)
    mean, low, high = mean_interval([1.5])
    assert mean == 1.5
    assert low != low
    assert high != high


def test_arrays_without_their_cell_are_computed_again(tmp_path):
    cells(tmp_path).cell("a", lambda: {"arrays": {"kernel": np.zeros(2)}})
    (cell,) = tmp_path.glob("*.json")
    cell.unlink()
    cell.with_suffix(".npz").write_bytes(b"left by a killed run")
    found = cells(tmp_path).cell("a", lambda: {"arrays": {"kernel": np.ones(2)}})
    assert found is not None
    assert cells(tmp_path).cell("a", dict)["arrays"]["kernel"].tolist() == [1, 1]


@pytest.mark.parametrize("damage", ["truncated", "another", "absent"])
def test_damaged_arrays_are_named(tmp_path, damage):
    cells(tmp_path).cell("a", lambda: {"arrays": {"kernel": np.ones(200)}})
    (path,) = tmp_path.glob("*.npz")
    if damage == "truncated":
        path.write_bytes(path.read_bytes()[:50])
    elif damage == "another":
        np.savez(path, kernel=np.ones(3))
    else:
        path.unlink()
    with pytest.raises(UserError, match=rf"{path.name}.*; remove it and {path.stem}.json"):
        cells(tmp_path).cell("a", dict)


def test_a_field_that_is_declared_free_must_be_there():
    with pytest.raises(AssertionError, match="no field"):
        settings_of(convergence.Config(), free=("nothing_such",), task=get_task("demo"), rows="r", model="m")


@pytest.mark.parametrize(
    "change", [{"rows": "s"}, {"model": "n"}, {"task": dataclasses.replace(get_task("demo"), degree=2.0)}]
)
def test_rows_model_and_task_count(change):
    shared = {"task": get_task("demo"), "rows": "r", "model": "m"}
    first = settings_of(convergence.Config(), free=convergence.ANALYSIS.free, **shared)
    assert settings_of(convergence.Config(), free=convergence.ANALYSIS.free, **shared | change) != first


def test_only_temporary_files_of_killed_processes_are_removed(tmp_path):
    left, own, link = (tmp_path / name for name in (".a.json.partial-99", ".notes.partial-draft", ".b.partial-7"))
    for path in (left, own):
        path.write_text("text")
    link.symlink_to(own)
    remove_leftovers(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([own.name, link.name])
