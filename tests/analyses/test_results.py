"""A result folder is complete or absent, is read back as it was written, and never replaces other files."""

import dataclasses
import errno
import hashlib
import json
import math
import os
import signal
import subprocess
import sys
import zipfile
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from analyses.records import (
    Metric,
    RecordError,
    Result,
    check_writable,
    environment,
    load_result,
    result_folders,
    write_result,
)  # fmt: skip
from analyses.records.environment import _commit

SETTLED = Metric("cka", 0.94, 0.92, 0.96, "", "initialisation", "full_backbone", "propulsion_z")
UNDEFINED = Metric("k_star", math.nan, None, None, "degree", "trained", "full_backbone", "propulsion_z")


def make_result(**changes) -> Result:
    rng = np.random.default_rng(0)
    arrays = {
        "initialisation.full_backbone": rng.normal(size=(6, 6)),
        "trained.propulsion_z": rng.normal(size=(6, 6)).astype(np.float32),
        "labels": np.array([0, 1, 1, 0, 1, 0]),
    }
    result = Result(
        analysis="kernel_distance",
        config={"model": "tiny", "degree": 15, "lr": 1e-4, "name": "Größe"},
        seed=3,
        metrics=[SETTLED, UNDEFINED],
        tables={"scores": [{"method": "full", "accuracy": 0.5}]},
        arrays=arrays,
        model={"name": "tiny", "parameters": 12},
        dataset={"name": "SST-2", "task": "classification", "label_names": ["negative", "positive"]},
        environment={"numpy": np.__version__, "commit": None},
        seconds={"kernels": 0.25},
        coverage={"full_backbone": "all 12 backbone weights"},
    )
    return dataclasses.replace(result, **changes)


def strict(path: Path):
    def refuse(literal):
        raise AssertionError(f"{literal} is not JSON")

    return json.loads(path.read_text(encoding="utf-8"), parse_constant=refuse)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# --- round trip ----------------------------------------------------------------------------------------------------


def test_a_result_comes_back_as_written(tmp_path):
    result = make_result()
    folder = write_result(result, tmp_path / "deep" / "run")
    read = load_result(folder, analysis="kernel_distance")
    for field in dataclasses.fields(Result):
        if field.name not in ("arrays", "metrics"):
            assert getattr(read, field.name) == getattr(result, field.name)
    assert read.arrays.keys() == result.arrays.keys()
    for name, array in result.arrays.items():
        assert read.arrays[name].dtype == array.dtype
        np.testing.assert_array_equal(read.arrays[name], array)
    assert read.metrics[0] == SETTLED
    assert math.isnan(read.metrics[1].value)
    assert read.metrics[1].low is None
    assert names(folder) == ["SHA256SUMS", "kernels.npz", "result.json"]
    assert names(folder.parent) == ["run"]


def test_the_json_file_itself_can_be_named(tmp_path):
    folder = write_result(make_result(), tmp_path / "run")
    assert load_result(folder / "result.json").seed == 3


def test_the_json_is_strict_and_readable(tmp_path):
    config = {
        "nan": math.nan,
        "inf": [np.float32("inf"), 1.5],
        "path": Path("data"),
        "count": np.int64(3),
        "on": np.bool_(True),
        "metric": SETTLED,
        "pair": (1, 2),
        "set": {"b", "a"},
        4: np.arange(2),
    }
    folder = write_result(make_result(config=config), tmp_path / "run")
    content = strict(folder / "result.json")
    assert content["config"] == {
        "nan": None,
        "inf": [None, 1.5],
        "path": "data",
        "count": 3,
        "on": True,
        "metric": dataclasses.asdict(SETTLED),
        "pair": [1, 2],
        "set": ["a", "b"],
        "4": [0, 1],
    }
    assert list(content)[:3] == ["format", "analysis", "seed"]
    text = (folder / "result.json").read_text(encoding="utf-8")
    assert "\n  " in text
    assert text.endswith("}\n")
    assert "Größe" in (write_result(make_result(), tmp_path / "b") / "result.json").read_text(encoding="utf-8")


def test_the_same_result_gives_the_same_bytes(tmp_path):
    one, two = (write_result(make_result(), tmp_path / name) for name in "ab")
    for name in names(one):
        assert (one / name).read_bytes() == (two / name).read_bytes()


def test_a_metric_is_found_by_all_its_names():
    pair = {"stage": "initialisation", "left": "full_backbone", "right": "propulsion_z"}
    assert make_result().metric("cka", **pair) is SETTLED
    with pytest.raises(RecordError, match="no metric 'alignment' of full_backbone and propulsion_z"):
        make_result().metric("alignment", **pair)
    with pytest.raises(RecordError, match="2 times"):
        make_result(metrics=[SETTLED, SETTLED]).metric("cka", **pair)


# --- a run that dies -----------------------------------------------------------------------------------------------


def test_an_exception_while_writing_leaves_nothing(tmp_path):
    unwritable = make_result(arrays={"labels": np.array([object()])})
    with pytest.raises(ValueError, match="Object arrays"):
        write_result(unwritable, tmp_path / "run")
    assert names(tmp_path) == []


def test_an_interrupt_while_drawing_leaves_nothing(tmp_path):
    def interrupted(_result, folder):
        (folder / "half.png").write_bytes(b"")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_result(make_result(), tmp_path / "run", figures=interrupted)
    assert names(tmp_path) == []


def test_a_failed_drawing_does_not_lose_the_numbers(tmp_path):
    def failing(_result, folder):
        (folder / "half.png").write_bytes(b"")
        raise RuntimeError("no ink")

    with pytest.raises(RuntimeError, match="no ink") as caught:
        write_result(make_result(), tmp_path / "run", figures=failing)
    assert "numbers are safe" in caught.value.__notes__[0]
    assert names(tmp_path / "run") == ["SHA256SUMS", "kernels.npz", "result.json"]
    assert load_result(tmp_path / "run").seed == 3


KILLED = """
import os, signal, sys
import numpy as np
from analyses.records import Result, write_result
result = Result("kernel_distance", {}, 9, [], {}, {"labels": np.zeros(2)}, {}, {}, {}, {}, {})
def die(result, folder):
    os.kill(os.getpid(), signal.SIGKILL)
write_result(result, sys.argv[1], figures=die, overwrite=True)
"""


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="POSIX signals")
@pytest.mark.parametrize("existing", [False, True])
def test_a_killed_run_leaves_no_half_result_and_the_next_one_cleans_up(tmp_path, existing):
    target = tmp_path / "run"
    if existing:
        write_result(make_result(), target)
    died = subprocess.run([sys.executable, "-c", KILLED, str(target)], capture_output=True, text=True)
    assert died.returncode == -signal.SIGKILL, died.stderr
    assert target.exists() == existing
    if existing:
        assert load_result(target).seed == 3
    (leftover,) = (path for path in tmp_path.iterdir() if path != target)
    with pytest.raises(RecordError, match="incomplete"):
        load_result(leftover)
    write_result(make_result(seed=4), target, overwrite=True)
    assert names(tmp_path) == ["run"]
    assert load_result(target).seed == 4


# --- what is there already -----------------------------------------------------------------------------------------


def test_an_existing_result_is_kept_unless_overwriting_is_allowed(tmp_path):
    write_result(make_result(), tmp_path / "run")
    for attempt in (check_writable, lambda path: write_result(make_result(seed=4), path)):
        with pytest.raises(RecordError, match="already holds a result"):
            attempt(tmp_path / "run")
    assert load_result(tmp_path / "run").seed == 3
    write_result(make_result(seed=4), tmp_path / "run", overwrite=True)
    assert load_result(tmp_path / "run").seed == 4
    assert names(tmp_path) == ["run"]


def test_the_old_result_stands_until_the_new_one_is_complete(tmp_path):
    write_result(make_result(), tmp_path / "run")
    seen = []
    write_result(
        make_result(seed=4),
        tmp_path / "run",
        figures=lambda *_: seen.append(load_result(tmp_path / "run").seed),
        overwrite=True,
    )
    assert seen == [3]


def test_a_failed_rename_keeps_the_old_and_the_new(tmp_path, monkeypatch):
    write_result(make_result(), tmp_path / "run")
    rename = Path.rename

    def failing(self, target):
        if ".partial-" in self.name:
            raise OSError(28, "No space left on device")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", failing)
    with pytest.raises(RecordError, match="finished result is kept in") as caught:
        write_result(make_result(seed=4), tmp_path / "run", overwrite=True)
    assert load_result(tmp_path / "run").seed == 3
    assert load_result(str(caught.value).split(" kept in ")[1]).seed == 4


def test_a_result_that_appeared_meanwhile_is_kept(tmp_path):
    def overtaken(*_):
        # Another process has its own temporary name; this process cannot use its name twice.
        write_result(make_result(), tmp_path / "other")
        (tmp_path / "other").rename(tmp_path / "run")

    with pytest.raises(RecordError, match=r"already holds a result.*finished result is kept in") as caught:
        write_result(make_result(seed=4), tmp_path / "run", figures=overtaken)
    assert load_result(tmp_path / "run").seed == 3
    kept = Path(str(caught.value).split(" kept in ")[1])
    check_writable(tmp_path / "run", overwrite=True)
    assert load_result(kept).seed == 4  # A complete folder with a temporary name is not removed.


def test_figures_beside_a_result_do_not_stop_its_replacement_but_notes_do(tmp_path):
    folder = write_result(make_result(), tmp_path / "run")
    (folder / "kernel_distance.pdf").write_bytes(b"")
    check_writable(folder, overwrite=True)
    (folder / "notes.txt").write_text("mine")
    with pytest.raises(RecordError, match=r"notes\.txt"):
        check_writable(folder, overwrite=True)


def test_foreign_content_is_never_replaced(tmp_path):
    (tmp_path / "thesis.tex").write_text("mine")
    with pytest.raises(RecordError, match=r"holds something else \(thesis\.tex\)"):
        write_result(make_result(), tmp_path, overwrite=True)
    assert names(tmp_path) == ["thesis.tex"]


@pytest.mark.parametrize("mine", ["holiday.png", "chapter.pdf", "kernels/notes.txt"])
def test_a_picture_beside_a_result_is_never_removed(tmp_path, mine):
    write_result(make_result(), tmp_path / "run")
    path = tmp_path / "run" / mine
    path.parent.mkdir(exist_ok=True)
    path.write_text("mine")
    with pytest.raises(RecordError, match=rf"it also holds {mine.partition('/')[0]}; move that away first"):
        write_result(make_result(seed=4), tmp_path / "run", overwrite=True)
    assert path.read_text() == "mine"


@pytest.mark.parametrize("content", ['{"score": 1}', "[]", "not JSON", ""])
def test_a_result_of_somebody_else_is_never_replaced(tmp_path, content):
    (tmp_path / "result.json").write_text(content)
    with pytest.raises(RecordError, match="may be somebody's"):
        write_result(make_result(), tmp_path, overwrite=True)
    assert (tmp_path / "result.json").read_text() == content


def test_an_empty_folder_and_a_link_are_written_through(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "empty")
    assert write_result(make_result(), tmp_path / "link") == tmp_path / "empty"
    assert load_result(tmp_path / "link").seed == 3


# --- where nothing can be written ----------------------------------------------------------------------------------


def test_a_folder_that_can_be_written_passes_and_is_left_alone(tmp_path):
    assert check_writable(tmp_path / "a" / "b") == tmp_path / "a" / "b"
    assert names(tmp_path / "a") == []


def test_a_file_in_the_way_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(RecordError, match="it is a file"):
        check_writable(tmp_path / "file")
    with pytest.raises(RecordError, match="cannot write results to"):
        check_writable(tmp_path / "file" / "run")


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="needs a file system where even root cannot write")
def test_a_file_system_that_refuses_is_named_in_one_line():
    with pytest.raises(RecordError, match=r"cannot write results to /proc/[0-9]+/run: ") as caught:
        check_writable("/proc/self/run")
    assert "\n" not in str(caught.value)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_without_permission_is_named(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(RecordError, match="Permission denied"):
        check_writable(tmp_path / "run")
    tmp_path.chmod(0o700)


# --- reading what is not a result ----------------------------------------------------------------------------------


def damage(folder: Path, name: str) -> None:
    path = folder / name
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def edit(folder: Path, **changes) -> None:
    path = folder / "result.json"
    path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | changes))


DAMAGES = {
    "no such folder": lambda folder: folder.rename(folder.with_name("moved")),
    "not a result folder": lambda folder: [path.unlink() for path in folder.iterdir()],
    "incomplete: it has no result.json": lambda folder: (folder / "result.json").unlink(),
    "incomplete: it has no kernels.npz": lambda folder: (folder / "kernels.npz").unlink(),
    "cannot read .*result.json": lambda folder: damage(folder, "result.json"),
    "kernels.npz is truncated": lambda folder: damage(folder, "kernels.npz"),
    "not of this project": lambda folder: (folder / "result.json").write_text("[1]"),
    "result format 99": lambda folder: edit(folder, format=99),
    "a result of 'lazy', not of 'kernel_distance'": lambda folder: edit(folder, analysis="lazy"),
    "damaged or was written by another version": lambda folder: edit(folder, metrics=[{"name": "cka"}]),
    "does not hold 'labels' of shape": lambda folder: np.savez(folder / "kernels.npz", labels=np.zeros(5)),
    "holds 'other', which is not listed": lambda folder: np.savez(folder / "kernels.npz", other=np.zeros(5)),
    "its result.json is not of this project": lambda folder: (folder / "result.json").write_text("{}"),
    "NaN is no JSON": lambda folder: replace_text(folder, "0.94", "NaN"),
    "gives a name twice": lambda folder: replace_text(folder, '"seed": 3', '"seed": 3, "seed": 4'),
    "nested too deeply": lambda folder: (folder / "result.json").write_text("[" * 100_000),
    "result.json: .*Exceeds the limit": lambda folder: replace_text(folder, "0.94", "9" * 5000),
    "has an unknown more": lambda folder: edit(folder, more=1),
    "its seed is not of type int": lambda folder: edit(folder, seed=True),
    "its config is not of type dict": lambda folder: edit(folder, config=[]),
    "a table is no list of rows": lambda folder: edit(folder, tables={"scores": [3]}),
    "an array has no shape": lambda folder: edit(folder, arrays={"labels": {"dtype": "int64"}}),
    "has one of another type": lambda folder: edit(folder, metrics=[dataclasses.asdict(SETTLED) | {"value": "a"}]),
    "damaged: Unable to allocate": lambda folder: claim_too_much(folder),
    "it has no kernels.npz": lambda folder: link_to_itself(folder / "kernels.npz"),
}


def replace_text(folder: Path, old: str, new: str) -> None:
    path = folder / "result.json"
    text = path.read_text(encoding="utf-8")
    assert old in text
    path.write_text(text.replace(old, new), encoding="utf-8")


def claim_too_much(folder: Path) -> None:
    """An array whose header says that it takes 1.2 TB."""
    header = b"{'descr': '<f8', 'fortran_order': False, 'shape': (387298, 387298), }".ljust(117) + b"\n"
    with zipfile.ZipFile(folder / "kernels.npz", "w") as file:
        file.writestr("labels.npy", b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header)


def link_to_itself(path: Path) -> None:
    path.unlink()
    path.symlink_to(path.name)


@pytest.mark.parametrize("message", DAMAGES)
def test_a_damaged_folder_is_refused_in_one_line(tmp_path, message):
    """Without its checksums, as older versions wrote results."""
    arrays = {"labels": np.zeros(6), "initialisation.full_backbone": np.random.default_rng(0).normal(size=(6, 6))}
    folder = write_result(make_result(arrays=arrays), tmp_path / "run")
    (folder / "SHA256SUMS").unlink()
    assert load_result(folder).seed == 3
    DAMAGES[message](folder)
    with pytest.raises(RecordError, match=message) as caught:
        load_result(folder, analysis="kernel_distance")
    assert "\n" not in str(caught.value)


FIELDS = ("analysis", "seed", "config", "metrics", "tables", "arrays", "model", "dataset", "environment", "seconds",
          "coverage")  # fmt: skip


@pytest.mark.parametrize("field", FIELDS)
def test_every_field_must_be_there_and_of_its_type(tmp_path, field):
    folder = write_result(make_result(), tmp_path / "run")
    (folder / "SHA256SUMS").unlink()
    path = folder / "result.json"
    content = strict(path)
    changes = [{name: value for name, value in content.items() if name != field}]
    changes += [content | {field: value} for value in (None, 3.5, [1], {"a": 1}, True)]
    refused = 0
    for change in changes:
        path.write_text(json.dumps(change), encoding="utf-8")
        try:
            load_result(folder)
        except RecordError:
            refused += 1
    # Of the values above, a field of entries by name takes one, if its entries may be of any type.
    free = field in ("config", "model", "dataset", "environment", "seconds")
    assert refused == len(changes) - free


def test_every_flipped_bit_is_found(tmp_path):
    folder = write_result(make_result(), tmp_path / "run")
    generator = np.random.default_rng(0)
    for name in ("result.json", "kernels.npz"):
        content = (folder / name).read_bytes()
        for place in generator.integers(0, 8 * len(content), size=40):
            flipped = bytearray(content)
            flipped[place // 8] ^= 1 << place % 8
            (folder / name).write_bytes(flipped)
            with pytest.raises(RecordError, match=rf"{name} is damaged or was changed by hand"):
                load_result(folder)
        (folder / name).write_bytes(content)
    assert load_result(folder).seed == 3
    (folder / "SHA256SUMS").write_text("cut")
    with pytest.raises(RecordError, match="SHA256SUMS is damaged"):
        load_result(folder)


def test_checksums_are_those_of_sha256sum(tmp_path):
    folder = write_result(make_result(), tmp_path / "run")
    listed = dict(line.split("  ")[::-1] for line in (folder / "SHA256SUMS").read_text().splitlines())
    assert listed == {
        name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in ("kernels.npz", "result.json")
    }


@pytest.mark.parametrize("use", [check_writable, load_result, result_folders, partial(write_result, make_result())])
@pytest.mark.parametrize("name", ["a" * 300, "a\0b", "circle"])
def test_a_name_that_no_file_can_have_is_one_line(tmp_path, name, use):
    (tmp_path / "circle").symlink_to("circle")
    with pytest.raises(RecordError):
        use(tmp_path / name)
    assert names(tmp_path) == ["circle"]


@pytest.mark.parametrize("everywhere", [False, True])
def test_a_full_disk_does_not_lose_a_result(tmp_path, monkeypatch, everywhere):
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(temporary))
    save = np.savez_compressed

    def no_room(path, **content):
        if everywhere or temporary not in path.parents:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        save(path, **content)

    monkeypatch.setattr(np, "savez_compressed", no_room)
    with pytest.raises(RecordError, match=r"cannot write .*run: No space left on device") as caught:
        write_result(make_result(), tmp_path / "run")
    assert names(tmp_path) == ["temporary"]
    assert bool(names(temporary)) != everywhere
    if not everywhere:
        assert load_result(str(caught.value).split(" kept in ")[1]).seed == 3


# --- environment ---------------------------------------------------------------------------------------------------


def test_the_environment_says_what_ran_and_nothing_about_who():
    found = environment()
    assert {"python", "torch", "transformers", "peft", "numpy", "scipy", "platform", "threads"} <= found.keys()
    assert found["numpy"] == np.__version__
    assert found["threads"] >= 1
    if found["commit"] is None:
        assert found["dirty"] is None
    else:
        assert len(found["commit"]) == 40
        assert isinstance(found["dirty"], bool)
    assert str(Path.home()) not in json.dumps(found)


def test_a_repository_around_the_code_is_not_mistaken_for_it(tmp_path):
    subprocess.run(["git", "init", "-q", str(tmp_path)], check=True)
    inside = tmp_path / "venv" / "site-packages"
    inside.mkdir(parents=True)
    assert _commit(inside) == (None, None)
