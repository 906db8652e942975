"""A grid: each cell computed once, whatever stops it, and never mixed with another experiment's."""

import json

import numpy as np
import pytest

from analyses.grid import Grid
from analyses.seeds import mean_interval
from propulsion.errors import UserError


def test_a_cell_is_computed_once(tmp_path):
    calls = []

    def compute():
        calls.append(1)
        return {"value": 0.1, "odd": float("nan")}

    first = Grid(tmp_path / "runs", {"steps": 3}).cell("a:b/c", compute)
    assert Grid(tmp_path / "runs", {"steps": 3}).cell("a:b/c", compute) == first == {"value": 0.1, "odd": None}
    assert len(calls) == 1


def test_the_number_of_runs_is_limited_and_the_rest_named(tmp_path):
    grid = Grid(tmp_path, {}, max_runs=1)
    assert [grid.cell(name, lambda: {"x": 1}) for name in "abc"] == [{"x": 1}, None, None]
    assert (grid.computed, grid.missing) == (1, ["b", "c"])
    again = Grid(tmp_path, {}, max_runs=1)
    assert [again.cell(name, lambda: {"x": 1}) for name in "abc"] == [{"x": 1}, {"x": 1}, None]


def test_an_interrupted_cell_leaves_nothing(tmp_path):
    def interrupted():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Grid(tmp_path, {}).cell("a", interrupted)
    assert list(tmp_path.iterdir()) == []


def test_cells_of_other_settings_are_refused(tmp_path):
    Grid(tmp_path, {"steps": 3, "rate": 1}).cell("a", dict)
    with pytest.raises(UserError, match=r"holds runs of other settings \(steps\)"):
        Grid(tmp_path, {"steps": 4, "rate": 1}).cell("a", dict)


def test_a_damaged_cell_is_named(tmp_path):
    Grid(tmp_path, {}).cell("a", dict)
    (tmp_path / "a.json").write_text("{")
    with pytest.raises(UserError, match=r"a\.json is damaged"):
        Grid(tmp_path, {}).cell("a", dict)
    (tmp_path / "a.json").write_text(json.dumps({"found": {}}))
    with pytest.raises(UserError, match=r"a\.json is damaged"):
        Grid(tmp_path, {}).cell("a", dict)


def test_students_interval():
    # Mean 2, standard deviation 1, t(0.975; 2 degrees of freedom) = 4.302653.
    assert mean_interval([1.0, 2.0, 3.0]) == pytest.approx((2, 2 - 4.302653 / 3**0.5, 2 + 4.302653 / 3**0.5), rel=1e-6)
    mean, low, high = mean_interval([1.5])
    assert mean == 1.5
    assert low != low
    assert high != high


def test_arrays_lie_beside_the_cell(tmp_path):
    kernel = np.arange(6, dtype=np.float32).reshape(2, 3)
    first = Grid(tmp_path, {}).cell("a", lambda: {"x": 1, "arrays": {"kernel": kernel}})
    again = Grid(tmp_path, {}, max_runs=0).cell("a", dict)
    for found in (first, again):
        assert found is not None
        assert found["x"] == 1
        assert found["arrays"]["kernel"].dtype == np.float32
        assert (found["arrays"]["kernel"] == kernel).all()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.json", "a.npz"]


def test_arrays_without_their_cell_are_computed_again(tmp_path):
    (tmp_path / "a.npz").write_bytes(b"left by a killed run")
    found = Grid(tmp_path, {}).cell("a", lambda: {"arrays": {"kernel": np.ones(2)}})
    assert found is not None
    assert Grid(tmp_path, {}).cell("a", dict)["arrays"]["kernel"].tolist() == [1, 1]


@pytest.mark.parametrize("damage", ["truncated", "another", "absent"])
def test_damaged_arrays_are_named(tmp_path, damage):
    Grid(tmp_path, {}).cell("a", lambda: {"arrays": {"kernel": np.ones(200)}})
    path = tmp_path / "a.npz"
    if damage == "truncated":
        path.write_bytes(path.read_bytes()[:50])
    elif damage == "another":
        np.savez(path, kernel=np.ones(3))
    else:
        path.unlink()
    with pytest.raises(UserError, match=r"a\.npz is damaged .* remove it and a\.json"):
        Grid(tmp_path, {}).cell("a", dict)
